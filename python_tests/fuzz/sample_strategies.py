"""Samples of rows as hypothesis draws them, for per-sample squares."""

import torch
from hypothesis import strategies as st
from strategies import BF16, FP16, FP32, FP64, LAYOUTS, MAGNITUDES, SIZES, laid_out


@st.composite
def sample_cases(draw, triton=False):
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


def sample_tensors(case):
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
