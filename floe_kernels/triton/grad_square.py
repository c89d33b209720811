"""Weight gradient, per-sample squares and norms from one read of the operands.

One flat loop over blocks of tokens that never span two samples: the square is taken where a sample
ends, so that a sample is summed before it is squared and squared before samples are summed.

Dims: N tokens, R columns of g, D columns of x, S samples, U units (contiguous whole samples).
Rows before the first sample and after the last count in the gradient alone: segments 0 and S + 1,
beside samples 1..S.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_kernels import reference
from floe_kernels.triton.grad_square_pieces import DTYPES, grad_squares_in_pieces
from floe_kernels.triton.gram_norms import gram_norms
from floe_kernels.triton.launch import (
    MULTIPROCESSORS,
    Dropout,
    arithmetic,
    gram_is_cheaper,
    options,
    parts,
    rows_of,
    sample_pieces,
    square_tile,
)
from floe_kernels.triton.segments import list_blocks
from floe_kernels.triton.tiles import dot, drop
from floe_kernels.triton.weight_grad import add_parts_kernel


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
    if 0 < grid[0] * grid[1] * s < MULTIPROCESSORS and n:  # whole samples do not fill the device
        whole = square_tile(dtype, r, n // s, 1)
        pieces = sample_pieces(triton.cdiv(d, whole.rows) * triton.cdiv(r, whole.columns), n, s)
        return grad_squares_in_pieces(
            g, x, offsets, scale, grad, square, want_norms, mask, dropout, whole, pieces
        )
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

    Through Gram matrices where samples are short, else through the gradient, which lives in
    registers, a tile at a time.
    """
    if torch.promote_types(g.dtype, x.dtype) == torch.float64:
        return reference.linear_grad_square(g, x, offsets, scale)
    if len(g) and gram_is_cheaper(len(g), len(offsets) - 1, g.shape[1], x.shape[1]):
        return gram_norms(g, x, offsets, scale)
    norms = grad_squares(g, x, offsets, scale)
    assert norms is not None
    return norms
