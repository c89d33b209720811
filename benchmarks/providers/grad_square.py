"""A weight gradient alone, with the squares fused in, and with every sample's gradient made."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.grad_square import GRAD_SQUARE, by_sample, truth
from benchmarks.providers.fisher_hooks import version
from benchmarks.registry import Step, Unavailable
from floe_kernels import functional
from floe_kernels.testing.cases import GradSquareInputs


class Function(Step):
    """A provider that is one function of the inputs; there is no backward."""

    def __init__(self, run: Callable[[], dict[str, Tensor]], held: list[Tensor]) -> None:
        self.run, self._held = run, held

    def forward(self) -> dict[str, Tensor]:
        return self.run()

    def backward(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        return out

    def results(self) -> dict[str, Tensor]:
        return self.run()

    def held(self) -> list[Tensor]:
        return self._held


def function(inputs: GradSquareInputs, run: Callable[[], dict[str, Tensor]]) -> Function:
    return Function(run, [inputs.g, inputs.x, inputs.offsets])


def gradient_truth(inputs: GradSquareInputs) -> dict[str, Tensor]:
    return {"grad": truth(inputs)["grad"]}


@GRAD_SQUARE.provide("weight gradient alone", "PyTorch", role="base", truth=gradient_truth)
def gradient(inputs: GradSquareInputs) -> Step:
    """One GEMM: the floor."""
    return function(inputs, lambda: {"grad": inputs.g.T @ inputs.x})


@GRAD_SQUARE.provide("ours", "ours", role="ours")
def ours(inputs: GradSquareInputs) -> Step:
    """``functional.segment_grad_square``, elementwise."""

    def run() -> dict[str, Tensor]:
        out = functional.segment_grad_square(inputs.g, inputs.x, inputs.offsets)
        return {"grad": out.grad, "fisher": out.fisher}

    return function(inputs, run)


def whole_truth(inputs: GradSquareInputs) -> dict[str, Tensor]:
    both = truth(inputs)
    return {"grad": both["grad"], "fisher": both["fisher"].sum()}


@GRAD_SQUARE.provide("ours, one sum", "ours", role="context", truth=whole_truth)
def ours_whole(inputs: GradSquareInputs) -> Step:
    """``functional.segment_grad_square(reduce="matrix")``: what a layer score needs."""

    def run() -> dict[str, Tensor]:
        out = functional.segment_grad_square(inputs.g, inputs.x, inputs.offsets, reduce="matrix")
        return {"grad": out.grad, "fisher": out.fisher}

    return function(inputs, run)


@GRAD_SQUARE.provide("loop over samples", "PyTorch")
def loop(inputs: GradSquareInputs) -> Step:
    """One product per sample into a tile that stays in the cache, and addcmul_."""
    return function(inputs, lambda: by_sample(inputs.g, inputs.x, inputs.offsets))


def sample_length(inputs: GradSquareInputs) -> int:
    case = inputs.case
    if case.ragged or case.tokens % case.samples:
        raise Unavailable("it wants samples of one length")
    return case.tokens // case.samples


@GRAD_SQUARE.provide("materialise, bmm", "PyTorch")
def bmm(inputs: GradSquareInputs) -> Step:
    """(samples, R, D) by a batched product."""
    length = sample_length(inputs)
    g, x = (t.view(-1, length, t.shape[1]) for t in (inputs.g, inputs.x))

    def run() -> dict[str, Tensor]:
        samples = (g.transpose(1, 2) @ x).float()
        fisher = torch.einsum("srd,srd->rd", samples, samples)
        return {"grad": inputs.g.T @ inputs.x, "fisher": fisher}

    return function(inputs, run)


@GRAD_SQUARE.provide("materialise, grouped_mm", "PyTorch")
def grouped(inputs: GradSquareInputs) -> Step:
    """(samples, R, D) by a grouped product, which takes ragged samples."""
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("this torch has no nn.functional.grouped_mm (2.10 or later does)")
    ends = inputs.offsets[1:].to(torch.int32)

    def run() -> dict[str, Tensor]:
        samples = F.grouped_mm(inputs.g.T, inputs.x, offs=ends).float()
        fisher = torch.einsum("srd,srd->rd", samples, samples)
        return {"grad": inputs.g.T @ inputs.x, "fisher": fisher}

    return function(inputs, run)


@GRAD_SQUARE.provide("Opacus", f"upstream opacus {version('opacus')}, its einsum alone")
def opacus(inputs: GradSquareInputs) -> Step:
    """``compute_linear_grad_sample``, which hooks call; squared by us."""
    length = sample_length(inputs)
    try:
        from opacus.grad_sample.linear import compute_linear_grad_sample
    except ImportError:
        raise Unavailable("opacus is not installed") from None
    layer = nn.Linear(inputs.x.shape[1], inputs.g.shape[1], bias=False, device="meta")
    g, x = (t.view(-1, length, t.shape[1]) for t in (inputs.g, inputs.x))

    def run() -> dict[str, Tensor]:
        samples = compute_linear_grad_sample(layer, [x], g)[layer.weight].float()
        fisher = torch.einsum("srd,srd->rd", samples, samples)
        return {"grad": inputs.g.T @ inputs.x, "fisher": fisher}

    return function(inputs, run)


@GRAD_SQUARE.provide("BackPACK einsum", "BackPACK's formula, on torch.einsum with opt_einsum")
def backpack(inputs: GradSquareInputs) -> Step:
    """The four-operand contraction of ``SumGradSquared``."""
    length = sample_length(inputs)
    if not torch.backends.opt_einsum.is_available():
        raise Unavailable("opt_einsum is not installed, and without it this would be unfair")
    g, x = (t.view(-1, length, t.shape[1]) for t in (inputs.g, inputs.x))

    def run() -> dict[str, Tensor]:
        fisher = torch.einsum("nmi,nmj,nki,nkj->ij", g, x, g, x)
        return {"grad": inputs.g.T @ inputs.x, "fisher": fisher}

    return function(inputs, run)
