"""The adapted linear on a GPU, backward: which kernels run, in which order, on what.

Dims: N tokens, I inputs, O outputs, E experts, K experts kept per token, R packed columns,
C columns of z (R, or the one rank of a shared A).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from floe_kernels.reference.moe_lora import FisherBuffers, Gradients
from floe_kernels.triton.launch import (
    MOST_EXPERTS_IN_TILE,
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
    weight_tile,
)
from floe_kernels.triton.moe_lora_forward import Routed, update
from floe_kernels.triton.moe_lora_gate import (
    expert_picks_kernel,
    gate_kernel,
    gate_part_kernel,
    gate_parts_kernel,
)
from floe_kernels.triton.weight_grad import add_parts_kernel, weight_grad_kernel


class GateGradients(NamedTuple):
    """The gradients of everything as narrow as the adapter's rank."""

    h: Tensor  #: ``(N, R)``, not a gradient: lora_B's is ``h^T dy``
    dz: Tensor  #: ``(N, C)``, the first columns of one buffer
    dlogits: Tensor  #: ``(N, E)``, its last columns
    score: Tensor | None  #: ``(N,)`` float32, the gradient of one gate on all of the adapter


def expert_picks(experts: Tensor, num_experts: int, mask: Tensor | None) -> Tensor:
    """Return picks per expert in blocks of tokens, ``(blocks, E)`` int32, to be added by readers."""
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
    narrow = saved.z.new_empty(n, c + e)
    out = GateGradients(
        saved.z.new_empty(n, r),
        narrow[:, :c],
        narrow[:, c:],
        saved.gates.new_empty(n) if want_score else None,
    )
    owners = column_experts(ranks, dy.device)
    load = None if aux_coefs is None else expert_picks(saved.experts, e, mask)
    blocks = 0 if load is None else len(load)
    tile = gate_tile(dy, r)
    block_e, block_k = block(e, 1 << 16), block(k, 1 << 16, 1)
    router = {
        "K": k, "RENORMALIZE": renormalize, "HAS_MASK": mask is not None,
        "HAS_AUX": aux_coefs is not None, "HAS_SCORE": want_score,
        "BLOCK_E": block_e, "BLOCK_K": block_k,
    }  # fmt: skip
    products = {"HAS_MASK": mask is not None, **arithmetic(dy)}
    launch = options(tile.warps, tile.stages)
    row_blocks, steps = triton.cdiv(n, tile.rows), triton.cdiv(o, tile.depth)
    fits = 0 < r <= tile.columns and e <= MOST_EXPERTS_IN_TILE and not shared_A
    if n >= SPLIT_BELOW and fits:
        gate_kernel[(row_blocks,)](
            dy, lora_B, scaling, owners, mask, saved.z, saved.gates, saved.experts, saved.logits,
            aux_coefs, load, out.h, out.dz, out.dlogits, out.score,
            dy.stride(0), c + e, blocks, n, o, r, e, steps,
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
        c + e, blocks, split, n, r, c, e, **router, SHARED=shared_A,
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
    tile, block_e = weight_tile(x, max(r, 1)), block(e, MOST_EXPERTS_IN_TILE)
    column_blocks, steps = triton.cdiv(d, tile.rows), triton.cdiv(n, tile.depth)
    router_blocks = triton.cdiv(e, block_e)
    split = parts(column_blocks * max(triton.cdiv(r, tile.columns), 1), steps)
    target, active = out if out is not None else out2, dropout is not None and dropout.active
    part = target
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
            **options(tile.warps, tile.stages),
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
            split, size, size2, BLOCK=1024, **options(),
        )  # fmt: skip


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
    x, dy = rows_of(x), rows_of(grad_out.to(x.dtype))
    like = (x, lora_A, lora_B, router_weight)
    grads = Gradients(
        *(
            torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
            for t, need in zip(like, needs, strict=True)
        )
    )
    if not len(x):
        return Gradients(*(grad.zero_() for grad in grads))
    narrow_A, narrow_B, router = adapter_weights(x, lora_A, lora_B, router_weight)
    mask, dropout = as_bytes(token_mask), as_dropout(dropout_p, dropout_seed)
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
    weight_gradient(x, mask, gate.dz, wanted[1], gate.dlogits, wanted[3], dropout)
    weight_gradient(dy, mask, gate.h, wanted[2])
    return grads._replace(x=grad_x)
