"""What a handful of runs can tell: confidence intervals, paired gains, agreement of rankings."""

import math
import statistics
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from floe_kernels.allocation import corrected_overlap, kendall_tau
from floe_kernels.allocation.units import best, keep_count

LEVEL = 0.95
#: Student's t for 95 %, two sided, by degrees of freedom; used where scipy is missing.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Interval(NamedTuple):
    """A mean and its confidence interval; without one (a single run) the ends are None."""

    mean: float
    low: float | None
    high: float | None
    runs: int

    def text(self, digits: int = 3) -> str:
        """Return it as tables write it."""
        if self.low is None or self.high is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean and Student's 95 % interval of independent values.

    Args:
        values: At least one.
    """
    count, mean = len(values), statistics.fmean(values)
    if count < 2:
        return Interval(mean, None, None, count)
    half = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    try:
        from scipy import stats
    except ImportError:
        if freedom <= len(T95):
            return T95[freedom - 1]
        z, n = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2), freedom
        # Abramowitz and Stegun 26.7.5, good to four digits from 31 on
        return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Interval | None:
    """Return the interval of ``first - second`` over the seeds that both have; None without any."""
    both = [first[seed] - second[seed] for seed in first if seed in second]
    return t_interval(both) if both else None


def binomial_interval(share: float, count: int) -> Interval:
    """Return Wilson's 95 % interval of a share of ``count`` questions."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return Interval(share, middle - half, middle + half, count)


def agreement(
    rows: Sequence[Mapping[str, float]], size: int, keep: float, draws: int, seed: int
) -> dict[str, list[float] | int]:
    """Compare the rankings by two disjoint random sets of ``size`` samples.

    Args:
        rows: Every sample's score of every layer.
        size: Samples of each set; at most half of all.
        keep: Fraction kept.
        draws: How often sets are drawn.
        seed: Of the draw.

    Returns:
        ``tau`` (Kendall's), ``overlap`` of the kept layers and ``corrected`` for chance, each as
        mean, 5 % and 95 % quantile over the draws.

    Raises:
        ValueError: There are too few samples.
    """
    if 2 * size > len(rows):
        raise ValueError(f"two sets of {size} samples need {2 * size}, got {len(rows)}")
    names = list(rows[0])
    count = keep_count(keep, len(names))
    found: dict[str, list[float]] = {"tau": [], "overlap": [], "corrected": []}
    random = Random(f"agreement {size} {seed}")
    for _ in range(draws):
        picks = random.sample(range(len(rows)), 2 * size)
        sums = [
            [math.fsum(rows[i][name] for i in half) for name in names]
            for half in (picks[:size], picks[size:])
        ]
        kept = [set(best(values, count)) for values in sums]
        found["tau"].append(kendall_tau(*sums))
        found["overlap"].append(len(kept[0] & kept[1]) / count)
        found["corrected"].append(corrected_overlap(kept[0], kept[1], len(names)))
    return {"draws": draws, **{name: _spread(values) for name, values in found.items()}}


def _spread(values: list[float]) -> list[float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    ends = ordered[round(0.05 * last)], ordered[round(0.95 * last)]
    return [round(x, 4) for x in (statistics.fmean(ordered), *ends)]


def means_by(lines: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Return a number of every seed's line."""
    return {line["seed"]: line[name] for line in lines if line.get(name) is not None}
