"""The C++ kernels of the adapted linear against the reference, on every instruction set."""

import functools

import closeness
import pytest
import torch

from floe_kernels import reference
from floe_kernels.reference.moe_lora import Adapter, FisherBuffers, adapter

_info = pytest.importorskip("floe_kernels._info", reason="the native extensions are not built")
OPS = torch.ops.floe
# in float64 the reference is the truth: two orders of a sum of that many terms may differ
assert_no_worse = functools.partial(closeness.assert_no_worse, terms=1100)
if not torch._C._dispatch_has_kernel_for_dispatch_key("floe::moe_lora_linear", "CPU"):
    pytest.skip("the operator has no C++ kernel in this build", allow_module_level=True)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# few tokens, and many columns, run grouped; the others dense
# what each case is for: (tokens, inputs, outputs, ranks, top_k, options)
CASES = {
    "nothing": (0, 24, 16, [4, 4], 1, {}),
    "one token": (1, 24, 16, [4, 4], 2, {}),
    "top 1": (37, 80, 40, [4, 4, 4], 1, {}),
    "every tile ragged": (71, 141, 115, [7, 9, 5, 11], 2, {}),
    "uneven": (33, 40, 24, [1, 0, 17, 5], 2, {}),
    "all kept": (20, 33, 19, [3, 3, 3], 3, {}),
    "padding": (45, 40, 24, [4, 4, 4], 2, {"mask": True}),
    "dropout": (45, 83, 24, [4, 4, 4], 2, {"dropout_p": 0.3}),
    "aux": (45, 40, 24, [4, 4, 4], 2, {"aux": True, "mask": True}),
    "renormalized 1": (21, 40, 24, [4, 4, 4], 1, {"renormalize": True}),
    "plain 2": (21, 40, 24, [4, 4, 4], 2, {"renormalize": False, "aux": True}),
    "plain 2, more tokens": (49, 40, 24, [4, 4, 4], 2, {"renormalize": False, "aux": True}),
    "all kept, more tokens": (40, 33, 19, [3, 3, 3], 3, {"dropout_p": 0.1}),
    "shared": (37, 40, 24, [5, 5, 5], 3, {"shared_A": True}),
    "shared 2": (37, 40, 24, [4, 4, 4], 2, {"shared_A": True, "dropout_p": 0.5, "mask": True}),
    "many experts": (300, 40, 24, [2] * 70, 2, {"mask": True, "dropout_p": 0.2}),
    "no columns": (9, 40, 24, [0, 0], 1, {}),
    "several blocks": (530, 1100, 200, [16, 16, 16, 16], 2, {}),
    "large R": (90, 130, 70, [64] * 16, 2, {"mask": True, "aux": True}),
    "long rows": (70, 1100, 200, [8] * 16, 2, {}),
    "large R, one hot expert": (90, 130, 70, [64, 0, 900, 64], 1, {"hot": True}),
}
DTYPES = {
    "fp64": (FP64, FP64),
    "fp64 fp32": (FP64, FP32),
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "bf16 fp32": (BF16, FP32),
    "fp16": (FP16, FP16),
    "fp16 fp32": (FP16, FP32),
    "fp32 bf16": (FP32, BF16),
}
EVERY = [(name, dtypes) for name in CASES for dtypes in ("fp32", "bf16")]
EVERY += [
    (name, dtypes)
    for name in ("every tile ragged", "dropout", "many experts", "shared 2")
    for dtypes in DTYPES
    if dtypes not in ("fp32", "bf16")
]


def draw(name, dtypes="fp32"):
    """Return the operands of a case, the arguments that follow them, and aux_coefs."""
    n, i, o, ranks, k, options = CASES[name]
    dtype, weight_dtype = DTYPES[dtypes]
    generator = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    shared_A, columns = options.get("shared_A", False), sum(ranks)
    router = randn(len(ranks), i).to(weight_dtype) / i**0.5
    x = randn(n, i).to(dtype)
    if options.get("hot"):
        x += 3 * torch.nn.functional.normalize(router[2].float(), dim=0).to(dtype) * i**0.5
    for _ in range(50 if k < len(ranks) else 0):  # no choice of experts may be a close call
        best = (x.double() @ router.double().T).topk(k + 1).values
        close = best[:, -2] - best[:, -1] < 0.002
        x[close] = randn(int(close.sum()), i).to(dtype)
    operands = {
        "x": x,
        "weight": randn(o, i).to(dtype) / i**0.5,
        "lora_A": randn(ranks[0] if shared_A else columns, i).to(weight_dtype) / i**0.5,
        "lora_B": randn(columns, o).to(weight_dtype) / 4,
        "router": router,
    }
    mask = torch.rand(n, generator=generator) < 0.7 if options.get("mask") else None
    if mask is not None:
        operands["x"][~mask] = float("nan")  # padding may hold anything
    p = options.get("dropout_p", 0.0)
    seed = torch.tensor(-(2**62) + 12345) if p else None
    aux = torch.tensor([0.3, 0.2]) if options.get("aux") else None
    scaling = torch.rand(columns, generator=generator) + 0.5
    route = (scaling, ranks, k, shared_A, options.get("renormalize", k > 1), mask, p, seed)
    return operands, route, aux


def random_gradient(operands):
    shape = len(operands["x"]), len(operands["weight"])
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(operands["x"].dtype)


NO_FISHER = (None,) * 6


def forward(operands, route, aux, bias=None):
    x, weight, lora_A, lora_B, router = operands.values()
    return OPS.moe_lora_linear(x, weight, bias, lora_A, lora_B, router, *route, aux, *NO_FISHER)


def backward(grad_out, operands, route, aux, saved, needs=(True,) * 4, base=True, fisher=None):
    x, weight, lora_A, lora_B, router = operands.values()
    scaling, ranks, _, shared_A, renormalize, mask, p, seed = route
    return OPS.moe_lora_backward(
        grad_out, x, weight if base else None, lora_A, lora_B, router, scaling,
        saved.z, saved.experts, saved.gates, saved.logits, ranks, shared_A, renormalize, mask,
        p, seed, aux, list(needs), *(fisher or NO_FISHER),
    )  # fmt: skip


def expected(grad_out, operands, route, aux, saved, wide=False, base=True, fisher=None):
    """The reference's gradients, of the operands in float64 where ``wide``."""
    x, weight, lora_A, lora_B, router = operands.values()
    scaling, ranks, _, shared_A, renormalize, mask, p, seed = route
    if wide:
        x, weight, lora_A, lora_B, router, grad_out = (
            t.double() for t in (x, weight, lora_A, lora_B, router, grad_out)
        )
    return reference.moe_lora_backward(
        grad_out, x, weight if base else None, lora_A, lora_B, router, scaling, saved, ranks,
        shared_A, renormalize, mask, p, seed, aux, (True,) * 4, fisher,
    )  # fmt: skip


def saved_by_reference(operands, route, wide=False):
    x, _, lora_A, _, router = (t.double() if wide else t for t in operands.values())
    return adapter(x, lora_A, router, *route)


@pytest.mark.parametrize(("name", "dtypes"), EVERY)
def test_forward_matches_reference(isa, name, dtypes):
    operands, route, aux = draw(name, dtypes)
    x, weight, _, lora_B, _ = operands.values()
    bias = torch.linspace(-1, 1, len(weight)).to(x.dtype)
    out, *saved = forward(operands, route, aux, bias)
    got = Adapter(None, *saved)
    peer, truth = (saved_by_reference(operands, route, wide) for wide in (False, True))
    assert torch.equal(got.experts, peer.experts)
    for field in ("gates", "logits"):
        assert_no_worse(getattr(got, field), getattr(peer, field), getattr(truth, field))
    kept = truth.h != 0  # a kernel need not compute z for experts that nobody kept
    if not route[3]:
        zero = torch.zeros(())
        z = [torch.where(kept, a.z, zero.to(a.z.dtype)) for a in (got, peer, truth)]
        assert_no_worse(*z)
    rows = slice(None) if route[5] is None else route[5]  # the base's own output of padding
    peer_out = torch.nn.functional.linear(x, weight, bias).addmm_(peer.h, lora_B.to(x.dtype))
    wide = [t.double() for t in (x, weight, bias, lora_B)]
    true_out = torch.nn.functional.linear(*wide[:3]) + truth.h @ wide[3]
    assert_no_worse(out[rows], peer_out[rows], true_out[rows])


@pytest.mark.parametrize(("name", "dtypes"), EVERY)
def test_backward_matches_reference(isa, name, dtypes):
    operands, route, aux = draw(name, dtypes)
    saved = saved_by_reference(operands, route)
    grad_out = random_gradient(operands)
    if route[5] is not None:
        operands["weight"].zero_()  # the base's own gradient of padding is not ours
        grad_out[~route[5]] = 1e3
    got = backward(grad_out, operands, route, aux, saved)
    peer = expected(grad_out, operands, route, aux, saved)
    true_saved = saved_by_reference(operands, route, wide=True)
    truth = expected(grad_out, operands, route, aux, true_saved, wide=True)
    for ours, theirs, true in zip(got, peer, truth, strict=True):
        assert_no_worse(ours, theirs, true)


@pytest.mark.parametrize("name", ["every tile ragged", "dropout", "large R", "shared 2"])
def test_needs_and_base_are_heeded(isa, name):
    operands, route, aux = draw(name)
    saved = saved_by_reference(operands, route)
    grad_out = random_gradient(operands)
    whole = backward(grad_out, operands, route, aux, saved, base=False)
    peer = expected(grad_out, operands, route, aux, saved, base=False)
    torch.testing.assert_close(whole[0], peer.x)
    for wanted in range(4):
        needs = [i == wanted for i in range(4)]
        got = backward(grad_out, operands, route, aux, saved, needs, base=False)
        for i, gradient in enumerate(got):
            if i == wanted:
                assert torch.equal(gradient, whole[i])
            else:
                assert gradient.shape == (0,)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_foreign_base_is_left_alone(isa, dtype):
    operands, route, aux = draw("every tile ragged")
    x, weight, lora_A, lora_B, router = operands.values()
    base = (x @ weight.T).to(dtype).repeat(1, 2)[:, : len(weight)]  # rows apart
    before = base.clone()
    out = OPS.moe_lora(x, base, lora_A, lora_B, router, *route, aux, *NO_FISHER)[0]
    assert torch.equal(base, before)
    h = saved_by_reference(operands, route).h
    true_h = saved_by_reference(operands, route, wide=True).h
    assert_no_worse(out, base + (h @ lora_B).to(dtype), base.double() + true_h @ lora_B.double())


@pytest.mark.parametrize("name", ["every tile ragged", "large R", "many experts"])
def test_a_bad_token_spoils_its_own_row_only(isa, name):
    operands, route, aux = draw(name)
    route = (*route[:5], None, 0.0, None)  # no mask, no dropout
    operands["x"] = torch.nan_to_num(operands["x"])
    clean = forward(operands, route, aux)[0]
    operands["x"][5, 3] = float("nan")
    spoilt = forward(operands, route, aux)[0]
    others = torch.arange(len(clean)) != 5
    assert torch.equal(spoilt[others], clean[others])
    assert spoilt[5].isnan().all()


@pytest.mark.parametrize(
    "name", ["several blocks", "long rows", "large R", "many experts", "dropout"]
)
def test_threads_do_not_change_a_bit(name):
    operands, route, aux = draw(name, "bf16")
    # without a base: how torch's own product sums is not ours to promise
    x, weight, lora_A, lora_B, router = operands.values()
    base, before = torch.zeros(len(x), len(weight), dtype=x.dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out, *rest = OPS.moe_lora(x, base, lora_A, lora_B, router, *route, aux, *NO_FISHER)
            saved = Adapter(None, *rest)
            gradients = backward(base + 1, operands, route, aux, saved, base=False)
            results.append([out, *rest, *gradients])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["every tile ragged", "padding", "dropout", "shared 2", "large R"])
@pytest.mark.parametrize("shape", ["element", "rank", "matrix"])
def test_fisher_matches_reference(isa, name, shape):
    operands, route, aux = draw(name)
    saved = saved_by_reference(operands, route)
    _, _, lora_A, lora_B, router = operands.values()
    grad_out = random_gradient(operands)
    offsets = torch.tensor([0, 0, 7, 9, len(operands["x"])])

    def buffers(dtype):
        size = {"element": 2, "rank": 1, "matrix": 0}[shape]
        like = [torch.ones(t.shape[:size], dtype=dtype) for t in (lora_A, lora_B, router)]
        scale = torch.tensor([1.0, 2.0, 0.5, 3.0]) if shape == "rank" else torch.tensor(2.0)
        return FisherBuffers(offsets, scale, *like, torch.zeros(4, dtype=dtype))

    got, peer, truth = buffers(FP32), buffers(FP32), buffers(FP64)
    with_fisher = backward(grad_out, operands, route, aux, saved, base=False, fisher=got)
    plain = expected(grad_out, operands, route, aux, saved, base=False, fisher=peer)
    true_saved = saved_by_reference(operands, route, wide=True)
    true = expected(grad_out, operands, route, aux, true_saved, True, base=False, fisher=truth)

    # a buffer of one number has but one error, which may be zero by luck: compare all as one
    def joined(buffers):
        return torch.cat(
            [(b / t.abs().max()).flatten() for b, t in zip(buffers[2:], truth[2:], strict=True)]
        )

    assert_no_worse(joined(got).float(), joined(peer).float(), joined(truth))
    for ours, theirs, exact in zip(with_fisher, plain, true, strict=True):
        assert_no_worse(ours, theirs, exact)
