"""The adapter's products over pairs sorted by expert: each tile meets one expert's weights.

Dims: N tokens, D inputs (or outputs), E experts, K experts kept per token, R packed columns,
Q columns an expert has at most, S pairs.
"""

import triton
import triton.language as tl

from floe_kernels.triton.moe_lora_gate import load_routing, router_backward
from floe_kernels.triton.tiles import dot, drop, kept_elements


@triton.jit
def _load_tile(tile_ptr, index, pair_ptr, columns_ptr, K: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile's first pair, who is live in it, pairs, tokens, expert's columns and rank."""
    first = tl.load(tile_ptr + index * 4)
    pairs = tl.load(tile_ptr + index * 4 + 1)
    expert = tl.load(tile_ptr + index * 4 + 2)
    t = tl.arange(0, ROWS)
    live = t < pairs
    pair = tl.load(pair_ptr + first + t, mask=live, other=0)
    column = tl.load(columns_ptr + expert)
    rank = tl.load(columns_ptr + expert + 1) - column
    return first, live, pair, pair // K, column, rank


@triton.jit
def _gathered_product(
    x_ptr,
    weight_ptr,
    seed_ptr,
    token,
    live,
    column,
    rank,
    threshold,
    keep_scale,
    x_stride_n,
    D,
    steps,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Return ``x[token] weight^T`` of one expert: the rows are gathered in the load."""
    q = tl.arange(0, BLOCK_Q)
    in_q = q < rank
    acc = tl.zeros((ROWS, BLOCK_Q), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for step in range(steps):
        d = step * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = d < D
        x = tl.load(
            x_ptr + token[:, None] * x_stride_n + d[None, :],
            mask=live[:, None] & in_d[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + ((column + q).to(tl.int64)[None, :] * D + d[:, None]),
            mask=in_q[None, :] & in_d[:, None],
            other=0.0,
        )
        if DROPOUT:
            x = drop(x, token, d, D, seed, threshold, keep_scale)
        acc = dot(x, w.to(x.dtype), acc, PRECISION, WIDEN)
    return acc


@triton.jit(do_not_specialize=["threshold", "steps"])
def grouped_shrink_kernel(
    x_ptr,  # (N, D)
    lora_A_ptr,  # (R, D)
    scaling_ptr,  # (R,)
    gates_ptr,  # (N, K) float32
    tile_ptr,  # (bound, 4) int64
    pair_ptr,  # (S,) int64
    columns_ptr,  # (E + 1,) int32
    seed_ptr,  # () int64
    z_ptr,  # (N, R)
    h_ptr,  # (S, Q)
    threshold,
    keep_scale,
    x_stride_n,
    D,
    R,
    Q,
    steps,
    K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> None:
    """Write z where the expert's columns are, and h pair by pair."""
    first, live, pair, token, column, rank = _load_tile(
        tile_ptr, tl.program_id(0).to(tl.int64), pair_ptr, columns_ptr, K, ROWS
    )
    z = _gathered_product(
        x_ptr, lora_A_ptr, seed_ptr, token, live, column, rank, threshold, keep_scale, x_stride_n,
        D, tl.where(tl.max(live.to(tl.int32), axis=0) > 0, steps, 0),
        DROPOUT, PRECISION, WIDEN, ROWS, BLOCK_D, BLOCK_Q,
    )  # fmt: skip
    q = tl.arange(0, BLOCK_Q)
    mask = live[:, None] & (q < rank)[None, :]
    z = z.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + token[:, None] * R + (column + q)[None, :], z, mask=mask)
    gate = tl.load(gates_ptr + pair, mask=live, other=0.0)
    scaling = tl.load(scaling_ptr + column + q, mask=q < rank, other=0.0).to(tl.float32)
    h = (scaling[None, :] * gate[:, None] * z.to(tl.float32)).to(z.dtype)
    place = first + tl.arange(0, ROWS)
    # the columns of a smaller expert are written too: readers need not mask them
    tl.store(h_ptr + place[:, None] * Q + q[None, :], h, mask=live[:, None] & (q < Q)[None, :])


@triton.jit(do_not_specialize=["threshold", "list_first"])
def grouped_update_kernel(
    out_ptr,  # (N, D)
    left_ptr,  # (S, Q)
    right_ptr,  # (R, D)
    tile_ptr,  # (bound, 4) int64
    group_ptr,  # (groups + 1, 2) int32
    pair_ptr,  # (S,) int64
    columns_ptr,  # (E + 1,) int32
    seed_ptr,  # () int64
    threshold,
    keep_scale,
    list_first,  # the first of the E groups of this launch
    out_stride_n,
    D,
    E,
    Q,
    K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> None:
    """Add one slot's share to its tokens' rows: no two pairs of a launch share a row."""
    index = tl.load(group_ptr + list_first * 2) + tl.program_id(1)
    if index < tl.load(group_ptr + (list_first + E) * 2):
        first, live, _, token, column, rank = _load_tile(
            tile_ptr, index.to(tl.int64), pair_ptr, columns_ptr, K, ROWS
        )
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = d < D
        place = first + tl.arange(0, ROWS)
        acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for step in range(tl.cdiv(Q, BLOCK_Q)):
            q = step * BLOCK_Q + tl.arange(0, BLOCK_Q)
            in_q = q < rank
            left = tl.load(
                left_ptr + place[:, None] * Q + q[None, :],
                mask=live[:, None] & in_q[None, :],
                other=0.0,
            )
            right = tl.load(
                right_ptr + ((column + q).to(tl.int64)[:, None] * D + d[None, :]),
                mask=in_q[:, None] & in_d[None, :],
                other=0.0,
            )
            acc = dot(left, right.to(left.dtype), acc, PRECISION, WIDEN)
        if DROPOUT:
            kept = kept_elements(token[:, None] * D + d[None, :], tl.load(seed_ptr), threshold)
            acc = tl.where(kept, acc * keep_scale, 0.0)
        out = out_ptr + token[:, None] * out_stride_n + d[None, :]
        mask = live[:, None] & in_d[None, :]
        acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["steps"])
def grouped_gate_kernel(
    dy_ptr,  # (N, D)
    lora_B_ptr,  # (R, D)
    scaling_ptr,  # (R,)
    gates_ptr,  # (N, K) float32
    z_ptr,  # (N, R)
    tile_ptr,  # (bound, 4) int64
    pair_ptr,  # (S,) int64
    columns_ptr,  # (E + 1,) int32
    h_ptr,  # (S, Q)
    dz_ptr,  # (S, Q)
    grad_gates_ptr,  # (N, K) float32
    dy_stride_n,
    D,
    R,
    Q,
    steps,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> None:
    """Write h, dz and the gate's gradient, pair by pair."""
    first, live, pair, token, column, rank = _load_tile(
        tile_ptr, tl.program_id(0).to(tl.int64), pair_ptr, columns_ptr, K, ROWS
    )
    u = _gathered_product(
        dy_ptr, lora_B_ptr, dy_ptr, token, live, column, rank, 0, 1.0, dy_stride_n,
        D, tl.where(tl.max(live.to(tl.int32), axis=0) > 0, steps, 0),
        False, PRECISION, WIDEN, ROWS, BLOCK_D, BLOCK_Q,
    )  # fmt: skip
    q = tl.arange(0, BLOCK_Q)
    mask = live[:, None] & (q < rank)[None, :]
    z = tl.load(z_ptr + token[:, None] * R + (column + q)[None, :], mask=mask, other=0.0)
    z = z.to(tl.float32)
    gate = tl.load(gates_ptr + pair, mask=live, other=0.0)
    scaling = tl.load(scaling_ptr + column + q, mask=q < rank, other=0.0).to(tl.float32)
    u = scaling[None, :] * u
    tl.store(grad_gates_ptr + pair, tl.sum(z * u, axis=1), mask=live)
    place = (first + tl.arange(0, ROWS))[:, None] * Q + q[None, :]
    mask = live[:, None] & (q < Q)[None, :]
    h = scaling[None, :] * gate[:, None] * z
    tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(dz_ptr + place, (gate[:, None] * u).to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["load_blocks", "N"])
def grouped_router_kernel(
    grad_gates_ptr,  # (N, K) float32, unwritten where the token is masked
    gates_ptr,  # (N, K) float32
    experts_ptr,  # (N, K) int64
    logits_ptr,  # (N, E) float32
    token_mask_ptr,  # (N,) uint8
    aux_coefs_ptr,  # (2,)
    load_ptr,  # (load_blocks, E) int32
    dlogits_ptr,  # (N, E)
    dlogits_stride_n,
    load_blocks,
    N,
    E,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_AUX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= E
    BLOCK_K: tl.constexpr,  # power of two >= K
) -> None:
    """Differentiate the softmax of BLOCK_N tokens, whose gates' gradients came pair by pair."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    gates, experts = load_routing(gates_ptr, experts_ptr, n, N, K, BLOCK_K)
    live = n < N
    if HAS_MASK:
        live = live & (tl.load(token_mask_ptr + n, mask=live, other=0) != 0)
    kept = tl.arange(0, BLOCK_K)
    grad_gates = tl.load(
        grad_gates_ptr + n[:, None] * K + kept[None, :],
        mask=live[:, None] & (kept[None, :] < K),
        other=0.0,
    )
    router_backward(
        grad_gates, gates, experts, logits_ptr, aux_coefs_ptr, load_ptr, token_mask_ptr,
        dlogits_ptr, grad_gates_ptr, n, dlogits_stride_n, load_blocks, N, E,
        K, RENORMALIZE, HAS_MASK, HAS_AUX, False, BLOCK_E,
    )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def grouped_weight_grad_kernel(
    g_ptr,  # (S, Q)
    x_ptr,  # (N, D)
    tile_ptr,  # (bound, 4) int64
    pair_ptr,  # (S,) int64
    columns_ptr,  # (E + 1,) int32
    seed_ptr,  # () int64
    out_ptr,  # (R, D)
    part_ptr,  # (split tiles, Q, D) float32
    threshold,
    keep_scale,
    x_stride_n,
    D,
    Q,
    K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> None:
    """Sum one piece of one expert's pairs; an expert in one piece goes straight to its place."""
    index = tl.program_id(0).to(tl.int64)  # experts fastest: they share rows of x, then in L2
    first = tl.load(tile_ptr + index * 4)
    pairs = tl.load(tile_ptr + index * 4 + 1)
    expert = tl.load(tile_ptr + index * 4 + 2)
    split = tl.load(tile_ptr + index * 4 + 3)
    column = tl.load(columns_ptr + expert)
    rank = tl.load(columns_ptr + expert + 1) - column
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    q = tl.arange(0, BLOCK_Q)
    in_d = d < D
    in_q = q < rank
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_D, BLOCK_Q), tl.float32)
    for step in range(tl.cdiv(pairs, BLOCK_N).to(tl.int32)):
        t = step * BLOCK_N + tl.arange(0, BLOCK_N)
        live = t < pairs
        token = tl.load(pair_ptr + first + t, mask=live, other=0) // K
        x = tl.load(
            x_ptr + token[:, None] * x_stride_n + d[None, :],
            mask=live[:, None] & in_d[None, :],
            other=0.0,
        )
        g = tl.load(
            g_ptr + (first + t)[:, None] * Q + q[None, :],
            mask=live[:, None] & in_q[None, :],
            other=0.0,
        )
        if DROPOUT:
            x = drop(x, token, d, D, seed, threshold, keep_scale)
        acc = dot(tl.trans(x), g, acc, PRECISION, WIDEN)
    # one of the two has no columns: an expert in one piece, or in several; a surplus tile, neither
    rank = tl.where(pairs > 0, rank, 0)
    direct = q < tl.where(split < 0, rank, 0)
    shared = q < tl.where(split < 0, 0, rank)
    out = out_ptr + ((column + q).to(tl.int64)[None, :] * D + d[:, None])
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_d[:, None] & direct[None, :])
    part = part_ptr + (split * Q + q)[None, :] * D + d[:, None]
    tl.store(part, acc, mask=in_d[:, None] & shared[None, :])


@triton.jit
def grouped_add_parts_kernel(
    part_ptr,  # (split tiles, Q, D) float32
    group_ptr,  # (E + 1, 2) int32
    columns_ptr,  # (E + 1,) int32
    out_ptr,  # (R, D)
    D,
    Q,
    BLOCK: tl.constexpr,
) -> None:
    """Add a split expert's pieces from first to last; write zeros for an expert without a pair."""
    expert = tl.program_id(1)
    pieces = tl.load(group_ptr + (expert + 1) * 2) - tl.load(group_ptr + expert * 2)
    if pieces != 1:
        first = tl.load(group_ptr + expert * 2 + 1).to(tl.int64)
        column = tl.load(columns_ptr + expert).to(tl.int64)
        rank = tl.load(columns_ptr + expert + 1) - column
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        in_i = i < rank * D
        total = tl.zeros((BLOCK,), tl.float32)
        for piece in range(pieces):
            total += tl.load(part_ptr + (first + piece) * Q * D + i, mask=in_i, other=0.0)
        tl.store(out_ptr + column * D + i, total.to(out_ptr.dtype.element_ty), mask=in_i)
