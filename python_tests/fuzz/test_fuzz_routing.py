"""Routing, its losses and the spectrum's exponent on drawn input."""

import contextlib

import pytest
import torch
from backends import BACKENDS, running
from balls import Ball, assert_within, exact, rounded, softmax, widened
from drawing import drawn
from hypothesis import given
from hypothesis import strategies as st
from strategies import BF16, FP16, FP32, FP64, LAYOUTS, laid_out

from floe_kernels import functional as FK
from floe_kernels import reference


@st.composite
def cases(draw):
    """Draw logits with ties, infinities and rows of NaN."""
    n, e = draw(st.sampled_from([0, 1, 2, 7, 33, 130])), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([FP32, FP32, BF16, FP16, FP64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    z = torch.randn(n, e, generator=generator, dtype=FP64)
    z *= 10.0 ** draw(st.sampled_from([0, 0, 0, 1, 3, -30]))
    if draw(st.booleans()):
        z = (z * 2).round()  # ties
    for value in draw(st.lists(st.sampled_from(["nan", "inf", "-inf", "-0.0"]), max_size=4)):
        if n:
            row, column = (int(torch.randint(m, (), generator=generator)) for m in (n, e))
            z[row, column] = float(value)
    z = laid_out(z.to(dtype), draw(st.sampled_from(LAYOUTS)))
    k = draw(st.sampled_from([1, min(2, e), e, max(1, e // 2)]))
    mask = torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return z, k, draw(st.sampled_from([None, True, False])), mask if draw(st.booleans()) else None


@pytest.mark.parametrize("backend", BACKENDS)
@drawn(0.03)
@given(case=cases())
def test_topk_softmax(backend, tried, case):
    z, k, renormalize, _ = case
    with running(backend):
        gates, experts = FK.topk_softmax(z, k, renormalize=renormalize)
    n, e = z.shape
    assert experts.shape == gates.shape == (n, k)
    assert gates.dtype == z.dtype
    assert ((experts >= 0) & (experts < e)).all()
    assert n == 0 or (experts.sort(1).values.diff(dim=1) > 0).all()
    sound = ~z.isnan().any(1) & (z != torch.inf).all(1)
    order = reference.topk_softmax(z[sound].contiguous(), k, True)[1]
    assert torch.equal(experts[sound], order)
    some = z[sound & (z[:, :1] > -torch.inf).any(1)]
    rows = sound & (z[:, :1] > -torch.inf).any(1)
    renormalize = k > 1 if renormalize is None else renormalize
    kept = some.gather(1, experts[rows])
    finite = kept.isfinite().all(1) if renormalize else some.isfinite().all(1)
    want = softmax(exact((kept if renormalize else some)[finite]), widened(z.dtype))
    if not renormalize:
        want = Ball(*(a.gather(1, experts[rows][finite]) for a in want))
    assert_within("gates", gates[rows][finite], rounded(want, z.dtype))
    assert not gates[z.isnan().any(1) & ~sound].isfinite().all(1).any() or renormalize
    tried()


@drawn(0.03)
@given(case=cases())
def test_losses_leave_padding_out(tried, case):
    z, k, _, mask = case
    experts = reference.topk_softmax(z, k, True)[1]
    if mask is None:
        mask = torch.ones(len(z), dtype=torch.bool)
    whole = [
        FK.load_balance_loss(z, experts, token_mask=mask),
        FK.router_z_loss(z, token_mask=mask),
        FK.expert_load(experts, z.shape[1], token_mask=mask),
    ]
    alone = [
        FK.load_balance_loss(z[mask], experts[mask]),
        FK.router_z_loss(z[mask]),
        FK.expert_load(experts[mask], z.shape[1]),
    ]
    for one, other in zip(whole, alone, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    load = whole[2].double().sum()
    assert abs(load - (1.0 if mask.any() else 0.0)) <= z.shape[1] * 2.0**-23
    tried()


@drawn(0.03)
@given(
    values=st.lists(
        st.floats(min_value=1e-30, max_value=1e30, allow_nan=False), min_size=2, max_size=40
    ),
    method=st.sampled_from(["median", "fix_finger"]),
)
def test_exponents_are_numbers_or_refused(tried, values, method):
    eigenvalues = torch.tensor(values, dtype=FP64)
    with contextlib.suppress(ValueError):  # too few of them
        alpha = FK.hill_alpha(eigenvalues, method=method).double()
        assert not alpha.isnan().any()
        assert (alpha >= 1).all()
    tried()
