"""FusedMoELoRA: goes where the linear was, and trains beside it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from floe_kernels import FusedMoELoRA
from floe_kernels import functional as FK
from floe_kernels.nn import BatchContext


def layer(ranks=(2, 3, 1), seed=0, base=None, **options):
    torch.manual_seed(seed)
    return FusedMoELoRA(base or nn.Linear(6, 5), list(ranks), **options)


def trained(*args, **options):
    """A layer whose lora_B has left zero."""
    module = layer(*args, **options)
    nn.init.normal_(module.lora_B)
    return module


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 0, 6), (2, 2, 3, 6)], ids=str)
def test_wrapping_changes_nothing_at_first(shape):
    base = nn.Linear(6, 5)
    x = torch.randn(shape)
    want = base(x)
    got = layer(base=base)(x)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    module = trained(base=nn.Linear(6, 5, dtype=dtype))
    assert module.lora_A.dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert module.lora_A.grad.dtype == module.lora_A.dtype


def test_only_the_adapter_trains():
    module = layer()
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "router.weight"}
    module(torch.randn(4, 6)).sum().backward()
    assert module.base_layer.weight.grad is None
    assert module.lora_B.grad.any()
    assert not module.lora_A.grad.any()  # lora_B is zero


def test_initialisation():
    module = layer([64] * 4, base=nn.Linear(512, 8))
    bound = 512**-0.5
    for weight in (module.lora_A, module.router.weight):
        assert weight.abs().max() <= bound
        assert abs(weight.std().item() - bound / 3**0.5) < 0.02 * bound
    assert not module.lora_B.any()


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora):
    module = layer([4, 0, 1], use_rslora=rslora, lora_alpha=8)
    four = 8 / 4**0.5 if rslora else 8 / 4
    assert module.scaling.tolist() == [four] * 4 + [8]


def test_scaling_is_never_rounded():
    module = layer([3] * 2)
    exact = module.scaling.clone()
    for moved in (module.half(), module.to(torch.bfloat16), module.double(), module.float()):
        assert torch.equal(moved.scaling, exact)
    assert module.scaling.dtype == torch.float32


def test_state_dict_round_trip():
    module, other = trained(seed=1), layer(seed=2)
    with torch.no_grad():
        module.scaling[0] = 0  # a dynamic-rank mask
    other.load_state_dict(module.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(other(x), module(x))
    keys = {"lora_A", "lora_B", "router.weight", "scaling", "base_layer.weight", "base_layer.bias"}
    assert set(module.state_dict()) == keys


def test_copies_and_meta_device():
    x, module = torch.randn(4, 6), trained()
    module(x)
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))
    with torch.device("meta"):
        empty = layer()
    assert empty.lora_A.is_meta
    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(module.state_dict())
    loaded.aux_coefs.zero_()
    torch.testing.assert_close(loaded(x), module(x))


class Quantised(nn.Module):
    """A base that is no nn.Linear: it only says how wide it is."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 5
        self.register_buffer("packed", torch.randint(-8, 8, (5, 6), dtype=torch.int8))

    def forward(self, x):
        return x @ self.packed.to(x.dtype).T / 8


def test_foreign_base_equals_plain_base():
    foreign, plain = trained(base=Quantised()), trained()
    plain.base_layer.weight.copy_(foreign.base_layer.packed / 8)
    plain.base_layer.bias.zero_()
    with torch.no_grad():
        for name, p in foreign.named_parameters():
            p.copy_(plain.get_parameter(name))
    x = torch.randn(2, 4, 6, requires_grad=True)
    outs = [module(x) for module in (foreign, plain)]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(*grads)


def test_conv1d():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)
    linear = nn.Linear(6, 5)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    x = torch.randn(3, 6)
    torch.testing.assert_close(trained(base=conv)(x), trained(base=linear)(x))


def test_a_base_that_trains_gets_its_gradient():
    module = trained()
    x = torch.randn(4, 6)
    frozen = module(x)
    module.base_layer.requires_grad_(True)
    out = module(x)
    torch.testing.assert_close(out, frozen)
    out.sum().backward()
    torch.testing.assert_close(module.weight.grad, x.sum(0).expand(5, -1))


def test_hooks_on_the_base_still_run():
    module, seen = trained(), []
    module.base_layer.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(4, 6))
    assert seen == [1]


def test_a_forward_put_on_the_base_still_runs():
    module, x = trained(), torch.randn(4, 6)
    usual = module(x)
    plain = module.base_layer.forward
    module.base_layer.forward = lambda t: plain(t) + 1
    torch.testing.assert_close(module(x), usual + 1)


def test_autocast_matches_bfloat16():
    module, x = trained(), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    low = copy.deepcopy(module)
    low.base_layer.to(torch.bfloat16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, low(x.bfloat16()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_repeats_dropout_and_routing(reentrant):
    module = trained(lora_dropout=0.5, load_balance_coef=0.1)
    x = torch.randn(8, 6, requires_grad=True)
    grads = []
    for run in (module, lambda t: checkpoint(module, t, use_reentrant=reentrant)):
        torch.manual_seed(3)
        module.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_dropout_only_while_training():
    module, x = trained(lora_dropout=0.5), torch.randn(8, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_aux_loss_is_logged_and_learnt():
    module = layer(load_balance_coef=0.5, z_loss_coef=0.25)
    x = torch.randn(20, 6)
    assert module.aux_loss() == 0
    module(x).mul(0).sum().backward()
    logits = (x @ module.router.weight.T).detach().requires_grad_()
    loss = 0.5 * FK.load_balance_loss(logits, FK.topk_softmax(logits, 2).experts)
    loss = loss + 0.25 * FK.router_z_loss(logits)
    torch.testing.assert_close(module.aux_loss(), loss.detach())
    assert not module.aux_loss().requires_grad
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(module.router.weight.grad, grad.T @ x)


def test_expert_load_leaves_padding_out():
    module = layer(top_k=1)
    assert module.expert_load().tolist() == [0, 0, 0]
    x, mask = torch.randn(2, 10, 6), torch.arange(10).expand(2, 10) < 7
    module(x, mask)
    experts = FK.topk_softmax((x @ module.router.weight.T)[mask], 1).experts
    torch.testing.assert_close(module.expert_load(), FK.expert_load(experts, 3))


def test_batch_context_reaches_the_layer():
    module, x = trained(), torch.randn(2, 4, 6)
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    want = module(x, mask)
    module.batch = BatchContext()
    module.batch.token_mask = mask
    torch.testing.assert_close(module(x), want)
    torch.testing.assert_close(module(x[:, :2]), module(x[:, :2], torch.ones(2, 2) > 0))


@pytest.mark.parametrize(
    ("ranks", "shared", "top_k"),
    [([4], False, 1), ([4] * 8, False, 2), ([4] * 8, True, 8), ([], False, 0)],
)
def test_default_top_k(ranks, shared, top_k):
    module = layer(ranks, shared_A=shared)
    assert module.top_k == top_k
    assert module(torch.randn(3, 6)).shape == (3, 5)


def test_compiles_a_model_of_unequal_layers():
    torch._dynamo.reset()
    model = nn.Sequential(
        *(
            trained([1 + i % 4] * (i % 5), seed=i, base=nn.Linear(6, 6), lora_alpha=1)
            for i in range(12)
        )
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9, 2):
        x = torch.randn(2, tokens, 6)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(x)
            out.square().mean().backward()
            results.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(model[3].expert_load().sum(), torch.tensor(1.0))


def test_repr_tells_the_adapter():
    assert "ranks=4 x 8, top_k=2, lora_alpha=16" in repr(layer([4] * 8))
    assert "ranks=[2, 3, 1]" in repr(layer(use_rslora=True))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ranks": [2, -1]}, ValueError, r"ranks must not be negative, got \[2, -1\]"),
        ({"top_k": 4}, ValueError, r"top_k must be in 1\.\.E = 1\.\.3, got 4"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"shared_A": True}, ValueError, "with shared_A all experts have one rank"),
        ({"base": nn.ReLU()}, TypeError, "in_features and out_features, got ReLU"),
    ],
)
def test_says_what_is_wrong(options, error, says):
    with pytest.raises(error, match=says):
        layer(**options)


def test_a_mismatched_input_is_refused():
    with pytest.raises(ValueError, match=r"weight must be \(O, I\) with I = 7"):
        layer()(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"weight must have the dtype of x, torch\.float64"):
        layer()(torch.randn(3, 6).double())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_a_linear_without_inputs_or_outputs(sizes):
    layer = FusedMoELoRA(torch.nn.Linear(*sizes), ranks=[2], top_k=1)
    assert layer(torch.randn(3, sizes[0])).shape == (3, sizes[1])
