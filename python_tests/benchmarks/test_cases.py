"""Cases and their inputs: what every provider is judged on."""

import dataclasses
import math

import pytest
import torch

from floe_kernels.testing import cases
from floe_kernels.testing.cases import MoELoRACase, moe_lora_inputs


@pytest.mark.parametrize(
    "make", [cases.moe_lora_cases, cases.fisher_cases, cases.grad_square_cases]
)
def test_names_are_unique(make):
    names = [case.name for case in make()]
    assert len(set(names)) == len(names) > 10


def test_issue_shapes_are_there():
    every = cases.moe_lora_cases()
    assert {1, 32768} <= {c.tokens for c in every}
    assert max(c.columns for c in every) == 4096
    assert {c.routing for c in every} == {"even", "zipf", "hot"}
    assert {c.dtype for c in every} == {torch.bfloat16, torch.float32}
    assert any(c.equal_rank is None for c in every)
    assert any(c.shared_A for c in every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["even", "zipf", "hot"])
def test_no_token_is_a_close_call(dtype, routing):
    case = MoELoRACase("c", 300, 64, 8, (4,) * 16, dtype=dtype, routing=routing)
    inputs = moe_lora_inputs(case)
    logits = inputs.x.double() @ inputs.router_weight.double().T
    best = logits.topk(case.top_k + 1).values
    assert (best[:, -2] - best[:, -1]).min() > cases.LOGIT_GAP * 0.99


def test_routing_is_as_skewed_as_it_says():
    def top_share(routing):
        case = MoELoRACase("c", 2000, 256, 8, (4,) * 8, top_k=1, routing=routing)
        inputs = moe_lora_inputs(case)
        best = (inputs.x.float() @ inputs.router_weight.float().T).argmax(-1)
        return (best == 0).float().mean().item()

    assert abs(top_share("even") - 1 / 8) < 0.05
    assert 0.2 < top_share("zipf") < 0.7
    assert top_share("hot") > 0.9


def test_seed_decides_the_numbers(tiny):
    first, again, other = (moe_lora_inputs(tiny, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert all(t.count_nonzero() for t in first[1:])


def test_unknown_routing_is_named(tiny):
    with pytest.raises(ValueError, match="'even', 'zipf' or 'hot', got 'cold'"):
        moe_lora_inputs(dataclasses.replace(tiny, routing="cold"))


def test_limits_keep_whole_samples(operations):
    for name in ("fisher", "grad_square"):
        op = operations[name]
        for case in op.cases():
            small = op.limit(case, 700)
            length = math.ceil(case.tokens / case.samples)
            assert small.tokens <= max(700, length)
            assert small.tokens / small.samples == pytest.approx(
                case.tokens / case.samples, rel=0.1
            )


@pytest.mark.parametrize("ragged", [False, True])
def test_offsets_cover_the_tokens(ragged):
    case = cases.GradSquareCase("c", 100, 8, 4, 7, ragged=ragged)
    offsets = cases.grad_square_inputs(case).offsets
    assert offsets[0] == 0
    assert offsets[-1] == 100
    assert (offsets.diff() >= 0).all()
    assert bool((offsets.diff() == 0).any()) is ragged
