"""Plots of an experiment's lines, one file each; the same lines give the same file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.intervals import means_by, t_interval
from benchmarks.evidence.tables import RANDOM, Lines, by_dataset, by_method


def pyplot() -> Any:
    """Return matplotlib's pyplot, made to draw SVG."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install floe-kernels[bench]") from error
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "floe"
    return plt


def losses(lines: Lines, path: Path) -> None:
    """Draw every method's held-out loss with its 95 % interval, a panel a data set."""
    plt, groups = pyplot(), by_dataset(lines)
    most = max(len(by_method(mine)) for mine in groups.values())
    size = (4.6 * len(groups), 1.2 + 0.24 * most)
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False)
    for axis, (dataset, mine) in zip(axes[0], groups.items(), strict=True):
        found = {
            name: t_interval(list(means_by(rows, "loss").values()))
            for name, rows in by_method(mine).items()
        }
        order = sorted(found, key=lambda name: -found[name].mean)
        for y, name in enumerate(order):
            mean, low, high, _ = found[name]
            colour = "tab:grey" if name.startswith(RANDOM) else "tab:blue"
            if low is not None and high is not None:
                axis.plot([low, high], [y, y], color=colour, linewidth=1)
            axis.plot([mean], [y], "o", color="black" if name == "all" else colour, markersize=4)
        axis.set_yticks(range(len(order)), order, fontsize=7)
        axis.set_title(dataset, fontsize=9)
        axis.set_xlabel("held-out loss, nats a token", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(alpha=0.3)
    _save(plt, figure, path)


def curves(
    series: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: Path,
    *,
    x: str,
    y: str,
    logarithmic: bool = False,
) -> None:
    """Draw lines, a panel a data set.

    Args:
        series: Data set -> name -> abscissae and ordinates.
        path: The file.
        x: What the abscissa is.
        y: What the ordinate is.
        logarithmic: Whether the abscissa's axis is.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, len(series), figsize=(4.2 * len(series), 3.2), squeeze=False)
    for axis, (dataset, named) in zip(axes[0], series.items(), strict=True):
        for name, (xs, ys) in named.items():
            axis.plot(xs, ys, marker="o", markersize=3, label=name)
        if logarithmic:
            axis.set_xscale("log", base=2)
        axis.set_title(dataset, fontsize=9)
        axis.set_xlabel(x, fontsize=8)
        axis.set_ylabel(y, fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
