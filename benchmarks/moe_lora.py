"""The operation ``moe_lora``: one frozen linear with its experts."""

import dataclasses

import torch
from torch import Tensor

from benchmarks.registry import OPERATIONS, Operation
from floe_kernels import reference
from floe_kernels.testing.cases import MoELoRACase, MoELoRAInputs, moe_lora_cases, moe_lora_inputs


def leaf(tensor: Tensor) -> Tensor:
    """Return a leaf that shares the tensor's memory; no provider writes to its leaves."""
    return tensor.detach().requires_grad_()


def truth(inputs: MoELoRAInputs) -> dict[str, Tensor]:
    """Return the output and the gradients in float64, by autograd through the reference."""
    case = inputs.case
    names = ("x", "lora_A", "lora_B", "router_weight")
    x, lora_A, lora_B, router = (getattr(inputs, n).double().requires_grad_() for n in names)
    base = torch.nn.functional.linear(x, inputs.weight.double())
    y = reference.moe_lora(
        x, base, lora_A, lora_B, router, inputs.scaling.double(), case.ranks, case.top_k,
        case.shared_A, case.renormalize, None, 0.0, None,
    )  # fmt: skip
    grads = torch.autograd.grad(y, (x, lora_A, lora_B, router), inputs.grad_out.double())
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB", "drouter"), grads, strict=True))}


def yardstick(inputs: MoELoRAInputs) -> dict[str, Tensor]:
    """Return what the plainest PyTorch gives in the case's own dtype: a loop over experts."""
    from benchmarks.providers.loops import dense_loop

    return dense_loop(inputs).results()


def cost(case: MoELoRACase, mode: str) -> tuple[float, float]:
    """Return the FLOPs and the bytes that no implementation of the layer can do without.

    FLOPs of the base and of the K experts kept per token; each tensor of size T or of the base
    read and written once; the adapter's own weights and gradients once.
    """
    t, i, o, e, k = case.tokens, case.inputs, case.outputs, case.experts, case.top_k
    size = case.dtype.itemsize
    adapter_size = (case.adapter_dtype or case.dtype).itemsize
    kept = case.columns * k / max(1, e)  # mean rank that a token meets
    rows_A = case.ranks[0] if case.shared_A else case.columns
    shrink = rows_A if case.shared_A else kept
    forward = 2 * t * (i * o + shrink * i + kept * o + e * i)
    backward = 2 * t * (i * o + 2 * (shrink * i + kept * o + e * i))
    experts = (rows_A * i + case.columns * o + e * i) * adapter_size
    moved_forward = (t * i + i * o + t * o) * size + experts
    moved_backward = (t * o + i * o + 2 * t * i) * size + 2 * experts
    flops = {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward}
    moved = {"fwd": moved_forward, "bwd": moved_backward, "fwdbwd": moved_forward + moved_backward}
    return flops[mode], moved[mode]


def limit(case: MoELoRACase, tokens: int) -> MoELoRACase:
    """Return the case with at most so many tokens."""
    return dataclasses.replace(case, tokens=min(case.tokens, tokens))


MOE_LORA = OPERATIONS["moe_lora"] = Operation(
    "moe_lora", moe_lora_cases, moe_lora_inputs, truth, yardstick, cost, limit
)
