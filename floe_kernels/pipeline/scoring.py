"""The four measurements, on a model and data that are loaded: one small function each."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from floe_kernels.allocation import stability, uniform
from floe_kernels.allocation.lora_smoe import mean_share
from floe_kernels.integrations.transformers import apply_plan, remove_adapters
from floe_kernels.pipeline.encoding import Samples, draw, permutation
from floe_kernels.pipeline.evaluation import to_device
from floe_kernels.pipeline.measurements import MEASURES, Measurement
from floe_kernels.scores import influence, sample_sensitivity, spectral

if TYPE_CHECKING:
    from floe_kernels.pipeline.workbench import Workbench

LEAST_VALIDATION = 8  # samples whose loss influence is measured on
DRAWS = 100  # of the bootstrap


def measure(bench: "Workbench", method: str, rank: Any) -> Measurement:
    """Measure the model; what the run's folder holds already is read from there.

    Args:
        bench: The model, its data and its run.
        method: ``"fisher"``, ``"sensitivity"``, ``"spectral"`` or ``"influence"``.
        rank: Of the experts that ``fisher`` and ``influence`` put on all layers.

    Raises:
        ValueError: An unknown method, or model and data do not fit it.
    """
    if method not in MEASURES:
        raise ValueError(f"method must be one of {', '.join(MEASURES)}, got {method!r}")
    if method == "fisher":
        found = bench.scores(rank)
    else:
        phase = f"measured {method}"
        if phase not in bench.run.state:
            start = time.monotonic()
            bench.run.finish(phase, {"seconds": 0.0, **MAKERS[method](bench, rank)})
            seconds = time.monotonic() - start
            bench.run.finish(phase, {**bench.run.state[phase], "seconds": seconds})
        found = bench.run.state[phase]
    return Measurement(
        bench.options.model,
        bench.fingerprint,
        found.get("variant", ""),
        found["scores"],
        bench.modules,
        found.get("gradients"),
        method,
        found.get("tasks"),
        found.get("stability"),
    )


def measure_sensitivity(bench: "Workbench", _rank: Any) -> dict[str, Any]:
    """Score every frozen matrix on each task's samples, and tell how far to trust the ranking.

    A task that is done stays done when the run is killed during the next one.
    """
    tasks: dict[str, dict[str, float]] = {}
    trust: dict[str, dict[str, Any]] = {}
    for task, samples in bench.dataset.tasks.items():
        phase = f"sensitivity of {task}"
        if phase not in bench.run.state:
            rows = _sensitivity_rows(bench, task, samples)
            mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
            keep = min(max(bench.options.percent / 100, 0.01), 0.99)
            report = _trust(rows, keep, bench.options.seed)
            bench.run.finish(phase, {"scores": mean, "stability": report})
        tasks[task] = bench.run.state[phase]["scores"]
        trust[task] = bench.run.state[phase]["stability"]
    return {"scores": mean_share(tasks), "tasks": tasks, "stability": trust}


def _sensitivity_rows(bench: "Workbench", task: str, samples: Samples) -> list[dict[str, float]]:
    options = bench.options
    drawn = draw(samples, options.score_samples, options.seed, f"scores {task}")
    with bench.progress.bar(f"sensitivity on {task}", len(drawn), unit="samples") as bar:
        return sample_sensitivity(
            bench.model,
            _singles(bench, drawn),
            modules=list(bench.modules),
            progress=lambda _done: bar.advance(),
        )


def _trust(rows: list[dict[str, float]], keep: float, seed: int) -> dict[str, Any]:
    """Bootstrap the ranking; nothing to tell of a single sample or linear."""
    if len(rows) < 2 or len(rows[0]) < 2:
        return {}
    found = stability(rows, keep=keep, draws=DRAWS, seed=seed)._asdict()
    return {name: v._asdict() if hasattr(v, "_asdict") else v for name, v in found.items()}


def measure_spectral(bench: "Workbench", _rank: Any) -> dict[str, Any]:
    """Score every frozen matrix by the tail of its spectrum; spectra are kept on disk."""
    folder = bench.options.cache
    if folder:
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with bench.progress.bar("spectra", len(bench.modules), unit="matrices") as bar:
        scores = spectral(
            bench.model,
            modules=bench.modules,
            method=bench.options.spectrum,
            aggregate="module",
            cache=folder or None,
            progress=lambda _done, _total, _name: bar.advance(),
        )
    return {"scores": scores, "variant": bench.options.spectrum}


def measure_influence(bench: "Workbench", rank: Any) -> dict[str, Any]:
    """Score every block by its training samples' influence on others of the training data.

    One fresh LoRA a linear carries the gradients; the held-out data are left alone.
    """
    options, samples = bench.options, bench.dataset.train
    order = permutation(len(samples), options.seed, "influence")
    judges = min(max(LEAST_VALIDATION, options.score_samples // 2), len(samples) // 2)
    train = samples.subset(order[judges : judges + options.score_samples])
    validation = samples.subset(order[:judges])
    keywords = {**options.adapter(rank), "top_k": 1}
    plan = uniform(bench.modules, experts=1, **keywords)
    torch.manual_seed(options.seed)
    apply_plan(bench.model, plan)
    total = len(train) + len(validation)
    try:
        with bench.progress.bar("influence", total, unit="samples") as bar:
            scores = influence(
                bench.model,
                _singles(bench, train),
                _singles(bench, validation),
                part=options.part,
                parameters=("lora_B",),
                progress=lambda _done: bar.advance(),
            )
    finally:
        remove_adapters(bench.model)
    return {"scores": scores, "variant": options.part}


def _singles(bench: "Workbench", samples: Samples) -> Iterator[Mapping[str, Tensor]]:
    """Yield samples one at a time, unpadded."""
    for i in range(len(samples)):
        yield to_device(samples.batch([i], bench.dataset.pad), bench.loaded.device)


MAKERS: dict[str, Callable[["Workbench", Any], dict[str, Any]]] = {
    "sensitivity": measure_sensitivity,
    "spectral": measure_spectral,
    "influence": measure_influence,
}
