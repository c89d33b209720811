"""One page that tells a run's story: no script, no font, nothing from anywhere else."""

from dataclasses import fields
from typing import Any

from floe_kernels.allocation import Plan
from floe_kernels.allocation.units import unit_scores
from floe_kernels.pipeline import files
from floe_kernels.pipeline.map_plots import plan_plot
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.plots import (
    importance_plot,
    loss_plot,
)
from floe_kernels.pipeline.report_page import page, paragraph, section, table, text
from floe_kernels.pipeline.report_search import search_section
from floe_kernels.pipeline.results import HEADINGS, remarks, results
from floe_kernels.pipeline.runs import Run

REPORT = "report.html"


def write_report(run: Run) -> None:
    """Write ``report.html`` into a run's folder, from what the run has found so far.

    Args:
        run: The run.

    Raises:
        ImportError: matplotlib is missing.
        OSError: The file cannot be written.
    """
    files.write_text(run.folder / REPORT, render(run))
    run.finish("report", {"file": REPORT})


def render(run: Run) -> str:
    """Return the page."""
    state = run.state
    parts = [_results(state), _layers(run), search_section(run), _losses(run), asked(run)]
    title = f"floe {run.command}: {run.arguments.get('model', '')}"
    return page(title, state.get("machine", {}), parts)


def _results(state: dict[str, Any]) -> str:
    rows = [row.texts() for row in results(state)]
    if not rows:
        return ""
    return section("Results", table(HEADINGS, rows, numbers=1), *map(paragraph, remarks(state)))


def _layers(run: Run) -> str:
    score, path = run.state.get("score"), run.folder / "plan.json"
    if not path.exists():
        return ""
    plan = Plan.load(path)
    kept = plan.layers()
    parts = [plan_plot(plan)]
    scores: dict[str, float] = {}
    if score:
        _, scores = unit_scores(score["scores"], plan.modules, "layer")
        title = f"Fisher score ({score['variant']})"
        counts = score["counts"]
        parts.append(importance_plot(scores, kept, title))
        parts.append(
            paragraph(
                f"Scored on {counts['samples']} samples with {counts['tokens']:,} tokens to learn, "
                f"one squared gradient a sample, in {score['seconds']:.0f} s."
            )
        )
    refinement = plan.provenance.get("refinement")
    if isinstance(refinement, dict):
        parts.append(
            paragraph(
                f"Refinement exchanged {refinement['swaps']} layers: the loss that removing the "
                f"others predicts went from {refinement['loss_before']:.4g} to "
                f"{refinement['loss_after']:.4g}."
            )
        )
    by_score = sorted(scores, key=lambda name: -scores[name])
    rows = []
    for layer in kept:
        names = [n for n, p in plan.placements.items() if p.experts and _layer(plan, n) == layer]
        only = Plan({n: plan.placements[n] for n in names}, "", modules=plan.modules,
                    shared_A=plan.shared_A)  # fmt: skip
        ranks = dict.fromkeys(f"{p.experts} x rank {p.ranks[0]}" for p in only.placements.values())
        rows.append(
            (
                layer,
                f"{scores[layer]:.3g}" if layer in scores else "-",
                f"{by_score.index(layer) + 1} of {len(by_score)}" if layer in scores else "-",
                str(len(names)),
                ", ".join(ranks),
                f"{only.parameters():,}",
            )
        )
    rows.append(("all", "", "", "", "", f"{plan.parameters():,}"))
    headings = ("layer", "score", "place", "linears", "experts", "trainable parameters")
    parts.append(table(headings, rows, numbers=1))
    return section("Layers kept", *parts)


def _losses(run: Run) -> str:
    titles = {name: found["title"] for name, found in run.state.get("trained", {}).items()}
    steps = {title: run.history.of("step", run=name) for name, title in titles.items()}
    if not steps:
        return ""
    held_out = {title: run.history.of("evaluation", run=name) for name, title in titles.items()}
    base = run.state.get("base", {}).get("loss")
    return section("Losses", loss_plot(steps, held_out, base))


def asked(run: Run) -> str:
    """Return the section on options and checksums."""
    usual = {f.name: f.default for f in fields(Options)}
    changed = {name: value for name, value in run.arguments.items() if value != usual.get(name)}
    chosen = run.state.get("pace", {}).get("options", {})
    facts = {f"checksum of the {name}": value for name, value in run.facts.items()}
    rows = [(name, str(value)) for name, value in {**changed, **chosen, **facts}.items()]
    use = (
        "model = AutoModelForCausalLM.from_pretrained(...)  # the same base\n"
        'floe_kernels.load_adapter(model, "adapter")'
    )
    parts = [
        paragraph("Options that are not the usual ones, and what results depend on:"),
        table(("option", "value"), rows, numbers=2),
    ]
    if (run.folder / "adapter").exists():
        parts.insert(0, f"<pre>{text(use)}</pre>")
    return section("How it was made, and how to use it", *parts)


def _layer(plan: Plan, name: str) -> str:
    return plan.modules[name].layer
