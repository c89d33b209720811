"""Layers or single modules as the things that a policy decides about, and plans made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

from floe_kernels.allocation.arguments import finite, nearest, whole
from floe_kernels.allocation.plan import Placement, Plan, checked_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from floe_kernels._types import JSON, ModuleSpec

Per: TypeAlias = Literal["layer", "module"]
"""What one decision is made for: a whole block, or every linear by itself."""


class PlanOptions(TypedDict, total=False):
    """Keywords that every policy takes and hands on to its plan."""

    rank: int | Mapping[str, int]  #: rank of every expert, or one by layer or module name; 8
    top_k: int | None  #: experts a token; None = 2, or all with shared_A; never above a module's E
    lora_alpha: float  #: 16
    lora_dropout: float  #: 0.0
    shared_A: bool  #: one lora_A for all experts of a module; False
    use_rslora: bool  #: False
    base_model: str  #: name of the model, for the record
    fingerprint: str  #: checksum of the model, checked when the plan is applied
    provenance: Mapping[str, JSON]  #: added to what the policy itself records


def unit_members(modules: Mapping[str, ModuleSpec], per: Per) -> dict[str, list[str]]:
    """Group module names by layer (or each by itself), in model order.

    Args:
        modules: All adaptable linears, in model order.
        per: ``"layer"`` or ``"module"``.

    Returns:
        Unit name -> names of its modules.

    Raises:
        ValueError: ``per`` is neither, or there is no module.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> unit_members({"q": ModuleSpec(4, 4, "h0"), "k": ModuleSpec(4, 4, "h0")}, "layer")
        {'h0': ['q', 'k']}
    """
    if per not in ("layer", "module"):
        raise ValueError(f"per must be layer or module, got {per!r}")
    if not modules:
        raise ValueError("modules must name at least one linear, got none")
    groups: dict[str, list[str]] = {}
    for name, spec in modules.items():
        groups.setdefault(checked_spec(name, spec).layer if per == "layer" else name, []).append(
            name
        )
    return groups


def unit_scores(
    scores: Mapping[str, float],
    modules: Mapping[str, ModuleSpec],
    per: Per | None = None,
    *,
    combine: Literal["sum", "mean"] = "sum",
) -> tuple[Per, dict[str, float]]:
    """Bring scores by layer or by module to one score a unit, in model order.

    Args:
        scores: Layer name -> number, or module name -> number; finite, one for every unit.
        modules: All adaptable linears, in model order.
        per: The unit; None takes the one that the scores are keyed by.
        combine: How module scores become a layer's.

    Returns:
        The unit and its scores.

    Raises:
        ValueError: A name is unknown or missing, a score is not finite, or modules are asked for
            and layers came.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {"q": ModuleSpec(4, 4, "h0"), "k": ModuleSpec(4, 4, "h0")}
        >>> unit_scores({"q": 1.0, "k": 2.0}, model, "layer")
        ('layer', {'h0': 3.0})
    """
    layers = unit_members(modules, "layer")
    hits = {"layer": sum(n in layers for n in scores), "module": sum(n in modules for n in scores)}
    keyed: Per = "layer" if hits["layer"] >= max(1, hits["module"]) else "module"
    names = layers if keyed == "layer" else modules
    for name in scores:
        if name not in names:
            known = [*layers, *modules]
            rule = "must all name layers or all name modules"
            raise ValueError(f"scores {rule} of the model, got {name!r}{nearest(name, known)}")
    missing = [name for name in names if name not in scores]
    if missing:
        raise ValueError(
            f"scores must name every {keyed} of the model, "
            f"{missing[0]!r} is missing ({len(missing)} of {len(names)} are)"
        )
    values = {name: finite(scores[name], f"the score of {name!r}") for name in names}
    if per is None or per == keyed:
        return keyed, values
    if per == "module":
        raise ValueError("scores must be per module to decide per module, got scores per layer")
    share = {u: len(m) if combine == "mean" else 1 for u, m in unit_members(modules, per).items()}
    return per, {unit: sum(values[m] for m in layers[unit]) / n for unit, n in share.items()}


def depth_group(index: int, length: int, groups: int) -> int:
    """Return which of ``groups`` contiguous groups the layer at ``index`` of ``length`` is in.

    floor(groups * index / length): where groups does not divide length, sizes differ by one.

    Example:
        >>> [depth_group(i, 6, 4) for i in range(6)]
        [0, 0, 1, 2, 2, 3]
    """
    return groups * index // length


def rank_of(rank: int | Mapping[str, int], module: str, layer: str) -> int:
    """Look up a module's rank: one number for all, or by module name, or by layer name."""
    if not isinstance(rank, Mapping):
        return whole(rank, "rank", least=1)
    value = rank.get(module, rank.get(layer))
    if value is None:
        raise ValueError(
            f"rank must be given for every module that gets experts, {module!r} has none"
            f"{nearest(module, rank)}"
        )
    return whole(value, f"rank of {module!r}", least=1)


def plan_of(
    counts: Mapping[str, int],
    modules: Mapping[str, ModuleSpec],
    per: Per,
    method: str,
    record: Mapping[str, JSON],
    options: PlanOptions,
) -> Plan:
    """Make the plan that gives every unit its number of experts.

    A unit of 0 experts stays untouched; a module of 1 expert gets top_k 1, whatever was asked.

    Args:
        counts: Unit name -> experts of each of its modules.
        modules: All adaptable linears, in model order.
        per: What the units are.
        method: The policy's name.
        record: What the policy knows, kept as provenance.
        options: The caller's keywords.

    Returns:
        The plan.

    Raises:
        TypeError: An option is unknown.
        ValueError: An option is out of its range; ``top_k`` above the most experts of any module.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> plan_of({"q": 1}, {"q": ModuleSpec(4, 4, "h")}, "module", "x", {}, {}).placements
        {'q': Placement(ranks=(8,), top_k=1)}
    """
    for name in options:
        if name not in PlanOptions.__annotations__:
            known = PlanOptions.__annotations__
            raise TypeError(f"a policy has no keyword {name!r}{nearest(name, known)}")
    members = unit_members(modules, per)
    shared_A = options.get("shared_A", False)
    placements = {}
    for unit, names in members.items():
        count = whole(counts.get(unit, 0), f"experts of {unit!r}")
        for name in names if count else ():
            rank = rank_of(options.get("rank", 8), name, modules[name].layer)
            placements[name] = Placement((rank,) * count)
    most = max((p.experts for p in placements.values()), default=0)
    top_k = options.get("top_k")
    if top_k is not None and whole(top_k, "top_k", least=1) > most > 0:
        raise ValueError(f"top_k must be in 1..E = 1..{most}, got {top_k}")
    for name, p in placements.items():
        asked = top_k or (p.experts if shared_A else 2)
        placements[name] = Placement(p.ranks, min(asked, p.experts))
    return Plan(
        placements,
        method,
        lora_alpha=options.get("lora_alpha", 16),
        lora_dropout=options.get("lora_dropout", 0.0),
        shared_A=shared_A,
        use_rslora=options.get("use_rslora", False),
        modules=dict(modules),
        base_model=options.get("base_model", ""),
        fingerprint=options.get("fingerprint", ""),
        provenance={"per": per, **record, **_versions(), **options.get("provenance", {})},
    )


def keep_count(keep: float, length: int) -> int:
    """Return how many of ``length`` units the fraction ``keep`` in (0, 1] keeps: ceil(keep L).

    Example:
        >>> keep_count(0.25, 30), keep_count(0.07, 100)
        (8, 7)
    """
    if not 0 < finite(keep, "keep") <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep!r}")
    return -int(-round(keep * length, 9) // 1)  # 0.07 * 100 is 7.000000000000001


def best(scores: Sequence[float], k: int) -> list[int]:
    """Return the indices of the ``k`` largest scores, ascending; ties keep model order."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:k])


def _versions() -> dict[str, JSON]:
    with contextlib.suppress(PackageNotFoundError):
        return {"versions": {"floe_kernels": version("floe-kernels")}}
    return {}
