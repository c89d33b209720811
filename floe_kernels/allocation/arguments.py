"""The argument checks that every policy shares, and their wording."""

from __future__ import annotations

import difflib
import math
import operator
from typing import TYPE_CHECKING, SupportsIndex

if TYPE_CHECKING:
    from collections.abc import Iterable


def whole(value: object, name: str, *, least: int = 0) -> int:
    """Return ``value`` as an int of at least ``least``; booleans and floats are refused."""
    if not isinstance(value, bool) and isinstance(value, SupportsIndex):
        number = operator.index(value)
        if number >= least:
            return number
    raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def finite(value: object, name: str, *, least: float = -math.inf) -> float:
    """Return ``value`` as a finite float of at least ``least``; booleans and text are refused."""
    rule = f" of at least {least:g}" if least > -math.inf else ""
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]  # numpy and torch scalars convert
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number) and number >= least:
        return number
    raise ValueError(f"{name} must be a finite number{rule}, got {value!r}")


def nearest(name: object, names: Iterable[str]) -> str:
    """Return `` (nearest: a, b)``, the names most like ``name``, or nothing if there are none."""
    close = difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.0)
    return f" (nearest: {', '.join(close)})" if close else ""
