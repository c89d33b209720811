"""MoLA: experts by depth, after a preset."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from floe_kernels.allocation.budget import allocate_budget
from floe_kernels.allocation.units import PlanOptions, depth_group, plan_of, unit_members

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Unpack

    from floe_kernels._types import JSON, ModuleSpec
    from floe_kernels.allocation.costs import Unit
    from floe_kernels.allocation.plan import Plan

PRESETS = ("2468", "8642", "5555", "8228", "2882")
"""The shapes of arXiv 2402.08562 with 160 experts on 32 layers; 8228 is its hourglass."""


def mola(
    modules: Mapping[str, ModuleSpec],
    preset: str = "2468",
    *,
    total: int | None = None,
    unit: Unit = "experts",
    lo: int = 0,
    hi: int | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Give the four quarters of a model their own numbers of experts (arXiv 2402.08562).

    Layer l of L is in quarter floor(4 l / L). Where 4 does not divide L, quarters differ by one
    layer: 30 layers make 8, 7, 8, 7; and with fewer than 4 layers some quarters are empty. With
    ``total`` the preset gives the shape only: layers share it in the preset's proportions.

    Args:
        modules: All adaptable linears, in model order.
        preset: Four digits such as ``"2468"``, first layers first, or four numbers with hyphens
            such as ``"10-2-2-2"``; 0 leaves a quarter untouched.
        total: Shared out in proportion, as in ``allocate_budget``; None takes the preset's numbers.
        unit: What ``total`` is counted in.
        lo: Least experts of each layer, with ``total``.
        hi: Most experts of each layer, with ``total``.
        options: ``rank``, ``top_k``, ``lora_alpha`` and the others of ``PlanOptions``.

    Returns:
        The plan.

    Raises:
        ValueError: The preset is neither form, or the bounds exclude the total.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {f"h.{i}.q": ModuleSpec(8, 8, f"h.{i}") for i in range(4)}
        >>> [p.experts for p in mola(model, "8642").placements.values()]
        [8, 6, 4, 2]
    """
    if not isinstance(preset, str) or not re.fullmatch(r"[0-9]{4}|[0-9]+(-[0-9]+){3}", preset):
        raise ValueError(f"preset must be four digits or a-b-c-d, got {preset!r}")
    quarters = [int(n) for n in (preset.split("-") if "-" in preset else preset)]
    layers = list(unit_members(modules, "layer"))
    counts = {name: quarters[depth_group(i, len(layers), 4)] for i, name in enumerate(layers)}
    record: dict[str, JSON] = {"arguments": {"preset": preset, "total": total, "unit": unit}}
    if total is not None:
        rank, shared_A = options.get("rank", 8), options.get("shared_A", False)
        counts = allocate_budget(
            counts, modules, total, unit=unit, lo=lo, hi=hi, rank=rank, shared_A=shared_A
        )
    return plan_of(counts, modules, "layer", "mola", record, options)
