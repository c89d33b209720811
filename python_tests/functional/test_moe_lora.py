"""moe_lora_linear and moe_lora: against an independently written loop over experts."""

import pytest
import torch
from closeness import assert_no_worse
from torch.nn import functional as F

from floe_kernels import functional as FK
from floe_kernels import reference

CASES = {  # ranks, shared_A
    "one": ([3], False),
    "uneven": ([3, 1, 4, 0, 2], False),
    "equal": ([2, 2, 2], False),
    "shared": ([2, 2, 2, 2], True),
}
EVERY_K = [
    pytest.param(ranks, shared, k, id=f"{name}-k{k}")
    for name, (ranks, shared) in CASES.items()
    for k in range(1, len(ranks) + 1)
]
N, INPUTS, OUTPUTS = 11, 6, 5


def expert_loop(x, weight, bias, lora_A, lora_B, router, ranks, k, scaling, shared, renormalize):
    """The published layer, token by token and expert by expert."""
    rows = []
    for token in x:
        p = (router @ token).softmax(0)
        kept = sorted(range(len(ranks)), key=lambda e: -p[e].item())[:k]
        total = sum(p[e] for e in kept) if renormalize else 1.0
        y = weight @ token + bias
        for e in kept:
            lo = sum(ranks[:e])
            columns = slice(lo, lo + ranks[e])
            down = lora_A if shared else lora_A[columns]
            y = y + p[e] / total * (scaling[columns] * (down @ token)) @ lora_B[columns]
        rows.append(y)
    return torch.stack(rows)


def weights(ranks, shared, dtype=torch.float64, adapter_dtype=None, n=N):
    gen = torch.Generator().manual_seed(len(ranks) * 100 + sum(ranks))

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    adapter = adapter_dtype or dtype
    return {
        "x": draw(n, INPUTS).requires_grad_(),
        "weight": draw(OUTPUTS, INPUTS),
        "bias": draw(OUTPUTS),
        "lora_A": draw(ranks[0] if shared else sum(ranks), INPUTS, dtype=adapter).requires_grad_(),
        "lora_B": draw(sum(ranks), OUTPUTS, dtype=adapter).requires_grad_(),
        "router_weight": draw(len(ranks), INPUTS, dtype=adapter).requires_grad_(),
        "scaling": draw(sum(ranks), dtype=torch.float32),
    }


def trained(w):
    return [w[name] for name in ("x", "lora_A", "lora_B", "router_weight")]


def through_linear(w, **options):
    return FK.moe_lora_linear(**w, **options).out


def through_foreign(w, **options):
    w = dict(w)
    base_out = F.linear(w["x"], w.pop("weight"), w.pop("bias"))
    return FK.moe_lora(base_out=base_out, **w, **options).out


DOORS = {"linear": through_linear, "foreign": through_foreign}


@pytest.fixture(params=DOORS.values(), ids=DOORS.keys())
def door(request):
    return request.param


@pytest.mark.parametrize(("ranks", "shared", "k"), EVERY_K)
def test_equals_expert_loop(door, ranks, shared, k):
    w = weights(ranks, shared)
    out = door(w, ranks=ranks, top_k=k, shared_A=shared)
    args = [w[n] for n in ("x", "weight", "bias", "lora_A", "lora_B", "router_weight")]
    want = expert_loop(*args, ranks, k, w["scaling"].double(), shared, renormalize=k > 1)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(out)
    got_grads = torch.autograd.grad(out, trained(w), cotangent)
    want_grads = torch.autograd.grad(want, trained(w), cotangent)
    for got, wanted in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("renormalize", [True, False], ids=["kept", "all"])
@pytest.mark.parametrize(("ranks", "shared"), CASES.values(), ids=CASES.keys())
def test_gradcheck(door, ranks, shared, renormalize):
    w = weights(ranks, shared, n=4)
    k = min(2, len(ranks))

    def layer(*tensors):
        names = ("x", "lora_A", "lora_B", "router_weight")
        changed = {**w, **dict(zip(names, tensors, strict=True))}
        return door(changed, ranks=ranks, top_k=k, shared_A=shared, renormalize=renormalize)

    assert torch.autograd.gradcheck(layer, trained(w))


def test_reference_differentiates_twice():
    w = weights([2, 1], False, n=3)
    weight, bias = w.pop("weight"), w.pop("bias")

    def layer(x, lora_A, lora_B, router):
        base = F.linear(x, weight, bias)
        rest = (router, w["scaling"], [2, 1], 2, False, True, None, 0.0, None)
        return reference.moe_lora(x, base, lora_A, lora_B, *rest)

    assert torch.autograd.gradgradcheck(layer, trained(w))


def test_double_backward_raises(door):
    w = weights([2, 2], False)
    out = door(w, ranks=[2, 2], top_k=2)
    (grad,) = torch.autograd.grad(out.sum(), w["lora_A"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dropout_spares_the_router(door, p):
    # the same mask applied by hand to lora_A's input; the router reads x as it is
    ranks, seed = [2, 3], torch.tensor(11)
    w = weights(ranks, False)
    out = door(w, ranks=ranks, top_k=2, dropout_p=p, dropout_seed=seed)
    gates = (w["x"] @ w["router_weight"].T).softmax(-1).repeat_interleave(torch.tensor(ranks), 1)
    dropped = reference.dropout(w["x"], p, seed)
    h = w["scaling"] * gates * (dropped @ w["lora_A"].T)
    want = F.linear(w["x"], w["weight"], w["bias"]) + h @ w["lora_B"]
    torch.testing.assert_close(out, want)
    cotangent = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, trained(w), cotangent),
        torch.autograd.grad(want, trained(w), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_masked_tokens_get_no_expert_and_leak_nothing(door):
    ranks = [2, 3]
    w, mask = weights(ranks, False), torch.arange(N) % 3 != 0
    clean = door(w, ranks=ranks, token_mask=mask)
    base = F.linear(w["x"], w["weight"], w["bias"])
    torch.testing.assert_close(clean[~mask], base[~mask])
    cotangent = torch.randn_like(clean)
    want = torch.autograd.grad(clean, trained(w)[1:], torch.where(mask[:, None], cotangent, 0))
    poisoned = dict(w)
    with torch.no_grad():
        poisoned["x"] = torch.where(mask[:, None], w["x"], torch.nan).requires_grad_()
    out = door(poisoned, ranks=ranks, token_mask=mask)
    torch.testing.assert_close(out[mask], clean[mask])
    bad = torch.where(mask[:, None], cotangent, torch.nan)
    got = torch.autograd.grad(out, trained(poisoned)[1:], bad)
    for g, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(g, wanted)


def test_a_bad_token_spoils_its_own_row_only(door):
    w = weights([2, 3], False)
    clean = door(w, ranks=[2, 3])
    with torch.no_grad():
        w["x"][4] = torch.inf
    out = door(w, ranks=[2, 3])
    rest = torch.arange(N) != 4
    torch.testing.assert_close(out[rest], clean[rest])
    assert not out[4].isfinite().any()


def test_aux_gradient_is_injected(door):
    ranks, mask = [2, 3, 1], torch.arange(N) < 8
    w, coefs = weights(ranks, False), torch.tensor([0.7, 0.3])
    out = door(w, ranks=ranks, aux_coefs=coefs, token_mask=mask)
    got = torch.autograd.grad(out, trained(w), torch.zeros_like(out))
    logits = w["x"] @ w["router_weight"].T
    experts = FK.topk_softmax(logits, 2).experts
    loss = 0.7 * FK.load_balance_loss(logits, experts, token_mask=mask)
    loss = loss + 0.3 * FK.router_z_loss(logits, token_mask=mask)
    for g, tensor in zip(got, trained(w), strict=True):
        (want,) = torch.autograd.grad(loss, tensor, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-7)  # the coefficients are float32


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(door, dtype, adapter_dtype):
    ranks, k = [3, 1, 4], 2
    w = weights(ranks, False, dtype, adapter_dtype, n=64)
    out = door(w, ranks=ranks, top_k=k)
    assert out.dtype == dtype
    experts = FK.moe_lora_linear(**w, ranks=ranks, top_k=k).experts

    def plain(w):  # autograd of six lines of PyTorch, given the same experts
        logits = w["x"].to(torch.promote_types(w["x"].dtype, torch.float32)) @ (
            w["router_weight"].to(torch.promote_types(w["x"].dtype, torch.float32)).T
        )
        gates = torch.zeros_like(logits).scatter(1, experts, logits.gather(1, experts).softmax(-1))
        columns = gates.repeat_interleave(torch.tensor(ranks), 1).to(w["x"].dtype)
        z = w["x"] @ w["lora_A"].to(w["x"].dtype).T
        h = columns * w["scaling"].to(w["x"].dtype) * z
        return F.linear(w["x"], w["weight"], w["bias"]) + h @ w["lora_B"].to(w["x"].dtype)

    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in w.items()}
    cotangent = torch.randn(out.shape).to(dtype)
    truth = plain(wide)
    peer = plain(w)
    assert_no_worse(out.detach(), peer.detach(), truth.detach())
    got = torch.autograd.grad(out, trained(w), cotangent)
    peer = torch.autograd.grad(peer, trained(w), cotangent)
    truth = torch.autograd.grad(truth, trained(wide), cotangent.double())
    for g, p, t in zip(got, peer, truth, strict=True):
        assert_no_worse(g, p, t)


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(door, n):
    w = weights([2, 3], False, n=n)
    out = door(w, ranks=[2, 3])
    assert out.shape == (n, OUTPUTS)
    grads = torch.autograd.grad(out.sum(), trained(w))
    assert all(g.shape == t.shape for g, t in zip(grads, trained(w), strict=True))
    if n == 0:
        assert not any(g.any() for g in grads)


def test_no_expert_is_the_base(door):
    w = weights([], False) | {"scaling": None}
    torch.testing.assert_close(door(w, ranks=[], top_k=7), F.linear(w["x"], w["weight"], w["bias"]))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_reads_any_layout(door, layout):
    w = weights([2, 3], False)
    with torch.no_grad():
        x = {
            "expanded": w["x"][:1].expand(N, -1),
            "transposed": w["x"].T.contiguous().T,
            "sliced": torch.cat([w["x"], w["x"]], 1)[:, :INPUTS],
        }[layout]
    strange = {**w, "x": x.detach().requires_grad_(), "weight": w["weight"].T.contiguous().T}
    plain = {**w, "x": x.detach().clone().contiguous().requires_grad_()}
    outs = [door(v, ranks=[2, 3]) for v in (strange, plain)]
    torch.testing.assert_close(*outs)
    grads = [
        torch.autograd.grad(out.sum(), trained(v))  # an expanded cotangent
        for out, v in zip(outs, (strange, plain), strict=True)
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "router_weight"])
def test_only_what_is_asked_for(door, name):
    w = weights([2, 3], False)
    (want,) = torch.autograd.grad(door(w, ranks=[2, 3]).sum(), w[name])
    alone = {n: t.detach().requires_grad_(n == name) for n, t in w.items()}
    out = door(alone, ranks=[2, 3])
    out.sum().backward()
    torch.testing.assert_close(alone[name].grad, want)
    assert all(t.grad is None for n, t in alone.items() if n != name)


def test_run_to_run_bits():
    w = weights([8] * 8, False, torch.bfloat16, n=257)
    runs = []
    for _ in range(2):
        out = FK.moe_lora_linear(**w, ranks=[8] * 8).out
        runs.append([out, *torch.autograd.grad(out.sum(), trained(w))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_registration(shared, requires_grad):
    ranks = [2, 2]
    w = weights(ranks, shared, torch.float32)
    for tensor in trained(w):
        tensor.requires_grad_(requires_grad)
    fisher = FK.FisherBuffers(
        torch.tensor([0, 4, N]), torch.ones(2), torch.zeros_like(w["lora_A"]), torch.zeros(4),
        torch.zeros(()), torch.zeros(2),
    )  # fmt: skip
    shared_args = [
        *(w[n] for n in ("lora_A", "lora_B", "router_weight", "scaling")), ranks, 2, shared, True,
        torch.arange(N) > 2, 0.25, torch.tensor(5), torch.ones(2), *fisher,
    ]  # fmt: skip
    base_out = torch.randn(N, OUTPUTS)
    torch.library.opcheck(
        torch.ops.floe.moe_lora_linear.default, (w["x"], w["weight"], w["bias"], *shared_args)
    )
    torch.library.opcheck(torch.ops.floe.moe_lora.default, (w["x"], base_out, *shared_args))


GOOD = {"ranks": [2, 3], "top_k": 2}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"top_k": 3}, r"top_k must be in 1\.\.E = 1\.\.2, got 3"),
        ({"top_k": 0}, r"top_k must be in 1\.\.E = 1\.\.2, got 0"),
        ({"ranks": [2, 2]}, r"lora_A must be \(4, 6\) from ranks .*, got \(5, 6\)"),
        ({"ranks": [6, -1]}, r"ranks must not be negative, got \[6, -1\]"),
        ({"shared_A": True}, r"with shared_A all experts have one rank, got \[2, 3\]"),
        ({"lora_B": torch.zeros(5, 4)}, r"lora_B must be \(5, 5\) .*, got \(5, 4\)"),
        ({"router_weight": torch.zeros(3, 6)}, r"router_weight must be \(2, 6\) .*, got \(3, 6\)"),
        ({"lora_A": torch.zeros(5, 6).half()}, "must share one floating point dtype"),
        ({"weight": torch.zeros(5, 7)}, r"weight must be \(O, I\) with I = 6.*, got \(5, 7\)"),
        ({"weight": torch.zeros(5, 6)}, r"weight must have the dtype of x, torch.float64"),
        ({"scaling": torch.zeros(4)}, r"scaling must be \(5,\) without a gradient, got \(4,\)"),
        ({"scaling": torch.zeros(5, requires_grad=True)}, "got .* requiring grad"),
        ({"token_mask": torch.ones(3, dtype=torch.bool)}, r"one element per token, 11, got .*\(3,"),
        ({"token_mask": torch.ones(11)}, r"token_mask must be bool .* got torch.float32"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.5}, r"dropout_p > 0 needs a dropout_seed"),
        ({"aux_coefs": torch.ones(3)}, r"aux_coefs must be \(2,\), got \(3,\)"),
    ],
)
def test_says_what_is_wrong(change, says):
    with pytest.raises(ValueError, match=says):
        FK.moe_lora_linear(**{**weights([2, 3], False), **GOOD, **change})


def test_a_base_that_trains_is_refused_by_name():
    w = weights([2, 3], False)
    w["bias"].requires_grad_()
    with pytest.raises(ValueError, match=r"bias is frozen here.*moe_lora\(x, base_out"):
        FK.moe_lora_linear(**w, **GOOD)


def test_base_out_must_fit():
    w = weights([2, 3], False)
    del w["weight"], w["bias"]
    with pytest.raises(ValueError, match=r"leading sizes of x, \(11,\), got \(3, 5\)"):
        FK.moe_lora(base_out=torch.zeros(3, 5), **w, **GOOD)


@pytest.mark.parametrize("shape", [(3, 0, 4), (2, 3, 0), (2, 3, 5, 4)], ids=str)
def test_no_inputs_or_no_outputs(shape):
    *lead, inputs, outputs = shape
    x = torch.randn(*lead, inputs, requires_grad=True)
    base = torch.randn(*lead, outputs)
    a, b = torch.randn(4, inputs, requires_grad=True), torch.randn(4, outputs, requires_grad=True)
    router = torch.randn(2, inputs, requires_grad=True)
    # what is not computed must be zero, not what memory held before
    junk = [torch.full((4096,), 1e6) for _ in range(64)]
    del junk
    out = FK.moe_lora(x, base, a, b, router, ranks=[2, 2]).out
    out.sum().backward()
    if not inputs:
        assert torch.equal(out, base)
        assert torch.equal(b.grad, torch.zeros(4, outputs))
    if not outputs:
        assert torch.equal(x.grad, torch.zeros_like(x))
        assert not router.grad.any()


def test_half_adapters_on_bfloat16_lose_nothing():
    x = torch.randn(64, 32).bfloat16()
    a, b, router = (torch.randn(*s).half() for s in ((24, 32), (24, 16), (3, 32)))
    out = FK.moe_lora(x, torch.zeros(64, 16).bfloat16(), a, b, router, ranks=[8] * 3, top_k=2)
    exact = x.double() @ router.double().T
    assert_no_worse(out.logits, x.float() @ router.float().T, exact, terms=32)


def test_a_shared_A_takes_an_empty_batch():
    x, a = torch.randn(0, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    more = (a, torch.randn(6, 4), torch.randn(3, 6))
    FK.moe_lora(x, torch.randn(0, 4), *more, ranks=[2] * 3, shared_A=True).out.sum().backward()
    assert torch.equal(a.grad, torch.zeros(2, 6))
