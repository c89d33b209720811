"""Plots of a results file: speed against T, against R with the crossover, and the roofline."""

import itertools
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]
#: One colour and marker a provider, the same in every plot.
STYLE = {
    "base": ("black", "none"),
    "ours": ("tab:red", "o"),
    "ours graphed": ("tab:red", "^"),
    "dense-cat": ("tab:blue", "s"),
    "dense-cat compiled": ("tab:cyan", "s"),
    "dense-cat by hand": ("tab:purple", "s"),
    "grouped_mm": ("tab:green", "D"),
    "ScatterMoE": ("tab:olive", "D"),
    "expert loop": ("tab:orange", "v"),
    "dense loop": ("tab:brown", "v"),
    "Arrow einsum": ("tab:pink", "x"),
}


def sweep(lines: Lines, prefix: str, dtype: str) -> Lines:
    """Return the right, timed lines of cases called PREFIX and a number, in one dtype."""
    return [
        line
        for line in lines
        if line["op"] == "moe_lora" and line["mode"] == "fwdbwd" and "over_base" in line
        and line["case"]["dtype"] == dtype and line["case"]["name"][: len(prefix)] == prefix
        and line["case"]["name"][len(prefix)].isdigit() and line["provider"] in STYLE
    ]  # fmt: skip


def against(axis: Any, lines: Lines, size: str) -> None:
    """Draw each provider's time over the base linear's, with its 20 to 80 % band."""
    from matplotlib import ticker

    for provider, (colour, marker) in STYLE.items():
        points = sorted(
            (line["case"][size], *line["over_base"])
            for line in lines
            if line["provider"] == provider
        )
        if not points:
            continue
        x, middle, low, high = zip(*points, strict=True)
        axis.plot(x, middle, color=colour, marker=marker, markersize=4, label=provider)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
    axis.set_ylabel("time / frozen linear alone")
    axis.grid(alpha=0.3, which="both")


def crossover(lines: Lines, first: str, second: str) -> float | None:
    """Return the R where ``second`` becomes faster than ``first``, between two measured ones."""
    ratio: dict[int, dict[str, float]] = {}
    for line in lines:
        ratio.setdefault(line["case"]["columns"], {})[line["provider"]] = line["over_base"][0]
    both = sorted(
        (r, t[first] / t[second]) for r, t in ratio.items() if {first, second} <= t.keys()
    )
    for (r0, q0), (r1, q1) in itertools.pairwise(both):
        if q0 <= 1 < q1:
            share = (1 - q0) / (q1 - q0)
            return float(r0 * (r1 / r0) ** share)
    return None


def roofline(axis: Any, lines: Lines) -> None:
    """Draw every right measurement under the machine's own measured roof."""
    timed = [
        line for line in lines
        if line.get("gbs") and line["status"] == "ok" and line["provider"] in STYLE
        and line["case"]["dtype"] == "bfloat16"
    ]  # fmt: skip
    if not timed:
        return
    flops = max(line["ceiling_gflops"] for line in timed)
    bandwidth = max(line["ceiling_gbs"] for line in timed)
    intensities = [line["gflops"] / line["gbs"] for line in timed]
    left, right = min(*intensities, flops / bandwidth) / 2, max(*intensities, flops / bandwidth) * 2
    axis.plot(
        [left, flops / bandwidth, right], [left * bandwidth, flops, flops], color="black",
        label=f"measured: {bandwidth:.0f} GB/s, {flops:.0f} GFLOP/s",
    )  # fmt: skip
    for provider, (colour, marker) in STYLE.items():
        mine = [line for line in timed if line["provider"] == provider]
        x = [line["gflops"] / line["gbs"] for line in mine]
        y = [line["gflops"] for line in mine]
        if mine and marker != "none":
            axis.scatter(x, y, color=colour, marker=marker, s=14, label=provider)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("least FLOPs / least bytes")
    axis.set_ylabel("least GFLOPs / second")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)


def draw(lines: Lines, folder: Path) -> list[Path]:
    """Write the plots that the lines hold data for; return their files."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install floe-kernels[bench]") from error
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "floe"  # the same data gives the same file
    device = lines[0]["device"]
    where = f"{lines[0]['machine']}, {lines[0].get('threads', lines[0]['cores'])} cores"
    written = []

    def save(figure: Any, name: str) -> None:
        path = folder / f"{name}-{device}.svg"
        figure.suptitle(where, fontsize=8)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
        written.append(path)

    for name, prefix, size, label in (
        ("speed-against-T", "T", "tokens", "tokens T (1024x1024, E=8, r=16, k=2)"),
        ("speed-against-R", "R", "columns", "packed columns R (1024x1024, T=1024, k=2)"),
    ):
        dtypes = [d for d in ("bfloat16", "float32") if sweep(lines, prefix, d)]
        if not dtypes:
            continue
        shape = (1.6 + 4.6 * len(dtypes), 4.0)
        figure, axes = plt.subplots(1, len(dtypes), figsize=shape, squeeze=False)
        for axis, dtype in zip(axes[0], dtypes, strict=True):
            chosen = sweep(lines, prefix, dtype)
            against(axis, chosen, size)
            axis.set_xlabel(label)
            axis.set_title(dtype)
            turn = crossover(chosen, "dense-cat", "grouped_mm") if size == "columns" else None
            if turn:
                axis.axvline(turn, color="grey", linestyle=":")
                words = f"grouped_mm passes \ndense-cat at R = {turn:.0f} "
                axis.text(turn, axis.get_ylim()[1], words, fontsize=7, va="top", ha="right")
        axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))  # beside it
        save(figure, name)
    figure, axis = plt.subplots(figsize=(6, 4.5))
    roofline(axis, lines)
    if axis.has_data():
        save(figure, "roofline")
    return written
