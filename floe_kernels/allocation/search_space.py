"""The grid that a rank search runs over, and how a sampler sees it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from floe_kernels.allocation.arguments import finite, whole
from floe_kernels.allocation.units import depth_group, unit_members

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from optuna.distributions import BaseDistribution

    from floe_kernels._types import JSON, ModuleSpec

Point: TypeAlias = "tuple[int, ...]"
"""One index into the choices of every dimension."""


class Dimension(NamedTuple):
    """One parameter of the search."""

    name: str
    choices: tuple[Any, ...]  #: numbers ascending, anything else as given
    scale: Literal["log2", "linear", "none"]  #: how far apart a sampler takes choices to be

    def nearest(self, value: object) -> int:
        """Return the index of the choice nearest to ``value`` on the dimension's scale."""
        if self.scale == "none" or not isinstance(value, (int, float)):
            return self.choices.index(value)
        place = math.log2 if self.scale == "log2" else float
        return min(
            range(len(self.choices)), key=lambda i: abs(place(self.choices[i]) - place(value))
        )

    def distribution(self) -> BaseDistribution:
        """Describe the dimension to Optuna."""
        from optuna import distributions

        low, high = self.choices[0], self.choices[-1]
        if self.scale == "none":
            return distributions.CategoricalDistribution(self.choices)
        if isinstance(low, int):
            return distributions.IntDistribution(low, high, log=self.scale == "log2")
        return distributions.FloatDistribution(low, high)


class SearchSpace:
    """A finite grid of parameters; whole numbers from 1 on are spaced by their log2.

    Example:
        >>> space = SearchSpace({"rank": (2, 4, 8), "keep": (0.25, 0.5)})
        >>> space.size, space.config((2, 0))
        (6, {'rank': 8, 'keep': 0.25})
    """

    def __init__(self, choices: Mapping[str, Sequence[Any]]) -> None:
        if not choices:
            raise ValueError("space must have at least one parameter, got none")
        self.dimensions = [_dimension(name, values) for name, values in choices.items()]
        self.size = math.prod(len(d.choices) for d in self.dimensions)

    def config(self, point: Point) -> dict[str, Any]:
        """Return the parameters at a point."""
        return {d.name: d.choices[i] for d, i in zip(self.dimensions, point, strict=True)}

    def point(self, config: Mapping[str, Any]) -> Point:
        """Return the point nearest to some parameters."""
        return tuple(d.nearest(config[d.name]) for d in self.dimensions)

    def points(self) -> Iterator[Point]:
        """Yield every point, the last parameter running fastest."""
        return itertools.product(*(range(len(d.choices)) for d in self.dimensions))

    def spread(self, n: int, seed: int) -> Point:
        """Return the ``n``-th point of a sequence that fills the space evenly (Halton's)."""
        draw = Random(f"spread {seed}")
        place = []
        for d, base in zip(self.dimensions, _primes(), strict=False):
            shifted = (_radical_inverse(n + 1, base) + draw.random()) % 1.0
            place.append(int(shifted * len(d.choices)))
        return tuple(place)

    def nearest_new(self, point: Point, taken: Container[Point]) -> Point | None:
        """Return the point nearest to ``point`` that is not taken; None if all are."""
        ring, seen = [point], {point}
        while ring:
            for candidate in ring:
                if candidate not in taken:
                    return candidate
            ring = sorted({p for q in ring for p in self._neighbours(q)} - seen)
            seen.update(ring)
        return None

    def describe(self) -> dict[str, JSON]:
        """Return the choices, as they are kept with a study."""
        return {d.name: list(d.choices) for d in self.dimensions}

    def _neighbours(self, point: Point) -> Iterator[Point]:
        for axis, (d, i) in enumerate(zip(self.dimensions, point, strict=True)):
            steps = range(len(d.choices)) if d.scale == "none" else (i - 1, i + 1)
            for j in steps:
                if 0 <= j < len(d.choices):
                    yield (*point[:axis], j, *point[axis + 1 :])


def grouped_space(space: Sequence[int] | Mapping[str, Sequence[Any]], groups: int) -> SearchSpace:
    """Build the space of one rank, or of one rank per depth group, and of further parameters.

    Args:
        space: Choices of the rank, or parameter name -> choices.
        groups: Depth groups; above 1, ``rank`` becomes ``rank_0``, ``rank_1``, ...

    Returns:
        The space.

    Raises:
        ValueError: A parameter has no choice, or two equal ones, or groups lack a ``rank``.

    Example:
        >>> grouped_space((2, 4), groups=2).describe()
        {'rank_0': [2, 4], 'rank_1': [2, 4]}
    """
    named: dict[str, Sequence[Any]] = dict(space) if isinstance(space, Mapping) else {"rank": space}
    if whole(groups, "groups", least=1) == 1:
        return SearchSpace(named)
    if "rank" not in named:
        raise ValueError(f"groups = {groups} need a parameter rank in space, got {list(named)}")
    split: dict[str, Sequence[Any]] = {}
    for name, choices in named.items():
        names = [f"rank_{g}" for g in range(groups)] if name == "rank" else [name]
        split.update(dict.fromkeys(names, choices))
    return SearchSpace(split)


def ranks_by_depth(
    config: Mapping[str, Any], modules: Mapping[str, ModuleSpec]
) -> int | dict[str, int]:
    """Turn a configuration's rank, or ranks by depth group, into a policy's ``rank`` argument.

    Args:
        config: With ``rank``, or ``rank_0``, ``rank_1``, ... for contiguous groups of layers.
        modules: All adaptable linears, in model order.

    Returns:
        One rank, or layer name -> rank.

    Raises:
        ValueError: The configuration has neither.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {f"h.{i}.q": ModuleSpec(8, 8, f"h.{i}") for i in range(3)}
        >>> ranks_by_depth({"rank_0": 4, "rank_1": 16}, model)
        {'h.0': 4, 'h.1': 4, 'h.2': 16}
    """
    if "rank" in config:
        return int(config["rank"])
    ranks = [config[f"rank_{g}"] for g in range(len(config)) if f"rank_{g}" in config]
    if not ranks:
        raise ValueError(f"a configuration must have rank or rank_0, got {list(config)}")
    layers = list(unit_members(modules, "layer"))
    return {name: ranks[depth_group(i, len(layers), len(ranks))] for i, name in enumerate(layers)}


def _dimension(name: str, values: Sequence[Any]) -> Dimension:
    if isinstance(values, (str, bytes)) or not values:
        raise ValueError(f"space[{name!r}] must be a sequence of choices, got {values!r}")
    if len(set(values)) != len(values):
        raise ValueError(f"the choices of space[{name!r}] must differ, got {list(values)}")
    if any(isinstance(v, (bool, str)) or v is None for v in values):
        return Dimension(name, tuple(values), "none")
    numbers = sorted(values)
    if any(isinstance(v, float) for v in numbers):
        floats = tuple(finite(v, f"space[{name!r}]") for v in numbers)
        return Dimension(name, floats, "linear")
    integers = tuple(whole(v, f"space[{name!r}]") for v in numbers)
    return Dimension(name, integers, "log2" if integers[0] >= 1 else "linear")


def _primes() -> Iterator[int]:
    return (n for n in itertools.count(2) if all(n % k for k in range(2, math.isqrt(n) + 1)))


def _radical_inverse(n: int, base: int) -> float:
    value, digit = 0.0, 1.0 / base
    while n:
        n, rest = divmod(n, base)
        value += rest * digit
        digit /= base
    return value
