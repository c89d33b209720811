"""How far a ranking of layers can be trusted: would a second measurement give the same one?"""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from floe_kernels.allocation.arguments import finite, whole
from floe_kernels.allocation.units import best, keep_count

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


class Spread(NamedTuple):
    """A statistic over bootstrap draws."""

    mean: float
    low: float  #: its 5th percentile
    high: float  #: its 95th percentile


class Stability(NamedTuple):
    """Agreement of two measurements of the size at hand."""

    kendall_tau: Spread  #: of all scores; 1 = the same order, 0 = none
    overlap: Spread  #: fraction of the kept units that both keep
    corrected: Spread  #: overlap with chance taken out; 1 = the same set, 0 = chance
    samples: int
    units: int
    kept: int


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Measure how far two rankings agree: Kendall's tau-b, which corrects for ties.

    Args:
        a: L numbers.
        b: L numbers, of the same things in the same order.

    Returns:
        From -1 to 1; NaN if either has no two different numbers.

    Raises:
        ValueError: The lengths differ.

    Example:
        >>> kendall_tau([1, 2, 3, 4], [1, 2, 4, 3])
        0.6666666666666666
    """
    if len(a) != len(b):
        raise ValueError(f"rankings must be of the same length, got {len(a)} and {len(b)}")
    together = in_a = in_b = 0
    for i in range(len(a)):
        for j in range(i):
            da = (a[i] > a[j]) - (a[i] < a[j])
            db = (b[i] > b[j]) - (b[i] < b[j])
            together += da * db
            in_a += da * da
            in_b += db * db
    return together / math.sqrt(in_a * in_b) if in_a and in_b else math.nan


def corrected_overlap(a: Collection[int], b: Collection[int], units: int) -> float:
    """Measure how far two sets of K of L units agree beyond chance: (o - K/L) / (1 - K/L).

    Two random sets share the fraction K/L on average, so 80 % of the units overlap by 0.8 for
    nothing.

    Args:
        a: K units.
        b: K units.
        units: L, above K.

    Returns:
        1 for equal sets, about 0 for random ones; NaN if all units are kept or none is.

    Raises:
        ValueError: The sizes differ.

    Example:
        >>> corrected_overlap({0, 1}, {1, 2}, units=4)
        0.0
    """
    if len(a) != len(b):
        raise ValueError(f"sets must be of the same size, got {len(a)} and {len(b)}")
    if not 0 < len(a) < units:
        return math.nan
    chance = len(a) / units
    return (len(set(a) & set(b)) / len(a) - chance) / (1 - chance)


def stability(
    samples: Sequence[Mapping[str, float]],
    *,
    keep: float = 0.25,
    draws: int = 200,
    seed: int = 0,
) -> Stability:
    """Estimate by bootstrap whether as many fresh samples would rank the units the same way.

    Each draw resamples the samples twice, sums both, and compares the two rankings: this is the
    agreement of two independent measurements of this size, not of one with itself.

    Args:
        samples: For every sample, unit name -> its part of the score; the same names throughout.
        keep: Fraction kept, in (0, 1].
        draws: Bootstrap draws, at least 1.
        seed: Whole number of at least 0; the same seed gives the same report.

    Returns:
        The report; statistics that are undefined in a draw (all scores equal) are left out of it,
        and NaN if undefined in all.

    Raises:
        ValueError: There are fewer than 2 samples or units, names differ, or a score is not finite.

    Example:
        >>> report = stability([{"a": 1.0, "b": 9.0, "c": 2.0}] * 3, keep=0.34)
        >>> report.kendall_tau.mean, report.corrected.mean, report.kept
        (1.0, 1.0, 2)
    """
    if len(samples) < 2:
        raise ValueError(f"stability needs at least 2 samples, got {len(samples)}")
    names = list(samples[0])
    if len(names) < 2:
        raise ValueError(f"stability needs at least 2 units, got {len(names)}")
    for n, row in enumerate(samples):
        if row.keys() != samples[0].keys():
            raise ValueError(f"every sample must score the same units, sample {n} differs")
    columns = [[finite(row[name], f"a score of {name!r}") for row in samples] for name in names]
    K = keep_count(keep, len(names))
    draw = Random(whole(seed, "seed"))

    def measure() -> list[float]:
        picks = [int(draw.random() * len(samples)) for _ in samples]
        return [math.fsum(column[i] for i in picks) for column in columns]

    taus, overlaps, corrected = [], [], []
    for _ in range(whole(draws, "draws", least=1)):
        a, b = measure(), measure()
        kept_a, kept_b = best(a, K), best(b, K)
        taus.append(kendall_tau(a, b))
        overlaps.append(len(set(kept_a) & set(kept_b)) / K)
        corrected.append(corrected_overlap(kept_a, kept_b, len(names)))
    tau, overlap, beyond = (_spread(values) for values in (taus, overlaps, corrected))
    return Stability(tau, overlap, beyond, len(samples), len(names), K)


def _spread(values: list[float]) -> Spread:
    ordered = sorted(v for v in values if not math.isnan(v))
    if not ordered:
        return Spread(math.nan, math.nan, math.nan)
    last = len(ordered) - 1
    mean = math.fsum(ordered) / len(ordered)
    return Spread(mean, ordered[round(0.05 * last)], ordered[round(0.95 * last)])
