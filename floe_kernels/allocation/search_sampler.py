"""Which point a search tries next: a function of its history and seed alone."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from floe_kernels.allocation.search_storage import quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optuna

    from floe_kernels.allocation.search_space import Point, SearchSpace


def propose(
    space: SearchSpace,
    seen: Sequence[optuna.trial.FrozenTrial],
    sampler: str,
    startup: int,
    seed: int,
) -> Point | None:
    """Choose the next point, none of those seen; None if all are.

    The sampler is made anew, from the seed and the number of trials seen, and only ever sees
    them: a search that was killed goes on exactly as if it had not been.

    Args:
        space: The grid.
        seen: Trials that are running or done for good, by number.
        sampler: ``"gp"``, ``"tpe"``, ``"random"`` or ``"grid"``.
        startup: Points that fill the space before the sampler is asked.
        seed: The search's seed.

    Returns:
        The point, or None.
    """
    from optuna.trial import TrialState

    taken = {space.point(t.params) for t in seen}
    draw = Random(f"{seed} {len(seen)}")
    if sampler == "grid":
        return next((point for point in space.points() if point not in taken), None)
    if sampler == "random":
        point = tuple(int(draw.random() * len(d.choices)) for d in space.dimensions)
    elif len(seen) < startup or not any(t.state == TrialState.COMPLETE for t in seen):
        point = space.spread(len(seen), seed)
    else:
        point = space.point(_ask(space, seen, sampler, int(draw.random() * 2**31)))
    return space.nearest_new(point, taken)


def _ask(
    space: SearchSpace, seen: Sequence[optuna.trial.FrozenTrial], sampler: str, seed: int
) -> dict[str, Any]:
    import optuna
    from optuna.trial import TrialState

    known = [t for t in seen if t.state != TrialState.FAIL]
    complete = next(t for t in known if t.state == TrialState.COMPLETE)
    with quiet():
        # a study in memory, because a sampler may write to the one that it is asked about
        study = optuna.create_study(
            directions=["minimize"] * len(complete.values), sampler=_sampler(sampler, seed)
        )
        study.add_trials(known)
        return study.ask({d.name: d.distribution() for d in space.dimensions}).params


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    if name == "tpe":
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True
        )
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
