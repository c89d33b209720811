"""Ratios of interleaved samples, and the spread that is stated with each.

The spread of a ratio is the 20 % and 80 % quantile of the ratios within single rounds, pooled over
epochs. An epoch draws and allocates everything anew, so what changes from one process to the next
(addresses, page placement, a neighbour's load) is sampled too, as far as one process can.
"""

from collections.abc import Sequence
from typing import NamedTuple


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


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Return the spread of the ratios round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def overhead_ratio(
    ours: Sequence[float], peer: Sequence[float], base: Sequence[float]
) -> Spread | None:
    """Return (ours - base) / (peer - base), or None where the peer's overhead is lost in noise.

    The median is the ratio of the two median overheads; the quantiles are those of the rounds.
    """
    mine = [(a - c) / c for a, c in zip(ours, base, strict=True)]
    theirs = [(b - c) / c for b, c in zip(peer, base, strict=True)]
    if quantile(sorted(theirs), 0.2) < 0.01:
        return None
    rounds = spread([a / b for a, b in zip(mine, theirs, strict=True) if b > 0])
    middle = quantile(sorted(mine), 0.5) / quantile(sorted(theirs), 0.5)
    return Spread(middle, min(rounds.low, middle), max(rounds.high, middle))
