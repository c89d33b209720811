"""The methods by the names that people type, and what each of them needs to make a plan."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from floe_kernels._types import ModuleSpec
from floe_kernels.allocation import (
    Plan,
    alphalora,
    by_position,
    floe,
    inverted_scores,
    layerif,
    lora_smoe,
    mola,
    random,
    uniform,
)
from floe_kernels.allocation.arguments import nearest
from floe_kernels.allocation.units import unit_scores
from floe_kernels.pipeline.measurements import Measurement
from floe_kernels.pipeline.options import Options, flag_of

NEEDS = {
    "floe": "fisher",
    "lora_smoe": "sensitivity",
    "alphalora": "spectral",
    "layerif": "influence",
    "mola": "",
    "uniform": "",
    "random": "",
    "random_layers": "",
    "by_position": "",
}
"""Method -> what it measures; the others look at no data and no weight."""
SHARING = ("lora_smoe", "alphalora", "layerif", "mola", "random")
TAKES = {
    "keep": ("floe", "random", "random_layers", "by_position"),
    "refine": ("floe",),
    "lo": SHARING,
    "hi": SHARING,
    "beta": ("lora_smoe", "alphalora", "layerif"),
    "per": ("floe", "lora_smoe", "alphalora", "uniform", "random"),
    "percent": ("lora_smoe",),
    "pool": ("lora_smoe",),
    "how": ("lora_smoe",),
    "where": ("by_position",),
    "compat": ("alphalora",),
}
"""Option -> the methods that it means something to; what is not here concerns all of them."""
INVERTED = "inverted-"
DRAWN = ("random", "random_layers")  # another plan for every seed
LIST = ", ".join(NEEDS)


@dataclass(frozen=True)
class Method:
    """A method as it was asked for.

    Attributes:
        name: One of ``NEEDS``.
        preset: The shape, for ``mola``.
        inverted: Whether its ranking is turned upside down, the control that it must beat.
    """

    name: str
    preset: str = ""
    inverted: bool = False

    @property
    def needs(self) -> str:
        """What must be measured first; may be nothing."""
        return NEEDS[self.name]

    @property
    def title(self) -> str:
        """What tables call it."""
        shape = f"{self.name} {self.preset}" if self.preset else self.name
        return f"inverted {shape}" if self.inverted else shape

    @property
    def key(self) -> str:
        """What files call it."""
        return self.title.replace(" ", "-")


def read_method(text: str) -> Method:
    """Read a method's name: one of ``NEEDS``, ``mola-PRESET``, or either behind ``inverted-``.

    ``inverted`` alone is ``inverted-floe``.

    Args:
        text: What was typed.

    Raises:
        ValueError: There is no such method, or nothing to invert.

    Example:
        >>> read_method("inverted-mola-10-2-2-2").title
        'inverted mola 10-2-2-2'
        >>> read_method("lora-smoe").name
        'lora_smoe'
    """
    rest = text.strip()
    turned = rest == "inverted" or rest.startswith(INVERTED)
    rest = "floe" if rest == "inverted" else rest.removeprefix(INVERTED)
    name, preset = rest.replace("-", "_"), ""
    if rest.startswith("mola"):
        name, _, preset = rest.partition("-")
        preset = preset or "2468"
    if name not in NEEDS or (preset and not re.fullmatch(r"[0-9]{4}|[0-9]+(-[0-9]+){3}", preset)):
        raise ValueError(
            f"a method must be one of {LIST}, mola-a-b-c-d, or inverted-METHOD, "
            f"got {text!r}{nearest(name, NEEDS)}"
        )
    if turned and not (NEEDS[name] or preset):
        raise ValueError(f"only a method with a ranking can be inverted, got {text!r}")
    return Method(name, preset, turned)


def check_options(method: Method, given: Collection[str]) -> None:
    """Make sure that the options which somebody named mean something to a method.

    Args:
        method: Which method.
        given: Fields of ``Options`` that were named.

    Raises:
        ValueError: One of them has no effect on it.

    Example:
        >>> check_options(read_method("floe"), ["where"])
        Traceback (most recent call last):
        ...
        ValueError: --where has no effect on floe, only on by_position
    """
    for name in given:
        if method.name not in TAKES.get(name, NEEDS):
            raise ValueError(
                f"{flag_of(name)} has no effect on {method.name}, only on {', '.join(TAKES[name])}"
            )


def make_plan(
    method: Method,
    modules: Mapping[str, ModuleSpec],
    found: Measurement | None,
    options: Options,
    *,
    rank: int | Mapping[str, int],
    seed: int = 0,
    total: int | None = None,
    unit: str = "",
    **more: Any,
) -> Plan:
    """Turn what was measured into a plan, under the budget that the options set.

    Args:
        method: Which method.
        modules: All adaptable linears, in model order.
        found: What the method needs; None where it needs nothing.
        options: ``budget`` and the others of its group; experts, fraction and adapter.
        rank: Of the experts.
        seed: Of the methods that draw.
        total: Experts, parameters or bytes in place of ``options.budget``; 0 there means none.
        unit: What ``total`` is counted in; empty: as the options say.
        more: Further keywords of every policy: ``base_model``, ``fingerprint``, ``provenance``.

    Returns:
        The plan; ``method`` is the title.

    Raises:
        ValueError: Measurement and method do not fit, or the budget cannot be met.
    """
    if method.needs and (found is None or found.method != method.needs):
        got = "none" if found is None else f"those of --method {found.method}"
        raise ValueError(
            f"{method.name} needs the scores of floe score --method {method.needs}, got {got}"
        )
    if total is None:
        total = options.budget or None
    ask = Ask(method, modules, found, options, total, unit or options.unit, seed, {
        **options.adapter(rank), **more,
    })  # fmt: skip
    return replace(MAKERS[method.name](ask), method=method.title)


@dataclass(frozen=True)
class Ask:
    """Everything that a maker may look at."""

    method: Method
    modules: Mapping[str, ModuleSpec]
    found: Measurement | None
    options: Options
    total: int | None
    unit: Any
    seed: int
    keywords: dict[str, Any]

    @property
    def scores(self) -> dict[str, float]:
        """The scores, upside down where that was asked for."""
        scores = {} if self.found is None else self.found.scores
        return inverted_scores(scores) if self.method.inverted else scores

    def shared(self, beta: float | None = None, lo: int = 0) -> dict[str, Any]:
        """Return the keywords of a policy that shares a total out."""
        options = self.options
        given: dict[str, Any] = {
            "lo": lo if options.lo < 0 else options.lo,
            "hi": options.hi or None,
        }
        if beta is not None:
            given["beta"] = beta if options.beta < 0 else options.beta
        return {"total": self.total, "unit": self.unit, **given, **self.keywords}

    def needed(self) -> int:
        """Return the total, which some policies cannot do without."""
        if self.total is None:
            raise ValueError(f"--budget must be given for {self.method.name}, such as --budget 160")
        return self.total

    def per(self, usual: str) -> Any:
        """Return what a decision is made for."""
        return self.options.per or usual

    def best(self, layers: Mapping[str, float]) -> Plan:
        """Keep the layers that score highest, with a share of the total each."""
        return keep_best(
            layers, self.modules, self.options, total=self.total, unit=self.unit, **self.keywords
        )


def keep_best(
    scores: Mapping[str, float],
    modules: Mapping[str, ModuleSpec],
    options: Options,
    *,
    per: str = "",
    total: int | None = None,
    unit: Any = "parameters",
    gradients: Any = None,
    **keywords: Any,
) -> Plan:
    """Keep what scores highest: layers by their number, or linears by their parameters.

    Linears differ in size: a fraction of their number would not say what they cost.

    Args:
        scores: By layer or by linear.
        modules: All adaptable linears, in model order.
        options: ``keep``, ``experts`` and ``refine``.
        per: ``"layer"`` or ``"module"``; empty takes what the scores are keyed by.
        total: What the kept share, counted in ``unit``; None: ``options.experts`` each.
        unit: What ``total`` is counted in.
        gradients: Of the gates, for refinement; None refines nothing.
        keywords: Further keywords of every policy: the adapter, the model.

    Raises:
        ValueError: As ``floe`` does.
    """
    by, _ = unit_scores(scores, modules, per or None)  # type: ignore[arg-type]
    limits: dict[str, Any] = {"total": total, "unit": unit}
    if by == "module" and total is None:
        whole = uniform(modules, experts=options.experts, **keywords).parameters()
        limits = {"budget": options.keep * whole, "unit": "parameters"}
    return floe(
        scores, modules, per=by, keep=options.keep, experts=options.experts,
        gradients=gradients, refine=options.refine, **limits, **keywords,
    )  # fmt: skip


def _floe(ask: Ask) -> Plan:
    gradients = None if ask.found is None or ask.method.inverted else ask.found.gradients
    return keep_best(
        ask.scores, ask.modules, ask.options, per=ask.options.per, total=ask.total,
        unit=ask.unit, gradients=gradients, **ask.keywords,
    )  # fmt: skip


def _lora_smoe(ask: Ask) -> Plan:
    tasks = ask.found.task_scores(ask.options.how) if ask.found else {}
    if ask.method.inverted:
        tasks = {task: inverted_scores(scores) for task, scores in tasks.items()}
    return lora_smoe(
        tasks, ask.modules, p=ask.options.percent, pool=ask.options.pool,  # type: ignore[arg-type]
        per=ask.per("module"), **ask.shared(beta=1.0),
    )  # fmt: skip


def _alphalora(ask: Ask) -> Plan:
    ask.needed()
    keywords = {**ask.shared(beta=2.5, lo=1), "compat": ask.options.compat}
    return alphalora(ask.scores, ask.modules, per=ask.per("layer"), **keywords)


def _layerif(ask: Ask) -> Plan:
    ask.needed()
    return layerif(ask.scores, ask.modules, **ask.shared(beta=1.0, lo=1))


def _mola(ask: Ask) -> Plan:
    preset = ask.method.preset
    if ask.method.inverted:
        separator = "-" if "-" in preset else ""
        quarters = preset.split("-") if separator else list(preset)
        preset = separator.join(reversed(quarters))
    return mola(ask.modules, preset, **ask.shared())


def _uniform(ask: Ask) -> Plan:
    return uniform(
        ask.modules, experts=ask.options.experts, total=ask.total, unit=ask.unit,
        per=ask.per("layer"), **ask.keywords,
    )  # fmt: skip


def _random(ask: Ask) -> Plan:
    return random(
        ask.modules, keep=ask.options.keep, experts=ask.options.experts, seed=ask.seed,
        per=ask.per("layer"), **ask.shared(),
    )  # fmt: skip


def _random_layers(ask: Ask) -> Plan:
    drawn = random(ask.modules, keep=ask.options.keep, seed=ask.seed).layers()
    return ask.best(_ones(ask.modules, drawn))


def _by_position(ask: Ask) -> Plan:
    placed = by_position(
        ask.modules, where=ask.options.where, keep=ask.options.keep  # type: ignore[arg-type]
    )  # fmt: skip
    return ask.best(_ones(ask.modules, placed.layers()))


def _ones(modules: Mapping[str, ModuleSpec], chosen: list[str]) -> dict[str, float]:
    layers = dict.fromkeys(spec.layer for spec in modules.values())
    return {layer: float(layer in chosen) for layer in layers}


MAKERS: dict[str, Callable[[Ask], Plan]] = {
    "floe": _floe,
    "lora_smoe": _lora_smoe,
    "alphalora": _alphalora,
    "layerif": _layerif,
    "mola": _mola,
    "uniform": _uniform,
    "random": _random,
    "random_layers": _random_layers,
    "by_position": _by_position,
}
