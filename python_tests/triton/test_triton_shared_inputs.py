"""The Triton kernels of linears that take one x, against the reference."""

import pytest
import torch
from closeness import assert_no_worse

from floe_kernels.reference import shared_inputs as reference
from floe_kernels.reference import topk_softmax
from floe_kernels.reference.moe_lora import Adapter
from floe_kernels.reference.shared_inputs import Sibling
from floe_kernels.triton import moe_lora_backward, moe_lora_forward, shared_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# what each case is for: (tokens, outputs and ranks of each linear, dtypes, masked?)
CASES = {
    "one token": (1, [(24, [4, 3, 1]), (9, [2, 2, 2])], (FP16, FP16), False),
    "three of unlike ranks": (
        70, [(24, [4, 4, 3]), (33, [5, 0, 2]), (17, [1, 1])], (FP16, FP16), True,
    ),
    "float32 adapters": (
        70, [(24, [4, 4, 3]), (33, [5, 0, 2]), (17, [1, 1, 1])], (BF16, FP32), True,
    ),
}  # fmt: skip
ALONE = {  # what no kernel shares, but the operator must still compute
    "float32": {"dtypes": (FP32, FP32)},
    "four": {"sizes": [(8, [2, 2])] * 4},
    "dropout": {"dropout_p": 0.25},
    "unlike routing": {"top_k": [2, 1]},
}


@pytest.fixture(params=[0, 4096], ids=["whole", "split"])
def split(request, monkeypatch):
    monkeypatch.setattr(shared_inputs, "SPLIT_BELOW", request.param)


def draw(n, sizes, dtypes=(FP16, FP16), masked=False, dropout_p=0.0, top_k=None):
    generator = torch.Generator().manual_seed(n)

    def randn(*shape, dtype=dtypes[1]):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x, siblings = randn(n, 40, dtype=dtypes[0]), []
    for s, (o, ranks) in enumerate(sizes):
        r, e = sum(ranks), len(ranks)
        kept = 2 if top_k is None else top_k[s]
        siblings.append(
            Sibling(
                randn(o, 40, dtype=dtypes[0]), None if s else randn(o, dtype=dtypes[0]),
                randn(r, 40), randn(r, o), randn(e, 40),
                torch.linspace(0.5, 1.5, r, device=DEVICE), ranks, kept, False, kept > 1,
                dropout_p, torch.tensor(s + 1, device=DEVICE) if dropout_p else None,
                torch.tensor([0.3, 0.2], device=DEVICE) if s else None,
            )
        )  # fmt: skip
    mask = torch.arange(n, device=DEVICE) % 4 != 0 if masked else None
    return x, siblings, mask


def widen(siblings):
    names = ("weight", "bias", "lora_A", "lora_B", "router_weight")
    return [
        s._replace(**{m: getattr(s, m).double() for m in names if getattr(s, m) is not None})
        for s in siblings
    ]


def factor(x):
    """The interpreter cuts bfloat16 off where hardware rounds: its errors are twice as large."""
    return 4.0 if x.dtype == BF16 and DEVICE == "cpu" else 2.0


def check(x, siblings, mask):
    count = len(siblings)
    rows = slice(None) if mask is None else mask  # the base's own output of padding is not ours
    got = shared_inputs.moe_lora_shared_linear(x, siblings, mask)
    peers = reference.shared_adapters(x, siblings, mask)
    truths = reference.shared_adapters(x.double(), widen(siblings), mask)
    for s, (peer, truth) in enumerate(zip(peers, truths, strict=True)):
        z, experts, gates, logits = got[count + 4 * s : count + 4 * s + 4]
        # the experts are compared by value: near-equal logits may change places between two sums
        assert torch.equal(experts, peer.experts)
        assert_no_worse(z, peer.z, truth.z, factor(x))
        assert_no_worse(logits, peer.logits, truth.logits, factor(x))
        own = siblings[s]
        # of the kernel's own logits: a softmax multiplies their rounding by their differences
        routed = [
            topk_softmax(wide, own.top_k, own.renormalize)[0] for wide in (logits, logits.double())
        ]
        if mask is not None:
            routed = [torch.where(mask[:, None], gate, 0) for gate in routed]
        assert_no_worse(gates, *routed)
        peer_out = torch.nn.functional.linear(x, own.weight, own.bias)
        peer_out = peer_out.addmm_(peer.h, own.lora_B.to(x.dtype))
        exact = widen([own])[0]
        true_out = torch.nn.functional.linear(x.double(), exact.weight, exact.bias)
        true_out += truth.h @ exact.lora_B
        assert_no_worse(got[s][rows], peer_out[rows], true_out[rows], factor(x))
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(len(x), len(s.weight), generator=generator) for s in siblings]
    dys = [dy.to(DEVICE, x.dtype) for dy in dys]
    saved = [Adapter(a.h, a.z.contiguous(), *a[2:4], a.logits.contiguous()) for a in peers]
    wide = [Adapter(*(t if t.dtype == torch.int64 else t.double() for t in a)) for a in saved]
    needs = [True] * (1 + 3 * count)
    grads = shared_inputs.moe_lora_shared_backward(dys, x, siblings, saved, mask, needs)
    peer = reference.moe_lora_shared_backward(dys, x, siblings, saved, mask, needs)
    doubled = [dy.double() for dy in dys]
    truth = reference.moe_lora_shared_backward(
        doubled, x.double(), widen(siblings), wide, mask, needs
    )
    for mine, theirs, exact in zip(grads, peer, truth, strict=True):
        assert_no_worse(mine, theirs, exact, factor(x))


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name):
    n, sizes, dtypes, masked = CASES[name]
    x, siblings, mask = draw(n, sizes, dtypes, masked)
    assert shared_inputs.share_kernels(x, siblings)
    if masked:  # a padding row may hold NaN
        x[0] = float("nan")
        finite = torch.where(mask[:, None], x, 0)
        for spoilt, clean in zip(
            shared_inputs.moe_lora_shared_linear(x, siblings, mask)[len(sizes) :],
            shared_inputs.moe_lora_shared_linear(finite, siblings, mask)[len(sizes) :],
            strict=True,
        ):
            assert torch.equal(spoilt, clean)
        x = finite
    check(x, siblings, mask)


@pytest.mark.parametrize("name", ALONE)
def test_what_no_kernel_shares(name):
    x, siblings, mask = draw(**{"n": 20, "sizes": [(8, [2, 2]), (12, [3, 1])], **ALONE[name]})
    assert not shared_inputs.share_kernels(x, siblings)
    count = len(siblings)
    got = shared_inputs.moe_lora_shared_linear(x, siblings, mask)
    saved = [Adapter(got[i], *got[i : i + 4]) for i in range(count, 5 * count, 4)]
    dys = [torch.ones(20, len(s.weight), dtype=x.dtype, device=DEVICE) for s in siblings]
    grads = shared_inputs.moe_lora_shared_backward(
        dys, x, siblings, saved, mask, [True] * (1 + 3 * count)
    )
    grad_x = 0
    for i, (s, dy) in enumerate(zip(siblings, dys, strict=True)):
        out, *rest = moe_lora_forward.moe_lora_linear(x, *s[:10], mask, *s[10:12])
        for mine, alone in zip((got[i], *saved[i][1:]), (out, *rest), strict=True):
            assert torch.equal(mine, alone)
        own = moe_lora_backward.moe_lora_backward(
            dy, x, s.weight, s.lora_A, s.lora_B, s.router_weight, s.scaling, *rest, s.ranks,
            False, s.renormalize, mask, *s[10:], [True] * 4, None,
        )  # fmt: skip
        grad_x = grad_x + own.x
        for mine, alone in zip(grads[1 + 3 * i : 4 + 3 * i], own[1:], strict=True):
            assert torch.equal(mine, alone)
    assert torch.equal(grads[0], grad_x)


@pytest.mark.parametrize("wanted", range(7))
def test_only_what_is_needed(wanted):
    x, siblings, mask = draw(20, [(8, [2, 2]), (12, [3, 1])])
    saved = reference.shared_adapters(x, siblings, mask)
    dys = [torch.ones(20, 1, device=DEVICE).expand(-1, len(s.weight)) for s in siblings]
    both = [
        shared_inputs.moe_lora_shared_backward(dys, x, siblings, saved, mask, needs)
        for needs in ([i == wanted for i in range(7)], [True] * 7)
    ]
    for i, (some, whole) in enumerate(zip(*both, strict=True)):
        assert torch.equal(some, whole) if i == wanted else some.shape == (0,)
