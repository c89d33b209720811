"""Searches replayed on a grid whose every point was trained: how soon is one close to the best?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from benchmarks.evidence.tables import Lines
from floe_kernels.allocation import RankSearch

SAMPLERS = ("gp", "tpe", "random")
SEEDS = 5
Point = tuple[int, ...]


def grid_losses(lines: Lines) -> dict[int, dict[Point, float]]:
    """Return seed -> ranks by depth group -> loss, of one data set's lines."""
    found: dict[int, dict[Point, float]] = {}
    for line in lines:
        ranks = tuple(int(rank) for rank in line["method"].partition(":")[2].split("-"))
        found.setdefault(line["seed"], {})[ranks] = line["loss"]
    return found


def is_whole(grid: Mapping[Point, float], ranks: Sequence[int], groups: int) -> bool:
    """Tell whether every point of the grid was trained."""
    return len(grid) == math.prod([len(ranks)] * groups)


def regrets(
    grid: Mapping[Point, float], ranks: Sequence[int], groups: int, sampler: str, seed: int
) -> list[float]:
    """Return, after each trial of a search, how far its best loss is above the grid's best.

    Args:
        grid: Ranks by depth group -> loss; whole.
        ranks: The choices.
        groups: Depth groups.
        sampler: As ``RankSearch`` takes it.
        seed: Of the search.
    """
    best, lowest, curve = min(grid.values()), float("inf"), []

    def objective(config: dict[str, Any], _report: Any) -> float:
        nonlocal lowest
        one = groups == 1
        point = (config["rank"],) if one else tuple(config[f"rank_{g}"] for g in range(groups))
        lowest = min(lowest, grid[point])
        curve.append(lowest - best)
        return grid[point]

    RankSearch(
        objective, space={"rank": tuple(ranks)}, groups=groups, sampler=cast("Any", sampler),
        seed=seed, n_trials=len(grid),
    ).run()  # fmt: skip
    return curve


def mean_regrets(
    lines: Lines, ranks: Sequence[int], groups: int, seeds: int = SEEDS
) -> dict[str, list[float]]:
    """Return sampler -> mean regret after 1, 2, ... trials, over whole grids and search seeds.

    Args:
        lines: Of one data set; grids that miss a point are left out.
        ranks: The choices.
        groups: Depth groups.
        seeds: Searches of each sampler on each grid.
    """
    grids = [grid for grid in grid_losses(lines).values() if is_whole(grid, ranks, groups)]
    means: dict[str, list[float]] = {}
    for sampler in SAMPLERS if grids else ():
        curves = [
            regrets(grid, ranks, groups, sampler, seed) for grid in grids for seed in range(seeds)
        ]
        means[sampler] = [sum(column) / len(curves) for column in zip(*curves, strict=True)]
    return means
