"""Several adapted linears that take one x, in plain PyTorch: one product for all their shrinks.

Dims: N tokens, I inputs, S siblings (the linears); for each, as in ``reference/moe_lora.py``,
O outputs, E experts, R packed columns, C columns of z.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from floe_kernels.reference.dropout import dropout
from floe_kernels.reference.moe_lora import (
    Adapter,
    drop_masked,
    moe_lora_backward,
    route,
    wide_dtype,
)


class Sibling(NamedTuple):
    """One linear and its experts; what a kernel needs of it besides x and the token mask."""

    weight: Tensor  #: ``(O, I)``
    bias: Tensor | None  #: ``(O,)``
    lora_A: Tensor  #: ``(C, I)``
    lora_B: Tensor  #: ``(R, O)``
    router_weight: Tensor  #: ``(E, I)``
    scaling: Tensor  #: ``(R,)``
    ranks: Sequence[int]  #: E of them
    top_k: int
    shared_A: bool
    renormalize: bool
    dropout_p: float
    dropout_seed: Tensor | None  #: its own: siblings drop different elements of x
    aux_coefs: Tensor | None  #: ``(2,)``


def shared_adapters(
    x: Tensor, siblings: Sequence[Sibling], token_mask: Tensor | None
) -> list[Adapter]:
    """Shrink x for all siblings in one product, then route each of them.

    A sibling with dropout has an x of its own, hence a product of its own.
    """
    wide = wide_dtype(x)
    x = drop_masked(x, token_mask)
    routers = torch.cat([s.router_weight for s in siblings])
    plain = [s.lora_A for s in siblings if not s.dropout_p]
    all_z = x @ torch.cat(plain or [x[:0]]).T.to(x.dtype)
    all_logits = x.to(wide) @ routers.T.to(wide)
    z = iter(torch.split(all_z, [len(lora_A) for lora_A in plain], 1))
    logits = torch.split(all_logits, [len(s.ranks) for s in siblings], 1)
    routed = []
    for s, own in zip(siblings, logits, strict=True):
        if s.dropout_p:
            shrunk = dropout(x, s.dropout_p, s.dropout_seed) @ s.lora_A.T.to(x.dtype)
        else:
            shrunk = next(z)
        config = (s.scaling, s.ranks, s.top_k, s.shared_A, s.renormalize)
        routed.append(route(shrunk, own, *config, token_mask))
    return routed


def moe_lora_shared_linear(
    x: Tensor, siblings: Sequence[Sibling], token_mask: Tensor | None = None
) -> list[Tensor]:
    """Return every sibling's output; differentiable by autograd, as often as wanted."""
    routed = shared_adapters(x, siblings, token_mask)
    return [
        F.linear(x, s.weight, s.bias) + adapter.h @ s.lora_B.to(x.dtype)
        for s, adapter in zip(siblings, routed, strict=True)
    ]


def moe_lora_shared_backward(
    grad_outs: Sequence[Tensor],
    x: Tensor,
    siblings: Sequence[Sibling],
    saved: Sequence[Adapter],
    token_mask: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Differentiate :func:`moe_lora_shared_linear` in closed form.

    ``needs`` says of x, then of every sibling's lora_A, lora_B and router, who wants a gradient;
    the gradients come in the same order, ``(0,)`` where not wanted. That of x is the siblings' sum.
    """
    grad_x = x.new_empty(0)
    rest: list[Tensor] = []
    for i, (grad_out, s, adapter) in enumerate(zip(grad_outs, siblings, saved, strict=True)):
        grads = moe_lora_backward(
            grad_out, x, s.weight, s.lora_A, s.lora_B, s.router_weight, s.scaling, adapter,
            s.ranks, s.shared_A, s.renormalize, token_mask, s.dropout_p, s.dropout_seed,
            s.aux_coefs, [needs[0], *needs[1 + 3 * i : 4 + 3 * i]],
        )  # fmt: skip
        if needs[0]:
            grad_x = grads.x if i == 0 else grad_x + grads.x
        rest += grads[1:]
    return [grad_x, *rest]
