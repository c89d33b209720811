"""Per-sample squares of a few long samples, each cut into pieces that are added up before squaring.

Dims: N tokens, R columns of g, D columns of x, S samples, P pieces of each segment. Segments are
the samples, and before and after them the rows that belong to none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_kernels.triton.launch import Dropout, Tile, arithmetic, options
from floe_kernels.triton.tiles import dot, drop

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _segment_rows(offsets_ptr, segment, N, S):
    """Return where a segment begins and ends."""
    begin = tl.load(offsets_ptr + segment - 1, mask=segment > 0, other=0)
    end = tl.load(offsets_ptr + segment, mask=segment <= S, other=0)
    return begin, tl.where(segment == S + 1, N, end)


@triton.jit(do_not_specialize=["threshold", "N", "S", "P"])
def gradient_piece_kernel(
    g_ptr,  # (N, R)
    x_ptr,  # (N, D)
    offsets_ptr,  # (S + 1,) int64
    token_mask_ptr,  # (N,) uint8
    seed_ptr,  # () int64
    part_ptr,  # (S + 2, P, R, D) float32
    threshold,
    keep_scale,
    g_stride_n,
    x_stride_n,
    N,
    D,
    R,
    S,
    P,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr,  # of the operands of the products
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Sum one piece's tokens into one tile; pieces of a segment are equal in blocks of tokens."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    segment, piece = tl.program_id(2) // P, tl.program_id(2) % P
    start, end = _segment_rows(offsets_ptr, segment, N, S)
    steps = tl.cdiv(tl.cdiv(end - start, BLOCK_T), P).to(tl.int32)
    begin = start + piece.to(tl.int64) * steps * BLOCK_T
    t = tl.arange(0, BLOCK_T)
    in_d = d < D
    in_r = r < R
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for step in range(steps):
        first = begin + step * BLOCK_T
        live = first + t < end
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
    out = part_ptr + tl.program_id(2).to(tl.int64) * R * D
    out += r[None, :].to(tl.int64) * D + d[:, None]
    # a segment without rows is not read either
    in_r = r < tl.where(end > start, R, 0)
    tl.store(out, acc, mask=in_d[:, None] & in_r[None, :])


@triton.jit(do_not_specialize=["N", "S", "P"])
def square_pieces_kernel(
    part_ptr,  # (S + 2, P, size) float32
    offsets_ptr,  # (S + 1,) int64
    scale_ptr,  # (S,), or one number if scale_stride is 0
    grad_ptr,  # (size,)
    square_ptr,  # (size,) float32, added to
    norm_ptr,  # (programs, S) float32
    scale_stride,
    N,
    S,
    P,
    size,
    WITH_GRAD: tl.constexpr,
    WITH_SQUARE: tl.constexpr,
    WITH_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add each segment's pieces from first to last, then square the sum, then add the samples."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    in_i = i < size
    grad = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for segment in range(S + 2):
        begin, end = _segment_rows(offsets_ptr, segment, N, S)
        source = part_ptr + (segment * P).to(tl.int64) * size + i
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(tl.where(end > begin, P, 0)):
            total += tl.load(source, mask=in_i, other=0.0)
            source += size
        grad += total
        scored = (segment > 0) & (segment <= S)
        if HAS_SCALE:
            place = scale_ptr + (segment - 1) * scale_stride
            total = total * tl.load(place, mask=scored, other=0.0).to(tl.float32)
        squared = tl.where(scored, total * total, 0.0)
        square += squared
        if WITH_NORM:
            norm = tl.sum(squared, axis=0)
            tl.store(norm_ptr + program * S + segment - 1, norm, mask=scored)
    if WITH_GRAD:
        tl.store(grad_ptr + i, grad.to(grad_ptr.dtype.element_ty), mask=in_i)
    if WITH_SQUARE:
        square += tl.load(square_ptr + i, mask=in_i, other=0.0)
        tl.store(square_ptr + i, square, mask=in_i)


def grad_squares_in_pieces(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    grad: Tensor | None,
    square: Tensor | None,
    want_norms: bool,
    mask: Tensor | None,
    dropout: Dropout | None,
    tile: Tile,
    pieces: int,
) -> Tensor | None:
    """Do as :func:`~floe_kernels.triton.grad_square.grad_squares`, each sample in ``pieces``."""
    (n, r), d, s = g.shape, x.shape[1], len(offsets) - 1
    offsets, active = offsets.contiguous(), dropout is not None and dropout.active
    part = x.new_empty(s + 2, pieces, r * d, dtype=torch.float32)
    gradient_piece_kernel[
        (triton.cdiv(d, tile.rows), triton.cdiv(r, tile.columns), (s + 2) * pieces)
    ](
        g, x, offsets, mask, dropout.seed if dropout else None, part,
        dropout.threshold if dropout else 0, dropout.keep_scale if dropout else 1.0,
        g.stride(0), x.stride(0), n, d, r, s, pieces, HAS_MASK=mask is not None, DROPOUT=active,
        DTYPE=DTYPES[torch.promote_types(g.dtype, x.dtype)], **arithmetic(x),
        BLOCK_T=tile.depth, BLOCK_D=tile.rows, BLOCK_R=tile.columns,
        **options(tile.warps, tile.stages, x.device),
    )  # fmt: skip
    programs = triton.cdiv(r * d, 1024)
    norms = x.new_empty(programs, s, dtype=torch.float32) if want_norms else None
    square_pieces_kernel[(programs,)](
        part, offsets, scale, grad, square, norms,
        0 if scale is None or scale.ndim == 0 else scale.stride(0), n, s, pieces, r * d,
        WITH_GRAD=grad is not None, WITH_SQUARE=square is not None, WITH_NORM=want_norms,
        HAS_SCALE=scale is not None, BLOCK=1024, **options(),
    )  # fmt: skip
    return None if norms is None else norms.sum(0)
