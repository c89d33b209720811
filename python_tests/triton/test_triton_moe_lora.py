"""The Triton kernels of the adapted linear against the reference, interpreted without a GPU."""

import pytest
import torch
from closeness import assert_no_worse

from floe_kernels import reference
from floe_kernels.reference.moe_lora import Adapter, FisherBuffers, adapter
from floe_kernels.triton import (
    grouping,
    launch,
    moe_lora_backward,
    moe_lora_forward,
    moe_lora_grouped,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# what each case is for: (tokens, inputs, outputs, ranks, top_k, options)
CASES = {
    "nothing": (0, 24, 16, [4, 4], 1, {}),
    "one token": (1, 24, 16, [4, 4], 2, {}),
    "top 1": (37, 80, 40, [4, 4, 4], 1, {}),
    "top 2": (70, 72, 136, [8, 8, 8, 8], 2, {}),
    "uneven": (33, 40, 24, [1, 0, 17, 5], 2, {}),
    "all kept": (20, 33, 19, [3, 3, 3], 3, {}),
    "padding": (45, 40, 24, [4, 4, 4], 2, {"mask": True}),
    "dropout": (45, 40, 24, [4, 4, 4], 2, {"dropout_p": 0.3}),
    "aux": (45, 40, 24, [4, 4, 4], 2, {"aux": True, "mask": True}),
    "renormalized 1": (21, 40, 24, [4, 4, 4], 1, {"renormalize": True}),
    "plain 2": (21, 40, 24, [4, 4, 4], 2, {"renormalize": False, "aux": True}),
    "shared": (37, 40, 24, [5, 5, 5], 3, {"shared_A": True}),
    "shared 2": (37, 40, 24, [4, 4, 4], 2, {"shared_A": True, "dropout_p": 0.5, "mask": True}),
    "many experts": (20, 40, 24, [2] * 70, 2, {}),
    "wide": (20, 40, 24, [48, 96], 2, {}),
    "no columns": (9, 40, 24, [0, 0], 1, {}),
    "one hot": (70, 40, 24, [4, 4, 4], 1, {"hot": True}),
}
DTYPES = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "bf16 fp32": (BF16, FP32),
    "fp16": (FP16, FP16),
    "fp16 fp32": (FP16, FP32),
}
REGIMES = ["split", "whole", "grouped"]
NOT_GROUPED = ("many experts", "shared", "shared 2", "all kept", "renormalized 1", "top 1")
EVERY = [(r, n, "fp32") for r in REGIMES for n in CASES if r != "grouped" or n not in NOT_GROUPED]
EVERY += [(r, "dropout", d) for r in REGIMES for d in DTYPES if d != "fp32"]
EVERY += [(r, "top 2", d) for r in REGIMES[:2] for d in DTYPES if d != "fp32"]


def draw(name, dtypes=(FP32, FP32)):
    """Return the operands of a case and the arguments that follow them."""
    n, i, o, ranks, k, options = CASES[name]
    generator = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    shared_A, columns = options.get("shared_A", False), sum(ranks)
    x, weights = randn(n, i), (randn(ranks[0] if shared_A else columns, i), randn(columns, o))
    dtype, weight_dtype = dtypes
    operands = {
        "x": x.to(dtype),
        "weight": randn(o, i).to(dtype) / i**0.5,
        "lora_A": weights[0].to(weight_dtype) / i**0.5,
        "lora_B": weights[1].to(weight_dtype) / 4,
        "router": randn(len(ranks), i).to(weight_dtype) / i**0.5,
    }
    if options.get("hot"):  # every token goes to one expert, the others stay empty
        operands["x"], operands["router"][1] = operands["x"].abs(), 1.0
    operands = {key: value.to(DEVICE) for key, value in operands.items()}
    mask = torch.rand(n, generator=generator) < 0.7 if options.get("mask") else None
    if mask is not None:
        operands["x"][~mask.to(DEVICE)] = float("nan")  # padding may hold anything
        mask = mask.to(DEVICE)
    p = options.get("dropout_p", 0.0)
    seed = torch.tensor(-(2**62) + 12345, device=DEVICE) if p else None
    aux = torch.tensor([0.3, 0.2], device=DEVICE) if options.get("aux") else None
    scaling = torch.rand(columns, generator=generator).to(DEVICE) + 0.5
    route = (scaling, ranks, k, shared_A, options.get("renormalize", k > 1), mask, p, seed)
    return operands, route, aux


def factor(dtypes):
    """The interpreter cuts bfloat16 off where hardware rounds: its errors are twice as large."""
    return 4.0 if dtypes.startswith("bf16") and DEVICE == "cpu" else 2.0


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    """Run few tokens through the kernels for few, through those for many, and sorted by expert."""
    for module in (moe_lora_forward, moe_lora_backward):
        monkeypatch.setattr(module, "SPLIT_BELOW", 4096 if request.param == "split" else 0)
        groups = request.param == "grouped"
        monkeypatch.setattr(module, "use_groups", lambda *args, on=groups: on and not args[2])
    # several chunks, and experts in several pieces
    for module in (grouping, moe_lora_grouped):
        monkeypatch.setattr(module, "CHUNK", 32)
    monkeypatch.setattr(moe_lora_grouped, "PIECE", 8)
    return request.param


@pytest.mark.parametrize(("regime", "name", "dtypes"), EVERY, indirect=["regime"])
def test_forward_matches_reference(name, dtypes, regime):
    operands, route, _ = draw(name, DTYPES[dtypes])
    x, weight, lora_A, lora_B, router = operands.values()
    out, *saved = moe_lora_forward.moe_lora_linear(x, weight, None, lora_A, lora_B, router, *route)
    peer = adapter(x, lora_A, router, *route)
    # the experts are compared by value: near-equal logits may change places between two sums
    assert torch.equal(saved[1], peer.experts)
    wide = [t.double() for t in (x, lora_A, router)]
    truth = adapter(*wide, *route)
    if regime == "grouped" and not route[3]:  # z is zero where an expert was not kept
        kept = peer.h != 0
        peer, truth = (a._replace(z=torch.where(kept, a.z, 0)) for a in (peer, truth))
    for field, got in zip(("z", "gates", "logits"), (saved[0], *saved[2:]), strict=True):
        assert_no_worse(got, getattr(peer, field), getattr(truth, field), factor(dtypes))
    mask = route[5]
    rows = slice(None) if mask is None else mask  # the base's own output of padding is not ours
    peer_out = (x @ weight.T).addmm_(peer.h, lora_B.to(x.dtype))
    true_out = x.double() @ weight.double().T + truth.h @ lora_B.double()
    assert_no_worse(out[rows], peer_out[rows], true_out[rows], factor(dtypes))


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's NumPy
def test_non_finite_row_stays_alone(regime):
    operands, route, _ = draw("top 2")
    x, weight, lora_A, lora_B, router = operands.values()
    args = (weight, None, lora_A, lora_B, router, *route)
    whole = moe_lora_forward.moe_lora_linear(x, *args)
    x[5] = float("nan")
    spoilt = moe_lora_forward.moe_lora_linear(x, *args)
    others = torch.arange(len(x), device=x.device) != 5
    for one, two in zip(spoilt, whole, strict=True):
        torch.testing.assert_close(one[others], two[others])
    assert spoilt[0][5].isnan().all()
    assert spoilt[3][5].isnan().all()
    assert 0 <= spoilt[2][5].min() <= spoilt[2][5].max() < len(router), "ids index other tensors"


def test_foreign_base_is_left_alone(regime):
    operands, route, _ = draw("top 2")
    x, weight, lora_A, lora_B, router = operands.values()
    base = (x @ weight.T).repeat(1, 2)[:, : len(weight)]  # rows further apart than they are wide
    before = base.clone()
    out = moe_lora_forward.moe_lora(x, base, lora_A, lora_B, router, *route)[0]
    assert torch.equal(base, before)
    peer = reference.moe_lora(x, base, lora_A, lora_B, router, *route)
    truth = reference.moe_lora(*(t.double() for t in (x, base, lora_A, lora_B, router)), *route)
    assert_no_worse(out, peer, truth)


@pytest.mark.parametrize(("regime", "name", "dtypes"), EVERY, indirect=["regime"])
def test_backward_matches_reference(name, dtypes, regime):
    operands, route, aux = draw(name, DTYPES[dtypes])
    x, weight, lora_A, lora_B, router = operands.values()
    scaling, ranks, _, shared_A, renormalize, mask, p, seed = route
    saved = adapter(x, lora_A, router, *route)
    dy = torch.randn(len(x), len(weight), generator=torch.Generator().manual_seed(3))
    dy = dy.to(DEVICE, x.dtype)

    def rest(saved):
        return (scaling, saved, ranks, shared_A, renormalize, mask, p, seed)

    needs = [True] * 4
    got = moe_lora_backward.moe_lora_backward(
        dy, x, weight, lora_A, lora_B, router, scaling, *saved[1:],
        ranks, shared_A, renormalize, mask, p, seed, aux, needs, None,
    )  # fmt: skip
    plain = (dy, x, weight, lora_A, lora_B, router)
    peer = reference.moe_lora_backward(*plain, *rest(saved), aux, needs)
    wide = Adapter(*(t if t.dtype == torch.int64 else t.double() for t in saved))
    truth = reference.moe_lora_backward(*(t.double() for t in plain), *rest(wide), aux, needs)
    for field in peer._fields:
        mine, theirs, exact = (getattr(g, field) for g in (got, peer, truth))
        assert_no_worse(mine, theirs, exact, factor(dtypes))


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_is_needed(wanted):
    operands, route, _ = draw("top 2")
    x, weight, lora_A, lora_B, router = operands.values()
    scaling, ranks, _, shared_A, renormalize, *tail = route
    saved = adapter(x, lora_A, router, *route)
    dy = torch.ones(len(x), 1, device=DEVICE).expand(-1, len(weight))  # as .sum() gives it
    needs = [i == wanted for i in range(4)]
    both = []
    for asked in (needs, [True] * 4):
        both.append(
            moe_lora_backward.moe_lora_backward(
                dy, x, None, lora_A, lora_B, router, scaling, *saved[1:],
                ranks, shared_A, renormalize, *tail, None, asked, None,
            )
        )  # fmt: skip
    for some, need, whole in zip(both[0], needs, both[1], strict=True):
        assert torch.equal(some, whole) if need else some.shape == (0,)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after another")
def test_runs_repeat_bit_for_bit(regime):
    operands, route, _ = draw("top 2", DTYPES["bf16"])
    x, weight, lora_A, lora_B, router = operands.values()
    args = (x, weight, None, lora_A, lora_B, router, *route)
    for one, two in zip(*(moe_lora_forward.moe_lora_linear(*args) for _ in "ab"), strict=True):
        assert torch.equal(one, two)


def test_rows_beyond_two_to_the_31_elements(tmp_path, regime):
    n, i, stride = 132, 24, (1 << 24) - 16
    file = str(tmp_path / "sparse")  # 4 GB, of which 132 rows are touched
    flat = torch.from_file(file, shared=True, size=n * stride, dtype=BF16).to(DEVICE)
    x = flat.as_strided((n, i), (stride, 1))
    generator = torch.Generator().manual_seed(1)
    x.copy_(torch.randn(n, i, generator=generator))
    lora_A, lora_B, router = (
        torch.randn(4, s, generator=generator).to(DEVICE, BF16) for s in (i, 8, i)
    )
    weight, dy = torch.zeros(8, i, dtype=BF16, device=DEVICE), torch.ones(n, 8, device=DEVICE)
    route = (torch.ones(4, device=DEVICE), [1] * 4, 2, False, True, None, 0.0, None)
    results = []
    for rows in (x, x.clone(memory_format=torch.contiguous_format)):
        out, *saved = moe_lora_forward.moe_lora_linear(
            rows, weight, None, lora_A, lora_B, router, *route
        )
        grads = moe_lora_backward.moe_lora_backward(
            dy.to(BF16), rows, weight, lora_A, lora_B, router, route[0], *saved,
            [1] * 4, False, True, None, 0.0, None, None, [True] * 4, None,
        )  # fmt: skip
        results.append((out, *saved, *grads))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)


def test_dropout_draws_the_reference_mask():
    n, d, p = 3, 40, 0.4
    seed = torch.tensor(-5, device=DEVICE)
    out = torch.zeros(n, d, device=DEVICE)
    update = moe_lora_forward.update
    ones = torch.ones(n, 16, device=DEVICE), torch.full((16, d), 1 / 16, device=DEVICE)
    update(None, out, *ones, dropout=launch.as_dropout(p, seed))
    assert torch.equal(out != 0, reference.dropout(torch.ones_like(out), p, seed) != 0)


def test_fisher_matches_reference():
    operands, route, _ = draw("padding")
    x, weight, lora_A, lora_B, router = operands.values()
    scaling, ranks, _, shared_A, renormalize, mask, p, seed = route
    saved = adapter(x, lora_A, router, *route)
    dy = torch.randn(len(x), len(weight), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    offsets = torch.tensor([0, 7, 7, 30, len(x)], device=DEVICE)
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0], device=DEVICE)
    shapes = [(lora_A, lora_B, router), (lora_A[:, 0], lora_B[:, 0], router[:, 0])]
    shapes.append(tuple(t[0, 0] for t in (lora_A, lora_B, router)))
    for like in shapes:

        def run(kernel, wide, like=like):
            dtype = torch.float64 if wide else torch.float32
            buffers = [torch.full_like(t, 0.25, dtype=dtype) for t in like]
            gate = torch.zeros(4, dtype=dtype, device=DEVICE)
            fisher = FisherBuffers(offsets, scale, *buffers, gate)
            kernel(fisher, dtype)
            return (*buffers, gate)

        def mine(fisher, _):
            grads = moe_lora_backward.moe_lora_backward(
                dy, x, weight, lora_A, lora_B, router, scaling, *saved[1:], ranks, shared_A,
                renormalize, mask, p, seed, None, [True] * 4, fisher,
            )  # fmt: skip
            plain = moe_lora_backward.moe_lora_backward(
                dy, x, weight, lora_A, lora_B, router, scaling, *saved[1:], ranks, shared_A,
                renormalize, mask, p, seed, None, [True] * 4, None,
            )  # fmt: skip
            for one, other in zip(grads, plain, strict=True):
                torch.testing.assert_close(one, other)

        def theirs(fisher, dtype):
            wide = [t.to(dtype) for t in (dy, x, weight, lora_A, lora_B, router)]
            known = Adapter(*(t if t.dtype == torch.int64 else t.to(dtype) for t in saved))
            reference.moe_lora_backward(
                *wide, scaling, known, ranks, shared_A, renormalize, mask, p, seed, None,
                [True] * 4, fisher,
            )  # fmt: skip

        triples = zip(run(mine, False), run(theirs, False), run(theirs, True), strict=True)
        for got, peer, truth in triples:
            assert_no_worse(got, peer, truth)
