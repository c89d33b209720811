"""What a layer leaves behind: how it routed, and what its auxiliary losses are set to."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

from floe_kernels import FisherCollector, FusedMoELoRA
from floe_kernels import functional as FK


def layer(**options):
    made = FusedMoELoRA(nn.Linear(6, 6), [2, 3, 1], **options)
    nn.init.normal_(made.lora_B)
    return made


def test_routing_is_that_of_the_last_forward_pass():
    module, x = layer(top_k=2), torch.randn(2, 4, 6)
    assert module.routing is None
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    module(x, mask)
    logits, experts, token_mask = module.routing
    assert torch.equal(token_mask, mask.flatten())
    torch.testing.assert_close(logits[token_mask], (x @ module.router.weight.T).detach()[mask])
    assert torch.equal(experts[token_mask], FK.topk_softmax(logits, 2).experts[token_mask])
    module(x)
    assert module.routing.token_mask is None


def router_gradient(module, x):
    module.zero_grad()
    module(x).mul(0).sum().backward()  # nothing but the auxiliary losses
    return module.router.weight.grad.clone()


def test_aux_losses_are_set_and_switched_off():
    module, x = layer(), torch.randn(9, 6)
    assert not router_gradient(module, x).any()
    module.set_aux_loss(load_balance_coef=0.5)
    balance = router_gradient(module, x)
    assert balance.any()
    module.set_aux_loss(z_loss_coef=0.25)
    both = router_gradient(module, x)
    module.set_aux_loss(load_balance_coef=0)
    torch.testing.assert_close(router_gradient(module, x) + balance, both)
    assert module.aux_coefs.tolist() == [0, 0.25]
    made_so = layer(z_loss_coef=0.25)
    made_so.load_state_dict(module.state_dict())
    torch.testing.assert_close(router_gradient(made_so, x), both - balance)
    module.set_aux_loss(0, 0)
    assert not router_gradient(module, x).any()


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_a_coefficient_out_of_range_changes_nothing(wrong):
    module = layer(load_balance_coef=0.5)
    with pytest.raises(ValueError, match="z_loss_coef must be finite and not negative, got"):
        module.set_aux_loss(0.25, wrong)
    assert module.aux_coefs.tolist() == [0.5, 0]
    with pytest.raises(ValueError, match="load_balance_coef must be finite"):
        layer(load_balance_coef=wrong)


def test_a_layer_that_records_nothing():
    module, x = layer(), torch.randn(5, 6)
    module.record_routing = False
    module(x)
    assert module.routing is None
    assert not module.expert_load().any()
    with FisherCollector(module, loss_reduction="sum") as collector:
        module(x[:, None]).sum().backward()
        collector.step()
    assert collector.record().hits[""].sum() == 10, "a collector needs it and gets it"


class Recomputed(nn.Module):
    """Two layers whose backward pass runs them again."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            layer(lora_dropout=0.5, load_balance_coef=0.1) for _ in range(2)
        )

    def forward(self, x):
        for module in self.layers:
            x = checkpoint(module, x, use_reentrant=False)
        return x


def gradients(model, run, x):
    model.zero_grad()
    torch.manual_seed(3)
    run(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("how", ["records nothing", "dynamo's setting"])
def test_checkpoints_compile_without_a_break(how):
    model, x = Recomputed(), torch.randn(4, 6, requires_grad=True)
    if how == "records nothing":
        for module in model.layers:
            module.record_routing = False
    setting = {"skip_fwd_side_effects_in_bwd_under_checkpoint": how == "dynamo's setting"}
    eager = gradients(model, model, x)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    # not monkeypatch: what it restores in torch's settings, later tests find deleted
    with torch._dynamo.config.patch(setting):
        compiled = gradients(model, torch.compile(model, fullgraph=True, backend=graphs), x)
    assert graphs.frame_count == 1
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want)
    recorded = [module.routing is not None for module in model.layers]
    assert recorded == [how != "records nothing"] * 2
    torch._dynamo.reset()
