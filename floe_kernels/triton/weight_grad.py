"""Weight gradients: ``g^T x``, split over the tokens and added up in order.

Dims: N tokens, D columns of x, R columns of g, E columns of a second g, P parts of the sum over N.
"""

import triton
import triton.language as tl

from floe_kernels.triton.tiles import dot, drop


@triton.jit(do_not_specialize=["threshold", "N", "steps"])
def weight_grad_kernel(
    g_ptr,  # (N, R)
    x_ptr,  # (N, D)
    g2_ptr,  # (N, E)
    token_mask_ptr,  # (N,) uint8
    seed_ptr,  # () int64
    out_ptr,  # (P, R + E, D) float32 if PARTS, else (R, D)
    out2_ptr,  # (E, D), not written if PARTS
    threshold,
    keep_scale,
    g_stride_n,
    x_stride_n,
    g2_stride_n,
    N,
    D,
    R,
    E,
    steps,
    HAS_G: tl.constexpr,
    HAS_G2: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,  # of x, for g alone
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Sum one part of the tokens into one tile, x's columns along the wide side of the product."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    block, part = tl.program_id(1), tl.program_id(2)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.arange(0, BLOCK_N)  # int32 within the tile: int64 offsets spill (sm_80, 128 columns)
    in_d = d < D
    in_r = r < R
    in_e = e < E
    if HAS_G:  # beside g, g2 is one block's work; alone it is as many blocks as it needs
        in_e = in_e & (e < BLOCK_E)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    acc2 = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    for step in range(steps):
        first = (part.to(tl.int64) * steps + step) * BLOCK_N
        n = first + t
        live = n < N
        if HAS_MASK:  # a padding row may hold NaN: it reads as zero
            live = live & (tl.load(token_mask_ptr + n, mask=live, other=0) != 0)
        x = tl.load(
            x_ptr + first * x_stride_n + (t[:, None] * x_stride_n + d[None, :]),
            mask=live[:, None] & in_d[None, :],
            other=0.0,
        )
        if HAS_G2:
            g2 = tl.load(
                g2_ptr + first * g2_stride_n + (t[:, None] * g2_stride_n + e[None, :]),
                mask=live[:, None] & in_e[None, :],
                other=0.0,
            )
            acc2 = dot(tl.trans(x), g2, acc2, PRECISION, WIDEN)
        if HAS_G:
            g = tl.load(
                g_ptr + first * g_stride_n + (t[:, None] * g_stride_n + r[None, :]),
                mask=live[:, None] & in_r[None, :],
                other=0.0,
            )
            if DROPOUT:
                x = drop(x, n, d, D, seed, threshold, keep_scale)
            acc = dot(tl.trans(x), g, acc, PRECISION, WIDEN)
    row = r.to(tl.int64)
    row2 = e.to(tl.int64)
    if PARTS:
        row = row + part.to(tl.int64) * (R + E)
        row2 = row2 + part.to(tl.int64) * (R + E) + R
    if HAS_G:
        out = out_ptr + row[None, :] * D + d[:, None]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_d[:, None] & in_r[None, :])
    if HAS_G2:
        second = out2_ptr
        if PARTS:
            second = out_ptr
        out = second + row2[None, :] * D + d[:, None]
        tl.store(out, acc2.to(second.dtype.element_ty), mask=in_d[:, None] & in_e[None, :])


@triton.jit(do_not_specialize=["P"])
def add_parts_kernel(
    part_ptr,  # (P, size + size2) float32, in rows of part_stride
    out_ptr,  # (size,)
    out2_ptr,  # (size2,)
    part_stride,
    P,
    size,
    size2,
    INTO2: tl.constexpr,  # add to what out2 holds
    BLOCK: tl.constexpr,
) -> None:
    """Add the parts from first to last: the same order, hence the same bits, in every run."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_i = i < size + size2
    total = tl.zeros((BLOCK,), tl.float32)
    source = part_ptr + i
    for _ in range(P):
        total += tl.load(source, mask=in_i, other=0.0)
        source += part_stride
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)
    out2 = out2_ptr + (i - size)
    in_out2 = in_i & (i >= size)
    if INTO2:
        total += tl.load(out2, mask=in_out2, other=0.0).to(tl.float32)
    tl.store(out2, total.to(out2_ptr.dtype.element_ty), mask=in_out2)
