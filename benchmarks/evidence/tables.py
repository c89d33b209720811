"""Tables and findings of an experiment, read off its lines alone."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.config import Config
from benchmarks.evidence.intervals import (
    binomial_interval,
    means_by,
    paired,
    t_interval,
)
from benchmarks.report import markdown
from floe_kernels.allocation import corrected_overlap, kendall_tau

Lines = Sequence[Mapping[str, Any]]
GOAL = 0.93  # of the gain, with a quarter of the layers
ALL, RANDOM, MATRICES = "all", ("random:", "budget:random/"), "random:matrices"


def by_dataset(lines: Lines) -> dict[str, list[Mapping[str, Any]]]:
    """Group lines by data set, in the order they came."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["dataset"], []).append(line)
    return groups


def by_method(lines: Lines) -> dict[str, list[Mapping[str, Any]]]:
    """Group one data set's lines by method, in the order they came."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["method"], []).append(line)
    return groups


def retained(method: Lines, everything: Lines) -> dict[int, float]:
    """Return seed -> (base - method) / (base - all), for seeds of which both are there.

    Args:
        method: Lines of one method on one data set.
        everything: Lines of all layers on it.
    """
    gains = {line["seed"]: line["base_loss"] - line["loss"] for line in everything}
    return {
        line["seed"]: (line["base_loss"] - line["loss"]) / gains[line["seed"]]
        for line in method
        if gains.get(line["seed"], 0) > 0
    }


def best_random(methods: Mapping[str, Lines]) -> str:
    """Return the random draw of lowest mean loss; empty where none was run.

    Matrices drawn by chance are a control of their own, for those who choose matrices.
    """
    drawn = [name for name in methods if name.startswith(RANDOM) and name != MATRICES]
    return min(drawn, key=lambda name: _mean(methods[name], "loss"), default="")


def training_table(lines: Lines) -> str:
    """Return one data set's methods, by the gain they retain, with what they cost."""
    methods = by_method(lines)
    everything, best = methods.get(ALL, []), best_random(methods)
    control = means_by(methods[best], "loss") if best else {}
    rows = []
    for name, mine in methods.items():
        shares = list(retained(mine, everything).values())
        below = paired(control, means_by(mine, "loss")) if best and name != best else None
        rows.append((
            _mean(mine, "loss"),
            [
                name,
                str(len(mine)),
                t_interval([line["loss"] for line in mine]).text(4),
                t_interval(shares).text() if shares else "",
                below.text(4) if below else "",
                _accuracy(mine, "accuracy"),
                _accuracy(mine, "accuracy_by_token"),
                _layers(mine),
                f"{_mean(mine, 'parameters') / 1e6:.2f}",
                _seconds(mine),
                f"{max((line['peak_bytes'] or 0) for line in mine) / 1e9:.2f}",
            ],
        ))  # fmt: skip
    header = (
        "method", "seeds", "held-out loss", "gain retained", "below best random", "accuracy, %",
        "by token, %", "layers", "million trained", "CPU s", "peak GB",
    )  # fmt: skip
    return markdown(header, [row for _, row in sorted(rows, key=lambda pair: pair[0])])


def training_findings(lines: Lines) -> list[str]:
    """Say of each data set who retains how much, and who beats chance outside its interval."""
    found = []
    for dataset, mine in by_dataset(lines).items():
        methods = by_method(mine)
        best = best_random(methods)
        others = {name: rows for name, rows in methods.items() if name not in (ALL, best)}
        others = {name: rows for name, rows in others.items() if not name.startswith(RANDOM)}
        if not best or not others:
            found.append(f"{dataset}: too few methods are done to say anything.")
            continue
        control = means_by(methods[best], "loss")
        gaps = {name: paired(control, means_by(rows, "loss")) for name, rows in others.items()}
        beats = [name for name, gap in gaps.items() if gap and gap.low is not None and gap.low > 0]
        loses = [
            name for name, gap in gaps.items() if gap and gap.high is not None and gap.high < 0
        ]
        winner = min(others, key=lambda name: _mean(others[name], "loss"))
        text = f"{dataset}: lowest loss by {winner} ({_mean(others[winner], 'loss'):.4f})"
        shares = retained(others[winner], methods.get(ALL, []))
        if shares:
            text += f", {t_interval(list(shares.values())).text(2)} of the gain"
        draws = sum(name.startswith(RANDOM) and name != MATRICES for name in methods)
        text += f"; the best of {draws} random draws, {best}, "
        text += f"has {_mean(methods[best], 'loss'):.4f}. "
        text += f"Better than it beyond chance: {', '.join(beats) or 'none'}; "
        text += f"worse: {', '.join(loses) or 'none'}."
        if all(gap is None or gap.low is None for gap in gaps.values()):
            text += " One seed has no interval: nothing is beyond chance yet."
        for name in (n for n in others if n.startswith("matrices:") and MATRICES in methods):
            gap = paired(means_by(methods[MATRICES], "loss"), means_by(others[name], "loss"))
            if gap:
                text += f" {name} is below matrices drawn by chance by {gap.text(4)}."
        found.append(text)
    return found


def goal_findings(lines: Lines) -> list[str]:
    """Say which methods meet the goal on two data sets or more."""
    met: dict[str, list[str]] = {}
    judged = 0
    for dataset, mine in by_dataset(lines).items():
        methods = by_method(mine)
        best = best_random(methods)
        for name, rows in methods.items():
            shares = list(retained(rows, methods.get(ALL, [])).values())
            if name == ALL or name.startswith(RANDOM) or not (shares and best):
                continue
            gap = paired(means_by(methods[best], "loss"), means_by(rows, "loss"))
            judged += gap is not None and gap.low is not None
            beats = gap is not None and gap.low is not None and gap.low > 0
            if beats and t_interval(shares).mean >= GOAL:
                met.setdefault(name, []).append(dataset)
    twice = [f"{name} ({', '.join(where)})" for name, where in met.items() if len(where) > 1]
    goal = f"{GOAL} of the gain with a quarter, and better than the best random draw beyond chance"
    if not judged:
        return [f"The goal ({goal}, on two data sets or more) cannot be judged yet."]
    found = f"The goal ({goal}, on two data sets or more) is met by: {', '.join(twice) or 'none'}."
    return [f"{found} {judged} comparisons were made, of which one in forty passes by chance."]


def definition_table(lines: Lines) -> str:
    """Compare which layers each definition chooses: tau of all scores, overlap of the kept."""
    rows = []
    for dataset, mine in by_dataset(lines).items():
        methods = by_method(mine)
        names = [name for name in methods if name.startswith("definition:")]
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                pairs = _same_seed(methods[a], methods[b])
                if not pairs:
                    continue
                taus = [kendall_tau(*_columns(x["scores"], y["scores"])) for x, y in pairs]
                overlaps = [
                    corrected_overlap(set(x["layers"]), set(y["layers"]), len(x["scores"]))
                    for x, y in pairs
                ]
                gap = paired(means_by(methods[b], "loss"), means_by(methods[a], "loss"))
                rows.append([
                    dataset, a.partition(":")[2], b.partition(":")[2],
                    t_interval(taus).text(2), t_interval(overlaps).text(2),
                    gap.text(4) if gap else "",
                ])  # fmt: skip
    header = ("data", "first", "second", "Kendall's tau", "overlap beyond chance", "first below")
    return markdown(header, rows)


def stability_table(lines: Lines) -> str:
    """Return Kendall's tau between disjoint sets of samples, by their size."""
    sizes = list(dict.fromkeys(n for line in lines for n in line["agreement"]))
    rows = []
    for dataset, mine in by_dataset(lines).items():
        for name, runs in by_method(mine).items():
            cells = []
            for size in sizes:
                parts = [run["agreement"][size] for run in runs if size in run["agreement"]]
                tau = statistics.fmean(p["tau"][0] for p in parts) if parts else None
                kept = statistics.fmean(p["corrected"][0] for p in parts) if parts else None
                cells.append("" if tau is None else f"{tau:.2f} / {kept:.2f}")
            rows.append([dataset, name.partition(":")[2], str(len(runs)), *cells])
    return markdown(("data", "score", "seeds", *(f"{n} samples" for n in sizes)), rows)


def stability_findings(lines: Lines, enough: float = 0.8) -> list[str]:
    """Say how many samples give a choice that other samples repeat."""
    found = []
    for dataset, mine in by_dataset(lines).items():
        for name, runs in by_method(mine).items():
            least = [
                int(size)
                for size in runs[0]["agreement"]
                if all(run["agreement"][size]["corrected"][0] >= enough for run in runs)
            ]
            most = max(map(int, runs[0]["agreement"]))
            words = f"{min(least)} samples are enough" if least else f"{most} are not enough"
            found.append(
                f"{dataset}, {name.partition(':')[2]}: {words} for an overlap of the kept layers "
                f"of {enough} beyond chance."
            )
    return found


def missing(config: Config, lines: Lines) -> str:
    """Say which runs have no line; empty where all are there."""
    present = {(line["dataset"], line["method"], line["seed"]) for line in lines}
    absent = [key for key in config.runs() if (key.dataset, key.method, key.seed) not in present]
    if not absent:
        return ""
    if len(absent) == len(config.runs()):
        return f"No line yet: all {len(absent)} runs are missing."
    methods = list(dict.fromkeys(key.method for key in absent))
    shown = ", ".join(methods[:6]) + (" and others" if len(methods) > 6 else "")
    return f"Missing: {len(absent)} of {len(config.runs())} runs ({shown})."


def _same_seed(a: Lines, b: Lines) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    others = {line["seed"]: line for line in b}
    return [(line, others[line["seed"]]) for line in a if line["seed"] in others]


def _columns(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[list[float], list[float]]:
    return list(a.values()), [b[name] for name in a]


def _mean(lines: Lines, name: str) -> float:
    return statistics.fmean(line[name] for line in lines)


def _seconds(lines: Lines) -> str:
    found = means_by(lines, "cpu_seconds").values()
    return f"{statistics.fmean(found):.0f}" if found else ""


def _accuracy(lines: Lines, name: str) -> str:
    values = [100 * value for value in means_by(lines, name).values()]
    return t_interval(values).text(1) if values else ""


def _layers(lines: Lines) -> str:
    chosen = {tuple(line["layers"]) for line in lines}
    if len(chosen) > 1:
        return f"{_mean([{'n': len(c)} for c in chosen], 'n'):.0f}, {len(chosen)} different sets"
    layers = next(iter(chosen))
    return "all" if len(layers) == len(lines[0]["experts_by_layer"]) else _ranges(layers)


def _ranges(layers: Sequence[int]) -> str:
    """Write 0, 1, 2, 7 as 0-2, 7."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts)


def base_line(lines: Lines) -> str:
    """Say what the model without adapters does on one data set."""
    line = lines[0]
    text = f"Without adapters: loss {line['base_loss']:.4f} over {line['tokens']} tokens"
    share = line.get("base_accuracy")
    if share is None:
        return text + "."
    _, low, high, _ = binomial_interval(share, line["questions"])
    right = f"{100 * share:.1f} % of {line['questions']} questions right"
    return f"{text}, {right} ({100 * (low or 0):.1f} to {100 * (high or 0):.1f})."
