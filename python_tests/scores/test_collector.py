"""FisherCollector: against one backward pass per sample, in float64."""

import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from floe_kernels import FisherCollector, FusedMoELoRA, scores
from floe_kernels.scores import FisherRecord

VOCABULARY, WIDTH = 13, 8


class Block(nn.Module):
    """Two linears around a causal mean, so that a sample's tokens depend on each other."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        past = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        return x + self.down(torch.tanh(self.up(x).cumsum(1) / past))


class Model(nn.Module):
    """The smallest thing that takes transformers' arguments and returns a ``.loss``."""

    def __init__(self, layers=3):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.reduction, self.checkpointing = "mean_tokens", None

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids)
        for block in self.layers:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        loss = nn.functional.cross_entropy(
            self.head(x[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        if self.reduction == "mean_tokens":
            loss = loss / (labels[:, 1:] != -100).sum()
        elif self.reduction == "mean_samples":
            loss = loss / len(labels)
        return types.SimpleNamespace(loss=loss)


def adapted(*, warm=True, shared=False, **options):
    torch.manual_seed(0)
    model = Model().double().requires_grad_(False)
    for i, block in enumerate(model.layers):
        for name in ("up", "down"):
            ranks = [2, 2, 2] if shared else [1 + i, 2, 3]
            layer = FusedMoELoRA(block.get_submodule(name), ranks, shared_A=shared, **options)
            if warm:
                nn.init.normal_(layer.lora_B)
            setattr(block, name, layer)
    return model


def batches(sizes=(4, 2), length=6):
    gen = torch.Generator().manual_seed(1)
    out = []
    for size in sizes:
        ids = torch.randint(VOCABULARY, (size, length), generator=gen)
        labels = ids.clone()
        for i in range(size):
            labels[i, : i % length] = -100  # samples of unequal length
        out.append({"input_ids": ids, "labels": labels})
    return out


def parameters(model):
    names = {"lora_A": "lora_A", "lora_B": "lora_B", "router.weight": "router"}
    for name, p in model.named_parameters():
        for suffix, short in names.items():
            if name.endswith("." + suffix):
                yield name[: -len(suffix)] + short, p


def one_by_one(model, data, per_sample="sum"):
    """The oracle: batch size 1, summed loss, square, add."""
    reduction, model.reduction = model.reduction, "sum"
    total = {name: torch.zeros_like(p) for name, p in parameters(model)}
    gates = []
    for batch in data:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            loss = model(ids[None], labels[None]).loss
            if per_sample == "mean":
                loss = loss / (labels[1:] != -100).sum().clamp(min=1)
            pairs = dict(parameters(model))
            grads = torch.autograd.grad(loss, list(pairs.values()))
            for (name, p), grad in zip(pairs.items(), grads, strict=True):
                total[name] += grad.square()
                if name.endswith("lora_B"):
                    gates.append((p * grad).sum())
    model.reduction = reduction
    count = len({n.rpartition(".")[0] for n in total})
    return total, torch.stack(gates).detach().view(-1, count)


def collect(model, data, run=None, **options):
    with FisherCollector(model, **options) as collector:
        for batch in data:
            (model if run is None else run)(**batch).loss.backward()
            collector.step()
    return collector.record()


@pytest.mark.parametrize("shared", [False, True], ids=["own_A", "shared_A"])
@pytest.mark.parametrize("granularity", ["element", "rank", "matrix"])
def test_equals_batch_size_one(granularity, shared):
    model = adapted(shared=shared)
    record = collect(model, batches(), granularity=granularity)
    want, gates = one_by_one(model, batches())
    dims = {"element": None, "rank": (1,), "matrix": (0, 1)}[granularity]
    for name, total in want.items():
        torch.testing.assert_close(record.sums[name], total.sum(dims) if dims else total)
    torch.testing.assert_close(record.gates, gates)
    assert record.counts["samples"] == record.counts["samples_with_loss"] == 6


def test_is_neither_token_as_sample_nor_squared_batch():
    model, data = adapted(), batches((4,))
    fisher = collect(model, data, granularity="element").sums
    model.zero_grad()
    model(**data[0]).loss.backward()
    loss_tokens = (data[0]["labels"][:, 1:] != -100).sum()
    tokens = {}

    def keep(name):
        def hook(_module, args, out):
            rows = args[0].detach().flatten(0, 1)
            out.register_hook(lambda g: tokens.update({name: (g.flatten(0, 1), rows)}))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, FusedMoELoRA):
            module.register_forward_hook(keep(name))
    model.zero_grad()
    model(**data[0]).loss.backward()
    for name, p in parameters(model):
        if name.endswith("lora_B"):
            batch = (p.grad * loss_tokens).square()
            assert not torch.allclose(fisher[name], batch, rtol=0.05)
    for name, (g, x) in tokens.items():
        layer = model.get_submodule(name)
        h = x @ layer.lora_A.T
        p = (x @ layer.router.weight.T).softmax(-1)
        kept = p.topk(layer.top_k)
        gates = torch.zeros_like(p).scatter(1, kept.indices, kept.values)
        gates = gates / gates.sum(-1, keepdim=True)
        h = h * gates.repeat_interleave(torch.tensor(layer.ranks), 1) * layer.scaling
        flat = torch.einsum("tr,to->tro", h, g * loss_tokens).square().sum(0)
        assert not torch.allclose(fisher[f"{name}.lora_B"], flat, rtol=0.05)


@pytest.mark.parametrize("per_sample", ["sum", "mean"])
@pytest.mark.parametrize("reduction", ["sum", "mean_samples", "mean_tokens"])
def test_loss_definitions(reduction, per_sample):
    model = adapted()
    want, _ = one_by_one(model, batches(), per_sample)
    model.reduction = reduction
    record = collect(
        model, batches(), loss_reduction=reduction, per_sample=per_sample, granularity="element"
    )
    for name, total in want.items():
        torch.testing.assert_close(record.sums[name], total, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("factor", [0.25, torch.tensor(65536.0)], ids=["accumulation", "scaler"])
def test_loss_factor_is_undone(factor):
    model = adapted()
    want = collect(model, batches())

    def scaled(**batch):
        return types.SimpleNamespace(loss=model(**batch).loss * factor)

    got = collect(model, batches(), scaled, loss_factor=factor)
    for name, total in want.sums.items():
        torch.testing.assert_close(got.sums[name], total)


def test_sums_do_not_depend_on_the_batching():
    model, data = adapted(), batches((6,))
    split = [{k: v[i : i + 2] for k, v in data[0].items()} for i in (4, 0, 2)]
    whole, parts = collect(model, data), collect(model, split)
    for name, total in whole.sums.items():
        torch.testing.assert_close(parts.sums[name], total)
    for name, hits in whole.hits.items():
        assert torch.equal(parts.hits[name], hits)


def test_gradients_are_what_they_would_be():
    model = adapted(load_balance_coef=0.1)
    model(**batches()[0]).loss.backward()
    aux = {name: p.grad.clone() for name, p in parameters(model)}
    for layer in model.modules():
        if isinstance(layer, FusedMoELoRA):
            layer._has_aux = False
    model.zero_grad()
    model(**batches()[0]).loss.backward()
    plain = {name: p.grad.clone() for name, p in parameters(model)}
    for layer in model.modules():
        if isinstance(layer, FusedMoELoRA):
            layer._has_aux = True
    model.zero_grad()
    collect(model, batches()[:1])
    for name, p in parameters(model):
        torch.testing.assert_close(p.grad, plain[name])
    routers = [n for n in aux if n.endswith("router")]
    assert any(not torch.allclose(aux[n], plain[n]) for n in routers)


def test_gate_identity():
    # the adapter is of degree one in lora_B and in lora_A: both inner products are d loss / d gate
    model, data = adapted(), batches((1,))
    record = collect(model, data)
    model.zero_grad()
    model.reduction = "sum"
    model(**data[0]).loss.backward()
    for i, name in enumerate(record.modules):
        layer = model.get_submodule(name)
        for p in (layer.lora_A, layer.lora_B):
            torch.testing.assert_close((p * p.grad).sum(), record.gates[0, i])


def test_zero_lora_B_silences_gates_and_lora_A():
    record = collect(adapted(warm=False), batches())
    assert not record.gates.any()
    assert all(not v.any() for k, v in record.sums.items() if k.endswith("lora_A"))
    assert all(v.any() for k, v in record.sums.items() if k.endswith("lora_B"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    model = adapted()
    want = collect(model, batches())
    model.embedding.requires_grad_()  # a reentrant checkpoint needs an input that trains
    model.checkpointing = reentrant
    got = collect(model, batches())
    for name, total in want.sums.items():
        torch.testing.assert_close(got.sums[name], total)


def test_compiled_model_collects():
    torch._dynamo.reset()
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batches()[0]).loss.backward()  # compiled before there was a collector
    got = collect(model, batches(), compiled)
    for name, total in collect(model, batches()).sums.items():
        torch.testing.assert_close(got.sums[name], total)
    assert got.counts["samples"] == 6


@pytest.mark.parametrize("adapters", [False, True])
def test_frozen_linears(adapters):
    model = adapted(warm=False) if adapters else Model().double().requires_grad_(False)
    names = scores.fisher.__globals__["block_linears"](model)
    assert names == tuple(f"layers.{i}.{part}" for i in range(3) for part in ("up", "down"))
    record = collect(model, batches(), frozen=names)
    model.reduction = "sum"
    for name in names:
        weight = model.get_submodule(name).weight.requires_grad_()
        want = 0
        for batch in batches():
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                (grad,) = torch.autograd.grad(model(ids[None], labels[None]).loss, weight)
                want = want + grad.square().sum()
        weight.requires_grad_(False)
        torch.testing.assert_close(record.sums[f"{name}.weight"], want)


def test_packed_sequences():
    # three samples in one row of a batch, told by offsets
    torch.manual_seed(0)
    layer = FusedMoELoRA(nn.Linear(4, 4), [2, 2])
    nn.init.normal_(layer.lora_B)
    x, offsets = torch.randn(1, 9, 4), torch.tensor([0, 2, 3, 9])
    with FisherCollector(layer, loss_reduction="sum", granularity="element") as collector:
        collector.batch(3, offsets=offsets)
        layer(x).square().sum().backward()
        collector.step()
        for a, b in ((0, 2), (2, 3), (3, 9)):
            layer(x[:, a:b]).square().sum().backward()
            collector.step()
    record = collector.record()
    assert record.counts["samples"] == 6
    with FisherCollector(layer, loss_reduction="sum", granularity="element") as alone:
        for a, b in ((0, 2), (2, 3), (3, 9)):
            layer(x[:, a:b]).square().sum().backward()
            alone.step()
    torch.testing.assert_close(record.sums["lora_B"], 2 * alone.record().sums["lora_B"])


def test_a_bad_step_is_skipped_whole():
    model, (first, second) = adapted(), batches((3, 3))
    want = collect(model, [second])
    with FisherCollector(model) as collector:
        (model(**first).loss * torch.inf).backward()
        collector.step()
        model(**second).loss.backward()
        collector.step()
    record = collector.record()
    tokens = (second["labels"][:, 1:] != -100).sum().item()
    assert record.counts == {"samples": 3, "samples_with_loss": 3, "tokens": tokens, "skipped": 1}
    assert len(record.gates) == 3
    for name, total in want.sums.items():
        torch.testing.assert_close(record.sums[name], total)


def test_hits_count_samples_that_reached_an_expert():
    torch.manual_seed(0)
    layer = FusedMoELoRA(nn.Linear(4, 4), [2, 2, 2], top_k=1)
    x = torch.randn(5, 7, 4)
    with FisherCollector(layer, loss_reduction="sum") as collector:
        layer(x).sum().backward()
        collector.step()
    chosen = (x @ layer.router.weight.T).argmax(-1)
    want = [(chosen == e).any(1).sum().item() for e in range(3)]
    assert collector.record().hits[""].tolist() == want


def test_second_backward_through_one_graph_raises():
    model = adapted()
    with FisherCollector(model):
        loss = model(**batches()[0]).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward through the same graph"):
            loss.backward()


def test_protocol_errors():
    model = adapted()
    with FisherCollector(model) as collector:
        with pytest.raises(RuntimeError, match=r"step\(\) follows one forward and one backward"):
            collector.step()
        model(**batches()[0])
        with pytest.raises(RuntimeError, match="got a second forward pass"):
            model(**batches()[0])
        with pytest.raises(RuntimeError, match="one FisherCollector at a time"):
            FisherCollector(model).__enter__()
    layer = FusedMoELoRA(nn.Linear(4, 4), [2])
    with FisherCollector(layer, loss_reduction="sum") as collector:
        collector.batch(3)
        with pytest.raises(ValueError, match=r"\(3 samples, \.\.\., I\).*got \(5, 4\)"):
            layer(torch.randn(5, 4))
    with pytest.raises(ValueError, match="got neither"):
        FisherCollector(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="granularity must be one of matrix, rank, element"):
        FisherCollector(layer, granularity="row")
    with pytest.raises(ValueError, match=r"needs \(B, T\) labels"), FisherCollector(layer):
        layer(torch.randn(3, 5, 4))


def test_evaluation_inside_the_context_is_ignored():
    model = adapted()
    with FisherCollector(model) as collector, torch.no_grad():
        model(**batches()[0])
    assert collector.record().counts["samples"] == 0


def test_save_load_merge(tmp_path):
    model = adapted()
    first, second = (collect(model, [b]) for b in batches())
    first.save(tmp_path / "a.safetensors")
    merged = FisherRecord.load(tmp_path / "a.safetensors").merge(second)
    both = collect(model, batches())
    assert merged.counts == both.counts
    for name, total in both.sums.items():
        torch.testing.assert_close(merged.sums[name], total)
    assert merged.read(aggregate="layer", how="mean") == pytest.approx(
        both.read(aggregate="layer", how="mean")
    )
    other = collect(model, batches(), granularity="matrix")
    with pytest.raises(ValueError, match="granularity is 'rank' here and 'matrix' there"):
        merged.merge(other)
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="must be a Fisher record"):
        FisherRecord.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize("variant", ["init", "gate", "param_sum", "param_mean", "taylor1", "base"])
def test_variants(variant):
    model = adapted(warm=variant != "init")
    got = scores.fisher(model, batches(), variant=variant)
    assert list(got) == [f"layers.{i}" for i in range(3)]
    assert all(p.grad is None for p in model.parameters())
    record = collect(model, batches(), granularity="element")
    names, gates = record.gate_gradients()
    for i, layer in enumerate(names):
        squares = {k: v for k, v in record.sums.items() if k.startswith(layer + ".")}
        both = [v for k, v in squares.items() if k.endswith(("lora_A", "lora_B"))]
        only_B = [v for k, v in squares.items() if k.endswith("lora_B")]
        want = {
            "init": sum(v.sum() for v in only_B) / sum(v.numel() for v in only_B) / 6,
            "param_sum": sum(v.sum() for v in both) / 6,
            "param_mean": sum(v.sum() for v in both) / sum(v.numel() for v in both) / 6,
            "gate": gates[:, i].square().mean(),
            "taylor1": gates[:, i].mean().abs(),
            "base": torch.tensor(got[layer]),  # test_frozen_linears has its own oracle
        }[variant]
        assert got[layer] == pytest.approx(want.item())


def test_sensitivity_is_per_matrix():
    model = Model().double().requires_grad_(False)
    got = scores.sensitivity(model, batches(), how="mean")
    assert list(got) == [f"layers.{i}.{n}" for i in range(3) for n in ("up", "down")]
    total = scores.sensitivity(model, batches(), how="sum")
    assert all(total[n] == pytest.approx(got[n] * WIDTH**2) for n in got)


def test_scoring_needs_data():
    with pytest.raises(ValueError, match="at least one batch with a finite loss gradient, got 0"):
        scores.fisher(adapted(), [])
    with pytest.raises(ValueError, match=r"variant must be one of init, .*, got 'best'"):
        scores.fisher(adapted(), batches(), variant="best")
