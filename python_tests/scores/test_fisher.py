"""Layer scores: every variant against its definition."""

import pytest
import torch
from scored_model import WIDTH, Model, adapted, batches, collect

from floe_kernels import scores


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
