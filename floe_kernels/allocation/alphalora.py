"""AlphaLoRA and LayerIF: experts per layer by a power of one score, to an exact total."""

from __future__ import annotations

from typing import TYPE_CHECKING

from floe_kernels.allocation.arguments import finite, whole
from floe_kernels.allocation.budget import allocate_budget
from floe_kernels.allocation.units import Per, PlanOptions, plan_of, unit_scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Unpack

    from floe_kernels._types import JSON, ModuleSpec
    from floe_kernels.allocation.costs import Unit
    from floe_kernels.allocation.plan import Plan


def alphalora(
    scores: Mapping[str, float],
    modules: Mapping[str, ModuleSpec],
    *,
    total: int,
    unit: Unit = "experts",
    beta: float = 2.5,
    lo: int = 1,
    hi: int | None = None,
    per: Per | None = None,
    compat: bool = False,
    **options: Unpack[PlanOptions],
) -> Plan:
    r"""Give layers experts in proportion to a power of their spectral exponent.

    .. math:: n_l \approx \frac{\alpha_l^\beta}{\sum_m \alpha_m^\beta} \, T

    The rule of arXiv 2410.10054 with its totals kept by largest remainders and at least ``lo``
    experts everywhere. A large exponent, a weakly heavy-tailed layer, gets many experts.

    Args:
        scores: Layer or module name -> tail exponent, finite, at least 0.
        modules: All adaptable linears, in model order.
        total: Experts (of a layer counted once for its linears; 160 in the paper), or a budget
            in ``unit``.
        unit: ``"experts"``, ``"parameters"`` or ``"bytes"`` of optimiser state.
        beta: Exponent, 2.5 in the paper.
        lo: Least experts of each unit.
        hi: Most experts of each unit.
        per: ``"layer"`` or ``"module"``; None takes what the scores are keyed by. Module scores
            are averaged over a layer, as in the paper.
        compat: Round and repair as the authors' program does (``alphalora_compat``); ``unit`` is
            then experts, and ``lo`` and ``hi`` have no effect.
        options: ``rank``, ``top_k``, ``lora_alpha`` and the others of ``PlanOptions``.

    Returns:
        The plan.

    Raises:
        ValueError: A score is missing or out of its range, the bounds exclude the total, or the
            compatible rule gave a layer fewer than 0 experts, which it can.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {f"h.{i}.q": ModuleSpec(8, 8, f"h.{i}") for i in range(2)}
        >>> plan = alphalora({"h.0": 2.0, "h.1": 4.0}, model, total=8)
        >>> [p.experts for p in plan.placements.values()]
        [2, 6]
    """
    per, by_unit = unit_scores(scores, modules, per, combine="mean")
    if compat:
        if unit != "experts":
            raise ValueError(f"the compatible rule must count experts, got the unit {unit!r}")
        counts = dict(
            zip(by_unit, alphalora_compat(list(by_unit.values()), total, beta), strict=True)
        )
    else:
        counts = allocate_budget(
            by_unit,
            modules,
            total,
            unit=unit,
            per=per,
            beta=beta,
            lo=lo,
            hi=hi,
            rank=options.get("rank", 8),
            shared_A=options.get("shared_A", False),
        )
    record: dict[str, JSON] = {
        "scores": {**by_unit},
        "arguments": {
            "total": total, "unit": unit, "beta": beta, "lo": lo, "hi": hi, "compat": compat,
        },
    }  # fmt: skip
    return plan_of(counts, modules, per, "alphalora", record, options)


def alphalora_compat(alphas: Sequence[float], total: int, beta: float = 2.5) -> list[int]:
    r"""Share out experts as the program released with arXiv 2410.10054 does, defects included.

    :math:`n_l = \mathrm{round}(\alpha_l^\beta T / \sum \alpha^\beta)`, halves to even; then, while
    the sum is off, one more to the smallest or one less to the largest
    :math:`\alpha_l^\beta - n_l`. That compares a power with a count, so the whole correction lands
    on one layer, and a layer can end at 0 or below. For comparisons only: use
    ``allocate_experts``. Ties go to the lower index.

    Args:
        alphas: L finite numbers above 0.
        total: Experts to share out.
        beta: Exponent.

    Returns:
        L whole numbers whose sum is ``total``; some may be 0 or negative.

    Raises:
        ValueError: There is no exponent, or one is not a finite number above 0.

    Example:
        >>> alphalora_compat([1.2, 2.2, 2.4, 2.6, 3.4, 3.6, 3.8, 5.0], 24)
        [1, 1, 1, 2, 3, 4, 4, 8]
    """
    powers = [finite(a, f"exponent {i}", least=0) ** beta for i, a in enumerate(alphas)]
    if not powers or min(powers) <= 0:
        raise ValueError(f"exponents must be above 0 and at least one, got {list(alphas)}")
    counts = [round(p / sum(powers) * whole(total, "total")) for p in powers]
    while (missing := total - sum(counts)) != 0:
        gaps = [p - n for p, n in zip(powers, counts, strict=True)]
        if missing > 0:
            counts[gaps.index(min(gaps))] += 1
        else:
            counts[gaps.index(max(gaps))] -= 1
    return counts


def layerif(
    scores: Mapping[str, float],
    modules: Mapping[str, ModuleSpec],
    *,
    total: int,
    unit: Unit = "experts",
    beta: float = 1.0,
    lo: int = 1,
    hi: int | None = None,
    per: Per | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Give layers experts in proportion to the positive part of their influence.

    The allocation of LayerIF (arXiv 2505.23811): negative influence counts as none, every layer
    gets at least ``lo`` experts, and the rest goes by largest remainders. If no influence is
    positive, all layers share equally.

    Args:
        scores: Layer or module name -> influence, any finite number.
        modules: All adaptable linears, in model order.
        total: Experts, or a budget in ``unit``.
        unit: ``"experts"``, ``"parameters"`` or ``"bytes"`` of optimiser state.
        beta: Exponent, at least 0.
        lo: Least experts of each unit.
        hi: Most experts of each unit.
        per: ``"layer"`` or ``"module"``; None takes what the scores are keyed by.
        options: ``rank``, ``top_k``, ``lora_alpha`` and the others of ``PlanOptions``.

    Returns:
        The plan.

    Raises:
        ValueError: A score is missing or not finite, or the bounds exclude the total.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {f"h.{i}.q": ModuleSpec(8, 8, f"h.{i}") for i in range(2)}
        >>> plan = layerif({"h.0": -3.0, "h.1": 4.0}, model, total=8)
        >>> [p.experts for p in plan.placements.values()]
        [1, 7]
    """
    per, by_unit = unit_scores(scores, modules, per)
    positive = {name: max(0.0, score) for name, score in by_unit.items()}
    rank, shared_A = options.get("rank", 8), options.get("shared_A", False)
    counts = allocate_budget(
        positive, modules, total,
        unit=unit, per=per, beta=beta, lo=lo, hi=hi, rank=rank, shared_A=shared_A,
    )  # fmt: skip
    record: dict[str, JSON] = {
        "scores": {**by_unit},
        "arguments": {"total": total, "unit": unit, "beta": beta, "lo": lo, "hi": hi},
    }
    return plan_of(counts, modules, per, "layerif", record, options)
