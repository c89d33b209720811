"""What a search found, as plain values for a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optuna

    from floe_kernels.allocation.search_space import SearchSpace


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    A trial is a dict of ``number`` (int), ``params`` (parameter -> choice), ``value`` (a number,
    a list of them if there are several objectives, or None), ``state`` (``"complete"``,
    ``"pruned"``, ``"failed"`` or ``"running"``), ``duration`` (seconds, or None), ``reports``
    (list of [step, value]) and ``reason`` (why it was pruned or failed, or "").

    Attributes:
        best: The complete trial of lowest value; with several objectives, of the front's lowest
            first value; ties go to the earlier trial. None before the first complete trial.
        front: Complete trials that no other one beats in every objective, by first value.
        trials: All trials, by number.
        completed: Number of complete trials.
        stopped: ``"n_trials"``, ``"exhausted"`` (every point was tried), ``"patience"``, or "".

    Example:
        >>> SearchResult(None, [], [], 0, "").best_params
        {}
    """

    best: dict[str, Any] | None
    front: list[dict[str, Any]]
    trials: list[dict[str, Any]]
    completed: int
    stopped: str

    @property
    def best_params(self) -> dict[str, Any]:
        """The best trial's parameters; empty before the first complete trial."""
        return dict(self.best["params"]) if self.best else {}

    @property
    def best_value(self) -> Any:
        """The best trial's value or values; None before the first complete trial."""
        return self.best["value"] if self.best else None

    def idle(self, min_delta: float) -> int:
        """Count the finished trials since the last one that improved by more than ``min_delta``.

        With several objectives an improvement is a trial that no earlier one matches to within
        ``min_delta`` in every objective.
        """
        count, seen = 0, list[list[float]]()
        for trial in self.trials:
            if trial["state"] == "pruned" and seen:
                count += 1
            if trial["state"] != "complete":
                continue
            values = _values(trial)
            matched = any(_no_worse(old, [v + min_delta for v in values]) for old in seen)
            seen.append(values)
            count = count + 1 if matched else 0
        return count


def search_result(study: optuna.Study, space: SearchSpace, stopped: str) -> SearchResult:
    """Collect a study's trials, its best one and its Pareto front."""
    trials = [trial_row(t, space) for t in study.get_trials(deepcopy=False) if t.params]
    complete = [t for t in trials if t["state"] == "complete"]
    front = pareto_front(complete)
    return SearchResult(front[0] if front else None, front, trials, len(complete), stopped)


def pareto_front(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the trials that no other one beats: no worse in all objectives, better in one.

    Of trials with equal values the first is returned. Sorted by value.

    Args:
        trials: Complete trials, as in ``SearchResult``.

    Returns:
        Those on the front.

    Example:
        >>> points = [(1.0, 9), (2.0, 4), (3.0, 5), (2.0, 4)]
        >>> front = pareto_front([{"number": i, "value": v} for i, v in enumerate(points)])
        >>> [trial["number"] for trial in front]
        [0, 1]
    """
    front: list[dict[str, Any]] = []
    for trial in sorted(trials, key=lambda t: (_values(t), t["number"])):
        if not any(_no_worse(_values(other), _values(trial)) for other in front):
            front.append(trial)
    return front


def trial_row(trial: optuna.trial.FrozenTrial, space: SearchSpace) -> dict[str, Any]:
    """Describe one trial in plain values."""
    values = trial.values
    state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name)
    reason = trial.user_attrs.get("reason", "its process died" if state == "failed" else "")
    return {
        "number": trial.number,
        "params": {d.name: trial.params.get(d.name) for d in space.dimensions},
        "value": values[0] if values and len(values) == 1 else values,
        "state": state or "running",
        "duration": trial.duration.total_seconds() if trial.duration else None,
        "reports": [[step, value] for step, value in sorted(trial.intermediate_values.items())],
        "reason": reason,
    }


def is_final(trial: optuna.trial.FrozenTrial) -> bool:
    """Tell whether a trial's point needs no other try: complete, pruned, or not finite."""
    return trial.state.name in ("COMPLETE", "PRUNED") or "not_finite" in trial.user_attrs


def _values(trial: dict[str, Any]) -> list[float]:
    value = trial["value"]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _no_worse(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))
