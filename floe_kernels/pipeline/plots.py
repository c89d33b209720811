"""A run's plots, as SVG that goes into a page."""

import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

KEPT, LEFT, INK = "#0b6e4f", "#c9d3cf", "#333333"
LINES = ("#0b6e4f", "#3c5a99", "#c2571a", "#7a7a7a", "#8e44ad")
STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


def check_matplotlib() -> None:
    """Make sure that plots can be drawn.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a report's plots need matplotlib: pip install floe-kernels[cli]"
        ) from error


def importance_plot(scores: Mapping[str, float], kept: Sequence[str], title: str) -> str:
    """Draw a bar for every layer's score, those kept in colour and marked.

    Args:
        scores: Layer -> score, in model order.
        kept: The layers that got experts.
        title: What the score is.

    Returns:
        An ``<svg>`` element.
    """
    with figure((7.2, 2.8), "importance") as drawing:
        axes = drawing.axes
        chosen = [name in set(kept) for name in scores]
        places = range(len(scores))
        axes.bar(places, scores.values(), color=[KEPT if c else LEFT for c in chosen], width=0.8)
        top = max(scores.values(), default=0.0) or 1.0
        marked = [(i, value) for i, value in enumerate(scores.values()) if chosen[i]]
        axes.plot(
            [i for i, _ in marked], [value + 0.04 * top for _, value in marked],
            linestyle="none", marker="v", markersize=5, color=KEPT, label="kept",
        )  # fmt: skip
        axes.set_ylim(0, 1.14 * top)
        axes.set_xlim(-0.7, len(scores) - 0.3)
        every = max(1, -(-len(scores) // 16))
        axes.set_xticks(list(places)[::every], [str(i) for i in places][::every])
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("layer")
        axes.set_ylabel(title)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        if marked:
            axes.legend(loc="upper right")
    return drawing.svg


def search_plot(trials: Sequence[Mapping[str, Any]], best: int) -> str:
    """Draw the loss of every trial over its rank, numbered in the order of trying.

    Args:
        trials: With ``number``, ``rank``, ``loss`` and ``state``.
        best: The rank that was chosen.

    Returns:
        An ``<svg>`` element.
    """
    with figure((7.2, 2.8), "search") as drawing:
        axes = drawing.axes
        complete = [t for t in trials if t["state"] == "complete" and t["loss"] is not None]
        ranks = sorted({t["rank"] for t in trials})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(r) for r in ranks])
        axes.minorticks_off()
        ordered = sorted(complete, key=lambda t: t["rank"])
        axes.plot([t["rank"] for t in ordered], [t["loss"] for t in ordered], color=LEFT)
        for t in complete:
            chosen = t["rank"] == best
            axes.plot(t["rank"], t["loss"], "o", markersize=8, color=KEPT if chosen else LINES[1])
            axes.annotate(
                str(t["number"] + 1), (t["rank"], t["loss"]), (6, 6), textcoords="offset points"
            )
        for t in trials:
            reports = t.get("reports") or []
            if t["state"] == "pruned" and reports:
                axes.plot(t["rank"], reports[-1][1], "x", markersize=7, color=LINES[2])
        axes.set_xlabel("rank (points are numbered in the order of trying; x: pruned)")
        axes.set_ylabel("loss of the trial")
    return drawing.svg


def front_plot(trials: Sequence[Mapping[str, Any]], front: Collection[int]) -> str:
    """Draw the loss of every trial over its parameters, and the front that nothing beats.

    Args:
        trials: With ``number``, ``parameters``, ``loss`` and ``state``.
        front: Numbers of the trials on the Pareto front; may be none.

    Returns:
        An ``<svg>`` element.
    """
    with figure((7.2, 3.0), "front") as drawing:
        axes = drawing.axes
        known = [t for t in trials if t["state"] == "complete" and t["loss"] is not None]
        best = sorted((t for t in known if t["number"] in front), key=lambda t: t["parameters"])
        axes.step(
            [t["parameters"] for t in best], [t["loss"] for t in best],
            where="post", color=KEPT, linewidth=1.2, label="Pareto front",
        )  # fmt: skip
        for t in known:
            color = KEPT if t["number"] in front else LINES[1]
            axes.plot(t["parameters"], t["loss"], "o", markersize=7, color=color)
            at = (t["parameters"], t["loss"])
            axes.annotate(str(t["number"] + 1), at, (6, 6), textcoords="offset points")
        axes.set_xlabel("trainable parameters (points are numbered in the order of trying)")
        axes.set_ylabel("loss of the trial")
        if best:
            axes.legend()
    return drawing.svg


def loss_plot(
    steps: Mapping[str, Sequence[Mapping[str, Any]]],
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]],
    base: float | None,
) -> str:
    """Draw training losses as lines and held-out losses as points.

    Args:
        steps: Title -> lines with ``step`` and ``loss``.
        evaluations: Title -> lines with ``step`` and ``loss``.
        base: Held-out loss of the model without adapters.

    Returns:
        An ``<svg>`` element.
    """
    with figure((7.2, 3.2), "losses") as drawing:
        axes = drawing.axes
        for i, (title, lines) in enumerate(steps.items()):
            color = LINES[i % len(LINES)]
            x = [line["step"] for line in lines]
            axes.plot(x, [line["loss"] for line in lines], color=color, linewidth=1.2, label=title)
            held_out = evaluations.get(title, [])
            axes.plot(
                [line["step"] for line in held_out], [line["loss"] for line in held_out],
                "D", color=color, markersize=6,
            )  # fmt: skip
        if base is not None:
            axes.axhline(base, color=INK, linewidth=1, linestyle="--", label="base, held out")
        axes.set_xlabel("step (lines: training; diamonds: held out)")
        axes.set_ylabel("loss, nats a token")
        if steps or base is not None:
            axes.legend()
    return drawing.svg


class figure:
    """A figure with one set of axes, or several side by side, rendered when the block ends."""

    def __init__(
        self, size: tuple[float, float], name: str, widths: Sequence[float] = (1,)
    ) -> None:
        check_matplotlib()
        self.size, self.name, self.widths, self.svg = size, name, widths, ""

    def __enter__(self) -> "figure":
        import matplotlib
        from matplotlib.figure import Figure

        style: Any = {**STYLE, "svg.hashsalt": self.name}  # equal runs give equal files
        self._style = matplotlib.rc_context(style)
        self._style.__enter__()
        self.canvas: Any = Figure(figsize=self.size, layout="constrained")
        ratios = {"width_ratios": list(self.widths)}
        grid = self.canvas.subplots(1, len(self.widths), squeeze=False, gridspec_kw=ratios)
        self.all_axes: list[Any] = list(grid[0])
        self.axes: Any = self.all_axes[0]
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                file = io.StringIO()
                nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
                self.canvas.savefig(file, format="svg", metadata=nothing)
                self.svg = _inline(file.getvalue(), self.name)
        finally:
            self._style.__exit__(None, None, None)


def _inline(svg: str, name: str) -> str:
    """Cut a file's head off, and make its ids differ from those of other plots on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
