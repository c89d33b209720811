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
from hypothesis import strategies as st
from strategies import BF16, FP16, FP32, FP64, LAYOUTS, MAGNITUDES, SIZES, laid_out

from floe_kernels import functional as FK


@st.composite
def cases(draw, triton=False):
    """Shapes, memory layouts, magnitudes, samples (empty, ragged, partly outside) and bad rows."""
    sizes = st.sampled_from([0, 1, 3, 16, 17, 33]) if triton else SIZES
    dtypes = [FP32, FP16] if triton else [FP32, FP32, BF16, FP16, FP64]
    one, other = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 15, 16, 17, 40, 129]), max_size=12))
    power = st.sampled_from([0, 0, 0, *MAGNITUDES.get(one, [30, 62, -62, -120])])
    return {
        "lengths": lengths[:4] if triton else lengths,
        "outside": draw(st.sampled_from([0, 0, 1, 5])),
        "rows": draw(sizes),
        "columns": draw(sizes),
        "dtypes": (one, other if draw(st.integers(0, 3)) == 0 else one),
        "power": draw(power),
        "layouts": draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))),
        "scale": draw(st.sampled_from(["none", "one", "each"])),
        "bad": draw(st.sampled_from([None, None, None, "nan", "inf"])),
        "reduce": draw(st.sampled_from(["element", "rank", "matrix"])),
        "seed": draw(st.integers(0, 2**32)),
    }


def tensors(case):
    generator = torch.Generator().manual_seed(case["seed"])
    n = sum(case["lengths"]) + 2 * case["outside"]
    out = []
    for width, dtype, how in zip(
        (case["rows"], case["columns"]), case["dtypes"], case["layouts"], strict=True
    ):
        values = torch.randn(n, width, generator=generator, dtype=FP64) * 2.0 ** case["power"]
        out.append(laid_out(values.to(dtype), how))
    g, x = out
    if case["bad"] and n and case["rows"] and case["layouts"][0] != "expanded":
        g[case["seed"] % n, case["seed"] % case["rows"]] = float(case["bad"])
    offsets = torch.tensor([case["outside"], *case["lengths"]]).cumsum(0)
    count = len(case["lengths"])
    scale = {"none": None, "one": torch.tensor(3.0)}.get(
        case["scale"], torch.rand(count, generator=generator) + 0.5
    )
    return g, x, offsets, scale


def check(case):
    g, x, offsets, scale = tensors(case)
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
@drawn(0.05)
@given(case=cases())
def test_squares(backend, tried, case):
    with running(backend):
        check(case)
    tried()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets
@pytest.mark.parametrize("backend", ["triton"])
@drawn(0.005)
@given(case=cases(triton=True))
def test_interpreted_squares(backend, tried, case):
    pytest.importorskip("triton")
    with running(backend):
        check(case)
    tried()
