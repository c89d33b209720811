"""The operation ``grad_square``: one weight gradient, and the sum of its samples' squares."""

import dataclasses
import itertools

import torch
from torch import Tensor

from benchmarks.registry import OPERATIONS, Operation
from floe_kernels.testing.cases import (
    GradSquareCase,
    GradSquareInputs,
    grad_square_cases,
    grad_square_inputs,
)


def by_sample(g: Tensor, x: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    """Return the results by one product per sample, squared in float32 or wider."""
    wide = torch.promote_types(g.dtype, torch.float32)
    fisher = torch.zeros(g.shape[1], x.shape[1], dtype=wide, device=g.device)
    bounds = offsets.tolist()
    for begin, end in itertools.pairwise(bounds):
        sample = (g[begin:end].T @ x[begin:end]).to(wide)
        fisher.addcmul_(sample, sample)
    return {"grad": g.T @ x, "fisher": fisher}


def truth(inputs: GradSquareInputs) -> dict[str, Tensor]:
    """Return the results in float64."""
    return by_sample(inputs.g.double(), inputs.x.double(), inputs.offsets)


def yardstick(inputs: GradSquareInputs) -> dict[str, Tensor]:
    """Return the results in the case's dtype."""
    return by_sample(inputs.g, inputs.x, inputs.offsets)


def cost(case: GradSquareCase, mode: str) -> tuple[float, float]:
    """Return the products' and squares' FLOPs; inputs read, gradient and square written once."""
    entries = case.columns * case.inputs
    flops = 2 * case.tokens * entries + 2 * case.samples * entries
    size = case.dtype.itemsize
    return flops, case.tokens * (case.columns + case.inputs) * size + entries * (size + 4)


def limit(case: GradSquareCase, tokens: int) -> GradSquareCase:
    """Return the case with fewer samples of the same mean length."""
    length = case.tokens / case.samples
    samples = max(1, min(case.samples, int(tokens / length)))
    return dataclasses.replace(case, samples=samples, tokens=int(samples * length))


GRAD_SQUARE = OPERATIONS["grad_square"] = Operation(
    "grad_square", grad_square_cases, grad_square_inputs, truth, yardstick, cost, limit,
    modes=("fwdbwd",),
)  # fmt: skip
