"""One page that tells a run's story: no script, no font, nothing from anywhere else."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from floe_kernels.allocation import Plan
from floe_kernels.pipeline import files
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.plots import (
    importance_plot,
    loss_plot,
    search_plot,
)
from floe_kernels.pipeline.report_page import PAGE
from floe_kernels.pipeline.results import HEADINGS, remarks, results
from floe_kernels.pipeline.runs import Run

REPORT = "report.html"
ENDS = {
    "n_trials": "that was the number asked for",
    "exhausted": "every rank had been tried",
    "patience": "there was no more progress",
    "time": "the time was up",
}


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
    parts = [_results(state), _layers(run), _search(run), _losses(run), _asked(run)]
    title = f"floe {run.command}: {run.arguments.get('model', '')}"
    machine = state.get("machine", {})
    where = ""
    if machine:
        where = (
            f"{machine['processor']}, {machine['threads']} threads; torch {machine['torch']}, "
            f"Python {machine['python']}"
        )
    return PAGE.format(
        title=_text(title), where=_text(where), body="\n".join(part for part in parts if part)
    )


def _results(state: dict[str, Any]) -> str:
    rows = [row.texts() for row in results(state)]
    if not rows:
        return ""
    return _section("Results", _table(HEADINGS, rows, numbers=1), *map(_paragraph, remarks(state)))


def _layers(run: Run) -> str:
    score, path = run.state.get("score"), run.folder / "plan.json"
    if not path.exists():
        return ""
    plan = Plan.load(path)
    kept = plan.layers()
    parts = []
    scores: dict[str, float] = score["scores"] if score else {}
    if score:
        title = f"Fisher score ({score['variant']})"
        counts = score["counts"]
        parts.append(importance_plot(scores, kept, title))
        parts.append(
            _paragraph(
                f"Scored on {counts['samples']} samples with {counts['tokens']:,} tokens to learn, "
                f"one squared gradient a sample, in {score['seconds']:.0f} s."
            )
        )
    refinement = plan.provenance.get("refinement")
    if isinstance(refinement, dict):
        parts.append(
            _paragraph(
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
    parts.append(_table(headings, rows, numbers=1))
    return _section("Layers kept", *parts)


def _search(run: Run) -> str:
    trials, found = run.history.of("trial"), run.state.get("search")
    if not trials or not found:
        return ""
    rows = [
        (
            str(t["number"] + 1),
            str(t["rank"]),
            t["state"],
            "-" if t["loss"] is None else f"{t['loss']:.4f}",
            "-" if t.get("duration") is None else f"{t['duration']:.1f}",
        )
        for t in trials
    ]
    return _section(
        "Rank search",
        search_plot(trials, found["rank"]),
        _paragraph(
            f"All layers were adapted, and the samples that judged a trial belong to the training "
            f"data. The search ended after {found['completed']} complete trials and "
            f"{found['seconds']:.0f} s, because {ENDS.get(found['stopped'], found['stopped'])}; "
            f"the rank is {found['rank']}."
        ),
        _table(("trial", "rank", "state", "loss", "seconds"), rows, numbers=3),
    )


def _losses(run: Run) -> str:
    titles = {name: found["title"] for name, found in run.state.get("trained", {}).items()}
    steps = {title: run.history.of("step", run=name) for name, title in titles.items()}
    if not steps:
        return ""
    held_out = {title: run.history.of("evaluation", run=name) for name, title in titles.items()}
    base = run.state.get("base", {}).get("loss")
    return _section("Losses", loss_plot(steps, held_out, base))


def _asked(run: Run) -> str:
    usual = {f.name: f.default for f in fields(Options)}
    asked = {name: value for name, value in run.arguments.items() if value != usual.get(name)}
    chosen = run.state.get("pace", {}).get("options", {})
    facts = {f"checksum of the {name}": value for name, value in run.facts.items()}
    rows = [(name, str(value)) for name, value in {**asked, **chosen, **facts}.items()]
    use = (
        "model = AutoModelForCausalLM.from_pretrained(...)  # the same base\n"
        'floe_kernels.load_adapter(model, "adapter")'
    )
    parts = [
        _paragraph("Options that are not the usual ones, and what results depend on:"),
        _table(("option", "value"), rows, numbers=2),
    ]
    if (run.folder / "adapter").exists():
        parts.insert(0, f"<pre>{_text(use)}</pre>")
    return _section("How it was made, and how to use it", *parts)


def _layer(plan: Plan, name: str) -> str:
    return plan.modules[name].layer


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>\n" + "\n".join(parts) + "</section>"


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int) -> str:
    """Return a table whose columns from ``numbers`` on are set like numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= numbers else ''}>{_text(text)}</{tag}>"
            for i, text in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', headings)}</tr></thead><tbody>\n{body}</tbody></table>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
