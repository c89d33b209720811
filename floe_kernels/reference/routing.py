"""Routing, in plain PyTorch.

Dims: N tokens, E experts, K experts kept per token.
"""

import torch
from torch import Tensor


def topk_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """See :func:`floe_kernels.functional.topk_softmax`."""
    # a stable sort, not topk: equal logits must keep index order, and topk promises no order
    values, experts = logits.sort(dim=-1, descending=True, stable=True)
    compute = torch.promote_types(logits.dtype, torch.float32)
    kept = values[:, :k] if renormalize else values
    gates = kept.softmax(dim=-1, dtype=compute)[:, :k]
    return gates.to(logits.dtype).contiguous(), experts[:, :k].contiguous()


def load_balance_loss(logits: Tensor, experts: Tensor, token_mask: Tensor | None) -> Tensor:
    """See :func:`floe_kernels.functional.load_balance_loss`."""
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    load = expert_load(experts, logits.shape[1], token_mask).to(p.dtype)
    return logits.shape[1] * (load * masked_mean(p, token_mask)).sum()


def router_z_loss(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    """See :func:`floe_kernels.functional.router_z_loss`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return masked_mean(wide.logsumexp(-1).square(), token_mask)


def expert_load(experts: Tensor, num_experts: int, token_mask: Tensor | None) -> Tensor:
    """Return the share of all picks that each expert got, ``(E,)`` float32; sums to 1, or to 0."""
    picks = experts.new_zeros(num_experts, dtype=torch.float32)
    weight = torch.ones_like(experts, dtype=torch.float32)
    if token_mask is not None:
        weight = weight * token_mask[:, None]
    # integers below 2**24 add exactly in float32, in any order
    picks.scatter_add_(0, experts.flatten(), weight.flatten())
    return picks / picks.sum().clamp(min=1)


def masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Return the mean over the unmasked rows; zero when there is none."""
    if token_mask is None:
        return values.sum(0) / max(1, values.shape[0])
    # select, do not multiply: a padding row may hold NaN
    shape = token_mask.shape + (1,) * (values.ndim - 1)
    kept = torch.where(token_mask.view(shape), values, values.new_zeros(()))
    return kept.sum(0) / token_mask.sum().clamp(min=1)
