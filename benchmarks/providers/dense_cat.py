"""Dense-cat: every expert side by side in two ordinary GEMMs. The honest peer, six lines long.

In its best form: lora_A and the router are one pre-concatenated weight, so x is read once; the
experts are added to the base's output in place.
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_lora import MOE_LORA, leaf
from benchmarks.providers.loops import route
from benchmarks.registry import AutogradStep
from floe_kernels.testing.cases import MoELoRACase, MoELoRAInputs


def spread(case: MoELoRACase, gates: Tensor, z: Tensor, scaling: Tensor, ones: Tensor) -> Tensor:
    """Return h (T, R): z times its column's gate and scaling, zero for experts not kept."""
    if case.shared_A:
        return (z[:, None, :] * (gates * scaling[0]).to(z.dtype)[:, :, None]).flatten(1)
    if case.equal_rank:
        blocks = z.view(len(z), case.experts, case.equal_rank)
        return (blocks * (gates * scaling[0]).to(z.dtype)[:, :, None]).view(z.shape)
    return z * (gates @ ones).to(z.dtype)  # (T, E) by (E, R), scaling on each expert's columns


def forward(
    case: MoELoRACase,
    x: Tensor,
    weight: Tensor,
    shrink: Tensor,  # (R + E, I), or (r + E, I) with a shared A
    lora_B: Tensor,
    scaling: Tensor,
    ones: Tensor,
) -> Tensor:
    """Compute the layer."""
    y = F.linear(x, weight)
    z, logits = F.linear(x, shrink.to(x.dtype)).split([len(shrink) - case.experts, case.experts], 1)
    kept, experts = route(logits, case)
    gates = kept.new_zeros(len(x), case.experts).scatter(1, experts, kept)
    h = spread(case, gates, z, scaling, ones)
    return y.addmm_(h, lora_B.to(x.dtype))


@cache
def compiled(mode: str) -> Any:
    torch._dynamo.config.cache_size_limit = 256  # one entry per shape, and there are many
    return torch.compile(forward, dynamic=False, mode=mode)


def build(inputs: MoELoRAInputs, layer: Any) -> AutogradStep:
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


MOE_LORA.provide("dense-cat", "PyTorch")(partial(build, layer=forward))


@MOE_LORA.provide("dense-cat compiled", "PyTorch, torch.compile")
def dense_cat_compiled(inputs: MoELoRAInputs) -> AutogradStep:
    """The same six lines through Inductor."""
    return build(inputs, compiled("default"))
