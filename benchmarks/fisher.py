"""The operation ``fisher``: a layer's backward with the sums of its per-sample squared gradients.

Results are dx, dA, dB and FA, FB = sum over samples of (sum over the sample's tokens)^2,
elementwise.
"""

import dataclasses

import torch
from torch import Tensor

from benchmarks import moe_lora
from benchmarks.registry import OPERATIONS, Operation
from floe_kernels.testing.cases import MoELoRACase, MoELoRAInputs, fisher_cases, moe_lora_inputs


def samples_of(inputs: MoELoRAInputs) -> list[MoELoRAInputs]:
    """Return the inputs of every sample alone."""
    case = inputs.case
    length = case.tokens // case.samples
    one = dataclasses.replace(case, tokens=length, samples=1)
    return [
        inputs._replace(case=one, x=x, grad_out=g)
        for x, g in zip(
            torch.split(inputs.x, length), torch.split(inputs.grad_out, length), strict=True
        )
    ]


def squares(sample_gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sums of the samples' gradients and of their squares, in float32 or wider."""
    total: dict[str, Tensor] = {}
    for grads in sample_gradients:
        for name, short in (("dA", "FA"), ("dB", "FB")):
            grad = grads[name].to(torch.promote_types(grads[name].dtype, torch.float32))
            total[name] = total.get(name, 0) + grad
            total[short] = total.get(short, 0) + grad.square()
    return {"dx": torch.cat([grads["dx"] for grads in sample_gradients]), **total}


def truth(inputs: MoELoRAInputs) -> dict[str, Tensor]:
    """Return the results by one float64 backward per sample."""
    return squares([moe_lora.truth(sample) for sample in samples_of(inputs)])


def yardstick(inputs: MoELoRAInputs) -> dict[str, Tensor]:
    """Return the results by one plain PyTorch backward per sample, in the case's dtype."""
    return squares([moe_lora.yardstick(sample) for sample in samples_of(inputs)])


def cost(case: MoELoRACase, mode: str) -> tuple[float, float]:
    """Return the layer's own least work, and the squares' two buffers read and written."""
    flops, moved = moe_lora.cost(case, mode)
    entries = case.columns * (case.inputs + case.outputs)
    per_sample = case.samples * case.columns * (case.inputs + case.outputs)
    return flops + 2 * per_sample, moved + 8 * entries


def limit(case: MoELoRACase, tokens: int) -> MoELoRACase:
    """Return the case with fewer samples, all of the same length, for at most so many tokens."""
    length = case.tokens // case.samples
    samples = max(1, min(case.samples, tokens // length))
    return dataclasses.replace(case, samples=samples, tokens=samples * length)


FISHER = OPERATIONS["fisher"] = Operation(
    "fisher", fisher_cases, moe_lora_inputs, truth, yardstick, cost, limit, modes=("fwdbwd",)
)
