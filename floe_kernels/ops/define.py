"""How an operator is defined: as ``torch.library.custom_op`` does, at about half its cost a call.

``custom_op`` checks in Python, on every call, that outputs alias nothing, and counts the versions
of what it mutates. The tests' ``opcheck`` does the first once; of the second there is no need, for
nothing that is mutated here is ever differentiated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def define(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Turn a function into the operator ``name``, its schema read off the annotations.

    The function serves every device for which no kernel is registered.

    Args:
        name: ``namespace::operator``.
        mutates: The arguments that it writes to.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default")(function)
        namespace, _, operator = name.partition("::")
        return getattr(getattr(torch.ops, namespace), operator).default

    return register
