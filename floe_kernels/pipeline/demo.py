"""The demonstration: FLoE on a real model and real text, in as much time as one can spare."""

import math
import time
from dataclasses import replace
from typing import Any

import torch

from floe_kernels.allocation import uniform
from floe_kernels.integrations.transformers import apply_plan, remove_adapters
from floe_kernels.pipeline.datasets import STDLIB
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.progress import SILENT, Progress
from floe_kernels.pipeline.report import check_plots, write_report
from floe_kernels.pipeline.runs import Run
from floe_kernels.pipeline.training import Recipe, train
from floe_kernels.pipeline.tune import find_rank, open_bench, train_all
from floe_kernels.pipeline.workbench import Workbench

AIM_S = 480.0  # of the ten minutes that it may take
REPORT_S = 10.0
MEASURED_STEPS = 3
MEASURED_RANK = 8
SPARSE = (
    0.75  # of the time of a step with all layers: 0.70 was measured with layer 0 among a quarter
)
SEARCHED = 1.15  # of the time of a step with rank 8: the mean over ranks 2 to 32
MOST_STEPS, LEAST_STEPS = 80, 8

DEFAULTS: dict[str, Any] = {
    "data": STDLIB,
    "length": 128,
    "max_samples": MOST_STEPS * 8,
    "eval_samples": 64,
    "trials": 4,
    "compare": True,
    "checkpoint_seconds": 10.0,
}
"""What the demonstration asks for in place of the usual defaults."""


def demo(run: Run, options: Options, progress: Progress = SILENT) -> None:
    """Tune as :func:`tune` does, compare with all layers and random ones, and mind the clock.

    Before anything else the time of a training step is measured, and trials, samples and steps are
    chosen to end after about eight minutes; before the trainings the steps are reconsidered. What
    was chosen is kept, so a resumed demonstration goes on in the same way.

    Args:
        run: The folder, open.
        options: What to do; trials, samples and steps are bounds.
        progress: Watches.

    Raises:
        ValueError: Options or model do not fit.
        OSError: A file cannot be read or written.
        ImportError: An optional package is missing.
    """
    start = time.monotonic()
    check_plots()
    bench = open_bench(run, options, progress)
    timed = time.monotonic()
    find_base(bench)
    evaluation = time.monotonic() - timed
    if "pace" not in run.state:
        run.finish("pace", measure_pace(bench, evaluation, start))
    pace = run.state["pace"]
    bench.options = replace(bench.options, **pace["options"])
    progress.say(pace["words"])

    def reconsider() -> None:
        if run.state["pace"].get("final") or run.state.get("trained"):
            return
        left = AIM_S - REPORT_S - (time.monotonic() - start) - 3 * pace["evaluation"]
        steps = min(bench.options.steps, affordable(left, pace["slowest"]))
        if steps < bench.options.steps:
            progress.say(f"the machine has slowed down: {steps} steps instead")
        chosen = {**pace["options"], "steps": steps}
        run.finish("pace", {**pace, "options": chosen, "final": True})
        bench.options = replace(bench.options, steps=steps)

    rank = find_rank(bench)
    train_all(bench, rank, reconsider)
    write_report(run)


def find_base(bench: Workbench) -> None:
    """Evaluate the base model."""
    bench.base_loss()


def measure_pace(bench: Workbench, evaluation: float, start: float) -> dict[str, Any]:
    """Take a few steps with all layers, and share out the time that is left.

    Args:
        bench: The model.
        evaluation: Seconds that one evaluation took.
        start: When the clock started, as ``time.monotonic`` gives it.

    Returns:
        The options chosen, and why, in words.
    """
    options = bench.options
    rank = options.rank or MEASURED_RANK
    plan = uniform(bench.modules, experts=options.experts, **bench.plan_options(rank))
    torch.manual_seed(options.seed)
    apply_plan(bench.model, plan)
    try:
        seconds = train(
            bench.model,
            bench.dataset.train,
            Recipe.of(options, MEASURED_STEPS),
            pad=bench.dataset.pad,
            title="measuring the machine",
            progress=bench.progress,
        ).seconds_per_step
    finally:
        remove_adapters(bench.model)
    left = AIM_S - REPORT_S - (time.monotonic() - start) - 3 * evaluation
    return {**share_out(options, left, seconds), "evaluation": evaluation}


def share_out(options: Options, left: float, seconds: float) -> dict[str, Any]:
    """Choose trials, samples and steps for the time that is left.

    Args:
        options: Upper bounds.
        left: Seconds.
        seconds: Of a step with all layers.

    Returns:
        ``options``, ``slowest`` (seconds of the slowest step) and ``words``.

    Example:
        >>> share_out(Options(trials=4), left=400, seconds=3.0)["options"]
        {'batch_size': 8, 'search_steps': 5, 'score_samples': 64, 'steps': 38}
        >>> share_out(Options(trials=4), left=400, seconds=60.0)["options"]
        {'batch_size': 1, 'search_steps': 2, 'score_samples': 8, 'steps': 12}
    """
    size = options.batch_size
    while size > 1 and affordable(0.7 * left, seconds) < LEAST_STEPS:
        size, seconds = size // 2, seconds / 2
    trial = 0 if options.rank else options.trials * SEARCHED * seconds
    search_steps = min(options.search_steps, max(2, int(0.17 * left / trial))) if trial else 1
    scored = max(1, min(options.score_samples // size, int(0.08 * left / seconds)))
    rest = left - search_steps * trial - scored * seconds
    most = min(options.steps or MOST_STEPS, MOST_STEPS)
    steps = min(most, affordable(rest, seconds))
    words = (
        f"a step of {size} x {options.length} tokens with all layers takes {seconds:.1f} s here, "
        f"so the demo takes {steps} steps a training and aims at {AIM_S / 60:.0f} minutes"
    )
    if size < options.batch_size:
        words += f"; this machine is slow, so a step has {size} samples, not {options.batch_size}"
    chosen = {
        "batch_size": size,
        "search_steps": search_steps,
        "score_samples": scored * size,
        "steps": steps,
    }
    return {"options": chosen, "slowest": seconds, "words": words}


def affordable(left: float, seconds: float) -> int:
    """Return the steps that all three trainings can take in the time that is left.

    Args:
        left: Seconds.
        seconds: Of a step with all layers.
    """
    return max(2, math.floor(left / (seconds * (1 + 2 * SPARSE))))
