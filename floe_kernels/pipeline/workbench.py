"""One model, one dataset, one run's folder: the steps that every pipeline is made of."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from floe_kernels.allocation import Plan, SearchResult, ranks_by_depth, uniform
from floe_kernels.integrations.transformers import (
    apply_plan,
    find_modules,
    fingerprint,
    remove_adapters,
    save_adapter,
)
from floe_kernels.pipeline.datasets import Dataset
from floe_kernels.pipeline.distributed import share
from floe_kernels.pipeline.encoding import Samples, draw
from floe_kernels.pipeline.evaluation import Evaluation, evaluate, to_device
from floe_kernels.pipeline.memory import PeakMemory
from floe_kernels.pipeline.methods import keep_best
from floe_kernels.pipeline.models import Loaded
from floe_kernels.pipeline.options import WARMED, Options, Rank
from floe_kernels.pipeline.progress import SILENT, Bar, Progress
from floe_kernels.pipeline.runs import Run
from floe_kernels.pipeline.search import search_rank
from floe_kernels.pipeline.search_judge import judge_samplers
from floe_kernels.pipeline.training import Recipe, train
from floe_kernels.scores.fisher import block_linears, collect, read_variant

if TYPE_CHECKING:
    from floe_kernels._types import JSON

SHORT = 16  # digits of a checksum that people compare


class Workbench:
    """Does a run's steps; what is finished already is read from its folder.

    The model carries no adapters between steps.

    Args:
        run: The folder.
        options: What was asked for.
        loaded: The model.
        dataset: The data.
        progress: Watches.

    Raises:
        ValueError: The run began with another model or other data.
    """

    def __init__(
        self,
        run: Run,
        options: Options,
        loaded: Loaded,
        dataset: Dataset,
        progress: Progress = SILENT,
    ) -> None:
        self.run, self.options, self.loaded, self.dataset = run, options, loaded, dataset
        self.progress, self.model = progress, loaded.model
        self.modules = find_modules(self.model, options.target_names())
        self.fingerprint = fingerprint(self.model)
        run.pin(weights=self.fingerprint[:SHORT], **dataset.facts())

    def base_loss(self) -> float:
        """Evaluate the model without adapters."""
        if "base" not in self.run.state:
            found = self._evaluate()
            self.run.history.rewind("evaluation", run="base")
            self.run.history.add("evaluation", run="base", step=0, **found._asdict())
            note = self.loaded.note
            self.run.finish("base", {**found._asdict(), "model": self.options.model, "note": note})
        return float(self.run.state["base"]["loss"])

    def rank(self) -> Rank:
        """Return the rank that was asked for, or else search for it.

        What a search finds of experts and of the fraction kept replaces the options'.
        """
        if self.options.rank:
            return self.options.rank
        if "search" not in self.run.state:
            scores, ranks = None, self.options.rank_choices()
            if self.options.search_keep:
                scores = self.scores(ranks[len(ranks) // 2])["scores"]
            start = time.monotonic()
            result = search_rank(
                self.model,
                self.modules,
                self.dataset.train,
                self.options,
                pad=self.dataset.pad,
                storage=Path(self.options.storage or self.run.folder / "search.journal"),
                context=cast("dict[str, JSON]", self.run.facts),
                scores=scores,
                on_trial=lambda trial: self._note_trials([trial]),
                progress=self.progress,
            )
            self._note_trials(result.trials, fresh=True)
            found = _search_facts(result, time.monotonic() - start)
            if self.options.sampler == "grid" and self.options.objectives == "loss":
                space = self.options.search_space()
                found["judged"] = judge_samplers(result.trials, space, self.options.groups)
            self.run.finish("search", found)
        config = self.run.state["search"]["config"]
        self.options = self.options.chosen(config)
        return ranks_by_depth(config, self.modules)

    def scores(self, rank: Rank) -> dict[str, Any]:
        """Score every layer, or linear, by Fisher information, after a warm-up where it needs one.

        Args:
            rank: Of the experts on all layers that the scores are taken of.

        Returns:
            ``scores`` by what ``--per`` names, and ``gradients`` of gates for ``gate``, else None.
        """
        if "score" not in self.run.state:
            self.run.finish("score", self._score(rank))
            self.run.checkpoint("warm_up").unlink(missing_ok=True)
        found: dict[str, Any] = self.run.state["score"]
        return found

    def choose(self, rank: Rank) -> Plan:
        """Turn scores into a plan and write it to ``plan.json``."""
        found, path = self.scores(rank), self.run.folder / "plan.json"
        if "plan" not in self.run.state:
            plan = keep_best(
                found["scores"], self.modules, self.options, gradients=found["gradients"],
                **self.plan_options(rank),
            )  # fmt: skip
            plan.save(path)
            self.run.finish("plan", {"layers": plan.layers(), "parameters": plan.parameters()})
        return Plan.load(path)

    def plan_options(self, rank: Rank) -> Any:
        """Return the keywords of every policy: adapter, model and where it comes from."""
        provenance: dict[str, JSON] = {
            "variant": self.options.variant,
            "search": self.run.state.get("search"),
            "facts": self.run.facts,
            "options": self.options.to_json(),
        }
        return {
            **self.options.adapter(rank),
            "base_model": self.options.model,
            "fingerprint": self.fingerprint,
            "provenance": provenance,
        }

    def steps(self) -> int:
        """Return the number of optimiser steps that was asked for."""
        if self.options.steps:
            return self.options.steps
        a_step = self.options.batch_size * self.options.accumulation
        return max(1, math.ceil(self.options.epochs * len(self.dataset.train) / a_step))

    def train(
        self,
        name: str,
        plan: Plan,
        *,
        title: str = "",
        keep_adapter: bool = True,
        seed: int | None = None,
        enough: Callable[[int], bool] | None = None,
    ) -> None:
        """Train a plan's adapters from the start, evaluate them, note what came out.

        Args:
            name: What the run's folder calls it.
            plan: Where the experts go.
            title: What people call it.
            keep_adapter: Write it to the folder ``adapter``.
            seed: Of adapters and data order; None takes the run's.
            enough: Ends the training early, as in :func:`~floe_kernels.pipeline.training.train`.
        """
        if name in self.run.state.get("trained", {}):
            return
        options, history = self.options, self.run.history
        checkpoint = self.run.checkpoint(name)
        seed = options.seed if seed is None else seed
        torch.manual_seed(seed)
        apply_plan(self.model, plan)
        peak = PeakMemory(self.loaded.device)
        try:

            def rewind(done: int) -> None:
                history.rewind("step", after=done, run=name)
                history.rewind("evaluation", after=done, run=name)

            def note(step: int, loss: float, figures: dict[str, float]) -> None:
                history.add("step", run=name, step=step, loss=loss, **figures, peak=peak.read())
                if options.eval_every and step % options.eval_every == 0 and step < recipe.steps:
                    history.add("evaluation", run=name, step=step, **self._evaluate()._asdict())

            recipe = Recipe.of(options, self.steps(), seed=seed)
            steps = train(
                self.model,
                self.dataset.train,
                recipe,
                pad=self.dataset.pad,
                checkpoint=checkpoint,
                checkpoint_seconds=options.checkpoint_seconds,
                on_step=note,
                on_resume=rewind,
                enough=enough,
                title=title or f"training {name}",
                progress=self.progress,
            ).steps
            found = self._evaluate()
            history.rewind("evaluation", after=steps - 1, run=name)
            history.add("evaluation", run=name, step=steps, **found._asdict())
            if keep_adapter:
                save_adapter(self.model, self.run.folder / "adapter")
        finally:
            peak.close()
            remove_adapters(self.model)
        trained = {
            **self.run.state.get("trained", {}),
            name: {
                "title": title or name,
                "steps": steps,
                "planned": recipe.steps,
                "loss": found.loss,
                "tokens": found.tokens,
                "parameters": plan.parameters(),
                "layers": plan.layers(),
                **_costs(history.of("step", run=name)),
                "peak_method": peak.method,
            },
        }
        self.run.finish("trained", trained)
        checkpoint.unlink(missing_ok=True)

    def _evaluate(self) -> Evaluation:
        return evaluate(
            self.model,
            self.dataset.held_out,
            batch_size=self.options.batch_size,
            pad=self.dataset.pad,
            progress=self.progress,
        )

    def _note_trials(self, trials: list[dict[str, Any]], *, fresh: bool = False) -> None:
        if fresh:
            self.run.history.rewind("trial")
        for trial in trials:
            rank, facts = trial["params"].get("rank"), dict(trial)
            value = facts.pop("value")
            loss = value[0] if isinstance(value, list) else value
            self.run.history.add("trial", rank=rank, loss=loss, **facts)

    def _score(self, rank: Rank) -> dict[str, Any]:
        options, variant = self.options, self.options.variant
        samples = draw(self.dataset.train, options.score_samples, options.seed, "scores")
        start = time.monotonic()
        if variant != "base":
            plan = uniform(self.modules, experts=options.experts, **self.plan_options(rank))
            torch.manual_seed(options.seed)
            apply_plan(self.model, plan)
        try:
            if variant in WARMED:
                self._warm_up()
            frozen = block_linears(self.model) if variant == "base" else ()
            with self.progress.bar("scoring layers", len(samples), unit="samples") as bar:
                record = collect(self.model, self._batches(samples, bar), frozen=frozen)
        finally:
            remove_adapters(self.model)
        gradients, per = None, options.per or "layer"
        if variant == "gate":
            names, gates = record.gate_gradients(aggregate=per)
            gradients = dict(zip(names, gates.T.tolist(), strict=True))
        return {
            "scores": read_variant(record, variant, per),
            "gradients": gradients,
            "variant": variant,
            "counts": record.counts,
            "seconds": time.monotonic() - start,
        }

    def _warm_up(self) -> None:
        name, options = "warm_up", self.options
        history = self.run.history
        train(
            self.model,
            self.dataset.train,
            Recipe.of(options, options.warm_up_steps, schedule="constant"),
            pad=self.dataset.pad,
            checkpoint=self.run.checkpoint(name),
            checkpoint_seconds=options.checkpoint_seconds,
            on_step=lambda step, loss, figures: history.add(
                "step", run=name, step=step, loss=loss, **figures
            ),
            on_resume=lambda done: history.rewind("step", after=done, run=name),
            title="warm-up of all layers",
            progress=self.progress,
        )

    def _batches(self, samples: Samples, bar: Bar) -> Iterator[dict[str, Tensor]]:
        size = self.options.batch_size
        for i in range(0, len(samples), size):
            chosen = range(i, min(i + size, len(samples)))
            mine = share(chosen)
            if mine:
                yield to_device(samples.batch(mine, self.dataset.pad), self.loaded.device)
            bar.advance(len(chosen))


def _search_facts(result: SearchResult, seconds: float) -> dict[str, Any]:
    best = result.best or {}
    several = isinstance(best.get("value"), list)
    return {
        "rank": result.best_params.get("rank"),
        "config": result.best_params,
        "loss": value[0] if isinstance(value := best.get("value"), list) else value,
        "front": [trial["number"] for trial in result.front] if several else [],
        "completed": result.completed,
        "stopped": result.stopped or "time",
        "seconds": seconds,
    }


def _costs(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    """Read time and memory off the steps, whichever process made them."""
    seconds = [line["seconds"] for line in steps]
    peaks = [line["peak"] for line in steps if line.get("peak")]
    return {
        "train_loss": steps[-1]["loss"] if steps else None,
        "seconds_per_step": statistics.median(seconds[1:] or seconds) if seconds else None,
        "peak_bytes": max(peaks) if peaks else None,
    }
