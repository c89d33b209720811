"""Ratios of interleaved samples, and the spread that is stated with each.

The spread of a ratio is the 20 % and 80 % quantile of the ratios within single rounds, pooled over
epochs. An epoch draws and allocates everything anew, so what changes from one process to the next
(addresses, page placement, a neighbour's load) is sampled too, as far as one process can.
"""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.timing import Sample

#: Quiet rounds below which the disturbed ones count too.
FEWEST = 5
#: Share of the base's time below which an overhead is not told from noise.
LEAST_OVERHEAD = 0.01


class Spread(NamedTuple):
    """A median and the 20 % and 80 % quantiles around it."""

    median: float
    low: float
    high: float

    def overlaps(self, other: "Spread") -> bool:
        """Tell whether the two intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


def quantile(sorted_numbers: Sequence[float], q: float) -> float:
    """Return the q-quantile, interpolated."""
    place = q * (len(sorted_numbers) - 1)
    below = int(place)
    above = min(below + 1, len(sorted_numbers) - 1)
    weight = place - below
    return sorted_numbers[below] * (1 - weight) + sorted_numbers[above] * weight


def spread(numbers: Sequence[float]) -> Spread:
    """Return the median and the 20 % and 80 % quantiles."""
    ordered = sorted(numbers)
    return Spread(quantile(ordered, 0.5), quantile(ordered, 0.2), quantile(ordered, 0.8))


def quiet(*rows: Sequence[Sample]) -> list[tuple[float, ...]]:
    """Return the seconds, round by round, of the rounds in which no row was disturbed.

    Of all rounds, where fewer than :data:`FEWEST` were quiet.
    """
    rounds = list(zip(*rows, strict=True))
    calm = [r for r in rounds if all(s.quiet for s in r)]
    kept = calm if len(calm) >= FEWEST else rounds
    return [tuple(s.seconds for s in r) for r in kept]


def seconds(row: Sequence[Sample]) -> Spread:
    """Return the spread of one provider's own times."""
    return spread([s for (s,) in quiet(row)])


def ratio(numerator: Sequence[Sample], denominator: Sequence[Sample]) -> Spread:
    """Return the spread of the ratios round by round."""
    return spread([a / b for a, b in quiet(numerator, denominator)])


def overhead_ratio(
    ours: Sequence[Sample], peer: Sequence[Sample], base: Sequence[Sample]
) -> Spread | None:
    """Return (ours - base) / (peer - base), or None where the peer's overhead is lost in noise.

    The median is the ratio of the two median overheads; the quantiles are those of the rounds.
    """
    rounds = quiet(ours, peer, base)
    mine = [a / c - 1 for a, _, c in rounds]
    theirs = [b / c - 1 for _, b, c in rounds]
    if quantile(sorted(theirs), 0.2) < LEAST_OVERHEAD:
        return None
    within = spread([a / b for a, b in zip(mine, theirs, strict=True) if b > 0])
    middle = quantile(sorted(mine), 0.5) / quantile(sorted(theirs), 0.5)
    return Spread(middle, min(within.low, middle), max(within.high, middle))
