"""Rules that choose layers or matrices, to be tried against FLoE's own: plain numbers in and out.

Dims: L units (layers or matrices), N samples; ``gradients`` is N rows of L numbers, the gradient of
a sample's loss by each unit's gate, and F = gradients^T gradients / N the block Fisher.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

Rows = Sequence[Sequence[float]]


def block_fisher(gradients: Rows) -> list[list[float]]:
    """Return F, (L, L): its diagonal is FLoE's gate score."""
    columns = list(zip(*gradients, strict=True))
    n = len(gradients)
    return [[math.fsum(map(float.__mul__, a, b)) / n for b in columns] for a in columns]


def correlations(fisher: Rows) -> list[list[float]]:
    """Return F_ij / sqrt(F_ii F_jj), (L, L); 0 where a unit has no gradient."""
    size = [math.sqrt(row[i]) for i, row in enumerate(fisher)]
    return [
        [value / (size[i] * size[j]) if size[i] and size[j] else 0.0 for j, value in enumerate(row)]
        for i, row in enumerate(fisher)
    ]


def best(scores: Mapping[str, float], count: int) -> list[str]:
    """Return the ``count`` units of highest score, in the order of ``scores``; ties keep it."""
    chosen = set(sorted(scores, key=lambda name: -scores[name])[:count])
    return [name for name in scores if name in chosen]


def less_redundant(
    scores: Mapping[str, float], gradients: Rows, count: int, *, penalty: float = 1.0
) -> list[str]:
    """Take units one by one: highest score times (1 - penalty * mean |correlation| with the taken).

    Scores must not be negative. With penalty 0 this is ``best``.
    """
    names, similar = list(scores), correlations(block_fisher(gradients))
    taken: list[int] = []
    while len(taken) < min(count, len(names)):
        rest = [i for i in range(len(names)) if i not in taken]

        def worth(i: int) -> float:
            alike = sum(abs(similar[i][j]) for j in taken) / max(1, len(taken))
            return scores[names[i]] * (1 - penalty * alike)

        taken.append(max(rest, key=lambda i: (worth(i), -i)))
    return [names[i] for i in sorted(taken)]


def most_explained(names: Sequence[str], gradients: Rows, count: int) -> list[str]:
    """Take units one by one: the largest part of F's diagonal that those taken do not explain.

    Pivoted Cholesky factorisation of F: a unit whose gate gradient is a multiple of a taken one's
    is worth nothing any more.
    """
    fisher = block_fisher(gradients)
    left = [row[i] for i, row in enumerate(fisher)]
    factors: list[list[float]] = []
    taken: list[int] = []
    while len(taken) < min(count, len(names)):
        rest = [i for i in range(len(names)) if i not in taken]
        pivot = max(rest, key=lambda i: (left[i], -i))
        taken.append(pivot)
        root = math.sqrt(max(left[pivot], 0.0))
        column = [
            (fisher[i][pivot] - sum(f[i] * f[pivot] for f in factors)) / root if root else 0.0
            for i in range(len(names))
        ]
        factors.append(column)
        left = [value - column[i] ** 2 for i, value in enumerate(left)]
    return [names[i] for i in sorted(taken)]


def spread_out(scores: Mapping[str, float], count: int) -> list[str]:
    """Take the best unit of each of ``count`` equal stretches of the model."""
    names = list(scores)
    bounds = [round(k * len(names) / count) for k in range(count + 1)]
    pieces = [names[a:b] for a, b in itertools.pairwise(bounds) if a < b]
    return [max(piece, key=lambda name: (scores[name], -names.index(name))) for piece in pieces]


def spaced_above(scores: Mapping[str, float], count: int, *, without: float = 1 / 3) -> list[str]:
    """Leave out the worst units, a fraction ``without``, and take evenly spaced ones of the rest.

    Scores know the bad units better than they rank the good ones, whose neighbours are redundant.
    """
    rest = best(scores, max(count, len(scores) - int(without * len(scores))))
    return [rest[(2 * k + 1) * len(rest) // (2 * count)] for k in range(count)]


def within(scores: Mapping[str, float], costs: Mapping[str, int], budget: int) -> list[str]:
    """Take matrices by falling score while they fit into the budget; smaller ones fill it up."""
    chosen, left = set(), budget
    for name in sorted(scores, key=lambda name: -scores[name]):
        if costs[name] <= left:
            chosen.add(name)
            left -= costs[name]
    return [name for name in scores if name in chosen]


PRICES: dict[str, Callable[[float, float], float]] = {
    "score": lambda score, cost: score,
    "by_cost": lambda score, cost: score / cost,
    "by_root": lambda score, cost: score / math.sqrt(cost),
}


def priced(scores: Mapping[str, float], costs: Mapping[str, int], price: str) -> dict[str, float]:
    """Weigh scores by what units cost in parameters: as they are, by cost, or by its root."""
    return {name: PRICES[price](score, costs[name]) for name, score in scores.items()}
