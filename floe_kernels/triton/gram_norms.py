"""Norms of per-sample gradients from Gram matrices: ``||g^T x||^2 = <g g^T, x x^T>``.

For samples short beside the weight's sides this is less work than the gradient itself; neither
Gram matrix leaves the registers.

Dims: N tokens, R columns of g, D columns of x, S samples, B blocks of tokens, none of which spans
two samples; J programs share a block's partners.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_kernels.triton.grad_square_pieces import DTYPES
from floe_kernels.triton.launch import arithmetic, gram_tile, options, parts, rows_of
from floe_kernels.triton.segments import list_blocks, segment_sum
from floe_kernels.triton.tiles import dot


@triton.jit
def _gram(
    x_ptr,
    row,
    other_row,
    live,
    other_live,
    x_stride_n,
    D,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the inner products of two blocks' rows, (BLOCK_T, BLOCK_T)."""
    t = tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for step in range(tl.cdiv(D, BLOCK_D)):
        d = step * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = d < D
        x = tl.load(
            x_ptr + row * x_stride_n + (t[:, None] * x_stride_n + d[None, :]),
            mask=live[:, None] & in_d[None, :],
            other=0.0,
        )
        other = tl.load(
            x_ptr + other_row * x_stride_n + (t[:, None] * x_stride_n + d[None, :]),
            mask=other_live[:, None] & in_d[None, :],
            other=0.0,
        )
        acc = dot(x.to(DTYPE), tl.trans(other.to(DTYPE)), acc, PRECISION, WIDEN)
    return acc


@triton.jit(do_not_specialize=["S"])
def gram_product_kernel(
    g_ptr,  # (N, R)
    x_ptr,  # (N, D)
    row_ptr,  # (B,) int64: a block's first row
    rows_ptr,  # (B,) int32: its rows, negated where it ends its segment
    segment_ptr,  # (B,) int32
    first_ptr,  # (S + 3,) int32: the first block of each segment, then how many there are
    part_ptr,  # (B, J) float32
    g_stride_n,
    x_stride_n,
    R,
    D,
    S,
    DTYPE: tl.constexpr,  # of the operands of the products
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Meet one block with every J-th of itself and those after it in its sample."""
    block, turn, turns = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    t = tl.arange(0, BLOCK_T)
    segment = tl.load(segment_ptr + block)
    row = tl.load(row_ptr + block)
    live = t < tl.abs(tl.load(rows_ptr + block))
    # rows of no sample, and blocks beyond the last, meet nobody
    end = tl.load(first_ptr + segment + 1)
    end = tl.where((segment > 0) & (segment <= S), end, block)
    total = 0.0
    for other in range(block + turn, end, turns):
        other_row = tl.load(row_ptr + other)
        other_live = t < tl.abs(tl.load(rows_ptr + other))
        x_gram = _gram(
            x_ptr, row, other_row, live, other_live, x_stride_n, D,
            DTYPE, PRECISION, WIDEN, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        g_gram = _gram(
            g_ptr, row, other_row, live, other_live, g_stride_n, R,
            DTYPE, PRECISION, WIDEN, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        product = tl.sum(tl.sum(x_gram * g_gram, axis=1), axis=0)
        total += tl.where(other == block, product, 2 * product)  # the matrices are symmetric
    tl.store(part_ptr + block.to(tl.int64) * turns + turn, total)


def gram_norms(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    """Return the squared norm of each sample's gradient, ``(S,)`` float32."""
    g, x = rows_of(g), rows_of(x)
    (n, r), d, s = g.shape, x.shape[1], len(offsets) - 1
    tile = gram_tile(x)
    blocks = list_blocks(offsets, n, tile.rows)
    bound = len(blocks.row)
    turns = parts(bound, triton.cdiv(triton.cdiv(n, s), tile.rows))
    part = x.new_empty(bound, turns, dtype=torch.float32)
    gram_product_kernel[(bound, turns)](
        g, x, blocks.row, blocks.rows, blocks.segment, blocks.first, part,
        g.stride(0), x.stride(0), r, d, s,
        DTYPE=DTYPES[torch.promote_types(g.dtype, x.dtype)], **arithmetic(x),
        BLOCK_T=tile.rows, BLOCK_D=tile.depth, **options(tile.warps, tile.stages, x.device),
    )  # fmt: skip
    # a sample's blocks follow one another, and so do their programs' sums
    norms = segment_sum(part.view(-1), blocks.first[1 : s + 2].long() * turns).clamp(min=0)
    return norms if scale is None else norms * scale.float().square()
