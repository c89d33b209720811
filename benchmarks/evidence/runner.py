"""One line a finished run: what the results file holds already is not done again."""

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.evidence import measured
from benchmarks.evidence.choices import choose
from benchmarks.evidence.config import Config, Key
from benchmarks.evidence.intervals import agreement
from benchmarks.evidence.stage import Stage
from floe_kernels.allocation import Plan
from floe_kernels.integrations.transformers import load_adapter, remove_adapters
from floe_kernels.pipeline.history import History

RUN = "run"
LEARNED = ("loss", "tokens", "steps", "train_loss", "seconds_per_step", "peak_bytes")
TRAINED = (
    *LEARNED, "accuracy", "accuracy_by_token", "cpu_seconds", "parameters", "seconds", "questions",
    "batch_size", "peak_method",
)  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a file of lines; none where there is no file."""
    return History(path, mend=False).of(RUN) if path.exists() else []


def pending(config: Config, lines: list[dict[str, Any]]) -> list[Key]:
    """Return the runs that have no line yet, in order."""
    done = {key_of(line) for line in lines}
    return [key for key in config.runs() if key not in done]


def key_of(line: Mapping[str, Any]) -> Key:
    """Return which run a line is of."""
    return Key(line["dataset"], line["method"], line["seed"], line["setting"])


def run_all(
    stage: Stage,
    results: Path,
    *,
    minutes: float = 0.0,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Do the runs that are missing, and append a line for each one that ends.

    Killed at any moment it loses at most the steps since the last checkpoint of the run in flight.

    Args:
        stage: The experiment.
        results: File of lines; made with the first.
        minutes: Start no run that would end later, going by the mean of those done; 0: no limit.
        say: Prints progress.
        clock: Seconds.

    Returns:
        The number of runs that are still missing.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    history = History(results)
    known = [line for path in sorted(results.parent.glob("*.jsonl")) for line in lines_of(path)]
    todo, began = pending(stage.config, history.of(RUN)), clock()
    earlier = [
        line["wall_seconds"] for line in history.of(RUN) if line["machine"] == machine(stage)
    ]
    say(f"{stage.config.name}: {len(todo)} of {len(stage.config.runs())} runs to do")
    walls: list[float] = []
    for number, key in enumerate(todo):
        expected = statistics.fmean(walls or earlier or [0.0])
        if minutes and clock() - began + expected > 60 * minutes:
            say(f"the time is up; {len(todo) - number} runs are left")
            return len(todo) - number
        start = clock()
        found = do(stage, key, known)
        walls.append(clock() - start)
        device = stage.loaded.device.type
        history.add(RUN, **records.complete(
            {"experiment": stage.config.name, **key._asdict(), **found,
             "wall_seconds": round(walls[-1], 2)}, device,
        ))  # fmt: skip
        known.append(history.lines[-1])
        shutil.rmtree(stage.folder(key.dataset) / folder_of(key), ignore_errors=True)
        left = statistics.fmean(walls) * (len(todo) - number - 1) / 60
        say(
            f"{number + 1}/{len(todo)} {describe(key)}: {summary(found)}; about {left:.0f} min left"
        )
    return 0


def do(stage: Stage, key: Key, known: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Do one run and return what its line says.

    A plan that another method came to as well is not trained twice: it would give the same bits.
    The line then names that method.

    Args:
        stage: The experiment.
        key: Of the run.
        known: Lines of this experiment and of others.
    """
    family, _, argument = key.method.partition(":")
    if family == "stability":
        rows = measured.per_sample(stage, key.dataset, key.seed, argument)
        return {**_agreements(stage, rows, key.seed), "scores": rounded(_mean(rows))}
    base = stage.base(key.dataset)
    plan, scores = choose(stage, key)
    where = {**placed(stage, plan), "plan": checksum(plan), "scores": rounded(scores)}
    same = (key.dataset, key.seed, key.setting, where["plan"])
    for line in known:
        if (line["dataset"], line["seed"], line["setting"], line.get("plan")) == same:
            trained = {name: line.get(name) for name in TRAINED}
            return {**base, **trained, **where, "trained_as": line["method"]}
    return {**base, **train(stage, key, plan), **where}


def train(stage: Stage, key: Key, plan: Plan) -> dict[str, Any]:
    """Train a plan's adapters from the start, evaluate them and let them answer.

    Processor seconds, unlike those of a clock, do not mind what else the machine does; a run that
    was taken up again has none.
    """
    fresh = not (stage.folder(key.dataset) / folder_of(key)).exists()
    start = time.process_time()
    with stage.bench(key.dataset, folder_of(key), key.seed) as bench:
        bench.train("it", plan, title=describe(key), seed=key.seed)
        trained = bench.run.state["trained"]["it"]
        if "answers" not in bench.run.state:
            load_adapter(stage.loaded.model, bench.run.folder / "adapter")
            try:
                bench.run.finish("answers", stage.answers(key.dataset))
            finally:
                remove_adapters(stage.loaded.model)
        answers = bench.run.state["answers"]
        seconds = sum(line["seconds"] for line in bench.run.history.of("step", run="it"))
    return {
        **{name: trained[name] for name in LEARNED}, **answers,
        "cpu_seconds": round(time.process_time() - start, 2) if fresh else None,
        "parameters": plan.parameters(), "seconds": round(seconds, 2),
        "questions": len(stage.task(key.dataset).questions),
        "batch_size": bench.options.batch_size, "peak_method": trained["peak_method"],
    }  # fmt: skip


def checksum(plan: Plan) -> str:
    """Return what tells plans apart that train differently on one model."""
    facts = [plan.lora_alpha, plan.lora_dropout, plan.shared_A, plan.use_rslora]
    members = {name: vars(placement) for name, placement in plan.placements.items()}
    return hashlib.sha256(json.dumps([facts, members]).encode()).hexdigest()[:12]


def placed(stage: Stage, plan: Plan) -> dict[str, Any]:
    """Say which layers got experts, by number, and how many on the mean of their linears."""
    members: dict[str, list[int]] = {layer: [] for layer in stage.layers}
    for name, spec in stage.modules.items():
        placement = plan.placements.get(name)
        members[spec.layer].append(placement.experts if placement else 0)
    means = [round(statistics.fmean(counts), 3) for counts in members.values()]
    return {"layers": [i for i, mean in enumerate(means) if mean], "experts_by_layer": means}


def rounded(scores: dict[str, float]) -> dict[str, float]:
    """Return scores with six digits, which is more than samples can tell."""
    return {name: float(f"{score:.6g}") for name, score in scores.items()}


def summary(found: dict[str, Any]) -> str:
    """Return what a line comes to, in a few words."""
    if "loss" not in found:
        largest = max(found["agreement"], key=int)
        return f"tau {found['agreement'][largest]['tau'][0]:.2f} at {largest} samples"
    accuracy = found["accuracy"]
    right = "" if accuracy is None else f", {100 * accuracy:.1f} % right"
    return f"loss {found['loss']:.4f} (base {found['base_loss']:.4f}){right}"


def describe(key: Key) -> str:
    """Return a run's name as people read it."""
    return f"{key.dataset} {key.method} seed {key.seed}"


def folder_of(key: Key) -> str:
    """Return the name of the folder that a run in flight works in."""
    return f"{key.method.replace(':', '-').replace('/', '-')}.{key.seed}"


def machine(stage: Stage) -> str:
    """Return the name of the machine, as lines have it."""
    return str(records.machine(stage.loaded.device.type)["machine"])


def _agreements(stage: Stage, rows: list[dict[str, float]], seed: int) -> dict[str, Any]:
    config, keep = stage.config, float(stage.config.options.get("keep", 0.25))
    sizes = {str(n): agreement(rows, n, keep, config.draws, seed) for n in config.sizes}
    return {"samples": len(rows), "agreement": sizes}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
