"""The layer around bases of other dtypes, quantised ones among them, with and without autocast."""

import contextlib
import dataclasses

import pytest
import torch
from backends import BACKENDS, running
from balls import add, assert_within, exact, rounded, widened
from calling import call
from drawing import drawn
from expected import backward, forward
from hypothesis import given
from hypothesis import strategies as st
from strategies import BF16, FP16, FP32, cases, tensors
from torch import nn

from floe_kernels import FusedMoELoRA

NAMES = ("lora_A", "lora_B", "router")


class Packed(nn.Module):
    """Integers and one scale, as quantised linears keep them; computes in a dtype of its own."""

    def __init__(self, inputs, outputs, dtype, seed):
        super().__init__()
        self.in_features, self.out_features, self.dtype = inputs, outputs, dtype
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
        self.register_buffer("whole", whole)
        self.out = None

    def forward(self, x):
        weight = self.whole.to(self.dtype) / 16
        self.out = nn.functional.linear(x.to(self.dtype), weight)
        return self.out


def casting(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def make_layer(base, case, t):
    layer = FusedMoELoRA(
        base, case.ranks, case.top_k, shared_A=case.shared_A, dtype=case.weight_dtype,
        load_balance_coef=0.3 if case.aux else 0.0, z_loss_coef=0.2 if case.aux else 0.0,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in parameters_of(layer).items():
            parameter.copy_(t[name])
        layer.scaling.copy_(t["scaling"])
    return layer


def parameters_of(layer):
    return dict(zip(NAMES, (layer.lora_A, layer.lora_B, layer.router.weight), strict=True))


def plain(case):
    """Without what the layer does not pass on."""
    return dataclasses.replace(
        case, base_dtype=None, dropout_p=0.0, samples=None, lead=2, renormalize=case.top_k > 1,
        inputs=max(1, case.inputs), outputs=max(1, case.outputs),
    )  # fmt: skip


def check(backend, case, t, base, autocast, effective):
    """Compare the layer with its operator at the dtype that ``effective`` finds, given the base."""
    layer = make_layer(base, case, t)
    x = t["x"].detach().requires_grad_()
    with running(backend):
        with casting(autocast):
            out = layer(x, t["mask"])
        case, t, through_base = effective(case, t, out.dtype)
        t["grad_out"] = t["grad_out"].to(out.dtype)
        out.backward(t["grad_out"])
        with torch.no_grad():
            experts = call(case, t)[0].experts
    want = forward(case, t, experts)
    assert_within("out", out, want.out)
    gradients = backward(case, t, t["grad_out"], experts, want)[0]
    for name, leaf in parameters_of(layer).items():
        assert_within(f"gradient of {name}", leaf.grad, getattr(gradients, name))
    grad_x = rounded(gradients.x, x.dtype)
    if through_base is not None:
        base_grad = exact(through_base(x.detach().clone().requires_grad_()))
        grad_x = rounded(add(grad_x, base_grad, widened(x.dtype)), x.dtype)
    assert_within("gradient of x", x.grad, grad_x)


@pytest.mark.parametrize("backend", BACKENDS)
@drawn(0.01)
@given(
    case=cases(),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    autocast=st.sampled_from([None, BF16, FP16]),
)
def test_quantised_base(backend, tried, case, dtype, autocast):
    case = plain(case)
    t = tensors(case)
    base = Packed(case.inputs, case.outputs, dtype, case.seed)

    def effective(case, t, found):
        assert found == (autocast or dtype)
        own = {**t, "x": t["x"].to(found), "base": base.out.detach()}
        own |= {"weight": None, "bias": None}

        def through_base(x):
            with casting(autocast):
                out = base(x)
            return torch.autograd.grad(out, x, t["grad_out"].to(out.dtype))[0]

        return dataclasses.replace(case, dtype=found, base_dtype=found), own, through_base

    check(backend, case, t, base, autocast, effective)
    tried()


@pytest.mark.parametrize("backend", BACKENDS)
@drawn(0.01)
@given(case=cases(), autocast=st.sampled_from([BF16, FP16]), dtype=st.sampled_from([FP32, BF16]))
def test_linear_base_under_autocast(backend, tried, case, autocast, dtype):
    case = plain(case)
    t = tensors(case)
    base = nn.Linear(case.inputs, case.outputs, bias=case.bias, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(t["weight"])
        if case.bias:
            base.bias.copy_(t["bias"])

    def effective(case, t, found):
        assert found == autocast
        own = {**t, "x": t["x"].to(found), "weight": base.weight.detach().to(found)}
        own["bias"] = base.bias.detach().to(found) if case.bias else None
        return dataclasses.replace(case, dtype=found), own, None

    check(backend, case, t, base, autocast, effective)
    tried()
