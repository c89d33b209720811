"""What experts cost, in trainable parameters and in bytes of optimiser state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from floe_kernels._types import ModuleSpec

Unit: TypeAlias = Literal["experts", "parameters", "bytes"]
"""What a total is counted in; bytes are those of the optimiser's state."""

ADAM_BYTES = 8
"""Bytes of optimiser state a parameter: two float32 moments."""


def adapter_parameters(
    spec: ModuleSpec, ranks: Sequence[int], *, shared_A: bool = False, router: bool = True
) -> int:
    r"""Count the trainable parameters of one module's experts.

    .. math:: d_{in} R_A + d_{out} \sum_e r_e + d_{in} E,
              \qquad R_A = r \text{ if A is shared, else } \sum_e r_e

    With the router counted it gives the totals of arXiv 2402.08562, table 1; without, those of
    arXiv 2404.19245. No experts cost nothing.

    Args:
        spec: The linear's sizes.
        ranks: Rank of every expert, E numbers.
        shared_A: One A for all experts, whose ranks are then equal.
        router: Count the router's E x d_in weights.

    Returns:
        A number of parameters.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> adapter_parameters(ModuleSpec(4096, 4096, "0"), [8, 8])
        139264
    """
    down = max(ranks, default=0) if shared_A else sum(ranks)
    routes = len(ranks) if router else 0
    return spec.in_features * (down + routes) + spec.out_features * sum(ranks)


def experts_cost(
    specs: Iterable[ModuleSpec],
    experts: int,
    *,
    unit: Unit,
    rank: int = 8,
    shared_A: bool = False,
    bytes_per_parameter: int = ADAM_BYTES,
) -> int:
    """Count what ``experts`` experts in each of ``specs`` cost together, router included.

    In the unit ``"experts"`` a group of modules with n experts each costs n, as the totals of
    arXiv 2410.10054 and 2402.08562 are counted (one number for all linears of a block).

    Args:
        specs: The modules of one block, or a single module.
        experts: Experts of each module, at least 0.
        unit: ``"experts"``, ``"parameters"`` or ``"bytes"`` of optimiser state.
        rank: Rank of every expert.
        shared_A: One A for all experts of a module.
        bytes_per_parameter: Bytes of optimiser state a parameter; 8 for Adam in float32.

    Returns:
        The cost, a whole number.

    Raises:
        ValueError: The unit is unknown.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> experts_cost([ModuleSpec(64, 32, "0")], 2, unit="bytes", rank=4)
        7168
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be experts, parameters or bytes, got {unit!r}")
    if unit == "experts":
        return experts
    ranks = [rank] * experts
    parameters = sum(adapter_parameters(spec, ranks, shared_A=shared_A) for spec in specs)
    return parameters * (bytes_per_parameter if unit == "bytes" else 1)
