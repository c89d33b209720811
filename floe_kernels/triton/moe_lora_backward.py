"""The adapted linear on a GPU, backward: which kernels run, in which order, on what.

Dims: N tokens, I inputs, O outputs, E experts, K experts kept per token, R packed columns,
C columns of z (R, or the one rank of a shared A).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from floe_kernels import reference
from floe_kernels.reference.moe_lora import Adapter, FisherBuffers, Gradients
from floe_kernels.triton.grad_square import grad_squares
from floe_kernels.triton.launch import (
    MOST_EXPERTS_IN_TILE,
    MOST_GATE_COLUMNS,
    SPLIT_BELOW,
    Dropout,
    adapter_weights,
    arithmetic,
    as_bytes,
    as_dropout,
    block,
    column_experts,
    gate_tile,
    options,
    parts,
    rows_of,
    use_groups,
    weight_tile,
)
from floe_kernels.triton.moe_lora_forward import Routed, update
from floe_kernels.triton.moe_lora_gate import (
    expert_picks_kernel,
    gate_kernel,
    gate_part_kernel,
    gate_parts_kernel,
)
from floe_kernels.triton.moe_lora_grouped import (
    gate_pairs,
    router_pairs,
    sort_pairs,
    update_pairs,
    weight_gradient_pairs,
)
from floe_kernels.triton.segments import segment_sum
from floe_kernels.triton.weight_grad import add_parts_kernel, weight_grad_kernel


class GateGradients(NamedTuple):
    """The gradients of everything as narrow as the adapter's rank."""

    h: Tensor  #: ``(N, R)``, not a gradient: lora_B's is ``h^T dy``
    dz: Tensor  #: ``(N, C)``, the first columns of one buffer
    dlogits: Tensor  #: ``(N, E)``, its last columns
    score: Tensor | None  #: ``(N,)`` float32, the gradient of one gate on all of the adapter


def expert_picks(experts: Tensor, num_experts: int, mask: Tensor | None) -> Tensor:
    """Return picks per expert in blocks of tokens, ``(blocks, E)`` int32; readers add them."""
    (n, k), rows = experts.shape, 1024
    picks = experts.new_empty(triton.cdiv(n, rows), num_experts, dtype=torch.int32)
    expert_picks_kernel[(len(picks),)](
        experts, mask, picks, n, num_experts, K=k, HAS_MASK=mask is not None,
        BLOCK_N=rows, BLOCK_E=block(num_experts, 1 << 16), **options(),
    )  # fmt: skip
    return picks


def gate_gradients(
    dy: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    saved: Routed,
    ranks: Sequence[int],
    shared_A: bool,
    renormalize: bool,
    mask: Tensor | None,
    aux_coefs: Tensor | None,
    want_score: bool,
) -> GateGradients:
    """Return h, dz and dlogits; one kernel for many tokens, two for few or wide ones."""
    (n, o), (r, c, e) = dy.shape, (len(scaling), saved.z.shape[1], saved.logits.shape[1])
    k = saved.experts.shape[1]
    # a stride that 16 divides lets kernels load 16 bytes at once: 2 at a time are not copied ahead
    narrow = saved.z.new_empty(n, triton.cdiv(c + e, 16) * 16)
    out = GateGradients(
        saved.z.new_empty(n, r),
        narrow[:, :c],
        narrow[:, c : c + e],
        saved.gates.new_empty(n) if want_score else None,
    )
    owners = column_experts(ranks, dy.device)
    load = None if aux_coefs is None else expert_picks(saved.experts, e, mask)
    blocks = 0 if load is None else len(load)
    tile = gate_tile(dy, lora_B)
    block_e, block_k = block(e, 1 << 16), block(k, 1 << 16, 1)
    router = {
        "K": k, "RENORMALIZE": renormalize, "HAS_MASK": mask is not None,
        "HAS_AUX": aux_coefs is not None, "HAS_SCORE": want_score,
        "BLOCK_E": block_e, "BLOCK_K": block_k,
    }  # fmt: skip
    products = {"HAS_MASK": mask is not None, **arithmetic(dy)}
    launch = options(tile.warps, tile.stages, dy.device)
    row_blocks, steps = triton.cdiv(n, tile.rows), triton.cdiv(o, tile.depth)
    fits = (
        0 < r <= min(tile.columns, MOST_GATE_COLUMNS) and e <= MOST_EXPERTS_IN_TILE and not shared_A
    )
    if n >= SPLIT_BELOW and fits:
        gate_kernel[(row_blocks,)](
            dy, lora_B, scaling, owners, mask, saved.z, saved.gates, saved.experts, saved.logits,
            aux_coefs, load, out.h, out.dz, out.dlogits, out.score,
            dy.stride(0), narrow.stride(0), blocks, n, o, r, e, steps,
            **{**router, **products}, **launch,
            BLOCK_N=tile.rows, BLOCK_O=tile.depth, BLOCK_R=tile.columns,
        )  # fmt: skip
        return out
    column_blocks = triton.cdiv(r, tile.columns)
    split = parts(row_blocks * max(column_blocks, 1), steps)
    part = dy.new_empty(split, n, r, dtype=torch.float32)
    if column_blocks:
        gate_part_kernel[(row_blocks, column_blocks, split)](
            dy, lora_B, mask, part, dy.stride(0), n, o, r, triton.cdiv(steps, split),
            **products, **launch, BLOCK_N=tile.rows, BLOCK_O=tile.depth, BLOCK_R=tile.columns,
        )  # fmt: skip
    rows = max(1, min(16, 2048 // block_e))
    gate_parts_kernel[(triton.cdiv(n, rows),)](
        part, scaling, owners, mask, saved.z, saved.gates, saved.experts, saved.logits,
        aux_coefs, load, out.h, out.dz, out.dlogits, out.score,
        narrow.stride(0), blocks, split, n, r, c, e, **router, SHARED=shared_A,
        BLOCK_N=rows, BLOCK_C=block(c, 128), **options(),
    )  # fmt: skip
    return out


def weight_gradient(
    x: Tensor,
    mask: Tensor | None,
    g: Tensor | None,
    out: Tensor | None,
    g2: Tensor | None = None,
    out2: Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    """Write ``g^T drop(x)`` to ``out`` and ``g2^T x`` to ``out2``, from one read of x."""
    n, d = x.shape
    r = 0 if out is None else len(out)
    e = 0 if out2 is None else len(out2)
    if not d or not r + e:
        return
    active = dropout is not None and dropout.active
    tile, block_e = weight_tile(x, max(r, 1), active or e > 16), block(e, MOST_EXPERTS_IN_TILE)
    column_blocks, steps = triton.cdiv(d, tile.rows), triton.cdiv(n, tile.depth)
    router_blocks = triton.cdiv(e, block_e)
    split = parts(column_blocks * max(triton.cdiv(r, tile.columns), 1), steps)
    part = out if out is not None else out2
    if split > 1:
        part = x.new_empty(split, r + e, d, dtype=torch.float32)

    def launch(blocks: int, has_g: bool, has_g2: bool) -> None:
        weight_grad_kernel[(column_blocks, blocks, split)](
            g, x, g2, mask, dropout.seed if dropout else None, part, out2 if e else part,
            dropout.threshold if dropout else 0, dropout.keep_scale if dropout else 1.0,
            g.stride(0) if g is not None else 0, x.stride(0), g2.stride(0) if g2 is not None else 0,
            n, d, r, e, triton.cdiv(steps, split), HAS_G=has_g, HAS_G2=has_g2,
            HAS_MASK=mask is not None, DROPOUT=active, PARTS=split > 1, **arithmetic(x),
            BLOCK_N=tile.depth, BLOCK_D=tile.rows, BLOCK_R=tile.columns, BLOCK_E=block_e,
            **options(tile.warps, tile.stages, x.device),
        )  # fmt: skip

    if r and router_blocks == 1:
        launch(triton.cdiv(r, tile.columns), True, True)
    else:
        if r:
            launch(triton.cdiv(r, tile.columns), True, False)
        if e:
            launch(router_blocks, False, True)
    if split > 1:
        size, size2 = r * d, e * d
        add_parts_kernel[(triton.cdiv(size + size2, 1024),)](
            part, out if out is not None else out2, out2 if out2 is not None else out,
            size + size2, split, size, size2, INTO2=False, BLOCK=1024, **options(),
        )  # fmt: skip


def add_fisher(
    fisher: FisherBuffers,
    wanted: list[Tensor | None],
    x: Tensor,
    dy: Tensor,
    gate: GateGradients,
    mask: Tensor | None,
    dropout: Dropout,
) -> list[Tensor | None]:
    """Add the samples to every buffer; return the gradients that did not come out on the way."""
    left = list(wanted)
    jobs = (
        (fisher.lora_A, 1, gate.dz, x, dropout),
        (fisher.lora_B, 2, gate.h, dy, None),
        (fisher.router, 3, gate.dlogits, x, None),
    )
    for buffer, which, g, columns, dropped in jobs:
        if buffer is None or not g.shape[1]:
            continue
        direct = buffer.ndim == 2 and buffer.dtype == torch.float32 and buffer.is_contiguous()
        square = buffer if direct else None
        if buffer.ndim and not direct:
            square = columns.new_zeros(g.shape[1], columns.shape[1], dtype=torch.float32)
        norms = grad_squares(
            g, columns, fisher.offsets, fisher.scale, wanted[which], square, not buffer.ndim,
            mask, dropped,
        )  # fmt: skip
        left[which] = None
        if norms is not None:
            buffer.add_(norms.sum())
        elif square is not None and not direct:
            buffer.add_(square if buffer.ndim == 2 else square.sum(1))
    if fisher.gate is not None and gate.score is not None:
        samples = segment_sum(gate.score, fisher.offsets)
        fisher.gate.add_(samples if fisher.scale is None else samples * fisher.scale)
    return left


def grouped_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    scaling: Tensor,
    saved: Routed,
    ranks: Sequence[int],
    renormalize: bool,
    mask: Tensor | None,
    dropout: Dropout,
    aux_coefs: Tensor | None,
    needs: Sequence[bool],
    grads: Gradients,
) -> Gradients:
    """Differentiate with the tokens sorted by expert."""
    pairs = sort_pairs(saved.experts, len(router), mask)
    gate = gate_pairs(dy, lora_B, scaling, saved.z, saved.gates, pairs, ranks)
    load = None if aux_coefs is None else expert_picks(saved.experts, len(router), mask)
    dlogits = router_pairs(
        gate.gates, saved.gates, saved.experts, saved.logits, renormalize, mask, aux_coefs, load,
        x.new_empty(0),
    )  # fmt: skip
    grad_x = grads.x
    if needs[0]:
        base = None
        if weight is not None:
            base = grad_x = dy @ weight.to(dy.dtype)
        update(base, grad_x, dlogits, router)
        update_pairs(grad_x, gate.dz, lora_A, pairs, ranks, dropout)
    if needs[1]:
        weight_gradient_pairs(x, gate.dz, grads.lora_A, pairs, ranks, dropout)
    if needs[2]:
        weight_gradient_pairs(dy, gate.h, grads.lora_B, pairs, ranks)
    weight_gradient(x, mask, None, None, dlogits, grads.router if needs[3] else None)
    return grads._replace(x=grad_x)


def moe_lora_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    scaling: Tensor,
    z: Tensor,
    experts: Tensor,
    gates: Tensor,
    logits: Tensor,
    ranks: Sequence[int],
    shared_A: bool,
    renormalize: bool,
    token_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    aux_coefs: Tensor | None,
    needs: Sequence[bool],
    fisher: FisherBuffers | None,
) -> Gradients:
    """Differentiate in closed form; see :func:`floe_kernels.reference.moe_lora_backward`."""
    if x.dtype == torch.float64:
        return reference.moe_lora_backward(
            grad_out, x, weight, lora_A, lora_B, router_weight, scaling,
            Adapter(z, z, experts, gates, logits), ranks, shared_A, renormalize, token_mask,
            dropout_p, dropout_seed, aux_coefs, needs, fisher,
        )  # fmt: skip
    x, dy = rows_of(x), rows_of(grad_out.to(x.dtype))
    # with a base, its GEMM brings the memory for x's gradient
    made = (needs[0] and (weight is None or not len(x)), *needs[1:])
    grads = Gradients(
        *(
            torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
            for t, need in zip((x, lora_A, lora_B, router_weight), made, strict=True)
        )
    )
    if not len(x):
        return Gradients(*(grad.zero_() for grad in grads))
    narrow_A, narrow_B, router = adapter_weights(x, lora_A, lora_B, router_weight)
    mask, dropout = as_bytes(token_mask), as_dropout(dropout_p, dropout_seed)
    if fisher is None and use_groups(ranks, experts.shape[1], shared_A):
        saved = Routed(z, z, experts, gates, logits)
        return grouped_backward(
            dy, x, weight, narrow_A, narrow_B, router, scaling, saved, ranks,
            renormalize, mask, dropout, aux_coefs, needs, grads,
        )  # fmt: skip
    gate = gate_gradients(
        dy, narrow_B, scaling, Routed(z, z, experts, gates, logits), ranks, shared_A,
        renormalize, mask, aux_coefs, fisher is not None and fisher.gate is not None,
    )  # fmt: skip
    grad_x = grads.x
    if needs[0]:
        base = None
        if weight is not None:
            base = grad_x = dy @ weight.to(dy.dtype)
        update(base, grad_x, gate.dz, narrow_A, gate.dlogits, router, dropout)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    if fisher is not None:
        wanted = add_fisher(fisher, wanted, x, dy, gate, mask, dropout)
    weight_gradient(x, mask, gate.dz, wanted[1], gate.dlogits, wanted[3], dropout)
    weight_gradient(dy, mask, gate.h, wanted[2])
    return grads._replace(x=grad_x)
