"""The C++ kernel of the per-sample squares against the reference, on every instruction set."""

import pytest
import torch
from closeness import assert_no_worse

from floe_kernels import reference

_info = pytest.importorskip("floe_kernels._info", reason="the native extensions are not built")
OP = torch.ops.floe.segment_grad_square
if not torch._C._dispatch_has_kernel_for_dispatch_key("floe::segment_grad_square", "CPU"):
    pytest.skip("the operator has no C++ kernel in this build", allow_module_level=True)

# (segments, rows before the first and after the last, R, D); what each case is for
CASES = {
    "no rows": ([], 0, 3, 7),
    "no samples": ([], 5, 3, 7),
    "ragged tiles": ([1, 0, 15, 16, 17], 2, 9, 115),
    "pieces longer than a panel": ([300, 5, 129, 0, 257], 3, 8, 50),
    "short pieces in one panel": ([3] * 90, 0, 17, 49),
    "more panels than a group": ([20, 40], 1, 300, 900),
    "no gradient": ([2, 3], 1, 0, 9),
    "no columns": ([2, 3], 1, 4, 0),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(name, dtype=torch.float32):
    lengths, outside, r, d = CASES[name]
    generator = torch.Generator().manual_seed(7)
    n = sum(lengths) + 2 * outside
    g, x = (torch.randn(n, c, generator=generator).to(dtype) for c in (r, d))
    offsets = torch.tensor([outside, *lengths]).cumsum(0)
    return g, x, offsets, torch.rand(len(lengths), generator=generator) + 0.5


@pytest.mark.parametrize("reduce", ["element", "rank", "matrix"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(isa, name, dtype, reduce):
    g, x, offsets, scale = draw(name, dtype)
    got = OP(g, x, offsets, scale, reduce)
    peer = reference.segment_grad_square(g, x, offsets, scale, reduce)
    truth = reference.segment_grad_square(g.double(), x.double(), offsets, scale, reduce)
    for ours, theirs, exact in zip(got, peer, truth, strict=True):
        assert_no_worse(ours, theirs, exact, terms=1000)


@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "float16")], ids=str)
def test_mixed_dtypes_meet_in_the_wider(types):
    g, x, offsets, scale = draw("ragged tiles")
    g, x = g.to(getattr(torch, types[0])), x.to(getattr(torch, types[1]))
    for ours, theirs in zip(
        OP(g, x, offsets, scale, "element"),
        OP(g.float(), x.float(), offsets, scale, "element"),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["pieces longer than a panel", "more panels than a group"])
def test_bits_depend_on_neither_run_nor_threads(name):
    g, x, offsets, scale = draw(name)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OP(g, x, offsets, scale, "rank"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_bad_row_spoils_its_own_sample_alone():
    g, x, offsets, _ = draw("ragged tiles")
    clean = OP(g, x, offsets, None, "rank")[2]
    x[offsets[2] + 3] = torch.nan
    norms = OP(g, x, offsets, None, "rank")[2]
    assert norms.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(norms[~norms.isnan()], clean[~norms.isnan()])


def test_reads_any_layout():
    g, x, offsets, scale = draw("ragged tiles")
    want = OP(g, x, offsets, scale, "element")
    strided = OP(
        g.T.contiguous().T, torch.cat([x, x], 1)[:, : x.shape[1]], offsets, scale, "element"
    )
    assert all(torch.equal(a, b) for a, b in zip(want, strided, strict=True))
