"""Fisher information of the layers: each record is taken once a data set and seed, and kept."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.stage import Stage
from floe_kernels.allocation import floe, uniform
from floe_kernels.integrations.transformers import apply_plan, remove_adapters
from floe_kernels.pipeline import files
from floe_kernels.pipeline.encoding import IGNORE, Samples, draw
from floe_kernels.pipeline.evaluation import to_device
from floe_kernels.pipeline.training import Recipe, train
from floe_kernels.scores import FisherCollector
from floe_kernels.scores.fisher import block_linears, collect, read_variant
from floe_kernels.scores.record import FisherRecord

COLD = ("init", "base")
"""Variants that are read before any training; the others need a warm-up."""
PER_SAMPLE = {"cold": ("init", "base"), "warm": ("gate", "param_sum")}
"""Variants whose score is a mean over samples, by what they are read off."""


def record(
    stage: Stage, label: str, seed: int, kind: str, *, layers: Sequence[str] = (), times: int = 1
) -> FisherRecord:
    """Take a record, or read the one that an earlier run took.

    Args:
        stage: The model and its data.
        label: Of the data set.
        seed: Of adapters, samples and warm-up.
        kind: ``"cold"``: adapters fresh from the start; ``"warm"``: trained a little first;
            ``"token"`` or ``"batch"``: as cold, but with every token, or every batch, squared as
            if it were a sample.
        layers: The only ones with adapters; empty: all.
        times: Multiple of the usual number of samples.
    """
    name = f"{kind}{times if times > 1 else ''}{'-some' if layers else ''}.{seed}.safetensors"
    path = stage.folder(label) / name
    if path.exists():
        return FisherRecord.load(path)
    options, model, dataset = stage.options(label), stage.loaded.model, stage.task(label).dataset
    samples = draw(dataset.train, times * options.score_samples, seed, "scores")
    keywords = {"experts": options.experts, **options.adapter(options.rank)}
    if layers:
        ones = {layer: float(layer in layers) for layer in stage.layers}
        plan = floe(ones, stage.modules, keep=len(layers) / len(ones), **keywords)
    else:
        plan = uniform(stage.modules, **keywords)
    torch.manual_seed(seed)
    apply_plan(model, plan)
    try:
        if kind == "warm":
            steps = options.warm_up_steps
            recipe = Recipe.of(options, steps, schedule="constant", seed=seed)
            train(model, dataset.train, recipe, pad=dataset.pad)
        batches = _batches(stage, samples, options.batch_size, dataset.pad)
        if kind in ("token", "batch"):
            found = collect_as(model, batches, kind)
        else:
            frozen = block_linears(model) if kind == "cold" and not layers else ()
            found = collect(model, batches, frozen=frozen)
    finally:
        remove_adapters(model)
    found.save(path)
    return found


def scores(
    stage: Stage, label: str, seed: int, variant: str, *, aggregate: str = "layer"
) -> dict[str, float]:
    """Score layers, or single matrices, by a variant of FLoE's Fisher score.

    Args:
        stage: The model and its data.
        label: Of the data set.
        seed: As in :func:`record`.
        variant: One of ``floe_kernels.scores.fisher.VARIANTS``.
        aggregate: ``"layer"`` or ``"module"``.
    """
    found = record(stage, label, seed, "cold" if variant in COLD else "warm")
    return read_variant(found, variant, aggregate)


def gradients(stage: Stage, label: str, seed: int, aggregate: str = "layer") -> list[list[float]]:
    """Return gate gradients after the warm-up, samples by layers (or matrices)."""
    _, gates = record(stage, label, seed, "warm").gate_gradients(aggregate=aggregate)
    rows: list[list[float]] = gates.tolist()
    return rows


def per_sample(stage: Stage, label: str, seed: int, variant: str) -> list[dict[str, float]]:
    """Score the layers on every sample alone, of as many as the largest size needs twice.

    What is read off the same adapters is measured once, and kept.

    Args:
        stage: The model and its data.
        label: Of the data set.
        seed: Of adapters, samples and warm-up.
        variant: One of ``PER_SAMPLE``.
    """
    kind = "cold" if variant in COLD else "warm"
    if variant not in PER_SAMPLE[kind]:
        raise ValueError(f"samples one by one have {PER_SAMPLE}, got {variant!r}")
    most = 2 * max(stage.config.sizes)
    path = stage.folder(label) / f"samples-{kind}-{most}.{seed}.json"
    if not path.exists():
        found = _one_by_one(stage, label, seed, kind, most)
        files.write_text(path, json.dumps(found))
    rows: list[dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))[variant]
    return rows


def _one_by_one(
    stage: Stage, label: str, seed: int, kind: str, most: int
) -> dict[str, list[dict[str, float]]]:
    options, model, dataset = stage.options(label), stage.loaded.model, stage.task(label).dataset
    samples = draw(dataset.train, most, seed, "scores")
    keywords = {"experts": options.experts, **options.adapter(options.rank)}
    torch.manual_seed(seed)
    apply_plan(model, uniform(stage.modules, **keywords))
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in PER_SAMPLE[kind]}
    try:
        if kind == "warm":
            recipe = Recipe.of(options, options.warm_up_steps, schedule="constant", seed=seed)
            train(model, dataset.train, recipe, pad=dataset.pad)
        frozen = block_linears(model) if "base" in found else ()
        for batch in _batches(stage, samples, 1, dataset.pad):
            seen = collect(model, [batch], frozen=frozen)
            for variant, rows in found.items():
                rows.append(read_variant(seen, variant))
    finally:
        remove_adapters(model)
    return found


def collect_as(model: Any, batches: Iterator[Mapping[str, Tensor]], what: str) -> FisherRecord:
    """Collect as :func:`floe_kernels.scores.fisher.collect` does, but square something else.

    Args:
        model: With adapters.
        batches: Keyword arguments of the model, with ``labels``.
        what: ``"token"``: every token's part of the gradient by itself, as libraries do that see
            a flat list of tokens; ``"batch"``: the gradient of a whole batch.
    """
    training = model.training
    model.eval()
    try:
        with FisherCollector(model) as collector:
            for batch in batches:
                predicted = (batch["labels"] != IGNORE).roll(-1, 1)
                predicted[:, -1] = False
                rows = predicted.numel()
                step = 1 if what == "token" else rows
                offsets = torch.arange(0, rows + 1, step, device=predicted.device)
                tokens = predicted.reshape(-1, step).sum(1)
                collector.batch(len(tokens), offsets=offsets, num_tokens=tokens)
                model(**batch).loss.backward()
                collector.step()
                model.zero_grad(set_to_none=True)
    finally:
        model.train(training)
    return collector.record()


def _batches(stage: Stage, samples: Samples, size: int, pad: int) -> Iterator[dict[str, Tensor]]:
    for i in range(0, len(samples), size):
        chosen = range(i, min(i + size, len(samples)))
        yield to_device(samples.batch(chosen, pad), stage.loaded.device)
