"""Deciding where experts go: scores and a budget in, a plan out. Plain Python, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from floe_kernels.allocation.alphalora import alphalora, alphalora_compat, layerif
from floe_kernels.allocation.budget import allocate_budget, allocate_experts
from floe_kernels.allocation.controls import (
    by_position,
    inverted,
    inverted_scores,
    random,
    uniform,
)
from floe_kernels.allocation.costs import adapter_parameters, experts_cost
from floe_kernels.allocation.floe import floe
from floe_kernels.allocation.knapsack import knapsack
from floe_kernels.allocation.lora_smoe import lora_smoe, votes
from floe_kernels.allocation.mola import mola
from floe_kernels.allocation.plan import Placement, Plan
from floe_kernels.allocation.rank_search import RankSearch
from floe_kernels.allocation.refinement import Refinement, refine, removal_loss
from floe_kernels.allocation.search_result import SearchResult, pareto_front
from floe_kernels.allocation.search_space import ranks_by_depth
from floe_kernels.allocation.stability import Stability, corrected_overlap, kendall_tau, stability

if TYPE_CHECKING:
    from collections.abc import Callable

POLICIES: dict[str, Callable[..., Plan]] = {
    "floe": floe,
    "lora_smoe": lora_smoe,
    "alphalora": alphalora,
    "layerif": layerif,
    "mola": mola,
    "uniform": uniform,
    "random": random,
    "by_position": by_position,
}
"""Every policy by its name; ``inverted`` is not here, for it takes a plan."""

__all__ = [
    "POLICIES",
    "Placement",
    "Plan",
    "RankSearch",
    "Refinement",
    "SearchResult",
    "Stability",
    "adapter_parameters",
    "allocate_budget",
    "allocate_experts",
    "alphalora",
    "alphalora_compat",
    "by_position",
    "corrected_overlap",
    "experts_cost",
    "floe",
    "inverted",
    "inverted_scores",
    "kendall_tau",
    "knapsack",
    "layerif",
    "lora_smoe",
    "mola",
    "pareto_front",
    "random",
    "ranks_by_depth",
    "refine",
    "removal_loss",
    "stability",
    "uniform",
    "votes",
]
