"""What can be measured: operations, their cases, and who provides them.

An operation names its cases and knows the truth; a provider is one way of computing it. A provider
is bound to one set of inputs by ``build``, which gives a :class:`Step`.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Unavailable(Exception):
    """A provider cannot run this case; the message is the reason, in one line."""


class Step:
    """One provider bound to one set of inputs: a forward, a backward, and named results."""

    def forward(self) -> Any:
        raise NotImplementedError

    def backward(self, out: Any) -> Any:
        raise NotImplementedError

    def results(self) -> dict[str, Tensor]:
        """Run once and name what came out, in the layout of the truth."""
        raise NotImplementedError

    def held(self) -> list[Tensor]:
        """Tensors that exist anyway (weights), which saving for the backward costs nothing."""
        return []

    def bind(self, mode: str) -> "Step":
        """Prepare for being timed in one mode."""
        return self


class AutogradStep(Step):
    """A forward function whose backward is autograd's, for one given output gradient."""

    def __init__(
        self,
        forward: Callable[[], Tensor],
        grad_out: Tensor,
        leaves: Mapping[str, Tensor],
        unpack: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda grads: grads,
        frozen: tuple[Tensor, ...] = (),
    ) -> None:
        self._forward, self.grad_out, self.frozen = forward, grad_out, frozen
        self.names, self.leaves = tuple(leaves), tuple(leaves.values())
        self.unpack = unpack

    def forward(self) -> Tensor:
        return self._forward()

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.grad_out)

    def results(self) -> dict[str, Tensor]:
        out = self.forward()
        grads = self.unpack(dict(zip(self.names, self.backward(out), strict=True)))
        return {"y": out.detach(), **grads}

    def held(self) -> list[Tensor]:
        return [
            *self.frozen,
            *(t for n, t in zip(self.names, self.leaves, strict=True) if n != "x"),
        ]


@dataclass(frozen=True)
class Provider:
    """One way of computing an operation."""

    name: str
    build: Callable[[Any], Step]
    origin: str  #: "ours", "PyTorch", "upstream NAME VERSION" or "published formula, rewritten"
    role: str = "peer"  #: "base", "ours", "peer", or "context": another function, not ranked
    devices: tuple[str, ...] = ("cpu", "cuda")
    truth: Callable[[Any], dict[str, Tensor]] | None = None  #: where it is not the operation's
    graphed: bool = False  #: replayed as a CUDA graph, and compared with such


@dataclass
class Operation:
    """One thing to measure."""

    name: str
    cases: Callable[[], list[Any]]
    inputs: Callable[..., Any]  #: (case, device, seed) -> inputs
    truth: Callable[[Any], dict[str, Tensor]]  #: in float64
    yardstick: Callable[[Any], dict[str, Tensor]]  #: plain PyTorch in the case's own dtype
    cost: Callable[[Any, str], tuple[float, float]]  #: (case, mode) -> least FLOPs, least bytes
    limit: Callable[[Any, int], Any]  #: (case, tokens) -> the case with at most so many tokens
    modes: tuple[str, ...] = ("fwd", "bwd", "fwdbwd")
    providers: dict[str, Provider] = field(default_factory=dict)

    def provide(
        self, name: str, origin: str, **rest: Any
    ) -> Callable[[Callable[[Any], Step]], Callable[[Any], Step]]:
        """Register the decorated ``build`` function under ``name``."""

        def register(build: Callable[[Any], Step]) -> Callable[[Any], Step]:
            self.providers[name] = Provider(name, build, origin, **rest)
            return build

        return register

    def choose(self, names: str, device: str) -> list[Provider]:
        """Return the providers named (comma separated, or "all"), base first."""
        wanted = list(self.providers) if names == "all" else names.split(",")
        unknown = set(wanted) - set(self.providers)
        if unknown:
            known = ", ".join(self.providers)
            raise SystemExit(f"providers of {self.name} are {known}, got {', '.join(unknown)}")
        chosen = [p for p in self.providers.values() if p.name in wanted or p.role == "base"]
        return [p for p in chosen if device in p.devices]


OPERATIONS: dict[str, Operation] = {}
#: Modules whose import fills ``OPERATIONS``, in the order tables show providers.
PROVIDERS = (
    "layers", "dense_cat", "grouped_mm", "scattermoe", "loops", "peft_lora",
    "fisher_torch", "fisher_hooks", "grad_square", "experimental",
)  # fmt: skip


def load() -> dict[str, Operation]:
    """Import every provider module and return the operations."""
    for name in PROVIDERS:
        importlib.import_module(f"benchmarks.providers.{name}")
    return OPERATIONS
