"""The controls that any allocation must beat: uniform, random, inverted, by position."""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING, Any, Literal, cast

from floe_kernels.allocation.arguments import whole
from floe_kernels.allocation.budget import allocate_budget
from floe_kernels.allocation.plan import Plan
from floe_kernels.allocation.units import (
    Per,
    PlanOptions,
    best,
    keep_count,
    plan_of,
    unit_members,
    unit_scores,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Unpack

    from floe_kernels._types import JSON, ModuleSpec
    from floe_kernels.allocation.costs import Unit
    from floe_kernels.allocation.plan import Placement

Where = Literal["first", "middle", "last", "spaced"]


def uniform(
    modules: Mapping[str, ModuleSpec],
    *,
    experts: int = 4,
    total: int | None = None,
    unit: Unit = "experts",
    per: Per = "layer",
    **options: Unpack[PlanOptions],
) -> Plan:
    """Give every module the same experts, or share a total out equally.

    Args:
        modules: All adaptable linears, in model order.
        experts: Experts of every module, unless ``total`` is given.
        total: Shared out equally, as in ``allocate_budget``; earlier units get what is left over.
        unit: What ``total`` is counted in.
        per: ``"layer"`` or ``"module"``.
        options: ``rank``, ``top_k``, ``lora_alpha`` and the others of ``PlanOptions``.

    Returns:
        The plan.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> plan = uniform({"q": ModuleSpec(8, 8, "h.0")}, experts=3)
        >>> plan.placements["q"].ranks
        (8, 8, 8)
    """
    names = unit_members(modules, per)
    record: dict[str, JSON] = {"arguments": {"experts": experts, "total": total, "unit": unit}}
    if total is None:
        counts = dict.fromkeys(names, whole(experts, "experts"))
    else:
        equal = dict.fromkeys(names, 1.0)
        counts = _share(equal, modules, total, unit=unit, per=per, options=options)
    return plan_of(counts, modules, per, "uniform", record, options)


def random(
    modules: Mapping[str, ModuleSpec],
    *,
    keep: float = 0.25,
    total: int | None = None,
    unit: Unit = "experts",
    seed: int = 0,
    experts: int = 4,
    per: Per = "layer",
    lo: int = 0,
    hi: int | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Keep layers by chance, or share a total out by chance.

    The same seed gives the same plan in every Python. With ``total`` the shares are drawn evenly
    from all possible ones (normalised exponentials) and met exactly by ``allocate_experts``.

    Args:
        modules: All adaptable linears, in model order.
        keep: Fraction kept, in (0, 1], unless ``total`` is given.
        total: Shared out over all units, as in ``allocate_budget``.
        unit: What ``total`` is counted in.
        seed: Whole number of at least 0.
        experts: Experts of every module kept by ``keep``.
        per: ``"layer"`` or ``"module"``.
        lo: Least experts of each unit, with ``total``.
        hi: Most experts of each unit, with ``total``.
        options: ``rank``, ``top_k``, ``lora_alpha`` and the others of ``PlanOptions``.

    Returns:
        The plan.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {f"h.{i}.q": ModuleSpec(8, 8, f"h.{i}") for i in range(8)}
        >>> len(random(model, keep=0.25, seed=1).layers())
        2
    """
    names = list(unit_members(modules, per))
    draw = Random(whole(seed, "seed"))
    draws = [-math.log(1.0 - draw.random()) for _ in names]
    arguments: dict[str, JSON] = {"seed": seed, "total": total, "lo": lo, "hi": hi, "unit": unit}
    if total is not None:
        scores = dict(zip(names, draws, strict=True))
        counts = _share(scores, modules, total, unit=unit, per=per, lo=lo, hi=hi, options=options)
    else:
        kept = best(draws, keep_count(keep, len(names)))
        counts = {names[i]: whole(experts, "experts", least=1) for i in kept}
        arguments = {"seed": seed, "keep": keep, "experts": experts}
    return plan_of(counts, modules, per, "random", {"arguments": arguments}, options)


def by_position(
    modules: Mapping[str, ModuleSpec],
    *,
    where: Where = "spaced",
    keep: float = 0.25,
    experts: int = 4,
    per: Per = "layer",
    **options: Unpack[PlanOptions],
) -> Plan:
    """Keep layers by where they are: the first, the middle, the last, or evenly spaced ones.

    Evenly spaced are the middles of K equal stretches of the model.

    Args:
        modules: All adaptable linears, in model order.
        where: ``"first"``, ``"middle"``, ``"last"`` or ``"spaced"``.
        keep: Fraction kept, in (0, 1].
        experts: Experts of every module kept.
        per: ``"layer"`` or ``"module"``.
        options: ``rank``, ``top_k``, ``lora_alpha`` and the others of ``PlanOptions``.

    Returns:
        The plan.

    Raises:
        ValueError: ``where`` is unknown, or a number is out of its range.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {f"h.{i}.q": ModuleSpec(8, 8, f"h.{i}") for i in range(8)}
        >>> by_position(model, where="spaced", keep=0.25).layers()
        ['h.2', 'h.6']
    """
    names = list(unit_members(modules, per))
    L, K = len(names), keep_count(keep, len(names))
    chosen = {
        "first": list(range(K)),
        "middle": list(range((L - K) // 2, (L - K) // 2 + K)),
        "last": list(range(L - K, L)),
        "spaced": [(2 * k + 1) * L // (2 * K) for k in range(K)],
    }
    if where not in chosen:
        raise ValueError(f"where must be first, middle, last or spaced, got {where!r}")
    counts = {names[i]: whole(experts, "experts", least=1) for i in chosen[where]}
    record: dict[str, JSON] = {"arguments": {"where": where, "keep": keep, "experts": experts}}
    return plan_of(counts, modules, per, where, record, options)


def inverted_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Turn a ranking upside down and keep its range: max + min - score.

    Scores of at least 0 stay so; equal scores stay equal.

    Args:
        scores: Name -> finite number.

    Returns:
        The same names, in the same order.

    Example:
        >>> inverted_scores({"a": 1.0, "b": 4.0, "c": 2.0})
        {'a': 4.0, 'b': 1.0, 'c': 3.0}
    """
    if not scores:
        return {}
    ends = max(scores.values()) + min(scores.values())
    return {name: ends - score for name, score in scores.items()}


def inverted(plan: Plan, scores: Mapping[str, float] | None = None) -> Plan:
    """Deal a plan's own placements out in the opposite order of the scores behind it.

    The unit with the lowest score gets the largest placement and so on, hence the same multiset
    of placements (equal totals wherever units cost the same). Ties keep model order.

    Args:
        plan: A plan of any policy.
        scores: Name -> number; None takes the scores that the plan recorded or, if it recorded
            none, its own numbers of experts.

    Returns:
        The plan; ``method`` is ``"inverted <method>"``.

    Raises:
        ValueError: The scores do not fit the plan's model, or two modules of one layer have
            unequal placements in a plan made per layer.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {f"h.{i}.q": ModuleSpec(8, 8, f"h.{i}") for i in range(4)}
        >>> inverted(by_position(model, where="first"), {f"h.{i}": i for i in range(4)}).layers()
        ['h.0']
    """
    per = cast("Per", plan.provenance.get("per", "module"))
    members = unit_members(plan.modules, per)
    by_unit: dict[str, Placement | None] = {}
    for unit, names in members.items():
        found = {plan.placements.get(name) for name in names}
        if len(found) > 1:
            raise ValueError(f"inverted needs one placement a {per}, got {len(found)} in {unit!r}")
        by_unit[unit] = found.pop()
    if scores is None:
        recorded = plan.provenance.get("scores")
        scores = cast("Mapping[str, float]", recorded) if isinstance(recorded, dict) else {}
    own = {unit: float(p.experts if p else 0) for unit, p in by_unit.items()}
    _, ranking = unit_scores(scores or own, plan.modules, per)
    rising = sorted(by_unit, key=lambda unit: ranking[unit])
    largest_first = sorted(by_unit.values(), key=lambda p: -sum(p.ranks) if p else 0)
    dealt = dict(zip(rising, largest_first, strict=True))
    placements = {name: p for unit, p in dealt.items() if p for name in members[unit]}
    fields: dict[str, Any] = {name: getattr(plan, name) for name in Plan.__dataclass_fields__}
    fields.update(
        placements=placements,
        method=f"inverted {plan.method}",
        provenance={**plan.provenance, "scores": {**ranking}, "inverted": True},
    )
    return Plan(**fields)


def _share(
    scores: Mapping[str, float],
    modules: Mapping[str, ModuleSpec],
    total: int,
    *,
    options: PlanOptions,
    **keywords: Any,
) -> dict[str, int]:
    rank, shared_A = options.get("rank", 8), options.get("shared_A", False)
    return allocate_budget(scores, modules, total, rank=rank, shared_A=shared_A, **keywords)
