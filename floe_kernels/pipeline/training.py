"""The training loop: the same steps in the same order, however often it is stopped."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels.pipeline.checkpoints import load_checkpoint, save_checkpoint
from floe_kernels.pipeline.distributed import add_gradients, any_of, share
from floe_kernels.pipeline.encoding import Samples, permutation
from floe_kernels.pipeline.evaluation import negative_log_likelihood, to_device
from floe_kernels.pipeline.interrupts import deferred_interrupts
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.progress import SILENT, Progress

SAVING_SHARE = 0.05  # of the time at most: slow disks get fewer checkpoints


@dataclass(frozen=True)
class Recipe:
    """How to train, whatever the data and the model.

    Example:
        >>> recipe = Recipe(steps=10, learning_rate=1.0, lr_warm_up=0.2)
        >>> [round(recipe.learning_rate_at(step), 2) for step in range(10)]
        [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    """

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    lr_warm_up: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, options: Options, steps: int, **changes: Any) -> "Recipe":
        """Take the recipe from a run's options, with a number of steps and other changes."""
        names = [name for name in cls.__dataclass_fields__ if name != "steps"]
        return cls(steps, **{**{name: getattr(options, name) for name in names}, **changes})

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ...: linear warm-up, then cosine or constant."""
        warm = round(self.lr_warm_up * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - warm) / (self.steps - warm)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class DataOrder:
    """Which samples a step sees: a fresh permutation every epoch, known without history.

    Example:
        >>> order = DataOrder(5, 2, seed=0)
        >>> sorted(order.at(0) + order.at(1) + order.at(2)[:1])
        [0, 1, 2, 3, 4]
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self._epochs: dict[int, list[int]] = {}

    def at(self, batch: int) -> list[int]:
        """Return the indices in batch 0, 1, ..."""
        places = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        return [self._epoch(i // self.samples)[i % self.samples] for i in places]

    def _epoch(self, number: int) -> list[int]:
        if number not in self._epochs:
            recent = {n: order for n, order in self._epochs.items() if abs(n - number) <= 1}
            order = permutation(self.samples, self.seed, f"epoch {number}")
            self._epochs = {**recent, number: order}
        return self._epochs[number]


@dataclass
class Training:
    """What a stretch of training did."""

    steps: int
    losses: list[float]  #: mean loss of a token, step by step, from where this process began
    seconds_per_step: float  #: median, the first step of a process left out; NaN without any
    tokens: int  #: tokens that counted in the loss, in the steps of ``losses``


def train(
    model: Any,
    samples: Samples,
    recipe: Recipe,
    *,
    pad: int = 0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    on_step: Callable[[int, float, dict[str, float]], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    enough: Callable[[int], bool] | None = None,
    title: str = "training",
    progress: Progress = SILENT,
) -> Training:
    """Train what requires a gradient, with AdamW on the mean loss of a step's tokens.

    Every token of a step weighs the same, however it falls into forward passes. The order of the
    data and the learning rate are functions of seed and step, and a checkpoint holds the rest, so
    on a CPU a run that was killed and resumed ends in the very same numbers. An interrupt (Ctrl-C,
    SIGTERM) waits for the end of a step, saves it, and then raises ``KeyboardInterrupt``.

    Args:
        model: A causal model of transformers, adapters applied.
        samples: What to train on; at least one token must count in every step.
        recipe: How.
        pad: Token id that fills up batches.
        checkpoint: File to save to and to resume from; None saves nothing.
        checkpoint_seconds: Least time between two checkpoints; also, saving takes at most about a
            twentieth of the time.
        on_step: Called after every step with the steps done, their loss, and further figures.
        on_resume: Called with the steps that the checkpoint has done, before going on.
        enough: Called with the steps done before every further one; True ends the training early.
        title: What a progress bar is called.
        progress: Watches.

    Returns:
        Losses and times of this process's steps.

    Raises:
        ValueError: Nothing requires a gradient, or the checkpoint is of another run.
        FloatingPointError: The loss is not finite any more.
        KeyboardInterrupt: An interrupt came; the step is saved.
        OSError: A checkpoint cannot be written; the one before it stands.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("training needs something that requires a gradient, got none")
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    facts = {"recipe": vars(recipe), "samples": len(samples), "tokens": samples.loss_tokens()}
    order = DataOrder(len(samples), recipe.batch_size, recipe.seed)
    device = next(iter(parameters.values())).device
    done = 0
    if checkpoint is not None and checkpoint.exists():
        done = int(load_checkpoint(checkpoint, parameters, optimizer, facts)["step"])
    if on_resume is not None:
        on_resume(done)

    def save() -> float:
        """Save, and return when to do so next."""
        if checkpoint is None:
            return math.inf
        start = time.monotonic()
        save_checkpoint(checkpoint, parameters, optimizer, {**facts, "step": done})
        took = time.monotonic() - start
        return time.monotonic() + max(checkpoint_seconds, took / SAVING_SHARE)

    result = Training(done, [], math.nan, 0)
    seconds: list[float] = []
    saved, due = done, time.monotonic() + checkpoint_seconds
    training = model.training
    model.train()
    try:
        with (
            deferred_interrupts() as interrupted,
            progress.bar(title, recipe.steps, done=done) as bar,
        ):
            while done < recipe.steps and not (enough is not None and enough(done)):
                start = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate_at(done)
                loss, tokens = _step(model, samples, order, recipe, done, pad, device)
                norm = _clip(list(parameters.values()), recipe.clip)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"loss and gradient must stay finite, got {loss:g} and {norm:g} in step "
                        f"{done + 1}: try a lower --learning-rate than {recipe.learning_rate:g}"
                    )
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                seconds.append(time.perf_counter() - start)
                result.losses.append(loss)
                result.tokens += tokens
                figures = {
                    "learning_rate": recipe.learning_rate_at(done - 1),
                    "grad_norm": norm,
                    "tokens": tokens,
                    "seconds": round(seconds[-1], 4),
                }
                if on_step is not None:
                    on_step(done, loss, figures)
                bar.advance(loss=loss)
                stop = any_of(interrupted(), device)
                if any_of(stop or time.monotonic() >= due, device):
                    due, saved = save(), done
                if stop:
                    raise KeyboardInterrupt
        if saved < done:
            save()
    finally:
        model.train(training)
    result.steps = done
    if seconds:
        result.seconds_per_step = statistics.median(seconds[1:] or seconds)
    return result


def _step(
    model: Any,
    samples: Samples,
    order: DataOrder,
    recipe: Recipe,
    step: int,
    pad: int,
    device: torch.device,
) -> tuple[float, int]:
    """Add up one step's gradients; return the mean loss of its tokens and their number."""
    batches = [order.at(step * recipe.accumulation + i) for i in range(recipe.accumulation)]
    tokens = sum(samples.loss_tokens(indices) for indices in batches)
    if tokens == 0:
        raise ValueError(
            f"every step needs a token that counts in the loss, step {step + 1} has none"
        )
    total = torch.zeros((), device=device)
    for indices in map(share, batches):
        if not indices:
            continue
        batch = to_device(samples.batch(indices, pad), device)
        if not (batch["labels"][:, 1:] >= 0).any():
            continue
        loss = negative_log_likelihood(model, batch) / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    add_gradients((p for p in model.parameters() if p.requires_grad), total)
    return total.item(), tokens


def _clip(parameters: list[nn.Parameter], most: float) -> float:
    """Scale the gradients down to a norm of at most ``most`` (0: no limit); return the norm."""
    norm: Tensor = nn.utils.clip_grad_norm_(parameters, most or math.inf)
    return float(norm)
