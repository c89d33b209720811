"""Plots of a model's layers in a row or in a grid: where experts are."""

from collections.abc import Mapping, Sequence

from floe_kernels.allocation import Plan
from floe_kernels.pipeline.picture import picture
from floe_kernels.pipeline.plots import INK, KEPT, LINES, figure


def plan_plot(plan: Plan) -> str:
    """Draw the experts of every linear: layers from left to right, kinds of linears below.

    Args:
        plan: Any plan.

    Returns:
        An ``<svg>`` element.
    """
    drawn = picture(plan)
    grid = [[row[k] or 0 for row in drawn.experts] for k in range(len(drawn.kinds))]
    with figure((7.2, 0.7 + 0.26 * len(grid)), "plan") as drawing:
        axes = drawing.axes
        _heat(drawing, axes, grid, "experts")
        axes.set_yticks(range(len(grid)), drawn.kinds)
        _layer_ticks(axes, len(drawn.layers))
    return drawing.svg


def choice_plot(
    experts: Mapping[str, Sequence[float]], losses: Mapping[str, Sequence[float]]
) -> str:
    """Draw the layers that each method chose, and beside them what it reached.

    Args:
        experts: Method -> experts of each layer.
        losses: Method -> held-out losses, seed by seed.

    Returns:
        An ``<svg>`` element.
    """
    titles = list(experts)
    with figure((7.2, 1.0 + 0.3 * len(titles)), "choice", widths=(5, 2)) as drawing:
        left, right = drawing.all_axes
        _heat(drawing, left, [list(experts[title]) for title in titles], "experts")
        left.set_yticks(range(len(titles)), titles)
        _layer_ticks(left, max(len(row) for row in experts.values()))
        for i, title in enumerate(titles):
            found = losses[title]
            right.plot(found, [i] * len(found), "o", color=LINES[1], markersize=4, alpha=0.7)
            mean = sum(found) / len(found)
            right.plot([mean, mean], [i - 0.3, i + 0.3], color=KEPT, linewidth=2)
        right.set_ylim(left.get_ylim())
        right.set_yticks(range(len(titles)), [""] * len(titles))
        right.tick_params(axis="x", labelrotation=45)
        right.set_xlabel("held-out loss")
    return drawing.svg


def _heat(drawing: figure, axes: object, grid: Sequence[Sequence[float]], what: str) -> None:
    """Colour a grid from white (none) to green (the most)."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("experts", ["#ffffff", "#9fc7b6", KEPT, "#052e21"])
    top = max((value for row in grid for value in row), default=0) or 1
    mesh = axes.pcolormesh(  # type: ignore[attr-defined]  # a mesh stays vectors, an image does not
        range(len(grid[0])), range(len(grid)), grid,
        cmap=colors, vmin=0, vmax=top, edgecolors="#e6e6e6", linewidth=0.5, shading="nearest",
    )  # fmt: skip
    axes.invert_yaxis()  # type: ignore[attr-defined]
    axes.grid(visible=False)  # type: ignore[attr-defined]
    bar = drawing.canvas.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(what, color=INK)
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(False)


def _layer_ticks(axes: object, count: int) -> None:
    every = max(1, -(-count // 10))
    axes.set_xticks(list(range(count))[::every])  # type: ignore[attr-defined]
    axes.set_xlabel("layer")  # type: ignore[attr-defined]
