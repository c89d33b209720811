"""A plan: which modules get experts, how many, of which rank, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from floe_kernels._types import JSON, ModuleSpec
from floe_kernels.allocation import plan_file
from floe_kernels.allocation.arguments import finite, nearest, whole
from floe_kernels.allocation.costs import adapter_parameters

if TYPE_CHECKING:
    from os import PathLike


@dataclass(frozen=True)
class Placement:
    """The experts of one module.

    Attributes:
        ranks: Rank of every expert, whole numbers; 0 and an empty tuple are legal.
        top_k: Experts a token, in 1..E; None = 2, or all E with a shared A.

    Raises:
        ValueError: A rank is no whole number or negative, or ``top_k`` is out of range.

    Example:
        >>> Placement((8, 8, 4), top_k=2).experts
        3
    """

    ranks: tuple[int, ...]
    top_k: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ranks, (str, bytes, Mapping)) or not isinstance(self.ranks, Iterable):
            raise ValueError(f"ranks must be a sequence of whole numbers, got {self.ranks!r}")
        ranks = tuple(whole(r, "every rank") for r in self.ranks)
        object.__setattr__(self, "ranks", ranks)
        if self.top_k is None:
            return
        k = whole(self.top_k, "top_k", least=1)
        if ranks and k > len(ranks):
            raise ValueError(f"top_k must be in 1..E = 1..{len(ranks)}, got {k}")
        object.__setattr__(self, "top_k", k)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.ranks)


@dataclass(frozen=True)
class Plan:
    """Where a model's experts go; the one thing that policies return and models are built from.

    Checked when made, whether by a policy, by hand or from a file: every placement names a known
    module, ranks are whole and not negative, ``top_k`` fits, numbers are finite. Placements are
    kept in model order. A module that is not placed, or placed with no expert, stays untouched.

    Attributes:
        placements: Module name -> its experts.
        method: The policy's name.
        lora_alpha: LoRA's alpha, above 0; an expert of rank r is scaled by alpha / r.
        lora_dropout: Probability in [0, 1) that an input element of lora_A is dropped.
        shared_A: One lora_A for all experts of a module (arXiv 2404.19245); their ranks are equal.
        use_rslora: Scale by alpha / sqrt(r) instead.
        modules: All adaptable linears of the model it was made for, in model order.
        base_model: Name of that model.
        fingerprint: Checksum of that model, as the integration computes it.
        provenance: Scores, budget, seed, versions, arguments: anything JSON can hold.

    Raises:
        ValueError: A rule above is broken; the message names it and what came.

    Example:
        >>> modules = {"h.0.q": ModuleSpec(8, 8, "h.0"), "h.1.q": ModuleSpec(8, 8, "h.1")}
        >>> plan = Plan({"h.1.q": Placement((4, 4), 1)}, "by hand", modules=modules)
        >>> plan.layers(), plan.parameters()
        (['h.1'], 144)
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    placements: dict[str, Placement]
    method: str
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    shared_A: bool = False
    use_rslora: bool = False
    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    base_model: str = ""
    fingerprint: str = ""
    provenance: dict[str, JSON] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("method", "base_model", "fingerprint"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} must be a string, got {value!r}")
        for name in ("shared_A", "use_rslora"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        for name in ("placements", "modules", "provenance"):
            if not isinstance(value := getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a dict, got {value!r}")
        if type(self.lora_alpha) is not int:
            object.__setattr__(self, "lora_alpha", finite(self.lora_alpha, "lora_alpha"))
        object.__setattr__(self, "lora_dropout", finite(self.lora_dropout, "lora_dropout"))
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        modules = {name: checked_spec(name, spec) for name, spec in self.modules.items()}
        for name, placement in self.placements.items():
            if name not in modules:
                raise ValueError(
                    "every placement must name a module of the plan, "
                    f"got {name!r}{nearest(name, modules)}"
                )
            if not isinstance(placement, Placement):
                raise ValueError(f"placements[{name!r}] must be a Placement, got {placement!r}")
            if self.shared_A and len(set(placement.ranks)) > 1:
                raise ValueError(
                    f"shared_A needs experts of equal rank, got {placement.ranks} for {name!r}"
                )
        ordered = {name: self.placements[name] for name in modules if name in self.placements}
        object.__setattr__(self, "modules", modules)
        object.__setattr__(self, "placements", ordered)
        provenance = plan_file.plain(dict(self.provenance), "provenance")
        object.__setattr__(self, "provenance", provenance)

    def parameters(self, router: bool = True) -> int:
        """Count the trainable parameters: lora_A, lora_B and the router.

        Equals arXiv 2402.08562, table 1, with the router and arXiv 2404.19245 without it.

        Args:
            router: Count the routers as well.

        Returns:
            A number of parameters.

        Example:
            >>> Plan({"q": Placement((8,))}, "x", modules={"q": ModuleSpec(4, 2, "h")}).parameters()
            52
        """
        return sum(
            adapter_parameters(
                self.modules[name], placement.ranks, shared_A=self.shared_A, router=router
            )
            for name, placement in self.placements.items()
        )

    def layers(self) -> list[str]:
        """List the layers that keep at least one expert, in model order.

        Returns:
            Layer names, each once.

        Example:
            >>> Plan({"q": Placement((8,))}, "x", modules={"q": ModuleSpec(4, 2, "h")}).layers()
            ['h']
        """
        kept = (self.modules[name].layer for name, p in self.placements.items() if p.experts)
        return list(dict.fromkeys(kept))

    def to_json(self) -> str:
        """Write the plan as JSON text, one line a module, with its format version.

        Returns:
            Text that ``from_json`` turns into an equal plan.

        Example:
            >>> '"version": 1' in Plan({}, "none").to_json()
            True
        """
        document: dict[str, JSON] = {
            "format": plan_file.FORMAT,
            "version": plan_file.VERSION,
            **{name: getattr(self, name) for name in plan_file.OPTIONS},
            "placements": {
                name: {"ranks": list(p.ranks), "top_k": p.top_k}
                for name, p in self.placements.items()
            },
            "modules": {name: dict(spec._asdict()) for name, spec in self.modules.items()},
            "provenance": self.provenance,
        }
        return plan_file.render(document)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from JSON text, strictly.

        Args:
            text: What ``to_json`` wrote, perhaps edited.

        Returns:
            The plan.

        Raises:
            ValueError: The text is no JSON, holds an unknown, missing or repeated key, a NaN or an
                infinity, another version, or anything that ``Plan`` refuses.

        Example:
            >>> Plan.from_json("[]")
            Traceback (most recent call last):
            ...
            ValueError: a plan must be a JSON object, got a list
        """
        document = plan_file.parse(text)
        placements = {
            name: _placement(name, **row)
            for name, row in plan_file.rows(document, "placements", Placement).items()
        }
        modules = {
            name: ModuleSpec(**row)
            for name, row in plan_file.rows(document, "modules", ModuleSpec).items()
        }
        options = {name: document[name] for name in plan_file.OPTIONS if name in document}
        provenance = document.get("provenance", {})
        return cls(placements, modules=modules, provenance=provenance, **options)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a file, whole or not at all.

        The text goes to a temporary name beside it, is forced to disk, and is then renamed, so a
        full disk or a kill leaves the old file as it was.

        Args:
            path: The file; its folder exists.

        Raises:
            OSError: The file system refused; the message is its own.

        Example:
            >>> import tempfile, pathlib
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Plan({}, "none").save(pathlib.Path(folder, "plan.json"))
            ...     Plan.load(pathlib.Path(folder, "plan.json")).method
            'none'
        """
        plan_file.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan from a file, strictly; the counterpart of ``save``.

        Args:
            path: A file that ``save`` wrote, perhaps edited.

        Returns:
            The plan.

        Raises:
            OSError: The file cannot be read.
            ValueError: As ``from_json``; the message starts with the path.

        Example:
            >>> Plan.load("missing.json")
            Traceback (most recent call last):
            ...
            FileNotFoundError: [Errno 2] No such file or directory: 'missing.json'
        """
        try:
            return cls.from_json(plan_file.read(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def checked_spec(name: object, spec: object) -> ModuleSpec:
    """Return ``spec`` as a ModuleSpec whose sizes are whole and at least 1."""
    if not isinstance(name, str):
        raise ValueError(f"a module's name must be a string, got {name!r}")
    if not isinstance(spec, tuple) or len(spec) != 3 or not isinstance(spec[2], str):
        rule = "a ModuleSpec(in_features, out_features, layer)"
        raise ValueError(f"modules[{name!r}] must be {rule}, got {spec!r}")
    rows, columns = (whole(n, f"modules[{name!r}] sizes", least=1) for n in spec[:2])
    return ModuleSpec(rows, columns, spec[2])


def _placement(name: str, ranks: tuple[int, ...], top_k: int | None) -> Placement:
    try:
        return Placement(ranks, top_k)
    except ValueError as error:
        raise ValueError(f"placements[{name!r}]: {error}") from error
