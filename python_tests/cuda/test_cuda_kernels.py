"""The CUDA C++ kernels on a GPU, against plain PyTorch; and what CUDA is not needed for.

Not yet run on a GPU: written beside kernels that were compiled and emulated.
"""

import itertools
from pathlib import Path

import pytest
import torch
from closeness import assert_no_worse

from floe_kernels import reference
from floe_kernels.ops import experimental

OPS = torch.ops.floe
REASON = (
    "needs a CUDA GPU" if not torch.cuda.is_available()
    else "this build has no CUDA C++: FLOE_BUILD=cuda"
)  # fmt: skip
READY = torch.cuda.is_available() and all(map(experimental.has_cuda_kernel, experimental.NAMES))
on_gpu = pytest.mark.skipif(not READY, reason=REASON)

# (segments, rows before the first and after the last, R, D); what each case is for
CASES = {
    "no rows": ([], 0, 3, 7),
    "no samples": ([], 5, 3, 7),
    "ragged, odd columns": ([1, 0, 15, 16, 17], 2, 9, 115),
    "one long sample in many units": ([9000], 0, 16, 256),
    "long and short": ([5, 3000, 1, 0, 64, 2000], 7, 24, 264),
    "samples of one row": ([1] * 300, 0, 32, 512),
    "every tile of ranks": ([100, 700], 0, 64, 384),
    "packed experts": ([512] * 4, 0, 128, 1024),
    "two tiles of ranks": ([300, 40], 3, 200, 520),
}
TYPES = [
    ("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"),
    ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"),
]  # fmt: skip


def draw(name, types=("float32", "float32"), device="cuda"):
    lengths, outside, r, d = CASES[name]
    generator = torch.Generator().manual_seed(7)
    n = sum(lengths) + 2 * outside
    g, x = (
        torch.randn(n, c, generator=generator).to(getattr(torch, t))
        for c, t in zip((r, d), types, strict=True)
    )
    offsets = torch.tensor([outside, *lengths]).cumsum(0)
    scale = torch.rand(len(lengths), generator=generator) + 0.5
    return [t.to(device) for t in (g, x, offsets, scale)]


@on_gpu
@pytest.mark.parametrize("reduce", ["element", "rank", "matrix"])
@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("name", CASES)
def test_segment_grad_square(name, types, reduce):
    g, x, offsets, scale = draw(name, types)
    got = OPS.experimental_segment_grad_square(g, x, offsets, scale, reduce)
    peer = reference.segment_grad_square(g, x, offsets, scale, reduce)
    truth = reference.segment_grad_square(g.double(), x.double(), offsets, scale, reduce)
    for ours, theirs, exact in zip(got, peer, truth, strict=True):
        assert_no_worse(ours, theirs, exact, terms=1000)


@on_gpu
@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("name", [*CASES, "long enough for gradients"])
def test_linear_grad_square(name, types, monkeypatch):
    monkeypatch.setitem(CASES, "long enough for gradients", ([900, 64, 500], 1, 300, 520))
    g, x, offsets, scale = draw(name, types)
    got = OPS.experimental_linear_grad_square(g, x, offsets, scale)
    peer = reference.linear_grad_square(g, x, offsets, scale)
    truth = reference.linear_grad_square(g.double(), x.double(), offsets, scale)
    assert_no_worse(got, peer, truth)


@on_gpu
def test_reads_any_layout_and_takes_any_scale():
    g, x, offsets, scale = draw("ragged, odd columns", ("bfloat16", "bfloat16"))
    wide = torch.cat([x, x], 1)
    for factor in (None, scale[0], scale):
        want = OPS.experimental_segment_grad_square(g, x, offsets, factor, "element")
        views = (g.T.contiguous().T, wide[:, : x.shape[1]])
        got = OPS.experimental_segment_grad_square(*views, offsets, factor, "element")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@on_gpu
@pytest.mark.parametrize("name", ["long and short", "packed experts"])
def test_bits_are_those_of_the_run_before(name):
    g, x, offsets, scale = draw(name, ("bfloat16", "bfloat16"))
    first = OPS.experimental_segment_grad_square(g, x, offsets, scale, "rank")
    norms = OPS.experimental_linear_grad_square(g, x, offsets, scale)
    for _ in range(3):
        again = OPS.experimental_segment_grad_square(g, x, offsets, scale, "rank")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        assert torch.equal(OPS.experimental_linear_grad_square(g, x, offsets, scale), norms)


@on_gpu
def test_a_bad_row_spoils_its_own_sample_alone():
    g, x, offsets, _ = draw("ragged, odd columns", ("bfloat16", "bfloat16"))
    x[offsets[2] + 3] = torch.nan
    for norms in (
        OPS.experimental_segment_grad_square(g, x, offsets, None, "rank")[2],
        OPS.experimental_linear_grad_square(g, x, offsets, None),
    ):
        assert norms.isnan().tolist() == [False, False, True, False, False]


@on_gpu
@pytest.mark.parametrize("renormalize", [True, False], ids=["kept", "all"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("n", "e", "k"), [(0, 4, 2), (1, 1, 1), (257, 8, 2), (33, 63, 63), (9, 1024, 40)]
)
def test_topk_softmax(n, e, k, dtype, renormalize):
    logits = torch.randn(n, 2 * e, device="cuda").to(getattr(torch, dtype))[:, :e]
    gates, experts = OPS.experimental_topk_softmax(logits, k, renormalize)
    peer_gates, peer_experts = reference.topk_softmax(logits, k, renormalize)
    assert torch.equal(experts, peer_experts)
    truth = reference.topk_softmax(logits.double(), k, renormalize)[0]
    assert_no_worse(gates, peer_gates, truth, terms=e)


@on_gpu
def test_topk_softmax_of_ties_and_nan():
    values = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan], device="cuda")
    logits = values[torch.randint(6, (200, 40), device="cuda")]
    got = OPS.experimental_topk_softmax(logits, 9, True)
    want = reference.topk_softmax(logits, 9, True)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], equal_nan=True)


def pairs(n, k, e, lengths, device):
    generator = torch.Generator().manual_seed(n)
    experts = torch.randint(-1, e + 1, (n, k), generator=generator)
    mask = torch.rand(n, generator=generator) > 0.2
    samples = torch.tensor([n // 50, *lengths]).cumsum(0)
    return experts.to(device), e, mask.to(device), samples.to(device)


SORTS = [
    (0, 2, 3, [0]), (1, 1, 1, [1]), (700, 2, 8, [10, 0, 300, 300]), (5000, 3, 70, [1] * 900),
    (9000, 1, 1024, [4000]), (100000, 2, 64, [30000, 60000]),
]  # fmt: skip


@on_gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "k", "e", "lengths"), SORTS)
def test_sort_pairs(n, k, e, lengths, masked):
    experts, _, mask, samples = pairs(n, k, e, lengths, "cuda")
    args = (experts, e, mask if masked else None, samples)
    on_cpu = [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]
    got, want = (OPS.experimental_sort_pairs(*a) for a in (args, on_cpu))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@on_gpu
def test_waits_for_nothing_and_replays_in_a_graph():
    g, x, offsets, scale = draw("long and short", ("bfloat16", "bfloat16"))
    logits = torch.randn(500, 8, device="cuda")
    samples = torch.tensor([0, 100, 500], device="cuda")

    def step():
        experts = OPS.experimental_topk_softmax(logits, 2, True)[1]
        return [
            experts, *OPS.experimental_sort_pairs(experts, 8, None, samples),
            *OPS.experimental_segment_grad_square(g, x, offsets, scale, "matrix"),
            OPS.experimental_linear_grad_square(g, x, offsets, scale),
        ]  # fmt: skip

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (g, x, logits):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_registration(device):
    g, x, offsets, scale = draw("ragged, odd columns", device=device)
    torch.library.opcheck(
        OPS.experimental_segment_grad_square.default, (g, x, offsets, scale, "rank")
    )
    torch.library.opcheck(OPS.experimental_linear_grad_square.default, (g, x, offsets, scale))
    torch.library.opcheck(
        OPS.experimental_topk_softmax.default, (torch.randn(5, 7, device=device), 3, True)
    )
    torch.library.opcheck(OPS.experimental_sort_pairs.default, pairs(70, 2, 8, [10, 0, 40], device))


@pytest.mark.parametrize(("n", "k", "e", "lengths"), SORTS[:3])
def test_sorting_in_plain_pytorch(n, k, e, lengths):
    experts, _, mask, samples = pairs(n, k, e, lengths, "cpu")
    pair, offsets = OPS.experimental_sort_pairs(experts, e, mask, samples)
    assert pair.sort().values.tolist() == list(range(n * k))
    bounds, flat = samples.tolist(), experts.flatten().tolist()
    for expert in range(e):
        for sample, (first, last) in enumerate(itertools.pairwise(bounds)):
            at = expert * len(lengths) + sample
            segment = pair[offsets[at] : offsets[at + 1]].tolist()
            assert segment == [
                p for p in range(first * k, last * k) if flat[p] == expert and mask[p // k]
            ]


def test_nothing_dispatches_to_them():
    package = Path(experimental.__file__).parents[1]
    users = [p.name for p in package.rglob("*.py") if "ops.experimental" in p.read_text()]
    assert not users
