"""Low-rank updates of a wide matrix in place: ``y += h lora_B`` and ``dx += [dz|dlogits] [A; W]``.

Dims: N tokens, O columns of the wide matrix, R packed columns, E columns of the second factor.
"""

import triton
import triton.language as tl

from floe_kernels.triton.tiles import dot, kept_elements


@triton.jit
def add_product(
    acc,  # (BLOCK_N, BLOCK_O)
    left_ptr,  # (N, R)
    right_ptr,  # (R, O)
    first,
    t,
    o,
    in_n,
    in_o,
    left_stride_n,
    R,
    O,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return ``acc`` plus one tile of ``left right``, the rows ``first + t``."""
    for block in range(tl.cdiv(R, BLOCK_R)):
        r = tl.arange(0, BLOCK_R) + block * BLOCK_R
        left = tl.load(
            left_ptr + first * left_stride_n + (t[:, None] * left_stride_n + r[None, :]),
            mask=in_n[:, None] & (r < R)[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + (r[:, None].to(tl.int64) * O + o[None, :]),
            mask=(r < R)[:, None] & in_o[None, :],
            other=0.0,
        )
        acc = dot(left, right.to(left.dtype), acc, PRECISION, WIDEN)
    return acc


@triton.jit(do_not_specialize=["threshold", "N"])
def rank_update_kernel(
    base_ptr,  # (N, O), the same as out, or not read
    out_ptr,  # (N, O)
    left_ptr,  # (N, R)
    right_ptr,  # (R, O)
    left2_ptr,  # (N, E)
    right2_ptr,  # (E, O)
    seed_ptr,  # () int64
    threshold,
    keep_scale,
    base_stride_n,
    out_stride_n,
    left_stride_n,
    left2_stride_n,
    N,
    O,
    R,
    E,
    HAS_BASE: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    DROPOUT: tl.constexpr,  # on the first product alone
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Update one tile; its product stays in float32 until it is added.

    Within the tile offsets are int32 from its first row, which halves the registers they take.
    """
    # neighbouring programs share rows: left is read from L2 for all but one of them
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    t = tl.arange(0, BLOCK_N)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_n = first + t < N
    in_o = o < O
    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    acc = add_product(
        acc, left_ptr, right_ptr, first, t, o, in_n, in_o, left_stride_n, R, O,
        PRECISION, WIDEN, BLOCK_R,
    )  # fmt: skip
    if DROPOUT:
        kept = kept_elements((first + t)[:, None] * O + o[None, :], tl.load(seed_ptr), threshold)
        acc = tl.where(kept, acc * keep_scale, 0.0)
    if HAS_SECOND:
        acc = add_product(
            acc, left2_ptr, right2_ptr, first, t, o, in_n, in_o, left2_stride_n, E, O,
            PRECISION, WIDEN, BLOCK_E,
        )  # fmt: skip
    in_no = in_n[:, None] & in_o[None, :]
    if HAS_BASE:
        base = base_ptr + first * base_stride_n + (t[:, None] * base_stride_n + o[None, :])
        acc += tl.load(base, mask=in_no, other=0.0).to(tl.float32)
    out = out_ptr + first * out_stride_n + (t[:, None] * out_stride_n + o[None, :])
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_no)
