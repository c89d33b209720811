"""Ratios of interleaved samples, and the spread that is stated with each.

An epoch draws and allocates everything anew, and a run comes back to a case minutes later, so what
changes from one process or one minute to the next (addresses, page placement, a neighbour's load)
is sampled too. The spread of a ratio runs from the 20 % to the 80 % quantile of the ratios within
single rounds, widened where needed to hold the median of every epoch, and then by what changes
from one process to the next: all epochs of a run share that, so no run can see it in itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.timing import DISTURBED, Sample

#: Rounds below which the calmest half of all counts instead of the quiet ones.
FEWEST = 5
#: Share of the base's time below which an overhead is not told from noise.
LEAST_OVERHEAD = 0.01
#: By how much a provider's time moves against another's from process to process (where memory lies,
#: what a compiler chose), as a share of it: measured by running the same commit again.
PROCESS = 0.02


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


def calm(*rows: Sequence[Sample]) -> list[tuple[Sample, ...]]:
    """Return the rounds in which no row was disturbed; the calmest half, if those are fewer."""
    rounds = sorted(zip(*rows, strict=True), key=disturbance)
    undisturbed = sum(disturbance(r) <= DISTURBED for r in rounds)
    return rounds[: max(undisturbed, -(-len(rounds) // 2), min(FEWEST, len(rounds)))]


def disturbance(samples: Sequence[Sample]) -> float:
    """Return the largest share of waiting among a round's samples."""
    return max(s.waited for s in samples)


def over_epochs(numbers: Sequence[float], epochs: Sequence[int]) -> Spread:
    """Return the median and quantiles of all, widened to hold every epoch's median."""
    everything = spread(numbers)
    medians = [
        spread([n for n, e in zip(numbers, epochs, strict=True) if e == epoch]).median
        for epoch in set(epochs)
    ]
    low, high = min(everything.low, *medians), max(everything.high, *medians)
    return Spread(everything.median, low, high)


def seconds(row: Sequence[Sample]) -> Spread:
    """Return the spread of one provider's own times: median and 20 % and 80 % quantiles."""
    return spread([s.seconds for (s,) in calm(row)])


def ratio(numerator: Sequence[Sample], denominator: Sequence[Sample]) -> Spread:
    """Return the spread of the ratios round by round."""
    rounds = calm(numerator, denominator)
    found = over_epochs([a.seconds / b.seconds for a, b in rounds], [a.epoch for a, _ in rounds])
    return Spread(found.median, found.low * (1 - PROCESS), found.high * (1 + PROCESS))


def overhead_ratio(
    ours: Sequence[Sample], peer: Sequence[Sample], base: Sequence[Sample]
) -> Spread | None:
    """Return (ours - base) / (peer - base), or None where the peer's overhead is lost in noise.

    The median is the ratio of the two median overheads; the spread is that of the rounds' ratios.
    """
    rounds = calm(ours, peer, base)
    mine = [a.seconds / c.seconds - 1 for a, _, c in rounds]
    theirs = [b.seconds / c.seconds - 1 for _, b, c in rounds]
    if spread(theirs).low < LEAST_OVERHEAD:
        return None
    kept = [(m / t, r[0].epoch) for m, t, r in zip(mine, theirs, rounds, strict=True) if t > 0]
    within = over_epochs([q for q, _ in kept], [e for _, e in kept])
    middle = spread(mine).median / spread(theirs).median
    moved = PROCESS * (1 + spread(mine).median) / spread(theirs).median
    return Spread(middle, min(within.low, middle) - moved, max(within.high, middle) + moved)
