"""hill_alpha and gram_eigenvalues: published figures, invariances, memory, messages."""

import math

import numpy as np
import pytest
import torch
from closeness import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

from floe_kernels.functional.spectrum import METHODS, gram_eigenvalues, hill_alpha
from floe_kernels.reference import spectrum

TAILS = ["median", "fix_finger"]


def pareto(alpha, n=1000):
    """The n mid-quantiles of a power law with density exponent alpha, largest first."""
    return ((torch.arange(n, dtype=torch.float64) + 0.5) / n) ** (-1 / (alpha - 1))


def gaussians():
    draw = np.random.default_rng(0)
    return {s: torch.from_numpy(draw.normal(0, 0.02, s)) for s in ((512, 512), (512, 2048))}


def ragged(seed=0, n=150):
    """A spectrum with a bulk, a tail, repeated values and zeros, in no order."""
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.rand(n, generator=generator, dtype=torch.float64) * 3 + 0.1
    values = torch.cat([bulk, bulk[:9], bulk[: n // 5] ** 4, torch.zeros(seed % 5)])
    return values[torch.randperm(len(values), generator=generator)]


def by_hand(values, method):
    """The definitions, one eigenvalue at a time, in Python's floats and NumPy's histogram."""
    x = sorted(v for v in values.tolist() if v > 0)
    n = len(x)

    def alpha(i):
        total = math.fsum(math.log(v) - math.log(x[i]) for v in x[i:])
        return 1 + (n - i) / total if total else math.inf

    if method == "median":
        return alpha(n // 2)
    counts, edges = np.histogram(np.log10(x), bins=100)
    peak = 10 ** float(edges[counts.argmax()])
    low = math.log10(0.95 * peak) if method == "fix_finger_compat" else 0.95 * peak
    best = (2.0, 0.0)
    for i in range(n - 1):
        if low <= x[i] <= 1.5 * peak:
            a, size = alpha(i), n - i
            law = (1 - (v / x[i]) ** (1 - a) for v in x[i:])
            distance = max(abs(f - j / size) for j, f in enumerate(law))
            best = min(best, (distance, a), key=lambda pair: pair[0])
    return best[1]


@pytest.mark.parametrize(
    ("alpha", "median", "finger"),
    [(2, 2.0017, 2.0008), (3, 3.0034, 3.0017), (4, 4.0051, 4.0025)],
)
def test_exact_power_laws(alpha, median, finger):
    got = {method: round(float(hill_alpha(pareto(alpha), method=method)), 4) for method in METHODS}
    assert got == {"median": median, "fix_finger": finger, "fix_finger_compat": finger}


def test_gaussian_matrices():
    expected = {(512, 512): (2.13, 5.15), (512, 2048): (3.48, 6.92)}
    for shape, weight in gaussians().items():
        values = gram_eigenvalues(weight)
        both = hill_alpha(values), hill_alpha(values, method="fix_finger")
        assert tuple(math.floor(float(a) * 100 + 0.5) / 100 for a in both) == expected[shape]


def test_the_slip_costs_candidates():
    values = gram_eigenvalues(gaussians()[512, 512])
    first, stop = spectrum.finger_window(values, compat=False)
    compat_first, compat_stop = spectrum.finger_window(values, compat=True)
    assert (stop - first, compat_stop - compat_first) == (74, 439)
    assert (compat_first, compat_stop) == (0, stop)  # the lower bound is gone, the upper is not
    compat = hill_alpha(values, method="fix_finger_compat")
    assert torch.equal(compat, hill_alpha(values, method="fix_finger"))  # and here it is harmless


CASES = {f"ragged{seed}": ragged(seed) for seed in range(5)} | {
    "all in the window, a flat end": torch.tensor([*torch.linspace(1, 1.2, 40), *[1.2] * 5]),
    "peak in the last bin": torch.cat([torch.linspace(0.1, 1, 50), torch.ones(60)]),
    "three": torch.tensor([1.0, 1.1, 1.2]),
    "far apart": torch.logspace(-250, 250, 40, dtype=torch.float64),
}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("method", METHODS)
def test_matches_the_definition(method, values, monkeypatch):
    monkeypatch.setattr(spectrum, "BLOCK", 1000)  # several blocks, the last one ragged
    got = hill_alpha(values, method=method)
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(by_hand(values, method), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 2.0**-20, 3.0, 1e9])
@pytest.mark.parametrize("method", TAILS)
def test_a_factor_changes_nothing(method, scale):
    values = torch.stack([ragged(5 * seed) for seed in range(4)])
    expected = hill_alpha(values, method=method)
    torch.testing.assert_close(
        hill_alpha(values * scale, method=method), expected, rtol=1e-9, atol=0
    )


def test_the_slip_depends_on_the_scale():
    # a few values below the peak at 10: log10(9.5) cuts some of them off, log10(0.0095) none
    values = torch.cat([torch.linspace(0.2, 8, 30, dtype=torch.float64), pareto(3.0, 300) * 10])
    scaled = [(values * c).sort().values for c in (1.0, 1e-3)]
    windows = [spectrum.finger_window(x, compat=False) for x in scaled]
    assert windows[0] == windows[1]
    windows = [spectrum.finger_window(x, compat=True) for x in scaled]
    assert windows[0][0] > windows[1][0] == 0


def test_compat_differs():
    differ = [
        float(hill_alpha(v, method="fix_finger")) != float(hill_alpha(v, method=METHODS[2]))
        for v in map(ragged, range(5))
    ]
    assert any(differ)


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_loop(method):
    rows = [ragged(seed) for seed in range(6)]
    width = max(map(len, rows))
    batch = torch.stack([torch.nn.functional.pad(v, (0, width - len(v))) for v in rows])
    got = hill_alpha(batch.view(2, 3, width), method=method)
    assert got.shape == (2, 3)
    torch.testing.assert_close(
        got.flatten(), torch.stack([hill_alpha(v, method=method) for v in rows]), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widens_first(method, dtype):
    values = ragged(1).to(dtype)
    assert torch.equal(
        hill_alpha(values, method=method), hill_alpha(values.double(), method=method)
    )


def test_k_is_the_size_of_the_tail():
    values = torch.tensor([8.0, 1.0, 4.0, 2.0, 0.0])
    for k, logs in ((2, 1), (3, 1 + 2), (4, 1 + 2 + 3)):
        assert float(hill_alpha(values, k=k)) == pytest.approx(1 + k / (logs * math.log(2)))
    assert torch.equal(hill_alpha(values), hill_alpha(values, k=2))


@pytest.mark.parametrize("method", METHODS)
def test_equal_eigenvalues_have_no_tail(method):
    for n in range(3, 40):
        assert float(hill_alpha(torch.full((n,), n / 7), method=method)) == math.inf


def test_wide_bins_leave_a_candidate():
    # 100 bins over 40 decades: the peak's edge lies at 1, so the window ends at 1.5
    bulk = torch.linspace(2.0, 2.4, 30, dtype=torch.float64)
    values = torch.tensor([1e-20, *bulk, 1e20], dtype=torch.float64)
    got, expected = hill_alpha(values, method="fix_finger"), hill_alpha(values, k=31)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_no_spectra(method):
    assert hill_alpha(torch.zeros(2, 0, 5), method=method).shape == (2, 0)
    assert hill_alpha(torch.zeros(0, 0), method=method).shape == (0,)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80), (1, 9)])
@pytest.mark.parametrize("chunk", [1, 200, 2**22])
def test_gram_against_singular_values(shape, chunk, monkeypatch):
    monkeypatch.setattr(spectrum, "SLICE", chunk)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02
    got, truth = gram_eigenvalues(weight), torch.linalg.svdvals(weight.double()).flip(0).square()
    peer = torch.linalg.svdvals(weight).flip(0).square()
    assert_no_worse(got, peer.double(), truth)
    # what float64 itself promises: the product's rounding and the solver's, a few ulp a column
    allowed = 4 * max(shape) * torch.finfo(torch.float64).eps * truth.max()
    assert (got - truth).abs().max() <= allowed


@pytest.mark.parametrize(("method", "decades"), [("median", 6), ("fix_finger", 2)])
def test_alpha_does_not_see_how_the_spectrum_was_found(method, decades):
    # the far end is lost in the product, the tail is not
    u, _, vh = torch.linalg.svd(torch.randn(96, 64, generator=torch.Generator().manual_seed(3)))
    weight = (u[:, :64] * torch.logspace(0, -decades, 64)) @ vh
    truth = torch.linalg.svdvals(weight.double()).flip(0).square()
    xmin = truth[32] if method == "median" else truth[0]  # or above, with fix_finger
    expected = hill_alpha(truth, method=method)
    # d alpha = (alpha - 1)^2 times the mean relative error of the ratios, each of two eigenvalues
    relative = 4 * 96 * torch.finfo(torch.float64).eps * truth[-1] / xmin
    error = (hill_alpha(gram_eigenvalues(weight), method=method) - expected).abs()
    assert error <= (expected - 1) ** 2 * 2 * relative < 1e-6


def test_rank_deficient_weights_have_exact_zeros():
    thin = torch.randn(50, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = gram_eigenvalues(thin @ thin.T)
    assert (values == 0).sum() == 42
    torch.testing.assert_close(hill_alpha(values), hill_alpha(values[42:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gram_reads_any_dtype_and_layout(dtype):
    weight = torch.randn(24, 60, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = gram_eigenvalues(weight.double())
    for view in (weight, weight.T, weight.T.contiguous(), weight.repeat(1, 2)[:, :60]):
        torch.testing.assert_close(gram_eigenvalues(view), expected)
    assert gram_eigenvalues(weight.requires_grad_()).requires_grad is False


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_gram_of_nothing(shape):
    assert gram_eigenvalues(torch.zeros(shape)).shape == (0,)


class LargestAllocation(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("transposed", [False, True])
def test_gram_never_widens_the_whole_weight(transposed):
    weight = torch.ones(40, 200_000, dtype=torch.bfloat16)  # 61 MiB in float64
    with LargestAllocation() as seen:
        gram_eigenvalues(weight.T if transposed else weight)
    assert 2**24 < seen.largest <= 2**25


def test_distances_never_fill_a_square():
    with LargestAllocation() as seen:
        hill_alpha(pareto(2.0, 4000), method="fix_finger_compat")  # 122 MiB as one matrix
    assert 2**20 < seen.largest <= 2**21


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (torch.ones(4), {"method": "ks"}, r"method must be one of median, .*, got 'ks'"),
        (torch.ones(4), {"method": "fix_finger", "k": 2}, r"k goes with method 'median' only"),
        (torch.ones(4), {"k": 1}, r"k must be in 2\.\.4, .*, got 1"),
        (torch.tensor([[1.0] * 4, [0.0, 1, 1, 1]]), {"k": 4}, r"k must be in 2\.\.3, .*, got 4"),
        (torch.ones(4, dtype=torch.int64), {}, r"floating point \(\.\.\., N\), got torch\.int64"),
        (torch.tensor(1.0), {}, r"\(\.\.\., N\), got torch\.float32 \(\)"),
        (torch.tensor([1.0, 2, math.nan]), {}, r"finite and not negative, got nan"),
        (torch.tensor([1.0, 2, math.inf]), {}, r"finite and not negative, got inf"),
        (torch.tensor([1.0, 2, 3, -1]), {}, r"finite and not negative, got -1\.0"),
        (torch.tensor([0.0, 2, 3]), {}, r"at least 3 positive eigenvalues, got 2"),
        (torch.zeros(3, 0), {}, r"at least 3 positive eigenvalues, got 0"),
    ],
)
def test_says_what_is_wrong(values, options, says):
    with pytest.raises(ValueError, match=says):
        hill_alpha(values, **options)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.ones(3), r"\(O, I\) matrix, got torch\.float32 \(3,\)"),
        (torch.ones(3, 3, dtype=torch.uint8), r"got torch\.uint8 \(3, 3\)"),
        (torch.tensor([[1.0, math.inf], [0, 1]]), r"weight must be finite"),
        (torch.tensor([[1.0, 2], [math.nan, 1]]), r"weight must be finite"),
    ],
)
def test_gram_says_what_is_wrong(weight, says):
    with pytest.raises(ValueError, match=says):
        gram_eigenvalues(weight)
