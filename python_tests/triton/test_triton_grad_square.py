"""The Triton kernels of per-sample squared gradients against the reference."""

import pytest
import torch
from closeness import assert_no_worse

from floe_kernels import reference
from floe_kernels.triton import grad_square, launch, segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what each case is for: (columns of g, columns of x, offsets, tokens)
CASES = {
    "nothing": (4, 24, [0, 0], 0),
    "no sample": (4, 24, [3], 9),
    "one token": (1, 17, [0, 1], 1),
    "ragged": (12, 40, [0, 3, 3, 40, 41, 41, 108, 150], 150),
    "rows outside": (7, 33, [5, 5, 70, 90], 150),
    "one long": (5, 70, [0, 200], 200),
    "many": (5, 24, list(range(0, 130, 2)), 129),
    "many units": (20, 130, [0, 40, 40, 90, 170, 200, 201, 260], 260),
    "wide": (140, 70, [0, 10, 30], 30),
}


@pytest.fixture(params=["samples", "pieces"])
def cut(request, monkeypatch):
    """Whole samples fill a device, or each is cut."""
    if request.param == "samples":
        monkeypatch.setattr(grad_square, "MULTIPROCESSORS", 0)


DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "mixed": (torch.float32, torch.bfloat16),
}


def draw(name, dtypes=DTYPES["fp32"]):
    rows, columns, offsets, n = CASES[name]
    generator = torch.Generator().manual_seed(n)
    g = torch.randn(n, rows, generator=generator).to(DEVICE, dtypes[0])
    x = torch.randn(n, columns, generator=generator).to(DEVICE, dtypes[1])
    return g, x, torch.tensor(offsets, device=DEVICE)


def scale_of(kind, offsets):
    scale = torch.linspace(0.5, 2, len(offsets) - 1, device=offsets.device)
    return {"none": None, "one": torch.tensor(3.0, device=offsets.device), "each": scale}[kind]


def factor(dtypes):
    """The interpreter cuts bfloat16 off where hardware rounds: its errors are twice as large."""
    return 4.0 if dtypes == "bf16" and DEVICE == "cpu" else 2.0


@pytest.mark.parametrize(
    ("cut", "reduce"),
    [
        ("samples", "element"),
        ("samples", "rank"),
        ("samples", "matrix"),
        ("pieces", "element"),
        ("pieces", "matrix"),
    ],
    indirect=["cut"],
)
@pytest.mark.parametrize(
    ("name", "dtypes", "scaled"),
    [(name, "fp32", "each") for name in CASES]
    + [("ragged", dtypes, "one") for dtypes in DTYPES]
    + [("rows outside", "fp32", "none")],
)
def test_matches_reference(name, dtypes, scaled, reduce, cut):
    g, x, offsets = draw(name, DTYPES[dtypes])
    scale = scale_of(scaled, offsets)
    got = grad_square.segment_grad_square(g, x, offsets, scale, reduce)
    peer = reference.segment_grad_square(g, x, offsets, scale, reduce)
    truth = reference.segment_grad_square(g.double(), x.double(), offsets, scale, reduce)
    for one, other, exact in zip(got, peer, truth, strict=True):
        assert_no_worse(one, other, exact, factor(dtypes))


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize("way", [True, False], ids=["gram", "gradient"])
@pytest.mark.parametrize("name", ["ragged", "rows outside", "one long", "wide"])
def test_norms_of_a_frozen_linear(name, way, dtypes, monkeypatch):
    monkeypatch.setattr(grad_square, "gram_is_cheaper", lambda *_: way)
    g, x, offsets = draw(name, DTYPES[dtypes])
    scale = scale_of("each", offsets)
    got = grad_square.linear_grad_square(g, x, offsets, scale)
    peer = reference.linear_grad_square(g, x, offsets, scale)
    truth = reference.linear_grad_square(g.double(), x.double(), offsets, scale)
    assert_no_worse(got, peer, truth, factor(dtypes))


def test_gram_matrices_serve_short_samples():
    assert launch.gram_is_cheaper(8192, 64, 4096, 4096), "128 tokens: a twentieth of the work"
    assert not launch.gram_is_cheaper(8192, 4, 4096, 4096)
    assert not launch.gram_is_cheaper(0, 0, 4096, 4096)


def test_every_row_is_in_one_block():
    for offsets, n in ((o, n) for _, _, o, n in CASES.values()):
        blocks = segments.list_blocks(torch.tensor(offsets, device=DEVICE), n, 16)
        seen = torch.zeros(n, dtype=torch.int64)
        bounds = [0, *offsets, n]
        for row, rows, segment in zip(*(t.tolist() for t in blocks[:3]), strict=True):
            seen[row : row + abs(rows)] += 1
            if rows:
                assert bounds[segment] <= row
                assert row + abs(rows) <= bounds[segment + 1]
                assert (rows < 0) == (row + abs(rows) == bounds[segment + 1])
        assert (seen == 1).all()


@pytest.mark.usefixtures("cut")
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's NumPy
def test_non_finite_sample_stays_in_its_norm():
    g, x, offsets = draw("ragged")
    g[50] = float("inf")
    _, _, norms = grad_square.segment_grad_square(g, x, offsets, None, "matrix")
    finite = norms.isfinite().tolist()
    assert finite == [True, True, True, True, True, False, True]


def test_few_long_samples_fill_a_device():
    for d, r, samples in ((4096, 16, 1), (1024, 128, 1), (1024, 16, 3), (4096, 128, 1)):
        tile = launch.square_tile(torch.bfloat16, r, 8192 // samples, 1)
        tiles = -(-d // tile.rows) * -(-r // tile.columns)
        programs = tiles * samples * launch.sample_pieces(tiles, 8192, samples)
        assert launch.MULTIPROCESSORS <= programs <= launch.PROGRAMS or programs == 16 * tiles
