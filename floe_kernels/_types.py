"""Plain values that several floors hand to each other; nothing here needs torch."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
"""What a JSON document can hold; numbers are finite."""


class ModuleSpec(NamedTuple):
    """One linear that can carry experts.

    Example:
        >>> ModuleSpec(576, 576, "model.layers.3").layer
        'model.layers.3'
    """

    in_features: int  #: inputs of the linear, at least 1
    out_features: int  #: outputs of the linear, at least 1
    layer: str  #: name of the block that it belongs to
