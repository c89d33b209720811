"""The operation ``two_source``: a frozen product and a low-rank one, added into the same output.

``y`` cases are a layer's output ``x W^T + h lora_B``, ``dx`` cases the gradient of its input,
``dy W + dz lora_A + dlogits router``. The base is the frozen product alone.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import OPERATIONS, Operation


@dataclasses.dataclass(frozen=True)
class TwoSourceCase:
    """One linear with R packed columns and E experts beside it."""

    name: str
    tokens: int
    inputs: int
    outputs: int
    columns: int  #: R
    routes: int = 8  #: E; columns of dlogits
    dtype: torch.dtype = torch.bfloat16
    tags: frozenset[str] = frozenset()

    @property
    def backward(self) -> bool:
        """Whether this is the gradient of x."""
        return self.name.startswith("dx")


class TwoSourceInputs(NamedTuple):
    """Random tensors; ``rows`` are x and h, or dy, dz and dlogits, ``weights`` what they meet."""

    case: TwoSourceCase
    rows: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


def cases() -> list[TwoSourceCase]:
    """Return both directions of the shapes at which the goals for an H100 are stated."""
    return [
        TwoSourceCase(f"{way}-{width}-R{columns}", 8192, width, width, columns)
        for width in (4096, 1024)
        for columns in (128, 64, 256)
        for way in ("y", "dx")
    ]


def inputs(case: TwoSourceCase, device: str = "cpu", seed: int = 0) -> TwoSourceInputs:
    """Draw rows of unit scale and weights that keep it."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device) * scale
        return values.to(case.dtype)

    t, r = case.tokens, case.columns
    weight = draw(case.outputs, case.inputs, case.inputs**-0.5)
    if case.backward:
        rows = (draw(t, case.outputs), draw(t, r), draw(t, case.routes))
        others = (draw(r, case.inputs, r**-0.5), draw(case.routes, case.inputs))
        return TwoSourceInputs(case, rows, (weight, *others))
    return TwoSourceInputs(
        case, (draw(t, case.inputs), draw(t, r)), (weight, draw(r, case.outputs, r**-0.5))
    )


def separately(rows: tuple[Tensor, ...], weights: tuple[Tensor, ...], backward: bool) -> Tensor:
    """Add the low-rank products to the frozen one's output, in place."""
    (first, *others), (weight, *more) = rows, weights
    out = first @ weight if backward else F.linear(first, weight)
    for row, other in zip(others, more, strict=True):
        out.addmm_(row, other)
    return out


def truth(given: TwoSourceInputs) -> dict[str, Tensor]:
    """Return the result in float64."""
    wide = tuple(tuple(t.double() for t in group) for group in (given.rows, given.weights))
    return {"out": separately(*wide, given.case.backward)}


def yardstick(given: TwoSourceInputs) -> dict[str, Tensor]:
    """Return the result in the case's dtype."""
    return {"out": separately(given.rows, given.weights, given.case.backward)}


def cost(case: TwoSourceCase, mode: str) -> tuple[float, float]:
    """Return the products' FLOPs; every operand read and the output written once."""
    depth = case.columns + (case.routes if case.backward else 0)
    flops = 2.0 * case.tokens * (case.inputs * case.outputs + depth * case.outputs)
    moved = case.tokens * (case.inputs + case.outputs + depth) + case.inputs * case.outputs
    return flops, (moved + depth * case.outputs) * float(case.dtype.itemsize)


def limit(case: TwoSourceCase, tokens: int) -> TwoSourceCase:
    """Return the case with fewer tokens."""
    return dataclasses.replace(case, tokens=min(case.tokens, tokens))


TWO_SOURCE = OPERATIONS["two_source"] = Operation(
    "two_source", cases, inputs, truth, yardstick, cost, limit, modes=("fwd",)
)
