"""A plan as a picture: a row for every layer, a column for every kind of linear."""

from typing import NamedTuple

from floe_kernels.allocation import Plan

BLOCKS = " ▏▎▍▌▋▊▉█"
LEVELS = "·▁▂▃▄▅▆▇█"


class Picture(NamedTuple):
    """How many experts are where.

    Attributes:
        layers: Names of the model's layers, in order.
        kinds: Kinds of linears, such as ``q_proj``, in order.
        experts: One row a layer: experts of each kind; None where the layer has no such linear.
        ranks: One row a layer: the ranks of its experts, ascending, each once.
    """

    layers: list[str]
    kinds: list[str]
    experts: list[list[int | None]]
    ranks: list[list[int]]

    def means(self) -> list[float]:
        """Return every layer's experts, averaged over its linears."""
        rows = [[n for n in row if n is not None] for row in self.experts]
        return [sum(row) / len(row) for row in rows]


def picture(plan: Plan) -> Picture:
    """Lay a plan out.

    Args:
        plan: Any plan.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> from floe_kernels.allocation import mola
        >>> model = {f"h.{i}.{n}": ModuleSpec(8, 8, f"h.{i}") for i in range(4) for n in "qk"}
        >>> picture(mola(model, "2-0-6-8")).experts
        [[2, 2], [0, 0], [6, 6], [8, 8]]
    """
    layers = list(dict.fromkeys(spec.layer for spec in plan.modules.values()))
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in plan.modules))
    experts: list[list[int | None]] = [[None] * len(kinds) for _ in layers]
    ranks: list[set[int]] = [set() for _ in layers]
    for name, spec in plan.modules.items():
        row, column = layers.index(spec.layer), kinds.index(name.rpartition(".")[2])
        placement = plan.placements.get(name)
        before = experts[row][column] or 0  # several linears of a layer may end alike
        experts[row][column] = before + (placement.experts if placement else 0)
        ranks[row] |= set(placement.ranks if placement else ())
    return Picture(layers, kinds, experts, [sorted(found) for found in ranks])


def bar(value: float, top: float, width: int = 16) -> str:
    """Draw a bar of at most ``width`` characters, in eighths of one.

    Example:
        >>> bar(3, 6, width=4), bar(0, 6)
        ('██', '')
    """
    eighths = round(8 * width * value / top) if top > 0 else 0
    whole, rest = divmod(max(eighths, 1 if value > 0 else 0), 8)
    return "█" * whole + (BLOCKS[rest] if rest else "")


def strip(values: list[float], top: float) -> str:
    """Draw one character a value: a dot for nothing, a full block for ``top``.

    Example:
        >>> strip([0, 1, 4, 8], top=8)
        '·▁▄█'
    """
    last = len(LEVELS) - 1
    return "".join(
        LEVELS[min(last, max(1, round(last * v / top)))] if v > 0 and top > 0 else LEVELS[0]
        for v in values
    )
