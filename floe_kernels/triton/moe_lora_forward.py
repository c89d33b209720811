"""The adapted linear on a GPU, forward: which kernels run, in which order, on what.

float64 has no kernel: it is for checking, and goes to the reference.

Dims: N tokens, I inputs, O outputs, E experts, K experts kept per token, R packed columns,
C columns of z (R, or the one rank of a shared A).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from floe_kernels.reference.moe_lora import adapter
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
    expand_tile,
    options,
    parts,
    rows_of,
    shrink_tile,
    use_groups,
)
from floe_kernels.triton.moe_lora_grouped import shrink_pairs, sort_pairs, update_pairs
from floe_kernels.triton.moe_lora_shrink import (
    route_parts_kernel,
    shrink_part_kernel,
    shrink_route_kernel,
)
from floe_kernels.triton.rank_update import rank_update_kernel


class Routed(NamedTuple):
    """What the forward leaves for the expand and for the backward."""

    h: Tensor
    z: Tensor
    experts: Tensor
    gates: Tensor
    logits: Tensor


def shrink_and_route(
    x: Tensor,
    lora_A: Tensor,
    router: Tensor,
    scaling: Tensor,
    ranks: Sequence[int],
    top_k: int,
    shared_A: bool,
    renormalize: bool,
    mask: Tensor | None,
    dropout: Dropout,
) -> Routed:
    """Return h, z and the routing; one kernel for many tokens, two for few or wide ones."""
    (n, i), c, e, r = x.shape, len(lora_A), len(router), len(scaling)
    out = Routed(
        x.new_empty(n, r),
        x.new_empty(n, c),
        x.new_empty(n, top_k, dtype=torch.int64),
        x.new_empty(n, top_k, dtype=torch.float32),
        x.new_empty(n, e, dtype=torch.float32),
    )
    if n == 0:
        return out
    tile = shrink_tile(x, lora_A if c else router[:0], e)
    owners = column_experts(ranks, x.device)
    block_e, block_k = block(e, MOST_EXPERTS_IN_TILE), block(top_k, 1 << 16, 1)
    products = {"HAS_MASK": mask is not None, "DROPOUT": dropout.active, **arithmetic(x)}
    launch = options(tile.warps, tile.stages, x.device)
    row_blocks, steps = triton.cdiv(n, tile.rows), triton.cdiv(i, tile.depth)
    drop = (dropout.threshold, dropout.keep_scale)
    routing = {"K": top_k, "RENORMALIZE": renormalize, "SHARED": shared_A, "BLOCK_K": block_k}
    if n >= SPLIT_BELOW and 0 < c <= tile.columns and e <= block_e:
        shrink_route_kernel[(row_blocks,)](
            x, lora_A, router, scaling, owners, mask, dropout.seed,
            out.z, out.h, out.gates, out.experts, out.logits,
            *drop, x.stride(0), n, i, r, c, e, steps, **routing, **products, **launch,
            BLOCK_N=tile.rows, BLOCK_I=tile.depth, BLOCK_C=tile.columns, BLOCK_E=block_e,
        )  # fmt: skip
        return out
    column_blocks, router_blocks = triton.cdiv(c, tile.columns), triton.cdiv(e, block_e)
    split = parts(row_blocks * max(column_blocks, 1), steps)
    each = triton.cdiv(steps, split)
    part = x.new_empty(split, n, c + e, dtype=torch.float32)

    def shrink(blocks: int, has_A: bool, has_router: bool) -> None:
        shrink_part_kernel[(row_blocks, blocks, split)](
            x, lora_A, router, mask, dropout.seed, part,
            *drop, x.stride(0), n, i, c, e, each, HAS_A=has_A, HAS_ROUTER=has_router,
            **products, **launch,
            BLOCK_N=tile.rows, BLOCK_I=tile.depth, BLOCK_C=tile.columns, BLOCK_E=block_e,
        )  # fmt: skip

    if column_blocks and router_blocks == 1:
        shrink(column_blocks, True, True)
    else:
        if column_blocks:
            shrink(column_blocks, True, False)
        shrink(router_blocks, False, True)
    all_e = block(e, 1 << 16)
    rows = max(1, min(16, 2048 // all_e))
    route_parts_kernel[(triton.cdiv(n, rows),)](
        part, scaling, owners, mask, out.z, out.h, out.gates, out.experts, out.logits,
        split, n, r, c, e, **routing, HAS_A=c > 0, HAS_MASK=mask is not None,
        BLOCK_N=rows, BLOCK_C=tile.columns, BLOCK_E=all_e, **options(),
    )  # fmt: skip
    return out


def update(
    base: Tensor | None,
    out: Tensor,
    left: Tensor,
    right: Tensor,
    left2: Tensor | None = None,
    right2: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Write ``base + drop(left right) + left2 right2`` to ``out``, which may be ``base``."""
    (n, o), r = out.shape, left.shape[1]
    second = left2 is not None and right2 is not None
    e = right2.shape[0] if right2 is not None else 0
    if not n or not o or (base is out and not r + e):
        return out
    tile, active = expand_tile(left, r), dropout is not None and dropout.active
    rank_update_kernel[(triton.cdiv(o, tile.columns), triton.cdiv(n, tile.rows))](
        out if base is None else base, out, left, right,
        left2 if second else None, right2 if second else None,
        dropout.seed if dropout else None,
        dropout.threshold if dropout else 0, dropout.keep_scale if dropout else 1.0,
        out.stride(0) if base is None else base.stride(0), out.stride(0),
        left.stride(0), left2.stride(0) if left2 is not None else 0, n, o, r, e,
        HAS_BASE=base is not None, HAS_SECOND=second, DROPOUT=active, **arithmetic(left),
        BLOCK_N=tile.rows, BLOCK_O=tile.columns, BLOCK_R=tile.depth, BLOCK_E=block(e, 64),
        **options(tile.warps, tile.stages, left.device),
    )  # fmt: skip
    return out


def run_adapter(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    scaling: Tensor,
    ranks: Sequence[int],
    top_k: int,
    shared_A: bool,
    renormalize: bool,
    mask: Tensor | None,
    dropout: Dropout,
) -> tuple[Callable[[Tensor, Tensor], object], Tensor, Tensor, Tensor, Tensor]:
    """Shrink and route; return what adds the experts to (base, out), then what is saved."""
    lora_A, lora_B, router = adapter_weights(x, lora_A, lora_B, router_weight)
    if not (use_groups(ranks, top_k, shared_A) and len(x)):
        routed = shrink_and_route(
            x, lora_A, router, scaling, ranks, top_k, shared_A, renormalize, mask, dropout
        )
        return lambda base, out: update(base, out, routed.h, lora_B), *routed[1:]
    routed = shrink_and_route(
        x, lora_A[:0], router, scaling[:0], (), top_k, False, renormalize, mask, dropout
    )
    pairs = sort_pairs(routed.experts, len(router), mask)
    z, h = shrink_pairs(x, lora_A, scaling, routed.gates, pairs, ranks, dropout)

    def add(base: Tensor, out: Tensor) -> None:
        if base is not out:
            out.copy_(base)
        update_pairs(out, h, lora_B, pairs, ranks)

    return add, z, *routed[2:]


def moe_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    scaling: Tensor,
    ranks: Sequence[int],
    top_k: int,
    shared_A: bool,
    renormalize: bool,
    token_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Own both GEMMs: cuBLAS for the frozen one, the experts added in place."""
    if x.dtype == torch.float64:
        readable = adapter(
            x, lora_A, router_weight, scaling, ranks, top_k, shared_A, renormalize,
            token_mask, dropout_p, dropout_seed,
        )  # fmt: skip
        out = F.linear(x, weight, bias).addmm_(readable.h, lora_B.to(x.dtype))
        return out, *readable[1:]
    x = rows_of(x)
    add, z, experts, gates, logits = run_adapter(
        x, lora_A, lora_B, router_weight, scaling, ranks, top_k, shared_A, renormalize,
        as_bytes(token_mask), as_dropout(dropout_p, dropout_seed),
    )  # fmt: skip
    out = F.linear(x, weight, bias)
    add(out, out)
    return out, z, experts, gates, logits


def moe_lora(
    x: Tensor,
    base_out: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    scaling: Tensor,
    ranks: Sequence[int],
    top_k: int,
    shared_A: bool,
    renormalize: bool,
    token_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Add the experts to a base's output, in a new tensor."""
    if x.dtype == torch.float64:
        readable = adapter(
            x, lora_A, router_weight, scaling, ranks, top_k, shared_A, renormalize,
            token_mask, dropout_p, dropout_seed,
        )  # fmt: skip
        return base_out + (readable.h @ lora_B.to(x.dtype)).to(base_out.dtype), *readable[1:]
    x, base_out = rows_of(x), rows_of(base_out)
    add, z, experts, gates, logits = run_adapter(
        x, lora_A, lora_B, router_weight, scaling, ranks, top_k, shared_A, renormalize,
        as_bytes(token_mask), as_dropout(dropout_p, dropout_seed),
    )  # fmt: skip
    out = base_out.new_empty(base_out.shape)
    add(base_out, out)
    return out, z, experts, gates, logits
