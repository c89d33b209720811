"""Dense-cat: every expert side by side in two ordinary GEMMs. The honest peer, six lines long.

In its best form: lora_A and the router are one pre-concatenated weight, so x is read once; the
experts are added to the base's output in place. Three ways to differentiate it: autograd, Inductor,
and by hand, with the gradient of x added in place too.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.graphed import GRAPHED, graphed
from benchmarks.moe_lora import MOE_LORA, leaf
from benchmarks.providers.loops import route
from benchmarks.registry import AutogradStep
from floe_kernels.testing.cases import MoELoRACase, MoELoRAInputs


def spread(case: MoELoRACase, gates: Tensor, z: Tensor, scaling: Tensor, ones: Tensor) -> Tensor:
    """Return h (T, R): z times its column's gate and scaling, zero for experts not kept."""
    rank = case.equal_rank
    if rank:  # broadcast, without a gate for every column in memory
        blocks = z[:, None] if case.shared_A else z.view(len(z), case.experts, rank)
        return (blocks * (gates * scaling[0]).to(z.dtype)[:, :, None]).flatten(1)
    return z * (gates @ ones).to(z.dtype)


def routed(case: MoELoRACase, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (kept gates, experts, dense gates with zeros for experts not kept)."""
    kept, experts = route(logits, case)
    return kept, experts, kept.new_zeros(logits.shape).scatter(1, experts, kept)


def forward(
    case: MoELoRACase,
    x: Tensor,
    weight: Tensor,
    shrink: Tensor,  # (R + E, I), or (r + E, I) with a shared A
    lora_B: Tensor,
    scaling: Tensor,
    ones: Tensor,  # (E, R)
    in_place: bool = True,
) -> Tensor:
    """Compute the layer; not in place for vmap, which has no rule for addmm_."""
    y = F.linear(x, weight)
    z, logits = F.linear(x, shrink.to(x.dtype)).tensor_split([len(shrink) - case.experts], 1)
    gates = routed(case, logits)[2]
    h = spread(case, gates, z, scaling, ones)
    lora_B = lora_B.to(x.dtype)
    return y.addmm_(h, lora_B) if in_place else y.addmm(h, lora_B)


class ByHand(torch.autograd.Function):
    """The same forward; the backward in closed form, as an expert user would write it."""

    @staticmethod
    def forward(
        ctx: Any, case: MoELoRACase, x: Tensor, weight: Tensor, shrink: Tensor, lora_B: Tensor,
        scaling: Tensor, ones: Tensor,
    ) -> Tensor:  # fmt: skip
        zl = F.linear(x, shrink.to(x.dtype))
        z, logits = zl.tensor_split([len(shrink) - case.experts], 1)
        kept, experts, gates = routed(case, logits)
        ctx.case = case
        ctx.save_for_backward(x, weight, shrink, lora_B, scaling, ones, zl, kept, experts)
        h = spread(case, gates, z, scaling, ones)
        return F.linear(x, weight).addmm_(h, lora_B.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        case = ctx.case
        x, weight, shrink, lora_B, scaling, ones, zl, kept, experts = ctx.saved_tensors
        z, logits = zl.tensor_split([len(shrink) - case.experts], 1)
        gates = kept.new_zeros(logits.shape).scatter_(1, experts, kept)
        u = dy @ lora_B.to(x.dtype).T
        z_all = z.repeat(1, case.experts) if case.shared_A else z
        product = (z_all * u).float()
        if case.equal_rank:
            dgates = product.view(len(x), case.experts, -1).sum(-1).mul_(scaling[0])
        else:
            dgates = product @ ones.T
        dkept = dgates.gather(1, experts)
        if case.renormalize:
            dkept = kept * (dkept - (kept * dkept).sum(-1, keepdim=True))
            dlogits = torch.zeros_like(gates).scatter_(1, experts, dkept)
        else:
            p = logits.float().softmax(-1)
            dense = torch.zeros_like(gates).scatter_(1, experts, dkept)
            dlogits = p * (dense - (p * dense).sum(-1, keepdim=True))
        if case.shared_A:  # the experts' columns meet in the one z
            weights = (gates * scaling[0]).to(u.dtype)[:, :, None]
            dz = (u.view(len(u), case.experts, -1) * weights).sum(1)
        else:
            dz = spread(case, gates, u, scaling, ones)
        dzl = torch.cat([dz, dlogits.to(x.dtype)], 1)
        dx = (dy @ weight).addmm_(dzl, shrink.to(x.dtype))
        h = spread(case, gates, z, scaling, ones)
        dshrink, dB = (dzl.T @ x).to(shrink.dtype), (h.T @ dy).to(lora_B.dtype)
        return None, dx, None, dshrink, dB, None, None


@cache
def compiled() -> Callable[..., Tensor]:
    """Return the forward through Inductor, one graph per shape."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 512
    torch._dynamo.config.accumulated_recompile_limit = 4096
    return torch.compile(forward, dynamic=False)


def build(inputs: MoELoRAInputs, layer: Callable[..., Tensor]) -> AutogradStep:
    """Bind ``layer`` to leaves: x, the concatenation, lora_B."""
    case = inputs.case
    x, lora_B = leaf(inputs.x), leaf(inputs.lora_B)
    shrink = leaf(torch.cat([inputs.lora_A, inputs.router_weight]))
    ones = column_scaling(inputs)

    def unpack(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        dA, drouter = grads["shrink"].tensor_split([len(inputs.lora_A)])
        return {"dx": grads["x"], "dA": dA, "dB": grads["lora_B"], "drouter": drouter}

    return AutogradStep(
        lambda: layer(case, x, inputs.weight, shrink, lora_B, inputs.scaling, ones),
        inputs.grad_out,
        {"x": x, "shrink": shrink, "lora_B": lora_B},
        unpack,
        frozen=(inputs.weight, inputs.scaling, ones),
    )


def column_scaling(inputs: MoELoRAInputs) -> Tensor:
    """Return (E, R): each expert's scaling on its own columns, zero elsewhere."""
    ones = inputs.scaling.new_zeros(inputs.case.experts, inputs.case.columns)
    begin = 0
    for e, rank in enumerate(inputs.case.ranks):
        ones[e, begin : begin + rank] = inputs.scaling[begin : begin + rank]
        begin += rank
    return ones


def dense_cat_compiled(inputs: MoELoRAInputs) -> AutogradStep:
    """The same six lines through Inductor."""
    return build(inputs, compiled())


eager = partial(build, layer=forward)
by_hand = partial(build, layer=ByHand.apply)
MOE_LORA.provide("dense-cat", "PyTorch")(eager)
MOE_LORA.provide("dense-cat compiled", "PyTorch, torch.compile")(dense_cat_compiled)
MOE_LORA.provide("dense-cat by hand", "PyTorch, backward in closed form")(by_hand)
for name, way in (("dense-cat", eager), ("dense-cat compiled", dense_cat_compiled),
                  ("dense-cat by hand", by_hand)):  # fmt: skip
    MOE_LORA.provide(f"{name} graphed", "PyTorch", **GRAPHED)(graphed(way))
