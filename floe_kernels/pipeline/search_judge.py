"""Judging the samplers by a grid that was tried whole: how soon would each have met the best?"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from floe_kernels.allocation import RankSearch

SAMPLERS = ("gp", "tpe", "random")
REPEATS = 3  # starts of each sampler


class Met(Exception):
    """The best point has been tried."""


def judge_samplers(
    trials: Sequence[Mapping[str, Any]],
    space: Mapping[str, Sequence[Any]],
    groups: int = 1,
    *,
    samplers: Sequence[str] = SAMPLERS,
) -> dict[str, float]:
    """Replay searches on the losses of a grid, without training anything.

    Args:
        trials: Of the grid, as in ``SearchResult``; one objective.
        space: What it was over, as ``RankSearch`` takes it.
        groups: Depth groups with a rank each.
        samplers: Which to judge.

    Returns:
        Sampler -> trials until the point of lowest loss is tried, the mean over three seeds; empty
        with fewer than 3 complete trials. Points without a loss count as trials too.

    Example:
        >>> grid = [{"params": {"rank": r}, "value": abs(r - 8), "state": "complete"}
        ...         for r in (2, 4, 8, 16)]
        >>> 1 <= judge_samplers(grid, {"rank": (2, 4, 8, 16)}, samplers=["random"])["random"] <= 4
        True
    """
    known = {_key(t["params"]): t["value"] for t in trials if t["state"] == "complete"}
    if len(known) < 3:
        return {}
    best = min(known.values())
    means = {}
    for sampler in samplers:
        needed = [_needed(known, best, space, groups, sampler, seed) for seed in range(REPEATS)]
        means[sampler] = sum(needed) / len(needed)
    return means


def _needed(
    known: Mapping[Any, float],
    best: float,
    space: Mapping[str, Sequence[Any]],
    groups: int,
    sampler: str,
    seed: int,
) -> int:
    tried = 0

    def objective(config: dict[str, Any], _report: Any) -> float:
        nonlocal tried
        tried += 1
        loss = known.get(_key(config), float("inf"))
        if loss == best:
            raise Met
        return loss

    search = RankSearch(
        objective, space=space, groups=groups, sampler=cast("Any", sampler), seed=seed,
        n_trials=len(known),
    )  # fmt: skip
    with contextlib.suppress(Met):
        search.run()
    return tried


def _key(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(config.items()))
