"""Bayesian search over ranks, and over whatever else a plan is made of, on Optuna."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from floe_kernels.allocation import search_sampler
from floe_kernels.allocation.arguments import finite, whole
from floe_kernels.allocation.plan_file import plain
from floe_kernels.allocation.search_result import SearchResult, is_final, search_result, trial_row
from floe_kernels.allocation.search_space import grouped_space
from floe_kernels.allocation.search_storage import SearchStorage, quiet

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import optuna

    from floe_kernels._types import JSON

Sampler = Literal["gp", "tpe", "random", "grid"]
Report: TypeAlias = Callable[[int, float], None]
Objective: TypeAlias = Callable[[dict[str, Any], Report], "float | tuple[float, ...]"]

RECORD = "floe_kernels"  # the study's note of what it searches
WAIT_S = 2.0  # longest pause between looks at trials that other processes run


class RankSearch:
    r"""Look for the rank (and more) that gives the lowest loss in few trials.

    The ranks are coded as log2 r. The first trials fill the space evenly; then ``"gp"`` fits a
    Gaussian process (Matern 5/2) and takes the point of largest expected improvement, ``"tpe"``
    a tree of Parzen estimators, ``"random"`` chance, and ``"grid"`` tries every point. arXiv
    2506.00495 searches ranks this way and does not say how; the choices here are ours. No point is
    tried twice: where a sampler repeats itself, the nearest new point is taken.

    In a ``storage`` file every finished trial is safe. A killed search is resumed by running it
    again: trials whose process is gone are marked failed and tried anew, and only complete trials
    count towards ``n_trials``. Several processes may run the same search on one file at once, and
    ``n_trials`` is the total over all of them. With one process, the same seed and objective give
    the same trials, resumed or not.

    Args:
        objective: ``objective(config, report) -> loss``, or a tuple with one number for each of
            ``objectives``; all are minimised. ``config`` holds one choice for each parameter.
            ``report(step, loss)`` lets the search prune: it raises ``optuna.TrialPruned``, which
            the objective must let through. A loss that is not finite makes a failed trial whose
            point is not tried again.
        space: Choices of ``rank``, or parameter name -> choices, such as ``{"rank": (4, 8),
            "experts": (2, 4), "keep": (0.25, 0.5)}``.
        groups: Depth groups with a rank each, called ``rank_0``, ``rank_1``, ...
        storage: File of the search (``SearchStorage``); None keeps it in memory.
        study_name: Name of the search; a file holds several.
        sampler: ``"gp"``, ``"tpe"``, ``"random"`` or ``"grid"``.
        seed: Whole number of at least 0.
        n_trials: Complete trials wanted; None = 3 + 5 a parameter, or all of a grid. The search
            ends earlier when every point was tried.
        objectives: Names of what the objective returns. With several there is no pruning, and the
            result has a Pareto front.
        prune: Stop a trial whose best report so far is above the median of the complete ones' at
            its step, after 3 complete trials.
        patience: End the search after this many finished trials without progress; None = never.
        min_delta: A smaller gain than this is no progress.
        startup: Trials that fill the space before the sampler starts; None = 3 a parameter.
        context: What else the losses depend on (data, model, steps); a file with another is
            refused.

    Raises:
        ValueError: An argument breaks a rule above, or the file holds another search.
        ImportError: Optuna, or scipy for ``"gp"``, is missing.

    Example:
        >>> search = RankSearch(lambda config, report: abs(config["rank"] - 16), sampler="grid")
        >>> search.run().best_params
        {'rank': 16}
    """

    def __init__(
        self,
        objective: Objective,
        *,
        space: Sequence[int] | Mapping[str, Sequence[Any]] = (2, 4, 8, 16, 32, 64),
        groups: int = 1,
        storage: str | os.PathLike[str] | None = None,
        study_name: str = "rank-search",
        sampler: Sampler = "gp",
        seed: int = 0,
        n_trials: int | None = None,
        objectives: Sequence[str] = ("loss",),
        prune: bool = True,
        patience: int | None = None,
        min_delta: float = 0.0,
        startup: int | None = None,
        context: Mapping[str, JSON] | None = None,
    ) -> None:
        if sampler not in get_args(Sampler):
            known = get_args(Sampler)
            raise ValueError(f"sampler must be one of {', '.join(known)}, got {sampler!r}")
        if isinstance(objectives, str) or not objectives:
            raise ValueError(f"objectives must be a sequence of names, got {objectives!r}")
        self.objective = objective
        self.space = grouped_space(space, groups)
        self.study_name = study_name
        self.sampler: Sampler = sampler
        self.seed = whole(seed, "seed")
        parameters = len(self.space.dimensions)
        wanted = self.space.size if sampler == "grid" else 3 + 5 * parameters
        self.n_trials = whole(wanted if n_trials is None else n_trials, "n_trials", least=1)
        self.objectives = tuple(objectives)
        self.prune = prune
        self.patience = None if patience is None else whole(patience, "patience", least=1)
        self.min_delta = finite(min_delta, "min_delta", least=0)
        self.startup = 3 * parameters if startup is None else whole(startup, "startup", least=1)
        self.context = plain(dict(context or {}), "context")
        self._storage = None if storage is None else SearchStorage(storage)
        self._memory: optuna.storages.BaseStorage | None = None

    def run(self, progress: Callable[[dict[str, Any]], None] | None = None) -> SearchResult:
        """Run trials until the search is over, together with whoever else runs it.

        Args:
            progress: Called after every trial that this process finishes, with the trial as in
                ``SearchResult.trials``.

        Returns:
            What was found, over all processes.

        Raises:
            Exception: What the objective raised; its trial is marked failed, and the next ``run``
                tries the point again.

        Example:
            >>> search = RankSearch(lambda c, report: 1 / c["rank"], space=(2, 4), sampler="grid")
            >>> search.run(progress=lambda trial: print(trial["params"], trial["value"])).stopped
            {'rank': 2} 0.5
            {'rank': 4} 0.25
            'n_trials'
        """
        _require("optuna", "rank search")
        if self.sampler == "gp":
            _require("scipy", "the gp sampler")  # now, not after the first hours
        working = self._storage.working() if self._storage else contextlib.nullcontext()
        pause = WAIT_S / 32
        with working, self._study() as study:
            while True:
                claimed = self._claim(study)
                if isinstance(claimed, str):
                    return search_result(study, self.space, claimed)
                if claimed is None:
                    time.sleep(pause)
                    pause = min(2 * pause, WAIT_S)
                    continue
                pause = WAIT_S / 32
                self._evaluate(study, claimed)
                if progress is not None:
                    finished = study.get_trials(deepcopy=False)[claimed.number]
                    progress(trial_row(finished, self.space))

    def result(self) -> SearchResult:
        """Read what was found so far, running nothing.

        Returns:
            As ``run``; ``stopped`` is empty.

        Example:
            >>> RankSearch(lambda config, report: 0.0).result().completed
            0
        """
        _require("optuna", "rank search")
        with self._study() as study:
            return search_result(study, self.space, "")

    @contextlib.contextmanager
    def _study(self) -> Iterator[optuna.Study]:
        import optuna

        with contextlib.ExitStack() as stack:
            with self._claiming(), quiet():
                if self._storage is not None:
                    storage = stack.enter_context(self._storage.open())
                else:
                    storage = self._memory = self._memory or optuna.storages.InMemoryStorage()
                study = optuna.create_study(
                    storage=storage,
                    study_name=self.study_name,
                    load_if_exists=True,
                    directions=["minimize"] * len(self.objectives),
                    sampler=optuna.samplers.RandomSampler(seed=self.seed),  # never asked
                    pruner=optuna.pruners.MedianPruner(n_startup_trials=3)
                    if self.prune
                    else optuna.pruners.NopPruner(),
                )
                self._recognise(study)
            yield study

    def _claiming(self) -> contextlib.AbstractContextManager[None]:
        return self._storage.claiming() if self._storage else contextlib.nullcontext()

    def _recognise(self, study: optuna.Study) -> None:
        """Note in a new study what it searches; refuse one that searches something else."""
        ours = {
            "space": self.space.describe(),
            "objectives": list(self.objectives),
            "context": self.context,
        }
        if RECORD not in study.user_attrs and not study.trials:
            study.set_user_attr(RECORD, ours)
            return
        theirs = study.user_attrs.get(RECORD, {})
        for key, value in ours.items():
            if theirs.get(key) != value:
                raise ValueError(
                    f"search {self.study_name!r} must be resumed with its own {key}, "
                    f"{theirs.get(key)!r}, got {value!r}"
                )

    def _claim(self, study: optuna.Study) -> optuna.Trial | str | None:
        """Start the next trial; or say why the search is over; or None to wait for others."""
        from optuna.trial import TrialState

        with self._claiming(), quiet():
            self._fail_stale(study)
            trials = study.get_trials(deepcopy=False)
            complete = sum(t.state == TrialState.COMPLETE for t in trials)
            running = sum(t.state == TrialState.RUNNING for t in trials)
            if complete >= self.n_trials:
                return "n_trials"
            if self._stalled(study):
                return "patience"
            if complete + running >= self.n_trials:
                return None
            if not any(t.state == TrialState.WAITING for t in trials):
                seen = [t for t in trials if t.state == TrialState.RUNNING or is_final(t)]
                point = search_sampler.propose(
                    self.space, seen, self.sampler, self.startup, self.seed
                )
                if point is None:
                    return None if running else "exhausted"
                # queued whole, then started: a kill in between loses nothing
                study.enqueue_trial(self.space.config(point))
            trial = study.ask({d.name: d.distribution() for d in self.space.dimensions})
            trial.set_user_attr("worker", self._storage.worker if self._storage else "")
            return trial

    def _fail_stale(self, study: optuna.Study) -> None:
        from optuna.trial import TrialState

        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # claiming excludes the moment between starting a trial and naming its worker
            worker = trial.user_attrs.get("worker")
            if self._storage is None or worker is None or not self._storage.alive(worker):
                study.tell(trial.number, state=TrialState.FAIL)

    def _stalled(self, study: optuna.Study) -> bool:
        if self.patience is None:
            return False
        return search_result(study, self.space, "").idle(self.min_delta) >= self.patience

    def _evaluate(self, study: optuna.Study, trial: optuna.Trial) -> None:
        import optuna
        from optuna.trial import TrialState

        def report(step: int, value: float) -> None:
            if len(self.objectives) > 1:
                return  # Optuna prunes on one number only
            if not math.isfinite(value):
                raise optuna.TrialPruned(f"loss {value} at step {step}")
            trial.report(float(value), whole(step, "step"))
            if trial.should_prune():
                raise optuna.TrialPruned(f"above the median at step {step}")

        config = self.space.config(self.space.point(trial.params))
        try:
            values = self._values(self.objective(config, report))
        except optuna.TrialPruned as pruned:
            trial.set_user_attr("reason", str(pruned))
            study.tell(trial, state=TrialState.PRUNED)
            return
        except BaseException as error:
            trial.set_user_attr("reason", f"{type(error).__name__}: {error}"[:500])
            study.tell(trial, state=TrialState.FAIL)
            raise
        if all(map(math.isfinite, values)):
            study.tell(trial, values)
            return
        trial.set_user_attr("not_finite", [str(v) for v in values])
        trial.set_user_attr("reason", f"the objective returned {values}")
        study.tell(trial, state=TrialState.FAIL)

    def _values(self, returned: object) -> list[float]:
        several = returned if isinstance(returned, (tuple, list)) else (returned,)
        if len(several) != len(self.objectives):
            names = ", ".join(self.objectives)
            raise ValueError(f"the objective must return {names}, got {returned!r}")
        try:
            return [float(value) for value in several]
        except (TypeError, ValueError) as error:
            raise ValueError(f"the objective must return numbers, got {returned!r}") from error


def _require(package: str, what: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install floe-kernels[search]") from error
