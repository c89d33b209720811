"""The layer's operators and their gradients on drawn cases, every kernel, against float64."""

import dataclasses

import pytest
import torch
from backends import BACKENDS, running
from balls import assert_within, ball, widened
from calling import call, check_experts, fisher_buffers
from drawing import drawn
from expected import backward, forward, squares
from hypothesis import given
from strategies import Case, cases, tensors

from floe_kernels import FusedMoELoRA


def check_fisher(case, t, fisher, pairs, tokens):
    sums = widened(case.dtype)
    offsets, scale, *buffers, gate = fisher
    for name, buffer, (g, x) in zip(("A", "B", "router"), buffers, pairs, strict=True):
        want = squares(g, x, offsets, scale, sums)[0][case.reduce]
        assert_within(f"fisher of {name}", buffer, want)
    for i in range(len(case.samples)):
        own = tokens[int(offsets[i]) : int(offsets[i + 1])]
        factor = 1.0 if scale is None else float(scale if scale.ndim == 0 else scale[i])
        v, size = own.v.sum() * factor, own.size.sum() * factor
        r = own.r.sum() * factor + (len(own.v) + 4) * torch.finfo(sums).eps * size
        # kernels may take this as a difference of running sums in float64
        r = r + 1e-15 * tokens.size.sum() * factor + torch.finfo(sums).tiny
        bad = not t["x"][int(offsets[i]) : int(offsets[i + 1])].isfinite().all()
        if bad or not tokens.size.sum().isfinite() or size > torch.finfo(sums).max:
            r = torch.tensor(torch.inf)
        assert_within(f"gate gradient of sample {i}", gate[i], ball(v, r))


def check(case):
    t = tensors(case)
    fisher = fisher_buffers(case, t) if case.samples is not None else None
    result, leaves = call(case, t, fisher)
    experts = result.experts
    want = forward(case, t, experts)
    check_experts(case, experts, result.logits, want.logits)
    assert_within("out", result.out, want.out)
    assert_within("logits", result.logits, want.logits)
    assert_within("gates", result.gates, want.gates)
    if case.base_dtype is None and case.inputs:
        spoilt = ~t["x"].isfinite().all(1)
        assert not result.out[spoilt].isfinite().any(), "a non-finite token has a finite output"

    result.out.backward(t["grad_out"])
    gradients, pairs, tokens = backward(case, t, t["grad_out"], experts, want)
    for name, leaf in leaves.items():
        if name == "base":
            assert torch.equal(leaf.grad.nan_to_num(7), t["grad_out"].nan_to_num(7))
        else:
            field = name if name != "router" else "router"
            assert_within(f"gradient of {name}", leaf.grad, getattr(gradients, field))
    if fisher is not None:
        check_fisher(case, t, fisher, pairs, tokens)
    if case.seed % 4 == 0:
        fisher = fisher_buffers(case, t) if case.samples is not None else None
        again, twice = call(case, t, fisher)
        again.out.backward(t["grad_out"])
        pairs = [*zip(result, again, strict=True)]
        pairs += [(leaves[k].grad, twice[k].grad) for k in leaves]
        for one, other in pairs:
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), "a second run differs"


@pytest.mark.parametrize("backend", BACKENDS)
@drawn(0.045)
@given(case=cases())
def test_values_and_gradients(backend, tried, case):
    with running(backend):
        check(case)
    tried()


PLAIN = Case(
    64, 24, 24, (8, 8, 8), 2, torch.float32, torch.float32, None, False, True, None, 0.0, False,
    False, 2, ("rows",) * 4, (0,) * 4, "any", (), None, "element", 0,
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_nothing_is_read_where_a_side_is_empty(backend, side):
    with running(backend):
        check(dataclasses.replace(PLAIN, **{side: 0}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_router_of_the_other_half(backend):
    with running(backend):
        check(dataclasses.replace(PLAIN, dtype=torch.bfloat16, weight_dtype=torch.float16))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("backend", BACKENDS)
@drawn(0.015)
@given(case=cases())
def test_layer(backend, tried, case):
    """``FusedMoELoRA`` draws its own dropout, so it is compared without."""
    case = dataclasses.replace(
        case, base_dtype=None, dropout_p=0.0, samples=None,
        lead=2, renormalize=case.top_k > 1, inputs=max(1, case.inputs),
    )  # fmt: skip
    t = tensors(case)
    with torch.device("meta"):  # nothing to initialise, and no warning about it
        linear = torch.nn.Linear(case.inputs, case.outputs, bias=case.bias, dtype=case.dtype)
    linear.weight = torch.nn.Parameter(t["weight"], requires_grad=False)
    if case.bias:
        linear.bias = torch.nn.Parameter(t["bias"], requires_grad=False)
    coefs = (0.3, 0.2) if case.aux else (0.0, 0.0)
    layer = FusedMoELoRA(
        linear, case.ranks, case.top_k, shared_A=case.shared_A, load_balance_coef=coefs[0],
        z_loss_coef=coefs[1], dtype=case.weight_dtype,
    )  # fmt: skip
    parameters = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "router": layer.router.weight}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(t[name])
        layer.scaling.copy_(t["scaling"])
    x = t["x"].detach().requires_grad_()
    with running(backend):
        out = layer(x, t["mask"])
        out.backward(t["grad_out"])
        experts = choice(case, t)
    want = forward(case, t, experts)
    assert_within("out", out, want.out)
    gradients = backward(case, t, t["grad_out"], experts, want)[0]
    for name, leaf in {"x": x, **parameters}.items():
        assert_within(f"gradient of {name}", leaf.grad, getattr(gradients, name))
    load = layer.expert_load().double().sum()
    kept = case.tokens if t["mask"] is None else int(t["mask"].sum())
    assert abs(load - float(kept > 0)) <= case.experts * 2.0**-23
    tried()


def choice(case, t):
    """The experts that the kernel, given the same numbers, chooses again."""
    with torch.no_grad():
        return call(case, t)[0].experts


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets
@pytest.mark.parametrize("backend", ["triton"])
@drawn(0.005)
@given(case=cases(triton=True))
def test_interpreted_kernels(backend, tried, case):
    pytest.importorskip("triton")
    # the interpreter cuts bfloat16 off where hardware rounds
    dtype = {torch.bfloat16: torch.float32}
    case = dataclasses.replace(
        case,
        dtype=dtype.get(case.dtype, case.dtype),
        weight_dtype=dtype.get(case.weight_dtype, case.weight_dtype),
        base_dtype=dtype.get(case.base_dtype, case.base_dtype),
    )
    with running(backend):
        check(case)
    tried()
