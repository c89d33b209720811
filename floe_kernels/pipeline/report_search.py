"""The report's section on the search: its trials, the front, and how good its sampler was."""

from collections.abc import Mapping
from typing import Any

from floe_kernels.pipeline.plots import front_plot, search_plot
from floe_kernels.pipeline.report_page import paragraph, section, table
from floe_kernels.pipeline.runs import Run

ENDS = {
    "n_trials": "that was the number asked for",
    "exhausted": "every point had been tried",
    "patience": "there was no more progress",
    "time": "the time was up",
}


def search_section(run: Run) -> str:
    """Return the section; nothing if there was no search.

    Args:
        run: The run.
    """
    trials, found = run.history.of("trial"), run.state.get("search")
    if not trials or not found:
        return ""
    front, config = set(found.get("front", [])), found.get("config", {"rank": found["rank"]})
    if list(config) == ["rank"] and not front:
        plot = search_plot(trials, found["rank"])
    else:
        plot = front_plot(trials, front)
    names = list(config)
    rows = [
        (
            str(t["number"] + 1),
            *(str(t["params"].get(name)) for name in names),
            t["state"],
            "-" if t["loss"] is None else f"{t['loss']:.4f}",
            f"{t.get('parameters', 0):,}" if t.get("parameters") else "-",
            "-" if t.get("duration") is None else f"{t['duration']:.1f}",
            *(["yes" if t["number"] in front else ""] if front else []),
        )
        for t in trials
    ]
    headings = ("trial", *names, "state", "loss", "trainable parameters", "seconds")
    return section(
        "Search",
        plot,
        *map(paragraph, search_words(found)),
        table((*headings, *(["on the front"] if front else [])), rows, numbers=len(names) + 2),
    )


def search_words(found: Mapping[str, Any]) -> list[str]:
    """Say what a search did and what came out.

    Args:
        found: The phase ``search`` of a run's state.
    """
    config = found.get("config", {"rank": found["rank"]})
    chosen = ", ".join(f"{name} {value}" for name, value in config.items())
    adapted = "The best layers by score were" if "keep" in config else "All layers were"
    lines = [
        f"{adapted} adapted, and the samples that judged a trial belong to the training "
        f"data. The search ended after {found['completed']} complete trials and "
        f"{found['seconds']:.0f} s, because {ENDS.get(found['stopped'], found['stopped'])}; "
        f"chosen: {chosen}."
    ]
    if found.get("front"):
        lines.append(
            f"{len(found['front'])} trials are on the Pareto front: no other one has both a lower "
            "loss and fewer parameters. The lowest loss was taken."
        )
    if found.get("judged"):
        words = ", ".join(f"{name} {mean:.1f}" for name, mean in found["judged"].items())
        lines.append(
            "The whole grid was tried, so the samplers can be judged by it: trials until the best "
            f"point was met, replayed on these losses from three seeds, on average: {words}."
        )
    return lines
