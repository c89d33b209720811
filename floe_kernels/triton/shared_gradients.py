"""The backward of linears that take one x: its gradient is updated once, and it is read once.

Arguments in the plural are tuples with an entry for each of two or three linears.

Dims: N tokens, D inputs, and for each linear E experts, R packed columns; P parts of a split sum,
W columns of all linears' dz and dlogits together.
"""

import triton
import triton.language as tl

from floe_kernels.triton.rank_update import add_product
from floe_kernels.triton.tiles import dot


@triton.jit(do_not_specialize=["N"])
def shared_update_kernel(
    out_ptr,  # (N, D), holds the base's share
    dz_ptrs,  # (N, R) in rows of dz_strides
    dlogits_ptrs,  # (N, E) in rows of dz_strides
    lora_A_ptrs,  # (R, D)
    router_ptrs,  # (E, D)
    out_stride_n,
    dz_strides,
    N,
    D,
    Rs,
    Es,
    S: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Add every linear's ``dz lora_A + dlogits router`` to one tile of x's gradient."""
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    t = tl.arange(0, BLOCK_N)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_n = first + t < N
    in_d = d < D
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for s in tl.static_range(S):
        acc = add_product(
            acc, dz_ptrs[s], lora_A_ptrs[s], first, t, d, in_n, in_d, dz_strides[s], Rs[s], D,
            PRECISION, WIDEN, BLOCK_R,
        )  # fmt: skip
        acc = add_product(
            acc, dlogits_ptrs[s], router_ptrs[s], first, t, d, in_n, in_d, dz_strides[s], Es[s], D,
            PRECISION, WIDEN, BLOCK_E,
        )  # fmt: skip
    in_nd = in_n[:, None] & in_d[None, :]
    out = out_ptr + first * out_stride_n + (t[:, None] * out_stride_n + d[None, :])
    acc += tl.load(out, mask=in_nd, other=0.0).to(tl.float32)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_nd)


@triton.jit
def _weight_step(
    x,  # (BLOCK_N, BLOCK_D)
    acc,  # (BLOCK_D, BLOCK_R) so far
    acc2,  # (BLOCK_D, BLOCK_E) so far
    dz_ptr,
    dlogits_ptr,
    first,
    t,
    live,
    d,
    dz_stride_n,
    D,
    R,
    E,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Add BLOCK_N tokens' share to one linear's gradients of lora_A and router."""
    r = tl.arange(0, acc.shape[1])
    e = tl.arange(0, acc2.shape[1])
    dlogits = tl.load(
        dlogits_ptr + first * dz_stride_n + (t[:, None] * dz_stride_n + e[None, :]),
        mask=live[:, None] & (e < E)[None, :],
        other=0.0,
    )
    acc2 = dot(tl.trans(x), dlogits, acc2, PRECISION, WIDEN)
    dz = tl.load(
        dz_ptr + first * dz_stride_n + (t[:, None] * dz_stride_n + r[None, :]),
        mask=live[:, None] & (r < R)[None, :],
        other=0.0,
    )
    return dot(tl.trans(x), dz, acc, PRECISION, WIDEN), acc2


@triton.jit
def _store_weights(acc, acc2, out_ptr, out2_ptr, d, D, R, E):
    """Store one linear's share, rows of lora_A then of the router, each D apart."""
    r = tl.arange(0, acc.shape[1])
    e = tl.arange(0, acc2.shape[1])
    out = out_ptr + r[None, :].to(tl.int64) * D + d[:, None]
    mask = (d < D)[:, None] & (r < R)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
    out2 = out2_ptr + e[None, :].to(tl.int64) * D + d[:, None]
    mask2 = (d < D)[:, None] & (e < E)[None, :]
    tl.store(out2, acc2.to(out2_ptr.dtype.element_ty), mask=mask2)


@triton.jit(do_not_specialize=["N", "steps"])
def shared_weight_grad_kernel(
    x_ptr,  # (N, D)
    token_mask_ptr,  # (N,) uint8
    dz_ptrs,  # (N, R) in rows of dz_strides
    dlogits_ptrs,  # (N, E) in rows of dz_strides
    part_ptr,  # (P, W, D) float32: linear after linear, lora_A then router
    x_stride_n,
    dz_strides,
    N,
    D,
    W,
    Rs,
    Es,
    steps,
    S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # power of two >= every R
    BLOCK_E: tl.constexpr,  # power of two >= every E
) -> None:
    """Sum one part of the tokens for every linear; a step loads x once."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(1)
    t = tl.arange(0, BLOCK_N)
    acc0 = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    acc1 = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    acc2 = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    router0 = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    router1 = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    router2 = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    for step in range(steps):
        first = (part.to(tl.int64) * steps + step) * BLOCK_N
        live = first + t < N
        if HAS_MASK:  # a padding row may hold NaN: it reads as zero
            live = live & (tl.load(token_mask_ptr + first + t, mask=live, other=0) != 0)
        x = tl.load(
            x_ptr + first * x_stride_n + (t[:, None] * x_stride_n + d[None, :]),
            mask=live[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc0, router0 = _weight_step(
            x, acc0, router0, dz_ptrs[0], dlogits_ptrs[0], first, t, live, d, dz_strides[0],
            D, Rs[0], Es[0], PRECISION, WIDEN,
        )  # fmt: skip
        acc1, router1 = _weight_step(
            x, acc1, router1, dz_ptrs[1], dlogits_ptrs[1], first, t, live, d, dz_strides[1],
            D, Rs[1], Es[1], PRECISION, WIDEN,
        )  # fmt: skip
        if S > 2:
            acc2, router2 = _weight_step(
                x, acc2, router2, dz_ptrs[2], dlogits_ptrs[2], first, t, live, d, dz_strides[2],
                D, Rs[2], Es[2], PRECISION, WIDEN,
            )  # fmt: skip
    out = part_ptr + part.to(tl.int64) * W * D
    _store_weights(acc0, router0, out, out + Rs[0] * D, d, D, Rs[0], Es[0])
    out += (Rs[0] + Es[0]) * D
    _store_weights(acc1, router1, out, out + Rs[1] * D, d, D, Rs[1], Es[1])
    if S > 2:
        out += (Rs[1] + Es[1]) * D
        _store_weights(acc2, router2, out, out + Rs[2] * D, d, D, Rs[2], Es[2])
