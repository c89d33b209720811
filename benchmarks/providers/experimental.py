"""CUDA C++ kernels that nothing dispatches yet, beside what they would replace.

They are measured on a GPU alone: on a CPU the operators are plain PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.grad_square import GRAD_SQUARE
from benchmarks.providers.grad_square import Function, function
from benchmarks.registry import Step, Unavailable
from benchmarks.two_source import TWO_SOURCE, TwoSourceInputs, separately
from floe_kernels.testing.cases import GradSquareInputs


def needs_kernel(name: str, device: torch.device) -> None:
    """Refuse a GPU for which the extension has no kernel: the default would be timed instead."""
    if device.type == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        raise Unavailable("the extension was built without CUDA C++")


@GRAD_SQUARE.provide("ours, CUDA C++", "ours, not dispatched", role="context", devices=("cuda",))
def squares(inputs: GradSquareInputs) -> Step:
    """``floe::experimental_segment_grad_square``."""
    from floe_kernels.ops import experimental

    needs_kernel("floe::experimental_segment_grad_square", inputs.g.device)

    def run() -> dict[str, Tensor]:
        grad, fisher, _ = experimental.segment_grad_square(
            inputs.g, inputs.x, inputs.offsets, None, "element"
        )
        return {"grad": grad, "fisher": fisher}

    return function(inputs, run)


def product(inputs: TwoSourceInputs, run: object) -> Function:
    return Function(lambda: {"out": run()}, [*inputs.rows, *inputs.weights])  # type: ignore[operator]


def base_truth(inputs: TwoSourceInputs) -> dict[str, Tensor]:
    rows, weights = (inputs.rows[0].double(),), (inputs.weights[0].double(),)
    return {"out": separately(rows, weights, inputs.case.backward)}


@TWO_SOURCE.provide("frozen product alone", "PyTorch", role="base", truth=base_truth)
def alone(inputs: TwoSourceInputs) -> Step:
    """One GEMM: the floor."""
    x, weight = inputs.rows[0], inputs.weights[0]
    if inputs.case.backward:
        return product(inputs, lambda: x @ weight)
    return product(inputs, lambda: F.linear(x, weight))


@TWO_SOURCE.provide("ours, CUDA C++", "ours, not dispatched", role="ours", devices=("cuda",))
def fused(inputs: TwoSourceInputs) -> Step:
    """``floe::experimental_two_source_linear`` and ``_grad``: one pass over the output."""
    from floe_kernels.ops import experimental_two_source as ops

    rows, weights = inputs.rows, inputs.weights
    if inputs.case.backward:
        needs_kernel("floe::experimental_two_source_grad", rows[0].device)
        return product(inputs, lambda: ops.two_source_grad(*rows, *weights))
    needs_kernel("floe::experimental_two_source_linear", rows[0].device)
    return product(inputs, lambda: ops.two_source_linear(*rows, *weights, None))


@TWO_SOURCE.provide("one product each", "PyTorch")
def each(inputs: TwoSourceInputs) -> Step:
    """The library's GEMM, then one that adds to its output for each further source."""
    return product(inputs, lambda: separately(inputs.rows, inputs.weights, inputs.case.backward))


@TWO_SOURCE.provide("concatenated", "PyTorch")
def concatenated(inputs: TwoSourceInputs) -> Step:
    """One GEMM over copies side by side; the weights' copy is made outside the clock."""
    if inputs.case.backward:
        stacked = torch.cat(inputs.weights)
        return product(inputs, lambda: torch.cat(inputs.rows, 1) @ stacked)
    weight, lora_B = inputs.weights
    wide = torch.cat([weight, lora_B.T], 1)
    return product(inputs, lambda: F.linear(torch.cat(inputs.rows, 1), wide))
