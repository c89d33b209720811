"""A mixture of LoRA experts beside one frozen linear, in plain PyTorch.

Dims: N tokens, I inputs, O outputs, E experts, K experts kept per token,
R packed columns (the sum of the experts' ranks), C columns of z (R, or the one rank of a shared A).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from floe_kernels.reference.dropout import dropout
from floe_kernels.reference.grad_square import segment_grad_square
from floe_kernels.reference.routing import expert_load, topk_softmax


class Adapter(NamedTuple):
    """What the forward computes besides the output, and what the backward needs of it."""

    h: Tensor  #: ``(N, R)`` dtype of x: scaling * gate * z, zero for experts not kept
    z: Tensor  #: ``(N, C)`` dtype of x
    experts: Tensor  #: ``(N, K)`` int64, best first
    gates: Tensor  #: ``(N, K)`` float32 (float64 for float64 x), zero where the token is masked
    logits: Tensor  #: ``(N, E)`` float32 (float64 for float64 x)


class Gradients(NamedTuple):
    """Gradients of one adapted linear, each empty ``(0,)`` where it was not asked for."""

    x: Tensor  #: ``(N, I)`` dtype of x; of the adapter and, given a weight, of the base
    lora_A: Tensor  #: ``(C, I)`` dtype of lora_A
    lora_B: Tensor  #: ``(R, O)`` dtype of lora_B
    router: Tensor  #: ``(E, I)`` dtype of the router


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def drop_masked(rows: Tensor, token_mask: Tensor | None) -> Tensor:
    """Zero the masked rows by selection: a padding row may hold NaN, and 0 * NaN is NaN."""
    if token_mask is None:
        return rows
    return torch.where(token_mask[:, None], rows, rows.new_zeros(()))


def expert_of_column(ranks: Sequence[int], device: torch.device) -> Tensor:
    """Return the expert of every packed column, ``(R,)`` int64."""
    return torch.tensor([e for e, r in enumerate(ranks) for _ in range(r)], device=device).long()


def column_gates(experts: Tensor, gates: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return every packed column's gate, ``(N, R)``: the gate of its expert, 0 if not kept."""
    dense = gates.new_zeros(len(gates), len(ranks)).scatter(1, experts, gates)
    return dense.index_select(1, expert_of_column(ranks, gates.device))


def packed_z(z: Tensor, ranks: Sequence[int], shared_A: bool) -> Tensor:
    """Return z side by side for all experts, ``(N, R)``; a shared z is repeated."""
    return z.repeat(1, len(ranks)) if shared_A else z


def adapter(
    x: Tensor,
    lora_A: Tensor,
    router_weight: Tensor,
    scaling: Tensor,
    ranks: Sequence[int],
    top_k: int,
    shared_A: bool,
    renormalize: bool,
    token_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Adapter:
    """Shrink, route, mask: everything of the adapter that comes before ``lora_B``."""
    wide = wide_dtype(x)
    x = drop_masked(x, token_mask)
    z = dropout(x, dropout_p, dropout_seed) @ lora_A.T.to(x.dtype)
    logits = x.to(wide) @ router_weight.T.to(wide)
    return route(z, logits, scaling, ranks, top_k, shared_A, renormalize, token_mask)


def route(
    z: Tensor,
    logits: Tensor,
    scaling: Tensor,
    ranks: Sequence[int],
    top_k: int,
    shared_A: bool,
    renormalize: bool,
    token_mask: Tensor | None,
) -> Adapter:
    """Choose experts by their logits, and scale and mask z accordingly."""
    gates, experts = topk_softmax(logits, top_k, renormalize)
    gates = drop_masked(gates, token_mask)
    weight = scaling.to(logits.dtype) * column_gates(experts, gates, ranks)
    h = (weight * packed_z(z, ranks, shared_A)).to(z.dtype)
    return Adapter(h, z, experts, gates, logits)


def moe_lora(x: Tensor, base_out: Tensor, lora_A: Tensor, lora_B: Tensor, *rest: object) -> Tensor:
    """See :func:`floe_kernels.functional.moe_lora`; ``rest`` as in :func:`adapter`.

    Differentiable by autograd, as often as wanted; the choice of experts is not differentiated.
    """
    h = adapter(x, lora_A, *rest).h  # type: ignore[arg-type]
    return base_out + h @ lora_B.to(h.dtype)


def gate_gradient(
    grad_gates: Tensor, experts: Tensor, gates: Tensor, logits: Tensor, renormalize: bool
) -> Tensor:
    """Return the gradient of the logits ``(N, E)`` from that of the dense gates ``(N, E)``."""
    if renormalize:  # a softmax over the kept logits alone
        kept = grad_gates.gather(1, experts)
        kept = gates * (kept - (gates * kept).sum(-1, keepdim=True))
        return torch.zeros_like(logits).scatter(1, experts, kept)
    p = logits.softmax(-1)
    kept = torch.zeros_like(p).scatter(1, experts, (gates != 0).to(p.dtype)) * grad_gates
    return p * (kept - (p * kept).sum(-1, keepdim=True))


def aux_gradient(
    experts: Tensor, logits: Tensor, aux_coefs: Tensor, token_mask: Tensor | None
) -> Tensor:
    """Return the gradient of ``c_0 * load_balance_loss + c_1 * router_z_loss``, ``(N, E)``."""
    coefs = aux_coefs.to(logits.dtype)
    p = logits.softmax(-1)
    load = expert_load(experts, logits.shape[1], token_mask).to(logits.dtype)
    balance = logits.shape[1] * p * (load - p @ load[:, None])
    z = 2 * logits.logsumexp(-1, keepdim=True) * p
    rows = max(1, len(logits)) if token_mask is None else token_mask.sum().clamp(min=1)
    return drop_masked((coefs[0] * balance + coefs[1] * z) / rows, token_mask)


def moe_lora_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    scaling: Tensor,
    saved: Adapter,
    ranks: Sequence[int],
    shared_A: bool,
    renormalize: bool,
    token_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    aux_coefs: Tensor | None,
    needs: Sequence[bool],
    fisher: "FisherBuffers | None" = None,
) -> Gradients:
    """Differentiate :func:`moe_lora` in closed form.

    ``weight`` (O, I) is the frozen base's, None leaves its part out of ``Gradients.x``; ``saved``
    is what :func:`adapter` returned, its ``h`` is not read; ``needs`` says which of x, lora_A,
    lora_B and router want a gradient; per-sample squares are added to ``fisher``.
    """
    _, z, experts, gates, logits = saved
    wide = wide_dtype(x)
    x_kept, dy = drop_masked(x, token_mask), drop_masked(grad_out, token_mask).to(x.dtype)
    z_all = packed_z(z, ranks, shared_A)
    gate = scaling.to(wide) * column_gates(experts, gates, ranks)  # (N, R)
    u = dy @ lora_B.T.to(dy.dtype)  # (N, R)

    column_dg = scaling.to(wide) * z_all * u.to(wide)
    grad_gates = torch.zeros_like(logits).index_add(1, expert_of_column(ranks, x.device), column_dg)
    dlogits = gate_gradient(grad_gates, experts, gates, logits, renormalize)
    if aux_coefs is not None:
        dlogits = dlogits + aux_gradient(experts, logits, aux_coefs, token_mask)
    dlogits = drop_masked(dlogits, token_mask)
    dz = gate * u.to(wide)
    if shared_A:
        dz = dz.view(len(dz), len(ranks), ranks[0]).sum(1)
    dz = dz.to(x.dtype)
    h = (gate * z_all).to(x.dtype)

    narrow = dlogits.to(x.dtype)
    x_dropped = dropout(x_kept, dropout_p, dropout_seed)
    if fisher is not None:
        fisher.add(x_kept, x_dropped, dy, dz, h, narrow, u, gate, z_all)
    grad_x = grad_A = grad_B = grad_router = None
    if needs[0]:
        grad_x = dropout(dz @ lora_A.to(x.dtype), dropout_p, dropout_seed)
        grad_x = grad_x + narrow @ router_weight.to(x.dtype)
        if weight is not None:
            grad_x = grad_x + grad_out @ weight.to(grad_out.dtype)
    if needs[1]:
        grad_A = dz.T @ x_dropped
    if needs[2]:
        grad_B = h.T @ dy
    if needs[3]:
        grad_router = narrow.T @ x_kept
    pairs = ((grad_x, x), (grad_A, lora_A), (grad_B, lora_B), (grad_router, router_weight))
    # a fresh empty each: an operator's outputs may not be one tensor
    return Gradients(*(p.new_empty(0) if g is None else g.to(p.dtype) for g, p in pairs))


class FisherBuffers(NamedTuple):
    """Running sums of one layer's per-sample squared gradients; each one optional.

    The shape of a buffer says how far it is summed: like the parameter, ``(rows,)`` or ``()``.
    """

    offsets: Tensor  #: ``(S + 1,)`` int64, the first row of each sample and the end of the last
    scale: Tensor | None  #: ``()`` or ``(S,)`` float32, multiplies a gradient before it is squared
    lora_A: Tensor | None
    lora_B: Tensor | None
    router: Tensor | None
    gate: Tensor | None  #: ``(S,)`` float32: gradient of a scalar gate on the adapter, NOT squared

    def add(
        self,
        x: Tensor,
        x_dropped: Tensor,
        dy: Tensor,
        dz: Tensor,
        h: Tensor,
        dlogits: Tensor,
        u: Tensor,
        gate: Tensor,
        z: Tensor,
    ) -> None:
        """Add the samples of one backward pass to every buffer."""
        pairs = ((self.lora_A, dz, x_dropped), (self.lora_B, h, dy), (self.router, dlogits, x))
        for buffer, g, columns in pairs:
            if buffer is not None:
                reduce = ("matrix", "rank", "element")[buffer.ndim]
                fisher = segment_grad_square(g, columns, self.offsets, self.scale, reduce)[1]
                buffer.add_(fisher)
        if self.gate is not None:
            # the adapter is linear in lora_B, so d loss / d gate = <lora_B, d loss / d lora_B>
            tokens = (gate * z * u).sum(1).double()  # differences of a running sum need the digits
            total = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)])
            samples = total[self.offsets[1:]] - total[self.offsets[:-1]]
            self.gate.add_(samples if self.scale is None else samples * self.scale)
