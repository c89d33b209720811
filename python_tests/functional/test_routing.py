"""topk_softmax: every kernel against reference.routing."""

import pytest
import torch
from closeness import assert_no_worse

from floe_kernels import functional as FK
from floe_kernels import reference
from floe_kernels.triton import routing as triton_routing

GPU = "cuda" if torch.cuda.is_available() else "cpu"


def triton_topk(logits, k, renormalize=None):
    return triton_routing.topk_softmax(logits, k, k > 1 if renormalize is None else renormalize)


KERNELS = {
    "public-cpu": (FK.topk_softmax, "cpu"),
    "public-gpu": (FK.topk_softmax, GPU),
    "triton": (triton_topk, GPU),  # interpreted where there is no GPU
}
# (N, E, K): nothing, one of everything, all kept, the common case, every block ragged
SHAPES = [(0, 4, 2), (1, 1, 1), (7, 5, 5), (33, 8, 2), (257, 63, 3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=KERNELS.values(), ids=KERNELS.keys())
def kernel(request):
    return request.param


def scores(n, e, dtype=torch.float32, device="cpu"):
    return torch.randn(n, e, generator=torch.Generator().manual_seed(n * e)).to(device, dtype)


@pytest.mark.parametrize("renormalize", [True, False], ids=["kept", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "e", "k"), SHAPES)
def test_matches_reference(kernel, n, e, k, dtype, renormalize):
    topk_softmax, device = kernel
    z = scores(n, e, dtype, device)
    gates, experts = topk_softmax(z, k, renormalize=renormalize)
    peer_gates, peer_experts = reference.topk_softmax(z, k, renormalize)
    assert torch.equal(experts, peer_experts)
    truth = reference.topk_softmax(z.double(), k, renormalize)[0]
    assert_no_worse(gates, peer_gates, truth, terms=e)


def test_renormalizes_only_above_one(kernel):
    topk_softmax, device = kernel
    z = scores(9, 4, torch.float64, device)
    torch.testing.assert_close(topk_softmax(z, 2)[0].sum(-1), torch.ones_like(z[:, 0]))
    torch.testing.assert_close(topk_softmax(z, 1)[0], z.softmax(-1).amax(-1, keepdim=True))


def test_ties_keep_index_order(kernel):
    topk_softmax, device = kernel
    _, experts = topk_softmax(torch.zeros(3, 6, device=device), 4)
    assert experts.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's NumPy
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_infinite_scores_keep_distinct_experts(kernel, dtype):
    """A row of nothing but -inf has NaN gates, and still names K different experts."""
    topk_softmax, device = kernel
    low, high = -torch.inf, torch.inf
    rows = [[low] * 6, [low, low, 1.0, low, 2.0, low], [low, high, low, low, 0.0, low]]
    z = torch.tensor(rows, dtype=dtype, device=device)
    for renormalize in (True, False):
        gates, experts = topk_softmax(z, 4, renormalize=renormalize)
        want_gates, want = reference.topk_softmax(z, 4, renormalize)
        assert experts.tolist() == want.tolist() == [[0, 1, 2, 3], [4, 2, 0, 1], [1, 4, 0, 2]]
        torch.testing.assert_close(gates, want_gates, equal_nan=True)


def test_reads_any_layout(kernel):
    topk_softmax, device = kernel
    wide = scores(16, 16, device=device)
    for z in (wide[:, ::2], wide.T, wide[::3]):
        torch.testing.assert_close(topk_softmax(z, 2), topk_softmax(z.contiguous(), 2))


@pytest.mark.parametrize("renormalize", [True, False], ids=["kept", "all"])
def test_gradients(renormalize):
    def gates(z):
        return FK.topk_softmax(z, 3, renormalize=renormalize).gates

    z = scores(4, 6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gates, z)
    assert torch.autograd.gradgradcheck(gates, z)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_registration(requires_grad):
    z = scores(5, 7, device=GPU).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.floe.topk_softmax.default, (z, 3, True))


def test_load_balance_loss():
    z = scores(50, 4, torch.float64).requires_grad_()
    experts = FK.topk_softmax(z, 2).experts
    load = torch.stack([(experts == e).sum() for e in range(4)]) / 100
    torch.testing.assert_close(
        FK.load_balance_loss(z, experts), 4 * (load * z.softmax(-1).mean(0)).sum()
    )
    assert torch.autograd.gradcheck(lambda z: FK.load_balance_loss(z, experts), z)
    assert torch.autograd.gradcheck(FK.router_z_loss, z)


def test_padding_leaves_the_losses():
    z, mask = scores(20, 4), torch.arange(20) < 15
    experts = FK.topk_softmax(z, 2).experts
    z[15:] = float("nan")
    torch.testing.assert_close(
        FK.load_balance_loss(z, experts, token_mask=mask),
        FK.load_balance_loss(z[:15], experts[:15]),
    )
    torch.testing.assert_close(FK.router_z_loss(z, token_mask=mask), FK.router_z_loss(z[:15]))
    load = FK.expert_load(experts, 4, token_mask=mask)
    torch.testing.assert_close(load, FK.expert_load(experts[:15], 4))
    nothing = torch.zeros(20, dtype=torch.bool)
    assert FK.load_balance_loss(z, experts, token_mask=nothing) == 0


@pytest.mark.parametrize(
    ("z", "k", "says"),
    [
        (torch.zeros(2, 3, 4), 1, r"\(N, E\) matrix, got torch.float32 \(2, 3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), 1, r"floating point .* got torch.int64 \(2, 3\)"),
        (torch.zeros(2, 3), 0, r"k must be in 1\.\.E = 1\.\.3, got 0"),
        (torch.zeros(2, 3), 4, r"k must be in 1\.\.E = 1\.\.3, got 4"),
    ],
)
def test_says_what_is_wrong(z, k, says):
    with pytest.raises(ValueError, match=says):
        FK.topk_softmax(z, k)
