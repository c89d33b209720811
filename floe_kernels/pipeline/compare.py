"""Methods side by side at one cost: the same budget, data, steps and seeds for each of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from floe_kernels.allocation import Plan, uniform
from floe_kernels.allocation.costs import ADAM_BYTES
from floe_kernels.pipeline.compare_report import write_comparison
from floe_kernels.pipeline.datasets import check_data
from floe_kernels.pipeline.history import History
from floe_kernels.pipeline.measurements import Measurement
from floe_kernels.pipeline.methods import DRAWN, Method, make_plan
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.packages import check_packages
from floe_kernels.pipeline.picture import picture
from floe_kernels.pipeline.progress import SILENT, Progress
from floe_kernels.pipeline.runs import RESULTS, Run
from floe_kernels.pipeline.scoring import measure
from floe_kernels.pipeline.tune import open_bench
from floe_kernels.pipeline.workbench import Workbench

USUAL = "floe,lora_smoe,alphalora,layerif,mola,uniform,random,random_layers,inverted-floe"
A_LAYER = 5  # experts where no budget is given: the 160 on 32 layers of arXiv 2402.08562


def compare(
    run: Run, options: Options, methods: Sequence[Method], seeds: int, progress: Progress = SILENT
) -> None:
    """Measure once, plan with every method at one cost, train every plan with every seed.

    The budget is turned into trainable parameters first, so that methods which decide by layer and
    by matrix spend alike. A seed draws the adapters' start, the order of the data and the plans of
    the methods that draw; scores are taken once. After the first seed there is a full table.

    Every training that ends adds a line to ``results.jsonl``; a killed comparison loses at most
    the steps since its last checkpoint. ``plans/`` keeps every plan, ``report.html`` the table and
    the plot of which layers each method chose.

    Args:
        run: The folder, open.
        options: What to do.
        methods: Which methods, each once.
        seeds: How many trainings of each.
        progress: Watches.

    Raises:
        ValueError: Options, data or model do not fit, or the budget is too small for a method.
        OSError: A file cannot be read or written.
        ImportError: An optional package is missing.
    """
    check_packages(options)
    check_data(options)
    bench = open_bench(run, options, progress)
    progress.say(f"held-out loss of the base: {bench.base_loss():.4f}")
    needed = dict.fromkeys(method.needs for method in methods if method.needs)
    found = {name: measure(bench, name, options.rank) for name in needed}
    total = parameters_of(options, bench)
    progress.say(f"every method may spend {total:,} trainable parameters")
    plans = {
        (method, seed): _plan(bench, method, found.get(method.needs), total, seed)
        for seed in range(seeds)
        for method in methods
    }
    results = History(run.folder / RESULTS)
    for done, ((method, seed), plan) in enumerate(plans.items()):
        name, kept = f"{method.key}.{seed}", results.of("run", method=method.title, seed=seed)
        if not kept:
            title = f"run {done + 1} of {len(plans)}, {method.title}, seed {seed}"
            bench.train(name, plan, title=title, keep_adapter=False, seed=options.seed + seed)
            results.add("run", **_line(method, seed, plan, run.state["trained"][name]))
            kept = results.of("run", method=method.title, seed=seed)
            left = len(plans) - done - 1
            progress.say(f"{method.title}, seed {seed}: {kept[0]['loss']:.4f}; {left} runs to go")
    write_comparison(run)


def parameters_of(options: Options, bench: Workbench) -> int:
    """Return the budget in trainable parameters.

    Args:
        options: ``budget``, 0 for five experts a layer, and ``unit``.
        bench: The model.
    """
    layers = len({spec.layer for spec in bench.modules.values()})
    budget = options.budget or A_LAYER * layers
    if options.unit == "bytes":
        return budget // ADAM_BYTES
    if options.unit == "parameters" and options.budget:
        return budget
    return uniform(bench.modules, total=budget, **options.adapter(options.rank)).parameters()


def _plan(
    bench: Workbench, method: Method, found: Measurement | None, total: int, seed: int
) -> Plan:
    """Make a method's plan, or read the one that an earlier start made."""
    drawn = f".{seed}" if method.name in DRAWN else ""
    path = bench.run.folder / "plans" / f"{method.key}{drawn}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        plan = make_plan(
            method, bench.modules, found, bench.options, rank=bench.options.rank,
            seed=bench.options.seed + seed, total=total, unit="parameters",
            base_model=bench.options.model, fingerprint=bench.fingerprint,
        )  # fmt: skip
        plan.save(path)
    return Plan.load(path)


def _line(method: Method, seed: int, plan: Plan, trained: Mapping[str, Any]) -> dict[str, Any]:
    means = picture(plan).means()
    names = ("loss", "tokens", "steps", "train_loss", "seconds_per_step", "peak_bytes")
    return {
        "method": method.title,
        "seed": seed,
        **{name: trained[name] for name in names},
        "parameters": plan.parameters(),
        "experts": round(sum(means), 4),
        "layers": len(plan.layers()),
        "experts_by_layer": [round(mean, 4) for mean in means],
    }
