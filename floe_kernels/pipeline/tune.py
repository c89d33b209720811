"""FLoE from end to end: which rank, which layers, and the adapter that follows."""

import functools
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from floe_kernels.allocation import Plan, random, uniform
from floe_kernels.integrations.transformers import find_modules, fingerprint, load_adapter
from floe_kernels.pipeline.datasets import Dataset, check_data, load_dataset
from floe_kernels.pipeline.encoding import Samples
from floe_kernels.pipeline.evaluation import Evaluation, evaluate
from floe_kernels.pipeline.machine import describe_machine
from floe_kernels.pipeline.measurements import Measurement
from floe_kernels.pipeline.models import load_model
from floe_kernels.pipeline.options import Options, Rank
from floe_kernels.pipeline.packages import check_packages
from floe_kernels.pipeline.progress import SILENT, Progress
from floe_kernels.pipeline.report import write_report
from floe_kernels.pipeline.runs import Run, open_run
from floe_kernels.pipeline.scoring import measure
from floe_kernels.pipeline.threads import choose_threads
from floe_kernels.pipeline.workbench import SHORT, Workbench

FLOE, ALL, RANDOM = "floe", "all", "random"


def tune(run: Run, options: Options, progress: Progress = SILENT) -> None:
    r"""Search for the rank, score and choose the layers, train the sparse model, evaluate it.

    After FLoE (arXiv 2506.00495), in the order: rank search on a small split with all layers
    adapted; warm-up, only where the score needs it; per-sample Fisher scores; selection and
    refinement; training of the chosen layers from fresh adapters; evaluation on held-out data.
    With ``options.compare`` all layers, and as many drawn by chance, are trained the same way.
    Every step that is finished stays finished when the run is resumed.

    Leaves ``plan.json``, ``adapter/``, ``history.jsonl`` and ``report.html`` in the run's folder.

    Args:
        run: The folder, open.
        options: What to do.
        progress: Watches.

    Raises:
        ValueError: Options, data or model do not fit.
        OSError: A file cannot be read or written.
        ImportError: An optional package is missing.
    """
    check_packages(options)
    check_data(options)
    bench = open_bench(run, options, progress)
    rank = find_rank(bench)
    train_all(bench, rank)
    write_report(run)


def train_plan(run: Run, options: Options, plan: Plan, progress: Progress = SILENT) -> None:
    """Train the adapters that a plan places, evaluate them, and report.

    Args:
        run: The folder, open.
        options: What to do.
        plan: Where experts go, of which rank.
        progress: Watches.

    Raises:
        ValueError: Options, data, plan or model do not fit.
        OSError: A file cannot be read or written.
        ImportError: An optional package is missing.
    """
    check_packages(options)
    check_data(options)
    run.pin(plan=hashlib.sha256(plan.to_json().encode()).hexdigest()[:SHORT])
    bench = open_bench(run, options, progress)
    progress.say(f"held-out loss of the base: {bench.base_loss():.4f}")
    if "plan" not in run.state:
        plan.save(run.folder / "plan.json")
        run.finish("plan", {"layers": plan.layers(), "parameters": plan.parameters()})
    bench.train(plan.method, plan, title=f"{plan.method}, {len(plan.layers())} layers")
    write_report(run)


def measure_model(
    options: Options, method: str = "fisher", progress: Progress = SILENT
) -> Measurement:
    """Measure a model, without a run's folder.

    Args:
        options: What to do.
        method: One of ``MEASURES``; ``"spectral"`` needs no data.
        progress: Watches.

    Returns:
        The scores, and what a plan needs to know about the model.

    Raises:
        ValueError: Options, data or model do not fit.
        OSError: A file cannot be read.
        ImportError: An optional package is missing.
    """
    if method != "spectral":
        check_data(options)
    if not options.rank:
        raise ValueError("--rank must be >= 1 here, got 0: floe tune searches for it")
    with (
        tempfile.TemporaryDirectory() as folder,
        open_run(Path(folder), "score", options.to_json()) as run,
    ):
        bench = open_bench(run, options, progress, with_data=method != "spectral")
        return measure(bench, method, options.rank)


def describe_model(options: Options, progress: Progress = SILENT) -> Measurement:
    """Load a model to see which linears it has; measures nothing.

    Args:
        options: ``model``, ``targets`` and how to load it.
        progress: Watches.

    Raises:
        ValueError: There is no such model, or it has no such linears.
        ImportError: An optional package is missing.
    """
    progress.say(f"loading {options.model}")
    model = load_model(options).model
    modules = find_modules(model, options.target_names())
    return Measurement(options.model, fingerprint(model), "", {}, modules, method="")


def evaluate_adapter(
    options: Options, adapter: Path | None, progress: Progress = SILENT
) -> Evaluation:
    """Return the held-out loss of a model, with an adapter or without.

    Args:
        options: What to do.
        adapter: Folder of the adapter; None evaluates the base.
        progress: Watches.

    Raises:
        ValueError: Options, data, adapter or model do not fit.
        OSError: A file cannot be read.
        ImportError: An optional package is missing.
    """
    check_data(options)
    loaded = load_model(options)
    dataset = load_dataset(options, loaded.tokenizer, most_tokens=loaded.most_tokens)
    if adapter is not None:
        load_adapter(loaded.model, adapter)
    return evaluate(
        loaded.model,
        dataset.held_out,
        batch_size=options.batch_size,
        pad=dataset.pad,
        progress=progress,
    )


def open_bench(
    run: Run, options: Options, progress: Progress, *, with_data: bool = True
) -> Workbench:
    """Load the model and the data of a run.

    Args:
        run: The folder, open.
        options: What to do.
        progress: Watches.
        with_data: False leaves the data out, for what looks at weights alone.
    """
    progress.say(f"loading {options.model}")
    loaded = load_model(options)
    run.finish("machine", describe_machine(loaded.device))
    if not with_data:
        nothing = Samples.of([])
        return Workbench(run, options, loaded, Dataset(nothing, nothing, 0, [], {}), progress)
    dataset = load_dataset(options, loaded.tokenizer, most_tokens=loaded.most_tokens)
    for note in [loaded.note, *dataset.notes]:
        if note:
            progress.say(note)
    progress.say(
        f"{len(dataset.train):,} training samples with {dataset.train.loss_tokens():,} tokens to "
        f"learn, {len(dataset.held_out):,} held out with {dataset.held_out.loss_tokens():,}"
    )
    bench = Workbench(run, options, loaded, dataset, progress)
    choose_threads(bench)
    return bench


def find_rank(bench: Workbench) -> Rank:
    """Evaluate the base and settle the rank, telling what came out."""
    bench.progress.say(f"held-out loss of the base: {bench.base_loss():.4f}")
    rank = bench.rank()
    ranks = [rank] if isinstance(rank, int) else dict.fromkeys(rank.values())
    bench.progress.say(f"rank of the experts: {', '.join(map(str, ranks))}")
    return rank


def train_all(
    bench: Workbench, rank: Rank, enough: Callable[[str, int], bool] | None = None
) -> None:
    """Score, choose, and train what the options ask for, telling what came out.

    Args:
        bench: The model and its run.
        rank: Of every expert, or by layer.
        enough: Called with a training's name and the steps it has done; True ends it early.
    """
    plan = bench.choose(rank)
    layers = len({spec.layer for spec in bench.modules.values()})
    kept, linears = plan.layers(), [name for name, p in plan.placements.items() if p.experts]
    share = f"{len(kept)} of {layers} layers"
    if len(linears) < sum(spec.layer in kept for spec in bench.modules.values()):
        share = f"{len(linears)} of {len(bench.modules)} linears"
    bench.progress.say(f"kept, {share}: {', '.join(kept)}")
    plans: dict[str, tuple[str, Plan]] = {}
    if bench.options.compare:
        keywords = {"experts": bench.options.experts, **bench.plan_options(rank)}
        plans[ALL] = f"MoE-LoRA, all {layers} layers", uniform(bench.modules, **keywords)
    plans[FLOE] = f"FLoE, {share}", plan
    if bench.options.compare:
        draw = random(bench.modules, keep=bench.options.keep, seed=bench.options.seed, **keywords)
        plans[RANDOM] = f"random, {len(draw.layers())} of {layers} layers", draw
    for name, (title, one) in plans.items():
        stop = None if enough is None else functools.partial(enough, name)
        bench.train(name, one, title=title, keep_adapter=name == FLOE, enough=stop)
        bench.progress.say(f"{title}: held-out loss {bench.run.state['trained'][name]['loss']:.4f}")
