"""Sharing a total out over layers or modules: always exactly, or as near as costs allow."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from floe_kernels.allocation.arguments import finite, whole
from floe_kernels.allocation.costs import ADAM_BYTES, Unit, experts_cost
from floe_kernels.allocation.units import Per, rank_of, unit_members, unit_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from floe_kernels._types import ModuleSpec


def allocate_experts(
    scores: Sequence[float] | Mapping[str, float],
    total: int,
    *,
    beta: float = 1.0,
    lo: int = 0,
    hi: int | None = None,
) -> list[int]:
    r"""Share ``total`` experts out in proportion to powers of the scores, to the last one.

    .. math:: f_l = \frac{s_l^\beta}{\sum_m s_m^\beta} (T - L\,lo), \qquad
              n_l = lo + \lfloor f_l \rfloor + [\text{one of the largest remainders}]

    The power rule of arXiv 2410.10054 with the largest-remainder method in place of rounding. Where
    ``hi`` cuts a share off, the rest is shared out again over the others. The shares are exact
    fractions; equal remainders go to the lower index; scores that are all zero (or among those
    left) share equally. With beta > 0 a larger score never gets fewer experts than a smaller one.

    Args:
        scores: L finite numbers of at least 0; of a mapping, its values in order.
        total: Experts to share out, ``L * lo <= total <= L * hi``.
        beta: Exponent, at least 0; 0 shares equally, larger sharpens.
        lo: Least experts of each.
        hi: Most experts of each; None = no bound.

    Returns:
        L whole numbers whose sum is ``total``, in the order of ``scores``.

    Raises:
        ValueError: A score is negative or not finite, or the bounds exclude the total.

    Example:
        >>> allocate_experts([1.9, 2.1, 3.0, 4.2], 10, beta=2.5)
        [1, 1, 2, 6]
    """
    checked = _checked(scores)
    beta = finite(beta, "beta", least=0)
    total, lo = whole(total, "total"), whole(lo, "lo")
    room = None if hi is None else whole(hi, "hi") - lo
    if room is not None and room < 0:
        raise ValueError(f"hi must be at least lo = {lo}, got {hi}")
    most = "any number" if hi is None else len(checked) * hi
    if total < len(checked) * lo or (hi is not None and total > len(checked) * hi):
        raise ValueError(
            f"total must be in L*lo..L*hi = {len(checked) * lo}..{most} for L = {len(checked)}, "
            f"got {total}"
        )
    if not checked:
        if total:
            raise ValueError(f"total must be 0 where there is nothing to share, got {total}")
        return []
    shares = _shares(checked, beta, total - lo * len(checked), room)
    extra = [int(share) for share in shares]
    left = total - lo * len(checked) - sum(extra)
    by_remainder = sorted(range(len(shares)), key=lambda i: (extra[i] - shares[i], i))
    for i in by_remainder[:left]:
        extra[i] += 1
    return [lo + n for n in extra]


def allocate_budget(
    scores: Mapping[str, float],
    modules: Mapping[str, ModuleSpec],
    total: int,
    *,
    unit: Unit = "experts",
    per: Per = "layer",
    rank: int | Mapping[str, int] = 8,
    shared_A: bool = False,
    beta: float = 1.0,
    lo: int = 0,
    hi: int | None = None,
    bytes_per_parameter: int = ADAM_BYTES,
) -> dict[str, int]:
    """Share out experts, parameters or bytes of optimiser state over layers or modules.

    In experts the total is met exactly by ``allocate_experts``. In parameters or bytes it is a
    ceiling: the largest number of experts whose allocation fits is shared out by the same rule,
    then single experts are added where the share is missed most, until not one more fits. So
    equal costs give ``allocate_experts(scores, total // cost)``, and what stays unspent is always
    less than the cheapest expert that ``hi`` still allows.

    Args:
        scores: Unit name -> finite number of at least 0, one for each unit.
        modules: All adaptable linears, in model order.
        total: The budget in ``unit``; experts of a layer are counted once for all its linears.
        unit: ``"experts"``, ``"parameters"`` (router included) or ``"bytes"``.
        per: ``"layer"`` or ``"module"``.
        rank: Rank of every expert, or one by layer or module name.
        shared_A: One lora_A for all experts of a module.
        beta: Exponent of the power rule.
        lo: Least experts of each unit.
        hi: Most experts of each unit.
        bytes_per_parameter: Bytes of optimiser state a parameter; 8 for Adam in float32.

    Returns:
        Unit name -> experts of each of its modules, in model order.

    Raises:
        ValueError: As ``allocate_experts``; or ``lo`` experts everywhere cost more than the total.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {f"h.{i}.q": ModuleSpec(64, 64, f"h.{i}") for i in range(3)}
        >>> allocate_budget({"h.0": 1, "h.1": 2, "h.2": 3}, model, 12_000, unit="parameters")
        {'h.0': 2, 'h.1': 4, 'h.2': 5}
    """
    members = unit_members(modules, per)
    values = list(unit_scores(scores, modules, per)[1].values())
    if unit == "experts":
        return dict(
            zip(members, allocate_experts(values, total, beta=beta, lo=lo, hi=hi), strict=True)
        )
    whole(total, "total")

    def cost(name: str, experts: int) -> int:
        return sum(
            experts_cost(
                [modules[m]],
                experts,
                unit=unit,
                rank=rank_of(rank, m, modules[m].layer),
                shared_A=shared_A,
                bytes_per_parameter=bytes_per_parameter,
            )
            for m in members[name]
        )

    least = sum(cost(name, lo) for name in members)
    if least > total:
        raise ValueError(
            f"total must pay lo = {lo} experts everywhere, {least} {unit}, got {total}"
        )
    # with a shared lora_A the first expert pays for it, and the second is cheaper
    steps = [cost(name, n + 1) - cost(name, n) for name in members for n in (lo, lo + 1)]
    cheapest = min(steps)
    most = len(members) * lo + 1 + (total - least) // max(1, cheapest)
    most = most if hi is None else min(most, len(members) * hi)

    def shared(experts: int) -> list[int]:
        return allocate_experts(values, experts, beta=beta, lo=lo, hi=hi)

    def spent(experts: int) -> int:
        return sum(cost(name, n) for name, n in zip(members, shared(experts), strict=True))

    experts = _largest(spent, len(members) * lo, most, total)
    counts = shared(experts)
    # what the rule would give with the whole budget, to see who misses most
    room = None if hi is None else hi - lo
    goal = _shares(values, beta, experts + len(members) * (1 - lo), room)
    return _fill(
        dict(zip(members, counts, strict=True)),
        dict(zip(members, goal, strict=True)),
        cost,
        total,
        hi,
    )


def _checked(scores: Sequence[float] | Mapping[str, float]) -> list[float]:
    named = scores.items() if isinstance(scores, Mapping) else enumerate(scores)
    return [finite(score, f"the score of {name!r}", least=0) for name, score in named]


def _weights(scores: Sequence[float], beta: float) -> list[Fraction]:
    top = max(scores)
    if top == 0:
        return [Fraction(1)] * len(scores)
    if beta == 1:
        return [Fraction(s) for s in scores]
    return [Fraction((s / top) ** beta) for s in scores]  # divided first: no power overflows


def _shares(scores: Sequence[float], beta: float, total: int, room: int | None) -> list[Fraction]:
    """Split ``total`` by powers, none above ``room``: clamp, and share the rest out again."""
    shares = [Fraction(0)] * len(scores)
    active = list(range(len(scores)))
    rest = Fraction(total)
    while active:
        weights = _weights([scores[i] for i in active], beta)
        mass = sum(weights)
        for i, weight in zip(active, weights, strict=True):
            shares[i] = rest * weight / mass
        over = [i for i in active if room is not None and shares[i] > room]
        if room is None or not over:
            break
        for i in over:
            shares[i] = Fraction(room)
        rest -= room * len(over)
        active = [i for i in active if i not in over]
    return shares


def _largest(spent: Callable[[int], int], low: int, high: int, total: int) -> int:
    """Bisect for an expert count that fits, below one that does not; ``spent(low)`` fits."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= total else (low, middle)
    return low


def _fill(
    counts: dict[str, int],
    goal: Mapping[str, Fraction],
    cost: Callable[[str, int], int],
    total: int,
    hi: int | None,
) -> dict[str, int]:
    left = total - sum(cost(name, n) for name, n in counts.items())
    order = {name: i for i, name in enumerate(counts)}
    while True:
        price = {name: cost(name, n + 1) - cost(name, n) for name, n in counts.items()}
        open_ = [
            name for name, n in counts.items() if price[name] <= left and (hi is None or n < hi)
        ]
        if not open_:
            return counts
        name = max(open_, key=lambda name: (goal[name] - counts[name], -order[name]))
        counts[name] += 1
        left -= price[name]
