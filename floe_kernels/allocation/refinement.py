"""Refining a set of kept layers on the block Fisher, which sees how layers act together."""

from __future__ import annotations

from math import inf
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from floe_kernels.allocation.arguments import finite, whole

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


class Refinement(NamedTuple):
    """A refined choice and what it gained."""

    kept: list[int]  #: indices of the kept layers, ascending
    before: float  #: the objective of the choice that came in
    after: float  #: the objective of the choice that goes out, never above ``before``
    swaps: int  #: exchanges made


def removal_loss(gradients: Sequence[Sequence[float]], kept: Collection[int]) -> float:
    r"""Estimate the harm of removing every layer that is not kept.

    .. math:: \frac{1}{N} \sum_x \Bigl( \sum_{l \notin kept} g_l(x) \Bigr)^2

    The second-order term of the loss with the Hessian replaced by the full Fisher matrix of the
    layers' gates, as in the mask rearrangement of arXiv 2204.09656; its diagonal is the usual
    score.

    Args:
        gradients: N samples by L layers, the gradient of a sample's loss by each layer's gate.
        kept: Indices of the kept layers.

    Returns:
        The estimate; 0 for no sample.

    Example:
        >>> removal_loss([[1.0, -1.0, 3.0], [2.0, -2.0, 1.0]], kept=[2])
        0.0
    """
    removed = [i for i in range(len(gradients[0])) if i not in kept] if gradients else []
    return sum(sum(row[i] for i in removed) ** 2 for row in gradients) / max(1, len(gradients))


def refine(
    gradients: Sequence[Sequence[float]],
    kept: Collection[int],
    *,
    costs: Sequence[float] | None = None,
    budget: float | None = None,
    passes: int = 10,
) -> Refinement:
    """Exchange kept for removed layers while that lowers the loss estimated for the removal.

    The mask rearrangement of arXiv 2204.09656, across layers and as exchanges: the pair that gains
    most is exchanged again and again, gain or not, each layer moving once, and the chain is cut
    where it stood best (Kernighan and Lin 1970). So layers that cancel each other can leave
    together, ``removal_loss`` never rises, and at the end no single exchange lowers it. Equal gains
    go to the earlier layer.

    Args:
        gradients: N samples by L layers of finite numbers, the gate gradients.
        kept: Indices of the layers kept so far, each in 0..L-1.
        costs: L costs that the kept layers must pay from ``budget``; None = all the same.
        budget: What the kept layers may cost together; None = no bound.
        passes: Most chains; they end when one gains nothing.

    Returns:
        The refined choice, of the same size.

    Raises:
        ValueError: Rows differ in length, a gradient is not finite, or an index is out of range.

    Example:
        >>> refine([[1.0, -1.0, 3.0], [2.0, -2.0, 1.0]], [0])
        Refinement(kept=[2], before=2.5, after=0.0, swaps=1)
    """
    if not gradients:
        raise ValueError("gradients must hold at least one sample, got none")
    length = len(gradients[0])
    rows = [[finite(g, "a gate gradient") for g in row] for row in gradients]
    for n, row in enumerate(rows):
        if len(row) != length:
            rule = f"gradients must be N samples by L = {length} layers"
            raise ValueError(f"{rule}, got {len(row)} numbers in sample {n}")
    start = sorted({whole(i, "a kept index") for i in kept})
    if start and start[-1] >= length:
        raise ValueError(f"a kept index must be in 0..L-1 = 0..{length - 1}, got {start[-1]}")
    before = removal_loss(rows, start)
    swapped = _Swaps(rows, start, costs, budget)
    swaps = 0
    for _ in range(whole(passes, "passes")):
        made = swapped.chain()
        swaps += made
        if not made:
            break
    after = removal_loss(rows, swapped.kept)
    if after >= before:  # what rounding promised and arithmetic does not keep
        return Refinement(start, before, before, 0)
    return Refinement(sorted(swapped.kept), before, after, swaps)


class _Swaps:
    def __init__(
        self,
        rows: list[list[float]],
        kept: list[int],
        costs: Sequence[float] | None,
        budget: float | None,
    ) -> None:
        columns = list(zip(*rows, strict=True))
        L = len(columns)
        self.fisher = [[0.0] * L for _ in range(L)]  # (L, L), sum over samples
        for i in range(L):
            for j in range(i + 1):
                product = sum(map(mul, columns[i], columns[j]))
                self.fisher[i][j] = self.fisher[j][i] = product
        self.kept = set(kept)
        self.removed = [i for i in range(L) if i not in self.kept]
        self.pull = [sum(row[i] for i in self.removed) for row in self.fisher]  # F times the mask
        self.costs = list(costs) if costs is not None else [0.0] * L
        self.room = None if budget is None else budget - sum(self.costs[i] for i in kept)
        self.least_gain = 1e-12 * max((self.fisher[i][i] for i in range(L)), default=0.0)

    def chain(self) -> int:
        """Exchange the best pair again and again, gain or not; keep the chain's best start."""
        chain: list[tuple[int, int]] = []
        total, highest, length = 0.0, self.least_gain, 0
        outs, backs = set(self.kept), set(self.removed)
        while outs and backs:
            offers = [(*self.best(out, sorted(backs)), out) for out in sorted(outs)]
            gain, back, out = max(offers, key=lambda offer: offer[0])
            if gain == -inf:
                break
            self.swap(out, back)
            chain.append((out, back))
            outs.remove(out)
            backs.remove(back)
            total += gain
            if total > highest:
                highest, length = total, len(chain)
        for out, back in chain[length:]:
            self.swap(back, out)
        return length

    def best(self, out: int, backs: list[int]) -> tuple[float, int]:
        """Return the largest gain of exchanging ``out`` and the layer that returns for it."""
        gains = [(self.gain(out, back), -back) for back in backs if self.fits(out, back)]
        gain, back = max(gains, default=(-inf, 0))
        return gain, -back

    def fits(self, out: int, back: int) -> bool:
        return self.room is None or self.costs[back] - self.costs[out] <= self.room

    def gain(self, out: int, back: int) -> float:
        """How far the objective falls when ``out`` is removed and ``back`` returns."""
        F = self.fisher
        rise = 2 * self.pull[out] + F[out][out]
        fall = 2 * (self.pull[back] + F[out][back]) - F[back][back]
        return fall - rise

    def swap(self, out: int, back: int) -> None:
        self.kept.symmetric_difference_update((out, back))
        self.removed[self.removed.index(back)] = out
        self.removed.sort()
        for i, row in enumerate(self.fisher):
            self.pull[i] += row[out] - row[back]
        if self.room is not None:
            self.room += self.costs[out] - self.costs[back]
