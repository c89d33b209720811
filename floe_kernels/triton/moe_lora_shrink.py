"""Shrink and route: one read of x gives z, the logits, the gates and the masked, scaled h.

Dims: N tokens, I inputs, E experts, K experts kept per token, R packed columns, C columns of z
(R, or the one rank of a shared A), P parts into which a sum over I is split.
"""

import triton
import triton.language as tl

from floe_kernels.triton.tiles import column_gates, dot, dot_exact, drop, select_experts


@triton.jit
def _products(
    x_ptr,
    lora_A_ptr,
    router_ptr,
    token_mask_ptr,
    seed_ptr,
    first,
    c,
    e,
    in_c,
    in_e,
    first_step,
    steps,
    threshold,
    keep_scale,
    x_stride_n,
    N,
    I,
    HAS_A: tl.constexpr,
    HAS_ROUTER: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return this tile's share of z and of the logits: BLOCK_I inputs a step, from step first."""
    t = tl.arange(0, BLOCK_N)
    n = first + t
    live = n < N
    if HAS_MASK:  # a padding row may hold NaN: it reads as zero
        live = live & (tl.load(token_mask_ptr + n, mask=live, other=0) != 0)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    z = tl.zeros((BLOCK_N, c.shape[0]), tl.float32)
    logits = tl.zeros((BLOCK_N, e.shape[0]), tl.float32)
    for step in range(steps):
        i = (first_step + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        in_i = i < I
        x = tl.load(
            x_ptr + first * x_stride_n + (t[:, None] * x_stride_n + i[None, :]),
            mask=live[:, None] & in_i[None, :],
            other=0.0,
        )
        if HAS_ROUTER:
            w = tl.load(
                router_ptr + (e[None, :].to(tl.int64) * I + i[:, None]),
                mask=in_e[None, :] & in_i[:, None],
                other=0.0,
            )
            logits = dot_exact(x, w, logits, PRECISION, WIDEN)
        if HAS_A:
            a = tl.load(
                lora_A_ptr + (c[None, :].to(tl.int64) * I + i[:, None]),
                mask=in_c[None, :] & in_i[:, None],
                other=0.0,
            )
            if DROPOUT:
                x = drop(x, n, i, I, seed, threshold, keep_scale)
            z = dot(x, a.to(x.dtype), z, PRECISION, WIDEN)
    return z, logits


@triton.jit
def route(
    logits,  # (BLOCK_N, BLOCK_E)
    token_mask_ptr,
    gates_ptr,
    experts_ptr,
    logits_ptr,
    n,
    e,
    N,
    E,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store the routing of one tile of tokens and return its gates and experts."""
    in_n = n < N
    in_ne = in_n[:, None] & (e[None, :] < E)
    tl.store(logits_ptr + n[:, None] * E + e[None, :], logits, mask=in_ne)
    logits = tl.where(e[None, :] < E, logits, float("-inf"))
    gates, experts = select_experts(logits, E, K, RENORMALIZE, BLOCK_K)
    if HAS_MASK:
        live = tl.load(token_mask_ptr + n, mask=in_n, other=0) != 0
        gates = tl.where(live[:, None], gates, 0.0)
    kept = tl.arange(0, BLOCK_K)
    in_nk = in_n[:, None] & (kept[None, :] < K)
    tl.store(gates_ptr + n[:, None] * K + kept[None, :], gates, mask=in_nk)
    tl.store(experts_ptr + n[:, None] * K + kept[None, :], experts.to(tl.int64), mask=in_nk)
    return gates, experts


@triton.jit
def store_z_and_h(
    z,  # (BLOCK_N, BLOCK_C) float32
    gates,
    experts,
    scaling_ptr,
    column_expert_ptr,
    z_ptr,
    h_ptr,
    first,
    c,
    in_c,
    N,
    R,
    C,
    E,
    K: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Narrow z, then scale and mask what was narrowed: the backward will read the same numbers."""
    t = tl.arange(0, z.shape[0])  # int32 within the tile: int64 offsets take twice the registers
    in_nc = (first + t < N)[:, None] & in_c[None, :]
    z = z.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + first * C + (t[:, None] * C + c[None, :]), z, mask=in_nc)
    packed = h_ptr + first * R + t[:, None] * R
    wide = z.to(tl.float32)
    if SHARED:
        for expert in range(E):
            gate = tl.sum(tl.where(experts == expert, gates, 0.0), axis=1)
            column = c + expert * C
            scaling = tl.load(scaling_ptr + column, mask=in_c, other=0.0).to(tl.float32)
            h = (scaling[None, :] * gate[:, None] * wide).to(z.dtype)
            tl.store(packed + column[None, :], h, mask=in_nc)
    else:
        scaling = tl.load(scaling_ptr + c, mask=in_c, other=0.0).to(tl.float32)
        column_expert = tl.load(column_expert_ptr + c, mask=in_c, other=-1)
        gate = column_gates(gates, experts, column_expert, K)
        h = (scaling[None, :] * gate * wide).to(z.dtype)
        tl.store(packed + c[None, :], h, mask=in_nc)


@triton.jit(do_not_specialize=["threshold", "N", "steps"])
def shrink_route_kernel(
    x_ptr,  # (N, I)
    lora_A_ptr,  # (C, I)
    router_ptr,  # (E, I)
    scaling_ptr,  # (R,)
    column_expert_ptr,  # (R,) int32
    token_mask_ptr,  # (N,) uint8
    seed_ptr,  # () int64
    z_ptr,  # (N, C)
    h_ptr,  # (N, R)
    gates_ptr,  # (N, K) float32
    experts_ptr,  # (N, K) int64
    logits_ptr,  # (N, E) float32
    threshold,
    keep_scale,
    x_stride_n,
    N,
    I,
    R,
    C,
    E,
    steps,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,  # power of two >= C
    BLOCK_E: tl.constexpr,  # power of two >= E
    BLOCK_K: tl.constexpr,  # power of two >= K
) -> None:
    """Do all that comes before lora_B for BLOCK_N tokens and every column."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    z, logits = _products(
        x_ptr, lora_A_ptr, router_ptr, token_mask_ptr, seed_ptr, first, c, e, c < C, e < E, 0,
        steps, threshold, keep_scale, x_stride_n, N, I, True, True, HAS_MASK, DROPOUT,
        PRECISION, WIDEN, BLOCK_N, BLOCK_I,
    )  # fmt: skip
    gates, experts = route(
        logits, token_mask_ptr, gates_ptr, experts_ptr, logits_ptr, n, e, N, E,
        K, RENORMALIZE, HAS_MASK, BLOCK_K,
    )  # fmt: skip
    store_z_and_h(
        z, gates, experts, scaling_ptr, column_expert_ptr, z_ptr, h_ptr, first, c, c < C,
        N, R, C, E, K, SHARED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold", "N", "steps"])
def shrink_part_kernel(
    x_ptr,  # (N, I)
    lora_A_ptr,  # (C, I)
    router_ptr,  # (E, I)
    token_mask_ptr,  # (N,) uint8
    seed_ptr,  # () int64
    part_ptr,  # (P, N, C + E) float32
    threshold,
    keep_scale,
    x_stride_n,
    N,
    I,
    C,
    E,
    steps,
    HAS_A: tl.constexpr,
    HAS_ROUTER: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Write one part of the sums over I, for few tokens or for columns too many for one tile."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    block, part = tl.program_id(1), tl.program_id(2)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    # beside lora_A the router is one block's work; alone it is as many blocks as it needs
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    in_c = c < C
    in_e = e < E
    if HAS_A:
        in_e = in_e & (e < BLOCK_E)
    z, logits = _products(
        x_ptr, lora_A_ptr, router_ptr, token_mask_ptr, seed_ptr, first, c, e, in_c, in_e,
        part * steps, steps, threshold, keep_scale, x_stride_n, N, I, HAS_A, HAS_ROUTER, HAS_MASK,
        DROPOUT, PRECISION, WIDEN, BLOCK_N, BLOCK_I,
    )  # fmt: skip
    row = (part.to(tl.int64) * N + n) * (C + E)
    in_n = n < N
    if HAS_A:
        tl.store(part_ptr + row[:, None] + c[None, :], z, mask=in_n[:, None] & in_c[None, :])
    if HAS_ROUTER:
        out = part_ptr + row[:, None] + C + e[None, :]
        tl.store(out, logits, mask=in_n[:, None] & in_e[None, :])


@triton.jit
def route_parts(
    part_ptr,
    scaling_ptr,
    column_expert_ptr,
    token_mask_ptr,
    z_ptr,
    h_ptr,
    gates_ptr,
    experts_ptr,
    logits_ptr,
    first,
    P,
    N,
    W,  # columns of a row of the parts: these and, where linears share x, others'
    R,
    C,
    E,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add up BLOCK_N tokens' parts and do with the sums as :func:`shrink_route_kernel` does."""
    n = first + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    in_ne = (n < N)[:, None] & (e < E)[None, :]
    logits = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for part in range(P):
        row = (n + part * N) * W + C
        logits += tl.load(part_ptr + row[:, None] + e[None, :], mask=in_ne, other=0.0)
    gates, experts = route(
        logits, token_mask_ptr, gates_ptr, experts_ptr, logits_ptr, n, e, N, E,
        K, RENORMALIZE, HAS_MASK, BLOCK_K,
    )  # fmt: skip
    if HAS_A:
        for block in range(tl.cdiv(C, BLOCK_C)):
            c = tl.arange(0, BLOCK_C) + block * BLOCK_C
            in_nc = (n < N)[:, None] & (c < C)[None, :]
            z = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for part in range(P):
                row = (n + part * N) * W
                z += tl.load(part_ptr + row[:, None] + c[None, :], mask=in_nc, other=0.0)
            store_z_and_h(
                z, gates, experts, scaling_ptr, column_expert_ptr, z_ptr, h_ptr, first, c, c < C,
                N, R, C, E, K, SHARED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["P", "N"])
def route_parts_kernel(
    part_ptr,  # (P, N, C + E) float32
    scaling_ptr,  # (R,)
    column_expert_ptr,  # (R,) int32
    token_mask_ptr,  # (N,) uint8
    z_ptr,  # (N, C)
    h_ptr,  # (N, R)
    gates_ptr,  # (N, K) float32
    experts_ptr,  # (N, K) int64
    logits_ptr,  # (N, E) float32
    P,
    N,
    R,
    C,
    E,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= E
    BLOCK_K: tl.constexpr,  # power of two >= K
) -> None:
    """Add the parts in order, then route and mask as :func:`shrink_route_kernel` does."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    route_parts(
        part_ptr, scaling_ptr, column_expert_ptr, token_mask_ptr, z_ptr, h_ptr, gates_ptr,
        experts_ptr, logits_ptr, first, P, N, C + E, R, C, E,
        K, RENORMALIZE, SHARED, HAS_A, HAS_MASK, BLOCK_N, BLOCK_C, BLOCK_E, BLOCK_K,
    )  # fmt: skip
