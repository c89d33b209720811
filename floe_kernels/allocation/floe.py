"""FLoE: keep the layers with the most Fisher information, leave the others alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from floe_kernels.allocation.arguments import finite, nearest, whole
from floe_kernels.allocation.budget import allocate_budget
from floe_kernels.allocation.costs import Unit, experts_cost
from floe_kernels.allocation.knapsack import knapsack
from floe_kernels.allocation.refinement import refine as refine_mask
from floe_kernels.allocation.units import (
    Per,
    PlanOptions,
    best,
    keep_count,
    plan_of,
    rank_of,
    unit_members,
    unit_scores,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from floe_kernels._types import JSON, ModuleSpec
    from floe_kernels.allocation.plan import Plan

Gradients = Mapping[str, Sequence[float]] | Sequence[Sequence[float]]


def floe(
    scores: Mapping[str, float],
    modules: Mapping[str, ModuleSpec],
    *,
    keep: float = 0.25,
    experts: int = 4,
    per: Per | None = None,
    costs: Mapping[str, float] | None = None,
    budget: float | None = None,
    total: int | None = None,
    unit: Unit = "parameters",
    gradients: Gradients | None = None,
    refine: bool = True,
    **options: Unpack[PlanOptions],
) -> Plan:
    r"""Put the same experts on the layers that score highest, none on the others.

    Without ``costs`` and ``budget``: the :math:`\lceil keep \cdot L \rceil` best. With either:
    the set of highest total score that the budget pays (``knapsack``, exact). Given per-sample
    gate gradients, the set is then refined by swaps that also count how layers act together
    (``refine``). Ties keep model order. With ``total`` the best are kept likewise, and share it
    equally in place of ``experts`` each, so that methods can be compared at one cost. After arXiv
    2506.00495, whose constraint is read as that of arXiv 2204.09656.

    Args:
        scores: Layer or module name -> finite number, larger = more worth adapting.
        modules: All adaptable linears, in model order.
        keep: Fraction kept, in (0, 1]; with ``costs`` alone, the fraction of their sum.
        experts: Experts of every module that is kept.
        per: ``"layer"`` or ``"module"``; None takes what the scores are keyed by.
        costs: Unit name -> cost above 0; None counts each unit's experts in ``unit``.
        budget: What the kept units may cost together.
        total: Experts, parameters or bytes that the kept units share, as in ``allocate_budget``;
            not beside ``costs`` or ``budget``.
        unit: What ``total`` is counted in, and ``budget`` without ``costs``: ``"experts"`` (of a
            layer counted once for its linears), ``"parameters"`` or ``"bytes"``.
        gradients: Gate gradients: unit name -> one number a sample, or N samples by L units.
        refine: Refine the choice; without ``gradients`` there is nothing to refine on.
        options: ``rank``, ``top_k``, ``lora_alpha`` and the others of ``PlanOptions``.

    Returns:
        The plan, with the scores, the arguments and the refinement's gain as provenance.

    Raises:
        ValueError: A name is unknown or missing, or a number is out of its range.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {f"h.{i}.q": ModuleSpec(8, 8, f"h.{i}") for i in range(4)}
        >>> floe({"h.0": 1.0, "h.1": 5.0, "h.2": 2.0, "h.3": 4.0}, model, keep=0.5).layers()
        ['h.1', 'h.3']
    """
    per, by_unit = unit_scores(scores, modules, per)
    names, values = list(by_unit), list(by_unit.values())
    experts = whole(experts, "experts", least=1)
    share = keep_count(keep, len(names))
    if total is not None and (costs is not None or budget is not None):
        raise ValueError("total cannot be given beside costs or budget: they choose the layers too")
    prices: list[float] | None = None
    if costs is not None:
        prices = _costs(costs, names)
        # 12 digits: 0.29 of 100 is 29 to whoever wrote it, not 28.999999999999996
        budget = float(f"{keep * sum(prices):.12g}") if budget is None else budget
    elif budget is not None:
        prices = [
            experts
            if unit == "experts"
            else sum(
                experts_cost(
                    [modules[m]],
                    experts,
                    unit=unit,
                    rank=rank_of(options.get("rank", 8), m, modules[m].layer),
                    shared_A=options.get("shared_A", False),
                )
                for m in members
            )
            for members in unit_members(modules, per).values()
        ]
    kept = best(values, share) if prices is None else knapsack(values, prices, budget or 0)
    record: dict[str, JSON] = {
        "scores": {**by_unit},
        "arguments": {
            "keep": keep, "experts": experts, "budget": budget, "total": total, "unit": unit,
            "refine": refine,
        },
    }  # fmt: skip
    if refine and gradients is not None:
        result = refine_mask(_matrix(gradients, names), kept, costs=prices, budget=budget)
        record["refinement"] = {
            "kept_before": [names[i] for i in kept],
            "loss_before": result.before,
            "loss_after": result.after,
            "swaps": result.swaps,
        }
        kept = result.kept
    record["kept"] = [names[i] for i in kept]
    counts = dict.fromkeys([names[i] for i in kept], experts)
    if total is not None:
        members = unit_members(modules, per)
        counts = allocate_budget(
            dict.fromkeys(counts, 1.0),
            {m: modules[m] for name in counts for m in members[name]},
            total,
            unit=unit,
            per=per,
            rank=options.get("rank", 8),
            shared_A=options.get("shared_A", False),
        )
    return plan_of(counts, modules, per, "floe", record, options)


def _costs(costs: Mapping[str, float], names: list[str]) -> list[float]:
    for name in costs:
        if name not in names:
            raise ValueError(
                f"costs must name units of the model, got {name!r}{nearest(name, names)}"
            )
    missing = [name for name in names if name not in costs]
    if missing:
        raise ValueError(f"costs must name every unit of the model, {missing[0]!r} is missing")
    for name in names:
        finite(costs[name], f"the cost of {name!r}", least=0)
    return [costs[name] for name in names]


def _matrix(gradients: Gradients, names: list[str]) -> Sequence[Sequence[float]]:
    if not isinstance(gradients, Mapping):
        if any(len(row) != len(names) for row in gradients):
            raise ValueError(
                f"gradients must be N samples by L = {len(names)} units, "
                f"got {sorted({len(row) for row in gradients})}"
            )
        return gradients
    missing = [name for name in names if name not in gradients]
    if missing:
        raise ValueError(f"gradients must name every unit, {missing[0]!r} is missing")
    columns = [list(gradients[name]) for name in names]
    if len(lengths := sorted({len(column) for column in columns})) != 1:
        raise ValueError(f"every unit needs the same number of samples, got {lengths}")
    return list(zip(*columns, strict=True))
