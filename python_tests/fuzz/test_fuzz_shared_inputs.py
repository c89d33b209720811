"""Linears that share one x: each as by itself, and one gradient of x, against float64."""

import dataclasses

import pytest
import torch
from backends import BACKENDS, running
from balls import assert_within, ball, rounded, unit
from calling import check_experts
from drawing import drawn
from expected import backward, forward
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, tensors

from floe_kernels.functional.shared_inputs import ExpertLinear, moe_lora_shared_linear

#: what siblings have in common
SHARED = ("tokens", "inputs", "dtype", "weight_dtype", "base_dtype", "masked", "lead", "samples")


@st.composite
def siblings(draw):
    """Draw up to three linears and, for each, whether its output is used."""
    first, *others = draw(st.lists(cases(), min_size=1, max_size=3))
    first = dataclasses.replace(first, base_dtype=None, samples=None)
    same = {name: getattr(first, name) for name in SHARED}
    own = [first, *(dataclasses.replace(case, **same) for case in others)]
    return own, draw(st.lists(st.booleans(), min_size=len(own), max_size=len(own)))


def total(parts, dtype):
    """The sum of balls, taken in any order and stored in ``dtype`` after each addition or once."""
    if not parts:
        return None
    v, r, size = (
        torch.stack([get(part) for part in parts]).sum(0)
        for get in (lambda a: a.v, lambda a: a.r, lambda a: a.size)
    )
    r = r + len(parts) * unit(dtype) * size
    return rounded(ball(v, torch.where(size > torch.finfo(dtype).max, torch.inf, r)), dtype)


def check(drawn_cases, used):
    own = [tensors(case) for case in drawn_cases]
    x, mask = own[0]["x"].detach().requires_grad_(), own[0]["mask"]
    own = [{**t, "x": own[0]["x"], "mask": mask} for t in own]
    names = ("lora_A", "lora_B", "router")
    leaves = [{k: t[k].detach().requires_grad_() for k in names} for t in own]
    linears = [
        ExpertLinear(
            t["weight"], t["bias"], *leaf.values(), ranks=case.ranks, top_k=case.top_k,
            scaling=t["scaling"], shared_A=case.shared_A, renormalize=case.renormalize,
            dropout_p=case.dropout_p, dropout_seed=t["seed"], aux_coefs=t["aux"],
        )
        for case, t, leaf in zip(drawn_cases, own, leaves, strict=True)
    ]  # fmt: skip
    put = x[None] if drawn_cases[0].lead == 3 else x
    results = moe_lora_shared_linear(put, linears, token_mask=mask)
    wants = []
    for case, t, result in zip(drawn_cases, own, results, strict=True):
        want = forward(case, t, result.experts)
        check_experts(case, result.experts, result.logits, want.logits)
        assert_within("out", result.out.reshape(case.tokens, case.outputs), want.out)
        assert_within("logits", result.logits, want.logits)
        assert_within("gates", result.gates, want.gates)
        wants.append(want)

    joint = [
        (result.out.reshape(t["grad_out"].shape), t["grad_out"])
        for result, t, wanted in zip(results, own, used, strict=True)
        if wanted
    ]
    if not joint:
        return
    torch.autograd.backward(*map(list, zip(*joint, strict=True)))
    grads_x = []
    for case, t, result, want, leaf, wanted in zip(
        drawn_cases, own, results, wants, leaves, used, strict=True
    ):
        if not wanted:
            assert all(p.grad is None for p in leaf.values())
            continue
        gradients = backward(case, t, t["grad_out"], result.experts, want)[0]
        for name, p in leaf.items():
            assert_within(f"gradient of {name}", p.grad, getattr(gradients, name))
        grads_x.append(gradients.x)
    assert_within("gradient of x", x.grad, total(grads_x, drawn_cases[0].dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@drawn(0.015)
@given(drawn_siblings=siblings())
def test_shared_inputs(backend, tried, drawn_siblings):
    with running(backend):
        check(*drawn_siblings)
    tried()
