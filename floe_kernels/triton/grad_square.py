"""Weight gradient, per-sample squares and norms from one read of the operands.

One flat loop over blocks of tokens that never span two samples: the square is taken where a sample
ends, so that a sample is summed before it is squared and squared before samples are summed.

Dims: N tokens, R columns of g, D columns of x, S samples, U units (contiguous whole samples).
Rows before the first sample and after the last count in the gradient alone: segments 0 and S + 1,
beside samples 1..S.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_kernels import reference
from floe_kernels.triton.grad_square_pieces import DTYPES, grad_squares_in_pieces
from floe_kernels.triton.launch import (
    Dropout,
    arithmetic,
    options,
    parts,
    rows_of,
    sample_pieces,
    square_tile,
)
from floe_kernels.triton.tiles import dot, drop
from floe_kernels.triton.weight_grad import add_parts_kernel

SEGMENTS_A_STEP = 1024  # offsets one program scans at once: 8 KB


@triton.jit(do_not_specialize=["N", "S"])
def first_blocks_kernel(
    offsets_ptr,  # (S + 1,) int64
    first_ptr,  # (S + 3,) int32: the first block of each segment, then how many there are
    N,
    S,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Count the blocks of each segment and scan the counts."""
    total = 0
    for step in range(tl.cdiv(S + 2, BLOCK_S)):
        s = step * BLOCK_S + tl.arange(0, BLOCK_S)
        begin = tl.load(offsets_ptr + s - 1, mask=(s > 0) & (s <= S + 1), other=0)
        end = tl.load(offsets_ptr + s, mask=s <= S, other=0)
        end = tl.where(s == S + 1, N, end)
        blocks = tl.where(s < S + 2, (end - begin + BLOCK_T - 1) // BLOCK_T, 0).to(tl.int32)
        last = tl.cumsum(blocks, axis=0) + total
        tl.store(first_ptr + s, last - blocks, mask=s < S + 2)
        total += tl.sum(blocks, axis=0)
    tl.store(first_ptr + S + 2, total)


@triton.jit(do_not_specialize=["N", "S", "bound", "halvings"])
def list_blocks_kernel(
    offsets_ptr,  # (S + 1,) int64
    first_ptr,  # (S + 3,) int32
    row_ptr,  # (bound,) int64: a block's first row
    rows_ptr,  # (bound,) int32: its rows, negated where it ends its segment
    segment_ptr,  # (bound,) int32
    N,
    S,
    bound,
    halvings,  # enough to search S + 2 segments
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the list of blocks, in the order of the tokens; beyond the last one, empty blocks."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_b = b < bound
    live = in_b & (b < tl.load(first_ptr + S + 2))
    # the last segment whose first block is not after b: empty ones before it own no block
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.full((BLOCK,), 0, tl.int32) + S + 2
    for _ in range(halvings):
        middle = (low + high) // 2
        left = tl.load(first_ptr + middle, mask=live, other=0) <= b
        low = tl.where(left, middle, low)
        high = tl.where(left, high, middle)
    index = b - tl.load(first_ptr + low, mask=live, other=0)
    begin = tl.load(offsets_ptr + low - 1, mask=live & (low > 0), other=0)
    end = tl.load(offsets_ptr + low, mask=live & (low <= S), other=0)
    end = tl.where(low == S + 1, N, end)
    row = begin + index.to(tl.int64) * BLOCK_T
    left_over = (end - row).to(tl.int32)
    rows = tl.where(left_over > BLOCK_T, BLOCK_T, -left_over)
    tl.store(row_ptr + b, tl.where(live, row, 0), mask=in_b)
    tl.store(rows_ptr + b, tl.where(live, rows, 0), mask=in_b)
    tl.store(segment_ptr + b, tl.where(live, low, 0), mask=in_b)


@triton.jit
def _unit_start(first_ptr, segment_ptr, unit, U, S):
    """Return a unit's first block: units are equal in blocks, rounded up to whole segments."""
    total = tl.load(first_ptr + S + 2)
    block = unit * tl.cdiv(total, U)
    segment = tl.load(segment_ptr + block, mask=block < total, other=S + 1)
    first = tl.load(first_ptr + segment)
    after = tl.load(first_ptr + segment + 1)
    return tl.minimum(tl.where(first == block, block, after), total)


@triton.jit(do_not_specialize=["threshold", "N", "S", "U"])
def grad_square_kernel(
    g_ptr,  # (N, R)
    x_ptr,  # (N, D)
    row_ptr,  # (bound,) int64
    rows_ptr,  # (bound,) int32
    segment_ptr,  # (bound,) int32
    first_ptr,  # (S + 3,) int32
    scale_ptr,  # (S,), or one number if scale_stride is 0
    token_mask_ptr,  # (N,) uint8
    seed_ptr,  # () int64
    grad_ptr,  # (U, R, D) float32, in rows of unit_stride
    square_ptr,  # (U, R, D) float32, in rows of unit_stride
    norm_ptr,  # (tiles, S) float32
    threshold,
    keep_scale,
    g_stride_n,
    x_stride_n,
    scale_stride,
    unit_stride,
    N,
    D,
    R,
    S,
    U,
    WITH_GRAD: tl.constexpr,
    WITH_SQUARE: tl.constexpr,
    WITH_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr,  # of the operands of the products
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Run one unit's blocks through one tile; ``acc`` starts anew where a sample ends."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    unit = tl.program_id(2)
    t = tl.arange(0, BLOCK_T)
    in_d = d < D
    in_r = r < R
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    grad = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    square = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    begin = _unit_start(first_ptr, segment_ptr, unit, U, S)
    end = _unit_start(first_ptr, segment_ptr, unit + 1, U, S)
    tile = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    for b in range(begin, end):
        first = tl.load(row_ptr + b)
        rows = tl.load(rows_ptr + b)
        ends = rows < 0
        rows = tl.abs(rows)
        live = t < rows
        if HAS_MASK:  # a padding row may hold NaN: it reads as zero
            live = live & (tl.load(token_mask_ptr + first + t, mask=live, other=0) != 0)
        x = tl.load(
            x_ptr + first * x_stride_n + (t[:, None] * x_stride_n + d[None, :]),
            mask=live[:, None] & in_d[None, :],
            other=0.0,
        )
        g = tl.load(
            g_ptr + first * g_stride_n + (t[:, None] * g_stride_n + r[None, :]),
            mask=live[:, None] & in_r[None, :],
            other=0.0,
        )
        if DROPOUT:
            x = drop(x, first + t, d, D, seed, threshold, keep_scale)
        acc = dot(tl.trans(x.to(DTYPE)), g.to(DTYPE), acc, PRECISION, WIDEN)
        if WITH_GRAD:
            grad += tl.where(ends, acc, 0.0)
        if WITH_SQUARE or WITH_NORM:
            segment = tl.load(segment_ptr + b)
            scored = ends & (segment > 0) & (segment <= S)
            scaled = acc
            if HAS_SCALE:
                place = scale_ptr + (segment - 1) * scale_stride
                scaled = acc * tl.load(place, mask=scored, other=0.0).to(tl.float32)
            if WITH_SQUARE:
                square += tl.where(scored, scaled * scaled, 0.0)
            if WITH_NORM:
                norm = tl.sum(tl.sum(scaled * scaled, axis=1), axis=0)
                tl.store(norm_ptr + tile * S + segment - 1, norm, mask=scored)
        acc = tl.where(ends, 0.0, acc)
    out = unit.to(tl.int64) * unit_stride + (r[None, :].to(tl.int64) * D + d[:, None])
    in_dr = in_d[:, None] & in_r[None, :]
    if WITH_GRAD:
        tl.store(grad_ptr + out, grad, mask=in_dr)
    if WITH_SQUARE:
        tl.store(square_ptr + out, square, mask=in_dr)


@triton.jit
def segment_sum_kernel(
    value_ptr,  # (N,) float32
    offsets_ptr,  # (S + 1,) int64
    out_ptr,  # (S,) float32
    BLOCK: tl.constexpr,
) -> None:
    """Add up one sample's rows in their order, a block at a time."""
    sample = tl.program_id(0)
    begin = tl.load(offsets_ptr + sample)
    rows = tl.load(offsets_ptr + sample + 1) - begin
    t = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.cdiv(rows, BLOCK).to(tl.int32)):
        row = step * BLOCK + t
        total += tl.load(value_ptr + begin + row, mask=row < rows, other=0.0)
    tl.store(out_ptr + sample, tl.sum(total, axis=0))


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum over each sample's rows, ``(S,)`` float32, the same bits in every run."""
    out = values.new_empty(len(offsets) - 1)
    if len(out):
        segment_sum_kernel[(len(out),)](values, offsets.contiguous(), out, BLOCK=256, **options())
    return out


class Blocks(NamedTuple):
    """The samples cut into blocks of tokens, on the device."""

    row: Tensor
    rows: Tensor
    segment: Tensor
    first: Tensor


def list_blocks(offsets: Tensor, n: int, block_t: int) -> Blocks:
    """Cut every sample into blocks of at most ``block_t`` rows; the bound on them needs no sync."""
    s = len(offsets) - 1
    bound = triton.cdiv(n, block_t) + s + 2
    first = offsets.new_empty(s + 3, dtype=torch.int32)
    narrow = offsets.new_empty(2, bound, dtype=torch.int32)
    out = Blocks(offsets.new_empty(bound), narrow[0], narrow[1], first)
    offsets = offsets.contiguous()
    first_blocks_kernel[(1,)](
        offsets, first, n, s, BLOCK_T=block_t, BLOCK_S=SEGMENTS_A_STEP, **options()
    )
    list_blocks_kernel[(triton.cdiv(bound, 256),)](
        offsets, first, out.row, out.rows, out.segment, n, s, bound, (s + 2).bit_length(),
        BLOCK_T=block_t, BLOCK=256, **options(),
    )  # fmt: skip
    return out


def grad_squares(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    grad: Tensor | None = None,
    square: Tensor | None = None,
    want_norms: bool = True,
    mask: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """Write the gradient to ``grad``, add the squares to ``square``, return the norms ``(S,)``.

    ``grad`` and ``square`` are (R, D) and contiguous; what is None is not computed.
    """
    g, x = rows_of(g), rows_of(x)
    (n, r), d, s = g.shape, x.shape[1], len(offsets) - 1
    dtype = torch.promote_types(g.dtype, x.dtype)
    sums = 1 + (grad is not None) + (square is not None)
    tile = square_tile(dtype, r, n // max(s, 1), sums)
    grid = triton.cdiv(d, tile.rows), triton.cdiv(r, tile.columns)
    pieces = sample_pieces(grid[0] * grid[1], n, s, tile.depth) if n * r * d else 1
    if pieces > 1:
        return grad_squares_in_pieces(
            g, x, offsets, scale, grad, square, want_norms, mask, dropout,
            square_tile(dtype, r, n // s, 1), pieces,
        )  # fmt: skip
    norms = x.new_zeros(grid[0] * grid[1], s, dtype=torch.float32) if want_norms else None
    if not n * r * d:
        if grad is not None:
            grad.zero_()
        return None if norms is None else norms.sum(0)
    blocks = list_blocks(offsets, n, tile.depth)
    units = min(parts(grid[0] * grid[1], max(s, 1)), max(s, 1))
    size = r * d
    part = x.new_empty(units, (sums - 1) * size, dtype=torch.float32)
    grad_square_kernel[(*grid, units)](
        g, x, blocks.row, blocks.rows, blocks.segment, blocks.first, scale, mask,
        dropout.seed if dropout else None,
        part, part[:, -size:], norms,
        dropout.threshold if dropout else 0, dropout.keep_scale if dropout else 1.0,
        g.stride(0), x.stride(0), 0 if scale is None or scale.ndim == 0 else scale.stride(0),
        part.stride(0), n, d, r, s, units,
        WITH_GRAD=grad is not None, WITH_SQUARE=square is not None, WITH_NORM=want_norms,
        HAS_SCALE=scale is not None, HAS_MASK=mask is not None,
        DROPOUT=dropout is not None and dropout.active,
        DTYPE=DTYPES[dtype], **arithmetic(x),
        BLOCK_T=tile.depth, BLOCK_D=tile.rows, BLOCK_R=tile.columns,
        **options(tile.warps, tile.stages, x.device),
    )  # fmt: skip
    if sums > 1:
        sizes = (size if grad is not None else 0, size if square is not None else 0)
        add_parts_kernel[(triton.cdiv(sum(sizes), 1024),)](
            part, square if grad is None else grad, grad if square is None else square,
            part.stride(0), units, *sizes, INTO2=True, BLOCK=1024, **options(),
        )  # fmt: skip
    return None if norms is None else norms.sum(0)


def segment_grad_square(
    g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`floe_kernels.functional.segment_grad_square`; float64 goes to the reference."""
    dtype = torch.promote_types(g.dtype, x.dtype)
    if dtype == torch.float64:
        return reference.segment_grad_square(g, x, offsets, scale, reduce)
    grad = x.new_empty(g.shape[1], x.shape[1], dtype=dtype)
    square = None if reduce == "matrix" else torch.zeros_like(grad, dtype=torch.float32)
    norms = grad_squares(g, x, offsets, scale, grad, square)
    assert norms is not None
    if square is None:
        return grad, norms.sum(), norms
    return grad, square if reduce == "element" else square.sum(1), norms


def linear_grad_square(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    """See :func:`floe_kernels.functional.linear_grad_square`; float64 goes to the reference.

    Through the gradient for samples of any length: it lives in registers, a tile at a time.
    """
    if torch.promote_types(g.dtype, x.dtype) == torch.float64:
        return reference.linear_grad_square(g, x, offsets, scale)
    norms = grad_squares(g, x, offsets, scale)
    assert norms is not None
    return norms
