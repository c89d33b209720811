"""The 0-1 knapsack: the best layers to keep when they do not cost the same."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from floe_kernels.allocation.arguments import finite

if TYPE_CHECKING:
    from collections.abc import Sequence

# a list of this many states takes about a second an item to extend
MAX_STATES = 200_000


class _State(NamedTuple):
    cost: int
    value: int
    mask: int  # item 0 is the highest bit, so that a larger mask keeps earlier items


def knapsack(
    scores: Sequence[float],
    costs: Sequence[float],
    budget: float,
    *,
    max_states: int = MAX_STATES,
) -> list[int]:
    r"""Choose the items whose scores sum highest within a budget, exactly.

    .. math:: \max_{S} \sum_{i \in S} s_i \quad \text{s.t.} \quad \sum_{i \in S} c_i \le C

    Dynamic programming over the undominated (cost, score) sums, cut by the bound of the relaxed
    problem, in exact whole numbers: there are at most ``budget / gcd(costs) + 1`` sums, and as many
    as one cost each if all cost the same. Costs count as the decimals that they print as, so three
    times 0.1 fits in 0.3. Of equal scores the cheaper set wins, then the one with earlier items.
    Items with a score of 0 or less are left out.

    Args:
        scores: L finite numbers.
        costs: L finite numbers above 0.
        budget: What may be spent, at least 0.
        max_states: Sums kept at a time before giving up.

    Returns:
        Indices of the chosen items, ascending.

    Raises:
        ValueError: A number is out of its range, or more than ``max_states`` sums are undominated;
            rounder costs have fewer.

    Example:
        >>> knapsack([6.0, 5.0, 5.0], [3, 2, 2], 4)
        [1, 2]
    """
    if len(scores) != len(costs):
        raise ValueError(f"every item needs one cost, got {len(costs)} for {len(scores)} items")
    values, _ = _whole([Fraction(finite(s, f"score {i}")) for i, s in enumerate(scores)])
    decimals = [_decimal(c, f"cost {i}") for i, c in enumerate(costs)]
    for i, c in enumerate(decimals):
        if c <= 0:
            raise ValueError(f"cost {i} must be above 0, got {costs[i]!r}")
    prices, scale = _whole(decimals)
    room = math.floor(_decimal(budget, "budget") * scale)
    if room < 0:
        raise ValueError(f"budget must be at least 0, got {budget!r}")
    items = [i for i in range(len(values)) if values[i] > 0 and prices[i] <= room]
    items.sort(key=lambda i: (-Fraction(values[i], prices[i]), i))
    best = _search(items, values, prices, room, max_states)
    top = len(values) - 1
    return [i for i in range(len(values)) if best.mask >> (top - i) & 1]


def _search(
    items: list[int], values: list[int], prices: list[int], room: int, max_states: int
) -> _State:
    top = len(values) - 1
    states = [_State(0, 0, 0)]
    floor = _greedy(items, values, prices, room)
    for step, item in enumerate(items):
        rest = items[step + 1 :]
        cost, value, bit = prices[item], values[item], 1 << (top - item)
        grown = [
            _State(s.cost + cost, s.value + value, s.mask | bit)
            for s in states
            if s.cost + cost <= room
        ]
        merged = sorted([*states, *grown], key=lambda s: (s.cost, -s.value, -s.mask))
        relaxed = _Relaxed(rest, values, prices)
        states = []
        for s in merged:
            dominated = states and s.value <= states[-1].value
            if not dominated and s.value + relaxed.bound(room - s.cost) >= floor:
                states.append(s)
        floor = max(floor, states[-1].value)
        if len(states) > max_states:
            raise ValueError(
                f"an exact knapsack must have at most {max_states} undominated sums, "
                f"got {len(states)}: round the costs"
            )
    return states[-1]  # values rise with costs, so the last is the best


class _Relaxed:
    """The most that a remaining budget can add if items could be cut: Dantzig's bound."""

    def __init__(self, items: list[int], values: list[int], prices: list[int]) -> None:
        self.rows = [(prices[i], values[i]) for i in items]
        self.at, self.spent, self.gained = 0, 0, 0
        for price, value in self.rows:
            self.spent += price
            self.gained += value
        self.at = len(self.rows)

    def bound(self, room: int) -> int:
        # rooms come in falling order, so the break item only moves to the left
        while self.at and self.spent > room:
            self.at -= 1
            self.spent -= self.rows[self.at][0]
            self.gained -= self.rows[self.at][1]
        if self.at == len(self.rows):
            return self.gained
        price, value = self.rows[self.at]
        return self.gained + (room - self.spent) * value // price


def _greedy(items: list[int], values: list[int], prices: list[int], room: int) -> int:
    total = 0
    for i in items:
        if prices[i] <= room:
            total += values[i]
            room -= prices[i]
    return total


def _decimal(value: float, name: str) -> Fraction:
    return Fraction(value) if isinstance(value, int) else Fraction(str(finite(value, name)))


def _whole(numbers: list[Fraction]) -> tuple[list[int], int]:
    scale = math.lcm(*(n.denominator for n in numbers))
    return [int(n * scale) for n in numbers], scale
