"""Sort-and-group on ``torch.nn.functional.grouped_mm``: the platform's own grouped GEMM."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_lora import MOE_LORA, leaf
from benchmarks.providers.loops import route
from benchmarks.registry import AutogradStep, Unavailable
from floe_kernels.testing.cases import MoELoRAInputs


def padded(packed: Tensor, ranks: tuple[int, ...], width: int) -> Tensor:
    """Return (E, width, D): each expert's rows of the packed (R, D), then zeros."""
    stack = packed.new_zeros(len(ranks), width, packed.shape[1])
    for expert, rows in zip(stack, torch.split(packed, list(ranks)), strict=True):
        expert[: len(rows)] = rows
    return stack


def unpadded(stack: Tensor, ranks: tuple[int, ...]) -> Tensor:
    return torch.cat([expert[:rank] for expert, rank in zip(stack, ranks, strict=True)])


@MOE_LORA.provide("grouped_mm", "PyTorch")
def grouped_mm(inputs: MoELoRAInputs) -> AutogradStep:
    """Sort (token, slot) pairs by expert, two grouped GEMMs, gates on the rank-sized tensor."""
    case = inputs.case
    if case.shared_A:
        raise Unavailable("with a shared A every expert is kept: there is nothing to group")
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("this torch has no nn.functional.grouped_mm (2.10 or later does)")
    # rows must be multiples of 16 bytes, so small and uneven ranks are padded
    step = 16 // case.dtype.itemsize
    width = -(-max(case.ranks) // step) * step
    x, router = leaf(inputs.x), leaf(inputs.router_weight)
    lora_A = leaf(padded(inputs.lora_A, case.ranks, width))
    lora_B = leaf(padded(inputs.lora_B, case.ranks, width))
    scales = torch.tensor([16.0 / max(1, r) for r in case.ranks], device=x.device)

    def forward() -> Tensor:
        y = F.linear(x, inputs.weight)
        gates, experts = route(F.linear(x, router.to(x.dtype)), case)
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        expert = flat[order]
        # histc, not bincount: that one waits for the device
        counts = torch.histc(expert.float(), case.experts, 0, case.experts)
        ends = counts.cumsum(0).to(torch.int32)
        token = order // case.top_k
        z = F.grouped_mm(x[token], lora_A.to(x.dtype).transpose(1, 2), offs=ends)
        h = z * (gates.flatten()[order] * scales[expert]).to(z.dtype)[:, None]
        return y.index_add(0, token, F.grouped_mm(h, lora_B.to(x.dtype), offs=ends))

    def unpack(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        dA, dB = (unpadded(grads[name], case.ranks) for name in ("lora_A", "lora_B"))
        return {"dx": grads["x"], "dA": dA, "dB": dB, "drouter": grads["router"]}

    leaves = {"x": x, "lora_A": lora_A, "lora_B": lora_B, "router": router}
    return AutogradStep(forward, inputs.grad_out, leaves, unpack, frozen=(inputs.weight,))
