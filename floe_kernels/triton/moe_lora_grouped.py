"""The adapter over tokens sorted by expert, for layers too wide to compute every column.

Dims: N tokens, I inputs, O outputs, E experts, K experts kept per token, R packed columns,
Q columns an expert has at most (a power of two), S = N K pairs.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from floe_kernels.triton.grouped_products import (
    grouped_add_parts_kernel,
    grouped_gate_kernel,
    grouped_router_kernel,
    grouped_shrink_kernel,
    grouped_update_kernel,
    grouped_weight_grad_kernel,
)
from floe_kernels.triton.grouping import (
    BY_CHUNK,
    BY_EXPERT,
    BY_SLOT,
    CHUNK,
    Pairs,
    list_tiles,
    sort_pairs,
)
from floe_kernels.triton.launch import (
    Dropout,
    arithmetic,
    block,
    expand_tile,
    expert_columns,
    gate_tile,
    options,
    shrink_tile,
    weight_tile,
)

# an expert with more pairs is summed in pieces: a hot one must not hold up the rest
PIECE = 1024


class PairGradients(NamedTuple):
    """What the backward computes pair by pair."""

    h: Tensor  #: ``(S, Q)``
    dz: Tensor  #: ``(S, Q)``
    gates: Tensor  #: ``(N, K)`` float32


def widest(ranks: Sequence[int]) -> int:
    """Return Q: every expert's columns fit one tile, and every row of a buffer is aligned."""
    return block(max(ranks, default=0), 128)


def tile_rows(pairs: Pairs) -> int:
    """Return the pairs a tile takes: most of it is used if an expert has as many in a chunk."""
    return block(pairs.total // (pairs.experts * pairs.chunks), 64)


def pair_warps(q: int) -> int:
    """Return the warps of a gathered product: 64 rows by 128 columns spill in four (sm_90)."""
    return 8 if q > 64 else 4


def shrink_pairs(
    x: Tensor,
    lora_A: Tensor,
    scaling: Tensor,
    gates: Tensor,
    pairs: Pairs,
    ranks: Sequence[int],
    dropout: Dropout,
) -> tuple[Tensor, Tensor]:
    """Return z ``(N, R)``, zero where an expert was not kept, and h ``(S, Q)``."""
    (n, i), q = x.shape, widest(ranks)
    z, h = x.new_zeros(n, len(lora_A)), x.new_empty(pairs.total, q)
    tile, rows = shrink_tile(x, lora_A[:q]), tile_rows(pairs)
    tiles = list_tiles(pairs, BY_CHUNK, rows)
    grouped_shrink_kernel[(tiles.bound,)](
        x, lora_A, scaling, gates, tiles.tile, pairs.pair, expert_columns(ranks, x.device),
        dropout.seed, z, h, dropout.threshold, dropout.keep_scale, x.stride(0), i, len(lora_A), q,
        triton.cdiv(i, tile.depth), K=pairs.slots, DROPOUT=dropout.active, **arithmetic(x),
        ROWS=rows, BLOCK_D=tile.depth, BLOCK_Q=q,
        **options(pair_warps(q), tile.stages, x.device),
    )  # fmt: skip
    return z, h


def update_pairs(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    pairs: Pairs,
    ranks: Sequence[int],
    dropout: Dropout | None = None,
) -> Tensor:
    """Add every pair's ``left right`` to its token's row of ``out``, slot after slot."""
    (n, d), q = out.shape, left.shape[1]
    tile, rows = expand_tile(left, q), tile_rows(pairs)
    tiles = list_tiles(pairs, BY_SLOT, rows)
    for first, tokens in _chunks(n):
        for slot in range(pairs.slots):
            bound = triton.cdiv(tokens, rows) + pairs.experts
            grouped_update_kernel[(triton.cdiv(d, tile.columns), bound)](
                out, left, right, tiles.tile, tiles.group, pairs.pair,
                expert_columns(ranks, out.device), dropout.seed if dropout else None,
                dropout.threshold if dropout else 0, dropout.keep_scale if dropout else 1.0,
                (first * pairs.slots + slot) * pairs.experts,
                out.stride(0), d, pairs.experts, q, K=pairs.slots,
                DROPOUT=dropout is not None and dropout.active, **arithmetic(left),
                ROWS=rows, BLOCK_D=tile.columns, BLOCK_Q=tile.depth,
                **options(tile.warps, tile.stages, out.device),
            )  # fmt: skip
    return out


def gate_pairs(
    dy: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    z: Tensor,
    gates: Tensor,
    pairs: Pairs,
    ranks: Sequence[int],
) -> PairGradients:
    """Return h, dz and the gates' gradients."""
    o, q = dy.shape[1], widest(ranks)
    out = PairGradients(
        z.new_empty(pairs.total, q), z.new_empty(pairs.total, q), torch.empty_like(gates)
    )
    tile, rows = gate_tile(dy, lora_B[:q]), tile_rows(pairs)
    tiles = list_tiles(pairs, BY_CHUNK, rows)
    grouped_gate_kernel[(tiles.bound,)](
        dy, lora_B, scaling, gates, z, tiles.tile, pairs.pair, expert_columns(ranks, dy.device),
        *out, dy.stride(0), o, len(lora_B), q, triton.cdiv(o, tile.depth),
        K=pairs.slots, **arithmetic(dy), ROWS=rows, BLOCK_D=tile.depth, BLOCK_Q=q,
        **options(pair_warps(q), tile.stages, dy.device),
    )  # fmt: skip
    return out


def router_pairs(
    grad_gates: Tensor,
    gates: Tensor,
    experts: Tensor,
    logits: Tensor,
    renormalize: bool,
    mask: Tensor | None,
    aux_coefs: Tensor | None,
    load: Tensor | None,
    narrow: Tensor,
) -> Tensor:
    """Return dlogits in the dtype of ``narrow``, an empty tensor on the same device."""
    (n, e), k = logits.shape, gates.shape[1]
    out = narrow.new_empty(n, triton.cdiv(e, 16) * 16)  # rows aligned to 16 bytes
    block_e = block(e, 1 << 16)
    rows = max(1, min(16, 2048 // block_e))
    grouped_router_kernel[(triton.cdiv(n, rows),)](
        grad_gates, gates, experts, logits, mask, aux_coefs, load, out, out.stride(0),
        0 if load is None else len(load), n, e, K=k, RENORMALIZE=renormalize,
        HAS_MASK=mask is not None, HAS_AUX=aux_coefs is not None,
        BLOCK_N=rows, BLOCK_E=block_e, BLOCK_K=block(k, 1 << 16, 1), **options(),
    )  # fmt: skip
    return out[:, :e]


def weight_gradient_pairs(
    x: Tensor,
    g: Tensor,
    out: Tensor,
    pairs: Pairs,
    ranks: Sequence[int],
    dropout: Dropout | None = None,
) -> None:
    """Write every expert's ``g^T x[tokens]`` to its rows of ``out``."""
    d, q = x.shape[1], g.shape[1]
    active = dropout is not None and dropout.active
    tile, columns = weight_tile(x, q, active), expert_columns(ranks, x.device)
    tiles = list_tiles(pairs, BY_EXPERT, PIECE)
    # a split expert has more than PIECE pairs, hence less than twice as many pieces as full ones
    part = x.new_empty(2 * triton.cdiv(pairs.total, PIECE), q, d, dtype=torch.float32)
    grouped_weight_grad_kernel[(tiles.bound, triton.cdiv(d, tile.rows))](
        g, x, tiles.tile, pairs.pair, columns, dropout.seed if dropout else None, out, part,
        dropout.threshold if dropout else 0, dropout.keep_scale if dropout else 1.0,
        x.stride(0), d, q, K=pairs.slots, DROPOUT=active,
        **arithmetic(x), BLOCK_N=tile.depth, BLOCK_D=tile.rows, BLOCK_Q=q,
        **options(tile.warps, tile.stages, x.device),
    )  # fmt: skip
    grouped_add_parts_kernel[(triton.cdiv(q * d, 1024), pairs.experts)](
        part, tiles.group, columns, out, d, q, BLOCK=1024, **options(),
    )  # fmt: skip


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    """Yield every chunk's number and how many tokens it has."""
    for chunk in range(triton.cdiv(n, CHUNK)):
        yield chunk, min(CHUNK, n - chunk * CHUNK)


__all__ = [
    "gate_pairs",
    "router_pairs",
    "shrink_pairs",
    "sort_pairs",
    "update_pairs",
    "weight_gradient_pairs",
]
