"""The kernels of linears that take one x: each tile of x, or of its gradient, is met once by all.

Arguments in the plural are tuples with an entry for each of two or three linears.

Dims: N tokens, I inputs, and for each linear E experts, K kept per token, R packed columns,
C columns of z, P parts of a split sum; W columns of all linears' z and logits together.
"""

import triton
import triton.language as tl

from floe_kernels.triton.moe_lora_shrink import route, route_parts, store_z_and_h
from floe_kernels.triton.tiles import dot, dot_exact


@triton.jit
def _shrink_step(
    x,  # (BLOCK_N, BLOCK_I)
    z,  # (BLOCK_N, BLOCK_C) so far
    logits,  # (BLOCK_N, BLOCK_E) so far
    lora_A_ptr,
    router_ptr,
    i,
    I,
    C,
    E,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Add BLOCK_I inputs' share to one linear's z and logits."""
    c = tl.arange(0, z.shape[1])
    e = tl.arange(0, logits.shape[1])
    in_i = i < I
    w = tl.load(
        router_ptr + (e[None, :].to(tl.int64) * I + i[:, None]),
        mask=(e < E)[None, :] & in_i[:, None],
        other=0.0,
    )
    logits = dot_exact(x, w, logits, PRECISION, WIDEN)
    a = tl.load(
        lora_A_ptr + (c[None, :].to(tl.int64) * I + i[:, None]),
        mask=(c < C)[None, :] & in_i[:, None],
        other=0.0,
    )
    return dot(x, a.to(x.dtype), z, PRECISION, WIDEN), logits


@triton.jit
def _shared_products(
    x_ptr,
    token_mask_ptr,
    lora_A_ptrs,
    router_ptrs,
    first,
    first_step,
    steps,
    x_stride_n,
    N,
    I,
    Cs,
    Es,
    S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Return z and logits of up to three linears: a step loads x once."""
    t = tl.arange(0, BLOCK_N)
    n = first + t
    live = n < N
    if HAS_MASK:  # a padding row may hold NaN: it reads as zero
        live = live & (tl.load(token_mask_ptr + n, mask=live, other=0) != 0)
    z0 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    z1 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    z2 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    logits0 = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    logits1 = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    logits2 = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for step in range(steps):
        i = (first_step + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        x = tl.load(
            x_ptr + first * x_stride_n + (t[:, None] * x_stride_n + i[None, :]),
            mask=live[:, None] & (i < I)[None, :],
            other=0.0,
        )
        z0, logits0 = _shrink_step(
            x, z0, logits0, lora_A_ptrs[0], router_ptrs[0], i, I, Cs[0], Es[0],
            PRECISION, WIDEN,
        )  # fmt: skip
        z1, logits1 = _shrink_step(
            x, z1, logits1, lora_A_ptrs[1], router_ptrs[1], i, I, Cs[1], Es[1],
            PRECISION, WIDEN,
        )  # fmt: skip
        if S > 2:
            z2, logits2 = _shrink_step(
                x, z2, logits2, lora_A_ptrs[2], router_ptrs[2], i, I, Cs[2], Es[2],
                PRECISION, WIDEN,
            )  # fmt: skip
    return z0, logits0, z1, logits1, z2, logits2


@triton.jit
def _finish(
    z,
    logits,
    scaling_ptr,
    column_expert_ptr,
    token_mask_ptr,
    z_ptr,
    h_ptr,
    gates_ptr,
    experts_ptr,
    logits_ptr,
    first,
    N,
    R,
    C,
    E,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Route one linear's tokens, and store all that the expand and the backward need."""
    n = first + tl.arange(0, z.shape[0])
    c = tl.arange(0, z.shape[1])
    e = tl.arange(0, logits.shape[1])
    gates, experts = route(
        logits, token_mask_ptr, gates_ptr, experts_ptr, logits_ptr, n, e, N, E,
        K, RENORMALIZE, HAS_MASK, BLOCK_K,
    )  # fmt: skip
    store_z_and_h(
        z, gates, experts, scaling_ptr, column_expert_ptr, z_ptr, h_ptr, first, c, c < C,
        N, R, C, E, K, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "steps"])
def shared_shrink_route_kernel(
    x_ptr,  # (N, I)
    token_mask_ptr,  # (N,) uint8
    lora_A_ptrs,  # (C, I)
    router_ptrs,  # (E, I)
    scaling_ptrs,  # (R,)
    column_expert_ptrs,  # (R,) int32
    z_ptrs,  # (N, C)
    h_ptrs,  # (N, R)
    gates_ptrs,  # (N, K) float32
    experts_ptrs,  # (N, K) int64
    logits_ptrs,  # (N, E) float32
    x_stride_n,
    N,
    I,
    Rs,
    Es,
    steps,
    S: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,  # power of two >= every R
    BLOCK_E: tl.constexpr,  # power of two >= every E
    BLOCK_K: tl.constexpr,  # power of two >= K
) -> None:
    """Do all that comes before lora_B, for BLOCK_N tokens and every column of every linear."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    z0, logits0, z1, logits1, z2, logits2 = _shared_products(
        x_ptr, token_mask_ptr, lora_A_ptrs, router_ptrs, first, 0, steps, x_stride_n, N, I, Rs, Es,
        S, HAS_MASK, PRECISION, WIDEN, BLOCK_N, BLOCK_I, BLOCK_C, BLOCK_E,
    )  # fmt: skip
    _finish(
        z0, logits0, scaling_ptrs[0], column_expert_ptrs[0], token_mask_ptr, z_ptrs[0], h_ptrs[0],
        gates_ptrs[0], experts_ptrs[0], logits_ptrs[0], first, N, Rs[0], Rs[0], Es[0],
        K, RENORMALIZE, HAS_MASK, BLOCK_K,
    )  # fmt: skip
    _finish(
        z1, logits1, scaling_ptrs[1], column_expert_ptrs[1], token_mask_ptr, z_ptrs[1], h_ptrs[1],
        gates_ptrs[1], experts_ptrs[1], logits_ptrs[1], first, N, Rs[1], Rs[1], Es[1],
        K, RENORMALIZE, HAS_MASK, BLOCK_K,
    )  # fmt: skip
    if S > 2:
        _finish(
            z2, logits2, scaling_ptrs[2], column_expert_ptrs[2], token_mask_ptr, z_ptrs[2],
            h_ptrs[2], gates_ptrs[2], experts_ptrs[2], logits_ptrs[2], first, N, Rs[2], Rs[2],
            Es[2], K, RENORMALIZE, HAS_MASK, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _store_part(part_ptr, z, logits, row, first_column, n, N, C, E):
    """Store one linear's columns of one part: z, then logits."""
    c = tl.arange(0, z.shape[1])
    e = tl.arange(0, logits.shape[1])
    out = part_ptr + row[:, None] + first_column
    tl.store(out + c[None, :], z, mask=(n < N)[:, None] & (c < C)[None, :])
    tl.store(out + C + e[None, :], logits, mask=(n < N)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["N", "steps"])
def shared_shrink_part_kernel(
    x_ptr,  # (N, I)
    token_mask_ptr,  # (N,) uint8
    lora_A_ptrs,  # (C, I)
    router_ptrs,  # (E, I)
    part_ptr,  # (P, N, W) float32
    x_stride_n,
    N,
    I,
    W,
    Rs,
    Es,
    steps,
    S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Write one part of the sums over I, for few tokens."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    z0, logits0, z1, logits1, z2, logits2 = _shared_products(
        x_ptr, token_mask_ptr, lora_A_ptrs, router_ptrs, first, part * steps, steps, x_stride_n, N,
        I, Rs, Es, S, HAS_MASK, PRECISION, WIDEN, BLOCK_N, BLOCK_I, BLOCK_C, BLOCK_E,
    )  # fmt: skip
    row = (part.to(tl.int64) * N + n) * W
    _store_part(part_ptr, z0, logits0, row, 0, n, N, Rs[0], Es[0])
    before = Rs[0] + Es[0]
    _store_part(part_ptr, z1, logits1, row, before, n, N, Rs[1], Es[1])
    if S > 2:
        before += Rs[1] + Es[1]
        _store_part(part_ptr, z2, logits2, row, before, n, N, Rs[2], Es[2])


@triton.jit(do_not_specialize=["P", "N"])
def shared_route_parts_kernel(
    part_ptr,  # (P, N, W) float32
    token_mask_ptr,  # (N,) uint8
    scaling_ptrs,  # (R,)
    column_expert_ptrs,  # (R,) int32
    z_ptrs,  # (N, C)
    h_ptrs,  # (N, R)
    gates_ptrs,  # (N, K) float32
    experts_ptrs,  # (N, K) int64
    logits_ptrs,  # (N, E) float32
    P,
    N,
    W,
    Rs,
    Es,
    S: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Add the parts in order, then route and mask; a program serves one linear."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    before = 0
    for s in tl.static_range(S):
        if tl.program_id(1) == s:
            route_parts(
                part_ptr + before, scaling_ptrs[s], column_expert_ptrs[s], token_mask_ptr,
                z_ptrs[s], h_ptrs[s], gates_ptrs[s], experts_ptrs[s], logits_ptrs[s],
                first, P, N, W, Rs[s], Rs[s], Es[s],
                K, RENORMALIZE, False, True, HAS_MASK, BLOCK_N, BLOCK_C, BLOCK_E, BLOCK_K,
            )  # fmt: skip
        before += Rs[s] + Es[s]
