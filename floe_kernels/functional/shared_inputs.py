"""Several adapted linears that take one x: query, key and value, or gate and up."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from floe_kernels.functional.moe_lora import (
    MoELoRAOutput,
    _no_autocast,
    _shared_arguments,
    rows_of,
)
from floe_kernels.ops import shared_inputs as ops


class ExpertLinear(NamedTuple):
    """A frozen linear and its experts, as :func:`~floe_kernels.functional.moe_lora_linear` takes.

    All but ``weight`` and ``bias`` mean what they mean there; x and the token mask are shared.
    """

    weight: Tensor  #: ``(O, I)``, dtype of x
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    router_weight: Tensor
    ranks: Sequence[int]
    top_k: int | None = None
    scaling: Tensor | None = None
    shared_A: bool = False
    renormalize: bool | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    aux_coefs: Tensor | None = None


def moe_lora_shared_linear(
    x: Tensor, linears: Sequence[ExpertLinear], *, token_mask: Tensor | None = None
) -> list[MoELoRAOutput]:
    r"""Apply several frozen linears, each with its own experts, to one input.

    .. math:: y_s = x W_s^\top + b_s + \sum_{e \in \mathrm{top}_k^s(x)} g_{s,e} (x A_{s,e}^\top)
              B_{s,e} \quad\text{for every linear } s

    The values and gradients are those of :func:`~floe_kernels.functional.moe_lora_linear` called
    once for each, dropout included: every linear has a seed, hence a mask, of its own. What is
    shared is the work: on a GPU x is read once for all products with lora_A and router, and x's
    gradient is written once instead of being added up linear by linear. Dtypes, ties and
    non-finite input are as there. Differentiable once.

    Memory, on a CPU, where the linears take turns: forward, what each of them takes by itself, but
    ``b * (N * G + W)`` for the largest alone; backward, ``2 * b * N * I`` more than the largest,
    and the others' gradients.

    Args:
        x: Input, ``(..., I)``, floating point.
        linears: The linears, each with at least one expert.
        token_mask: ``(...)`` bool, False on padding.

    Returns:
        One output for each linear.

    Raises:
        ValueError: A shape, dtype or number does not fit, a linear is not frozen or has no expert.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 6)
        >>> def draw(outputs):
        ...     adapter = torch.randn(3, 6), torch.zeros(3, outputs), torch.randn(2, 6)
        ...     return ExpertLinear(torch.randn(outputs, 6), None, *adapter, ranks=[1, 2])
        >>> [result.out.shape[1] for result in moe_lora_shared_linear(x, [draw(4), draw(2)])]
        [4, 2]
    """
    rows = rows_of(x)
    columns: list[tuple[object, ...]] = []
    for linear in linears:
        weight, bias = linear.weight, linear.bias
        if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or weight.dtype != x.dtype:
            raise ValueError(
                f"weight must be (O, {x.shape[-1]}) in the dtype of x, {x.dtype}, "
                f"got {tuple(weight.shape)} in {weight.dtype}"
            )
        for name, frozen in (("weight", weight), ("bias", bias)):
            if frozen is not None and frozen.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} is frozen here, got one that requires grad")
        checked = _shared_arguments(
            rows, len(weight), *linear[2:5], linear.ranks, linear.top_k, linear.scaling,
            linear.shared_A, linear.renormalize, token_mask, linear.dropout_p,
            linear.dropout_seed, linear.aux_coefs, None,
        )  # fmt: skip
        if checked is None:
            raise ValueError("every linear must have an expert, got one without")
        columns.append((weight, bias, *checked[:12]))
    if not columns:
        return []
    none = rows.new_empty(0)  # the operator's lists have no place for None
    (weights, biases, lora_As, lora_Bs, routers, scalings, ranks, top_ks, shared_As, renormalizes,
     masks, dropout_ps, seeds, aux_coefs) = map(list, zip(*columns, strict=True))  # fmt: skip
    given = [[none if t is None else t for t in tensors] for tensors in (biases, seeds, aux_coefs)]
    results = _no_autocast(
        ops.call, rows, weights, given[0], lora_As, lora_Bs, routers, scalings,
        [rank for own in ranks for rank in own], top_ks, shared_As, renormalizes, masks[0],
        dropout_ps, given[1], given[2],
    )  # fmt: skip
    outs = []
    for s, weight in enumerate(weights):
        _z, experts, gates, logits = results[len(weights) + 4 * s : len(weights) + 4 * (s + 1)]
        out = results[s].view(*x.shape[:-1], len(weight))
        outs.append(MoELoRAOutput(out, logits.detach(), experts, gates.detach()))
    return outs
