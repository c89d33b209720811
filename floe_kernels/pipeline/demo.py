"""The demonstration: FLoE on a real model and real text, in as much time as one can spare."""

import math
import time
from dataclasses import replace
from typing import Any

import torch

from floe_kernels.allocation import uniform
from floe_kernels.integrations.transformers import apply_plan, remove_adapters
from floe_kernels.pipeline.datasets import STDLIB
from floe_kernels.pipeline.options import Options, Rank
from floe_kernels.pipeline.packages import check_packages
from floe_kernels.pipeline.progress import SILENT, Progress
from floe_kernels.pipeline.report import write_report
from floe_kernels.pipeline.runs import Run
from floe_kernels.pipeline.search import judges_of
from floe_kernels.pipeline.training import Recipe, train
from floe_kernels.pipeline.tune import ALL, FLOE, find_rank, open_bench, train_all
from floe_kernels.pipeline.workbench import Workbench

AIM_S = 480.0  # of the ten minutes that it may take
LAST_S = 540.0  # no training step starts later
REPORT_S = 10.0
MEASURED_STEPS = 3
MEASURED_RANK = 8
MOST_STEPS, LEAST_STEPS = 80, 8

# In units of a training step with rank 8 on all layers of the model that comes along:
SPARSE = 0.75  # a step on a quarter of them; 0.70 with layer 0 among them, 0.5 without
SEARCHED = 1.15  # a step of a trial, the mean over ranks 2 to 32
FORWARD = 0.3  # a forward pass
SCORED = 1.6  # a step that scores
SHARES = {"search": 0.2, "score": 0.1}  # of the time, at most

CHOSEN = ("batch_size", "search_steps", "score_samples", "steps")
DEFAULTS: dict[str, Any] = {
    "data": STDLIB,
    "length": 128,
    "max_samples": MOST_STEPS * 8,
    "eval_samples": 64,
    "trials": 4,
    "search_samples": 32,
    "compare": True,
    "checkpoint_seconds": 10.0,
}
"""What the demonstration asks for in place of the usual defaults."""


def demo(run: Run, options: Options, progress: Progress = SILENT) -> None:
    """Tune as :func:`tune` does, compare with all layers and random ones, and mind the clock.

    Before anything else the time of a training step is measured, and trials, samples and steps are
    chosen so that it ends after about eight minutes. A machine that turns out slower gets fewer of
    what is still to come; all trainings make the same number of steps. What was chosen is kept, so
    a resumed demonstration goes on in the same way.

    Args:
        run: The folder, open.
        options: What to do; trials, samples and steps are bounds.
        progress: Watches.

    Raises:
        ValueError: Options or model do not fit.
        OSError: A file cannot be read or written.
        ImportError: An optional package is missing.
    """
    clock = Clock()
    check_packages(options)
    bench = open_bench(run, options, progress)
    _, evaluation = clock.timed(bench.base_loss)
    if "pace" not in run.state:
        seconds = measure_step(bench)
        chosen = share_out(options, clock.left(3 * evaluation), seconds)
        run.finish("pace", {**chosen, "evaluation": evaluation})
    evaluation = run.state["pace"]["evaluation"]
    progress.say(run.state["pace"]["words"])
    _take(bench)

    rank = find_rank(bench)
    if "score" not in run.state:
        left = clock.left(3 * evaluation)
        _change(bench, score_samples=_scorable(bench.options, left, _step_seconds(bench, rank)))
    bench.scores(rank)
    if not run.state["pace"].get("final"):  # a training that has begun keeps its schedule
        left = clock.left(3 * evaluation)
        _change(bench, steps=_trainable(options, left, _step_seconds(bench, rank)))
        run.finish("pace", {**run.state["pace"], "final": True})
    progress.say(f"{bench.options.steps} steps a training")

    rest = LAST_S - clock.passed() - 3 * evaluation
    ends = {ALL: rest / (1 + 2 * SPARSE), FLOE: rest * (1 + SPARSE) / (1 + 2 * SPARSE)}
    began = clock.passed()

    def enough(name: str, done: int) -> bool:
        first = run.state.get("trained", {}).get(ALL)
        if first is not None and done >= first["steps"]:
            return True
        return done >= 1 and clock.passed() > began + ends.get(name, rest)

    train_all(bench, rank, enough)
    write_report(run)


class Clock:
    """Counts from when it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def passed(self) -> float:
        """Return the seconds since then."""
        return time.monotonic() - self.start

    def left(self, reserved: float) -> float:
        """Return the seconds that are left for work, when some are reserved."""
        return max(0.0, AIM_S - REPORT_S - reserved - self.passed())

    def timed(self, work: Any) -> tuple[Any, float]:
        """Return what ``work()`` returns, and the seconds that it took."""
        before = self.passed()
        return work(), self.passed() - before


def measure_step(bench: Workbench) -> float:
    """Return the seconds of a training step with experts on all layers.

    Args:
        bench: The model and its run.
    """
    options = bench.options
    rank = options.rank or MEASURED_RANK
    plan = uniform(bench.modules, experts=options.experts, **bench.plan_options(rank))
    torch.manual_seed(options.seed)
    apply_plan(bench.model, plan)
    try:
        return train(
            bench.model,
            bench.dataset.train,
            Recipe.of(options, MEASURED_STEPS),
            pad=bench.dataset.pad,
            title="measuring the machine",
            progress=bench.progress,
        ).seconds_per_step
    finally:
        remove_adapters(bench.model)


def share_out(options: Options, left: float, seconds: float) -> dict[str, Any]:
    """Choose trials, samples and steps for the time that is left.

    Args:
        options: Upper bounds.
        left: Seconds.
        seconds: Of a step with all layers.

    Returns:
        ``options``, ``seconds`` of the step that they make, and ``words``.

    Example:
        >>> share_out(Options(**DEFAULTS), left=400, seconds=3.0)["options"]
        {'batch_size': 8, 'search_steps': 5, 'score_samples': 64, 'steps': 38}
        >>> share_out(Options(**DEFAULTS), left=400, seconds=60.0)["options"]
        {'batch_size': 1, 'search_steps': 1, 'score_samples': 3, 'steps': 9}
    """
    size = options.batch_size
    rest = 1 - sum(SHARES.values())
    while size > 1 and affordable(rest * left, seconds) < LEAST_STEPS:
        size, seconds = size // 2, seconds / 2
    tried = replace(options, batch_size=size)
    while tried.search_steps > 1 and _searching(tried) * seconds > SHARES["search"] * left:
        tried = replace(tried, search_steps=tried.search_steps - 1)
    tried = replace(tried, score_samples=_scorable(tried, left, seconds))
    spent = _searching(tried) + SCORED * math.ceil(tried.score_samples / size)
    tried = replace(tried, steps=_trainable(options, left - spent * seconds, seconds))
    words = (
        f"a step of {size} x {options.length} tokens with all layers takes {seconds:.1f} s here, "
        f"which allows about {tried.steps} steps a training in {AIM_S / 60:.0f} minutes"
    )
    if size < options.batch_size:
        words += f"; this machine is slow: {size} samples a step instead of {options.batch_size}"
    chosen = {name: getattr(tried, name) for name in CHOSEN}
    return {"options": chosen, "seconds": seconds, "words": words}


def affordable(left: float, seconds: float) -> int:
    """Return the steps that each of the three trainings can make in the time that is left.

    Args:
        left: Seconds.
        seconds: Of a step with all layers.
    """
    return max(1, math.floor(left / (seconds * (1 + 2 * SPARSE))))


def _searching(options: Options) -> float:
    """Return the time of the rank search, in steps with all layers."""
    if options.rank:
        return 0.0
    judging = 2 * FORWARD * math.ceil(judges_of(options) / options.batch_size)
    return options.trials * (options.search_steps * SEARCHED + judging)


def _trainable(options: Options, left: float, seconds: float) -> int:
    """Return the steps of a training: what time, request and data allow."""
    return min(options.steps or MOST_STEPS, MOST_STEPS, affordable(left, seconds))


def _scorable(options: Options, left: float, seconds: float) -> int:
    """Return the samples that can score the layers in their share of the time."""
    batches = max(1, int(SHARES["score"] * left / (SCORED * seconds)))
    return min(options.score_samples, batches * options.batch_size)


def _step_seconds(bench: Workbench, rank: Rank) -> float:
    """Return the seconds of a step with all layers: of the trial with this rank, or as measured."""
    options = bench.options
    judging = 2 * FORWARD * math.ceil(judges_of(options) / options.batch_size)
    trials = [t for t in bench.run.history.of("trial", rank=rank) if t.get("duration")]
    if not trials:
        return float(bench.run.state["pace"]["seconds"])
    return float(trials[-1]["duration"]) / (options.search_steps + judging)


def _take(bench: Workbench) -> None:
    bench.options = replace(bench.options, **bench.run.state["pace"]["options"])


def _change(bench: Workbench, **options: int) -> None:
    """Reconsider what was chosen, for this run and for one that resumes it."""
    pace = bench.run.state["pace"]
    bench.run.finish("pace", {**pace, "options": {**pace["options"], **options}})
    _take(bench)
