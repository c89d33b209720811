"""FisherCollector: against one backward pass per sample, in float64."""

import types

import pytest
import torch
from scored_model import adapted, batches, collect, one_by_one, parameters
from torch import nn

from floe_kernels import FisherCollector, FusedMoELoRA


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
            layer.set_aux_loss(0, 0)
    model.zero_grad()
    model(**batches()[0]).loss.backward()
    plain = {name: p.grad.clone() for name, p in parameters(model)}
    for layer in model.modules():
        if isinstance(layer, FusedMoELoRA):
            layer.set_aux_loss(0.1)
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
