"""EVIDENCE.md and its plots, from the committed lines and nothing else."""

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence import config, plots, tables
from benchmarks.evidence.config import Config
from benchmarks.evidence.regret import mean_regrets
from benchmarks.evidence.runner import lines_of
from benchmarks.evidence.tables import ALL, RANDOM, Lines
from benchmarks.report import markdown

ORDER = ("layers", "rules", "confirm", "experts", "rank", "definition", "stability")
COMPARED = (ALL, *RANDOM, "floe:init")
"""Methods of ``layers`` that ``rules`` is compared with; setting, data and seeds are the same."""
HEAD = """# Evidence on real tasks

Does it hold what the papers promise? `python -m benchmarks.evidence report` writes this page from
the lines in `benchmarks/results/evidence/`; what they do not say is not here. Every experiment is a
file in `benchmarks/evidence/`; `python -m benchmarks.evidence NAME --data FOLDER` does its missing
runs.

Loss is held out, in nats a token of the answers (of all tokens for stdlib). An answer is right if
its words are likeliest of the question's options, by the sum of their tokens' log-likelihoods or,
by token, by their mean. Gain retained is (base - method) / (base - all layers), seed by seed.
Brackets are Student's 95 % intervals over seeds, which draw adapters, the order of the data and the
samples of the scores; the training data and the questions are the same throughout, so the brackets
say nothing about other questions. The best random draw is the best in hindsight, which favours it.
"""


def write(configs: Path, results: Path, out: Path) -> list[Path]:
    """Write the report and its plots.

    Args:
        configs: Folder of the experiments' files.
        results: Folder of the lines; plots go there too.
        out: The report.

    Returns:
        The files written.
    """
    names = [path.stem for path in configs.glob("*.toml")]
    names.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    everything = {name: lines_of(results / f"{name}.jsonl") for name in names}
    parts, written = [HEAD], []
    for name in names:
        chosen = config.load(name, configs)
        lines = [line for line in everything[name] if _current(chosen, line)]
        stale = len(everything[name]) - len(lines)
        parts.append(f"## {name}\n\n{chosen.title}\n")
        if chosen.left_out:
            parts.append(f"Left out. {chosen.left_out}\n")
        if absent := tables.missing(chosen, lines):
            parts.append(absent + "\n")
        if stale:
            parts.append(f"{stale} lines are of another setting or method and left out.\n")
        if lines:
            path = results / f"{name}.svg"
            others = _shared(lines, everything.get("layers", [])) if name == "rules" else []
            text, drawn = _experiment(chosen, [*lines, *others], path)
            parts.append(text)
            if drawn:
                where = Path(os.path.relpath(path, out.parent)).as_posix()
                parts.append(f"![{name}]({where})\n")
                written.append(path)
            parts.append(_origin(lines))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts), encoding="utf-8")
    return [out, *written]


def _experiment(chosen: Config, lines: Lines, path: Path) -> tuple[str, bool]:
    if "agreement" in lines[0]:
        series = {
            dataset: {
                name.partition(":")[2]: _agreement(runs)
                for name, runs in tables.by_method(mine).items()
            }
            for dataset, mine in tables.by_dataset(lines).items()
        }
        plots.curves(series, path, x="samples", y="Kendall's tau", logarithmic=True)
        found = _list(tables.stability_findings(lines))
        head = "Two disjoint sets of samples: Kendall's tau / overlap of the kept beyond chance.\n"
        return f"{found}\n{head}\n{tables.stability_table(lines)}\n", True
    if chosen.rank_grid:
        return _rank(chosen, lines, path)
    plots.losses(lines, path)
    findings = tables.training_findings(lines)
    if any(line["method"] == ALL for line in lines):
        findings += tables.goal_findings(lines)
    parts = [] if _definitions(lines) else [_list(findings)]
    if _definitions(lines):
        parts.append(tables.definition_table(lines) + "\n")
    for dataset, mine in tables.by_dataset(lines).items():
        head = f"### {dataset}\n\n{tables.base_line(mine)}\n"
        parts.append(f"{head}\n{tables.training_table(mine)}\n")
    return "\n".join(parts), True


def _rank(chosen: Config, lines: Lines, path: Path) -> tuple[str, bool]:
    ranks, groups = chosen.rank_grid["ranks"], chosen.rank_grid.get("groups", 1)
    series: dict[str, Any] = {}
    rows, findings = [], []
    for dataset, mine in tables.by_dataset(lines).items():
        methods = tables.by_method(mine)
        means = {n: statistics.fmean(x["loss"] for x in runs) for n, runs in methods.items()}
        best, worst = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        findings.append(
            f"{dataset}: of {len(means)} points {best} has the lowest mean loss, "
            f"{means[best]:.4f}, {worst} the highest, {means[worst]:.4f}."
        )
        found = mean_regrets(mine, ranks, groups)
        if not found:
            findings.append(f"{dataset}: no grid is whole yet, so searches cannot be replayed.")
            continue
        series[dataset] = {name: (range(1, len(curve) + 1), curve) for name, curve in found.items()}
        for name, curve in found.items():
            after = [f"{curve[n - 1]:.4f}" for n in _trials(len(curve))]
            rows.append([dataset, name, *after])
    if not series:
        return _list(findings), False
    plots.curves(series, path, x="trials", y="mean regret, nats a token")
    most = max(len(curve) for named in series.values() for _, curve in named.values())
    header = ("data", "search", *(f"after {n}" for n in _trials(most)))
    return f"{_list(findings)}\n{markdown(header, rows)}\n", True


def _trials(most: int) -> list[int]:
    return [n for n in (1, 2, 4, 6, 8, 12, 16, 24, 36) if n <= most]


def _agreement(runs: Lines) -> tuple[list[float], list[float]]:
    sizes = list(runs[0]["agreement"])
    means = [statistics.fmean(run["agreement"][n]["tau"][0] for run in runs) for n in sizes]
    return [float(n) for n in sizes], means


def _definitions(lines: Lines) -> bool:
    return all(line["method"].startswith("definition:") for line in lines)


def _current(chosen: Config, line: Mapping[str, Any]) -> bool:
    labels = {data.label: chosen.setting(data) for data in chosen.datasets}
    return labels.get(line["dataset"]) == line["setting"] and line["method"] in chosen.methods


def _shared(lines: Lines, layers: Lines) -> list[Mapping[str, Any]]:
    settings = {(line["dataset"], line["setting"]) for line in lines}
    return [
        line for line in layers
        if (line["dataset"], line["setting"]) in settings
        and line["method"].startswith(COMPARED)
    ]  # fmt: skip


def _origin(lines: Lines) -> str:
    machines = dict.fromkeys(f"{x['machine']}, {x.get('threads', 0)} threads" for x in lines)
    commits = dict.fromkeys(line["commit"] for line in lines)
    hours = sum(line["wall_seconds"] for line in lines) / 3600
    return (
        f"{len(lines)} runs, {hours:.1f} h; {'; '.join(machines)}; commit {', '.join(commits)}.\n"
    )


def _list(findings: list[str]) -> str:
    return "".join(f"- {text}\n" for text in findings)
