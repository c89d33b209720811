"""Per-sample squares on drawn samples, every kernel, against float64."""

import itertools

import pytest
import torch
from backends import BACKENDS, running
from balls import Ball, assert_within, ball, exact, matmul, mul, rounded, widened
from balls import total as summed
from drawing import drawn
from expected import squares
from hypothesis import given
from sample_strategies import sample_cases, sample_tensors

from floe_kernels import functional as FK


def check(case):
    g, x, offsets, scale = sample_tensors(case)
    got = FK.segment_grad_square(g, x, offsets, scale=scale, reduce=case["reduce"])
    promoted = torch.promote_types(g.dtype, x.dtype)
    sums = widened(promoted)
    grad = rounded(matmul(exact(g).T, exact(x), sums), promoted)
    assert_within("grad", got.grad, grad)
    fisher, norms = squares(exact(g), exact(x), offsets, scale, sums)
    assert_within("fisher", got.fisher, fisher[case["reduce"]])
    assert_within("norms", got.norms, norms)
    full = FK.linear_grad_square(g, x, offsets, scale=scale)
    assert_within("norms of a frozen matrix", full, either_way(g, x, offsets, scale, norms, sums))
    assert (full.nan_to_num(0) >= 0).all()
    finite = g.isfinite().all(1)
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if not finite[begin:end].all() and case["columns"]:
            assert not got.norms[i].isfinite(), "a sample with a bad row has a finite norm"


def either_way(g, x, offsets, scale, norms, sums):
    """The same norms by Gram matrices, whose sums cancel: a radius that covers both ways."""
    radii = []
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        own, other = exact(g[begin:end]), exact(x[begin:end])
        gram = mul(matmul(own, own.T, sums), matmul(other, other.T, sums), sums)
        value = summed(summed(gram, 1, sums), 0, sums)
        for _ in range(0 if scale is None else 2):
            value = mul(value, exact(scale if scale.ndim == 0 else scale[i]), sums)
        radii.append(value.r + value.v.abs() * torch.finfo(sums).eps * 4)
    if not radii:
        return norms
    return ball(norms.v, torch.maximum(norms.r, torch.stack(radii))) if radii else Ball(*norms)


@pytest.mark.parametrize("backend", BACKENDS)
@drawn(0.03)
@given(case=sample_cases())
def test_squares(backend, tried, case):
    with running(backend):
        check(case)
    tried()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets
@pytest.mark.parametrize("backend", ["triton"])
@drawn(0.005)
@given(case=sample_cases(triton=True))
def test_interpreted_squares(backend, tried, case):
    pytest.importorskip("triton")
    with running(backend):
        check(case)
    tried()
