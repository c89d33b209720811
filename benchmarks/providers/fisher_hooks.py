"""Per-sample squares by libraries that hook into ``nn.Linear``: Opacus, BackPACK, Kronfluence.

They see what a linear layer sees. Inside a routed layer that is a flat list of tokens, without the
samples, so they square every token alone and say nothing: fast, and another quantity.
"""

from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fisher import FISHER, truth
from benchmarks.providers.loops import route
from benchmarks.registry import Step, Unavailable
from floe_kernels.testing.cases import MoELoRAInputs


def version(package: str) -> str:
    """Return the installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


class ExpertLinears(nn.Module):
    """MoLA's layer from ``nn.Linear`` modules, so that there is something to hook into."""

    def __init__(self, inputs: MoELoRAInputs) -> None:
        super().__init__()
        case = self.case = inputs.case
        if case.shared_A:
            raise Unavailable("written for experts with an A of their own")
        self.base = linear(inputs.weight).requires_grad_(False)
        self.A = nn.ModuleList(linear(a) for a in torch.split(inputs.lora_A, list(case.ranks)))
        self.B = nn.ModuleList(linear(b.T) for b in torch.split(inputs.lora_B, list(case.ranks)))
        self.router = linear(inputs.router_weight)
        self.scales = [16.0 / max(1, r) for r in case.ranks]

    def forward(self, x: Tensor) -> Tensor:  # (samples, length, I)
        if self.case.experts == 1:  # plain LoRA: the linears see whole samples
            out: Tensor = self.base(x) + self.B[0](self.A[0](x)) * self.scales[0]
            return out
        y: Tensor = self.base(x).flatten(0, 1)
        gates, experts = route(self.router(x).flatten(0, 1), self.case)
        tokens = x.flatten(0, 1)
        for e, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            token, slot = torch.where(experts == e)
            gate = gates[token, slot, None].to(x.dtype) * self.scales[e]
            y = y.index_add(0, token, B(A(tokens[token])) * gate)
        return y.view(*x.shape[:-1], -1)


def linear(weight: Tensor) -> nn.Linear:
    """Return a linear with its own copy of ``weight`` (O, I)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous().clone())
    return layer


class HookStep(Step):
    """A module's forward and backward with a library's hooks in it."""

    def __init__(self, inputs: MoELoRAInputs) -> None:
        case = inputs.case
        self.inputs, self.experts = inputs, ExpertLinears(inputs)
        self.model: nn.Module = self.experts
        self.x: Any = inputs.x.detach().view(case.samples, -1, case.inputs).requires_grad_()
        self.grad_out = inputs.grad_out.view(case.samples, -1, case.outputs)

    def forward(self) -> Tensor:
        out: Tensor = self.model(self.x)
        return out

    def backward(self, out: Tensor) -> dict[str, Tensor]:
        out.backward(self.grad_out)
        A: list[Any] = list(self.experts.A)
        B: list[Any] = list(self.experts.B)
        FA = torch.cat([self.square(layer) for layer in A])
        FB = torch.cat([self.square(layer).T for layer in B])
        results = {"FA": FA, "FB": FB, "dx": self.x.grad.flatten(0, 1)}
        if A[0].weight.grad is not None:
            results["dA"] = torch.cat([layer.weight.grad for layer in A])
            results["dB"] = torch.cat([layer.weight.grad.T for layer in B])
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None
        return results

    def square(self, layer: Any) -> Tensor:
        """Return the library's sum of squares of one linear, and forget it there."""
        raise NotImplementedError

    def results(self) -> dict[str, Tensor]:
        return self.backward(self.forward())

    def held(self) -> list[Tensor]:
        return [*self.experts.parameters()]


class OpacusStep(HookStep):
    """``GradSampleModule``, whose per-sample gradients the user squares."""

    def __init__(self, inputs: MoELoRAInputs) -> None:
        super().__init__(inputs)
        from opacus import GradSampleModule

        self.model = GradSampleModule(self.experts, loss_reduction="sum", strict=False)

    def square(self, layer: Any) -> Tensor:
        samples = layer.weight.grad_sample.float()
        layer.weight.grad_sample = None
        return torch.einsum("sij,sij->ij", samples, samples)

    def backward(self, out: Tensor) -> dict[str, Tensor]:
        results = super().backward(out)
        self.experts.router.weight.grad_sample = None
        return results


class BackpackStep(HookStep):
    """``SumGradSquared``; torch's einsum takes opt_einsum's path where that is installed."""

    def __init__(self, inputs: MoELoRAInputs) -> None:
        super().__init__(inputs)
        if not torch.backends.opt_einsum.is_available():
            raise Unavailable("opt_einsum is not installed, and without it this would be unfair")
        from backpack import extend

        for layer in (*self.experts.A, *self.experts.B):
            extend(layer)

    def backward(self, out: Tensor) -> dict[str, Tensor]:
        from backpack import backpack
        from backpack.extensions import SumGradSquared

        with backpack(SumGradSquared()):
            return super().backward(out)

    def square(self, layer: Any) -> Tensor:
        total: Tensor = layer.weight.sum_grad_squared
        del layer.weight.sum_grad_squared
        return total


class KronfluenceStep(HookStep):
    """Strategy "diagonal", as its factor fitting runs it; it computes no ordinary gradients."""

    def __init__(self, inputs: MoELoRAInputs) -> None:
        super().__init__(inputs)
        from kronfluence.analyzer import prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.module.tracked_module import ModuleMode
        from kronfluence.module.utils import set_mode, update_factor_args
        from kronfluence.task import Task

        names = [f"{side}.{e}" for side in "AB" for e in range(inputs.case.experts)]

        class Experts(Task):
            def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
                raise NotImplementedError

            def compute_measurement(self, batch: Any, model: Any) -> Any:
                raise NotImplementedError

            def get_influence_tracked_modules(self) -> list[str]:
                return names

        self.model = prepare_model(self.experts, Experts())
        arguments = FactorArguments(strategy="diagonal", use_empirical_fisher=True)
        update_factor_args(self.model, arguments)
        set_mode(self.model, ModuleMode.LAMBDA, release_memory=True)

    def square(self, layer: Any) -> Tensor:
        total: Tensor = layer.storage["lambda_matrix"]
        layer.storage["lambda_matrix"] = layer.storage["num_lambda_processed"] = None
        return total


def squares_truth(inputs: MoELoRAInputs) -> dict[str, Tensor]:
    """Return the results without the gradients of the parameters."""
    return {name: value for name, value in truth(inputs).items() if name not in ("dA", "dB")}


def needs(package: str, step: type[HookStep]) -> Any:
    """Return a ``build`` that says so where the package is missing."""

    def build(inputs: MoELoRAInputs) -> Step:
        try:
            return step(inputs)
        except ImportError as error:
            raise Unavailable(f"{package} is not installed ({error})") from None

    return build


for package, step, rest in (
    ("opacus", OpacusStep, {}),
    ("backpack-for-pytorch", BackpackStep, {}),
    ("kronfluence", KronfluenceStep, {"truth": squares_truth}),
):
    label = {"opacus": "Opacus", "backpack-for-pytorch": "BackPACK", "kronfluence": "Kronfluence"}
    FISHER.provide(label[package], f"upstream {package} {version(package)}", **rest)(
        needs(package, step)
    )
