"""What a rank is worth, and experts and layers: the loss after a few steps on a small split."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from floe_kernels._types import JSON, ModuleSpec
from floe_kernels.allocation import (
    Plan,
    RankSearch,
    SearchResult,
    ranks_by_depth,
    uniform,
)
from floe_kernels.integrations.transformers import apply_plan, remove_adapters
from floe_kernels.pipeline.distributed import any_of
from floe_kernels.pipeline.encoding import Samples, permutation
from floe_kernels.pipeline.evaluation import evaluate
from floe_kernels.pipeline.methods import keep_best
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.progress import SILENT, Progress
from floe_kernels.pipeline.training import Recipe, train

MILLION = 1e6
LEAST_HELD_OUT = 8  # samples that judge a trial


class OutOfTime(Exception):
    """The time for trials is up."""


def search_rank(
    model: Any,
    modules: dict[str, ModuleSpec],
    samples: Samples,
    options: Options,
    *,
    pad: int = 0,
    storage: Path | None = None,
    context: dict[str, JSON] | None = None,
    scores: Mapping[str, float] | None = None,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress = SILENT,
) -> SearchResult:
    r"""Choose the rank of the experts, and whatever else is asked for, by a few short trainings.

    The space is that of ``options``: one rank or one a depth group, and perhaps the number of
    experts and the fraction of the layers kept. Every trial adapts all layers, or with a fraction
    the best of ``scores``, trains ``search_steps`` steps on the same small split of the
    training data from the same seed, and returns

    .. math:: \text{loss on samples it did not see} + \mu \cdot \text{parameters} / 10^6

    after a report half-way, at which a hopeless trial is pruned. Neither the samples that train a
    trial nor those that judge it come from the run's held-out data. A trial whose loss is not
    finite fails, and its rank is out. With ``alpha`` 0 the scaling alpha / rank is 2 for every
    rank, so that ranks are compared and not learning rates. With ``objectives`` of
    ``loss,parameters`` both are minimised, mu has no part in it, and no trial is pruned.

    Several processes may search on one ``storage``: each takes the next point.

    Args:
        model: The base, without adapters; it is left so.
        modules: Its adaptable linears.
        samples: The training data.
        options: Of the run.
        pad: Token id that fills up batches.
        storage: File that makes the search resumable.
        context: What the losses depend on besides the options that are noted anyway.
        scores: Layer -> score, where fractions are searched.
        on_trial: Called after every trial of this process.
        progress: Watches.

    Returns:
        The trials, each with its ``parameters``, and the best of them.

    Raises:
        ValueError: There are too few samples, or no trial ended in a finite loss.
        ImportError: Optuna is missing.
    """
    small, judges = _splits(samples, options)
    recipe = Recipe.of(options, options.search_steps, accumulation=1, schedule="constant")
    started = time.monotonic()
    trials: list[dict[str, Any]] = []

    both = options.objectives != "loss"

    def objective(
        config: dict[str, Any], report: Callable[[int, float], None]
    ) -> float | tuple[float, ...]:
        spent = (time.monotonic() - started) / 60
        late = bool(options.search_minutes and trials and spent > options.search_minutes)
        if any_of(late, next(model.parameters()).device):
            raise OutOfTime
        plan = trial_plan(modules, options, config, scores)
        torch.manual_seed(options.seed)
        apply_plan(model, plan)

        def judge() -> float:
            loss = evaluate(model, judges, batch_size=options.batch_size, pad=pad).loss
            return loss + (0.0 if both else options.mu * plan.parameters() / MILLION)

        def half_way(step: int, _loss: float, _figures: dict[str, float]) -> None:
            if step == recipe.steps // 2 and not both:
                report(step, judge())

        try:
            words = ", ".join(f"{name} {value}" for name, value in config.items())
            title = f"trial {len(trials) + 1} of {search.n_trials}, {words}"
            train(model, small, recipe, pad=pad, on_step=half_way, title=title, progress=progress)
            return (judge(), float(plan.parameters())) if both else judge()
        except FloatingPointError:
            return (math.inf, float(plan.parameters())) if both else math.inf
        finally:
            remove_adapters(model)

    def priced(trial: dict[str, Any]) -> dict[str, Any]:
        parameters = trial_plan(modules, options, trial["params"], scores).parameters()
        return {**trial, "parameters": parameters}

    def finished(trial: dict[str, Any]) -> None:
        trial = priced(trial)
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)

    search = RankSearch(
        objective,
        space=options.search_space(),
        groups=options.groups,
        storage=storage,
        sampler=cast("Literal['gp', 'tpe', 'random', 'grid']", options.sampler),
        seed=options.seed,
        n_trials=None if options.sampler == "grid" else options.trials,
        objectives=tuple(options.objectives.split(",")),
        context={**(context or {}), **_context(options)},
    )
    trials += [t for t in search.result().trials if t["state"] in ("complete", "pruned")]
    try:
        result = search.run(finished)
    except OutOfTime:
        result = search.result()
    if result.best is None:
        raise ValueError(
            "a rank must end in a finite loss, and none did: "
            f"try a lower --learning-rate than {options.learning_rate:g}"
        )
    return replace(result, trials=[priced(trial) for trial in result.trials])


def trial_plan(
    modules: dict[str, ModuleSpec],
    options: Options,
    config: Mapping[str, Any],
    scores: Mapping[str, float] | None = None,
) -> Plan:
    """Return the plan that a point of the space stands for.

    Args:
        modules: All adaptable linears.
        options: What the point says nothing about.
        config: The point: ``rank`` or ``rank_0``, ..., perhaps ``experts`` and ``keep``.
        scores: Layer -> score; only ``keep`` needs them.
    """
    chosen = options.chosen(config)
    keywords = chosen.adapter(ranks_by_depth(config, modules))
    if "keep" in config:
        return keep_best(scores or {}, modules, replace(chosen, refine=False), **keywords)
    return uniform(modules, experts=chosen.experts, **keywords)


def judges_of(options: Options) -> int:
    """Return how many samples judge a trial, where there are enough.

    Args:
        options: Of the run.
    """
    return max(LEAST_HELD_OUT, options.search_samples // 4)


def _splits(samples: Samples, options: Options) -> tuple[Samples, Samples]:
    """Draw the samples that trials train on and, apart from them, those that judge trials."""
    order = permutation(len(samples), options.seed, "search")
    held_out = min(judges_of(options), len(samples) // 2)
    if held_out < 1:
        raise ValueError(f"a rank search needs at least 2 training samples, got {len(samples)}")
    size = min(options.search_samples, len(samples) - held_out)
    return samples.subset(order[:size]), samples.subset(order[size : size + held_out])


def _context(options: Options) -> dict[str, JSON]:
    names = (
        "experts", "top_k", "alpha", "dropout", "shared_a", "rslora", "search_steps",
        "search_samples", "batch_size", "learning_rate", "weight_decay", "clip", "mu", "seed",
    )  # fmt: skip
    return {name: getattr(options, name) for name in names}
