"""Gate backward: from dy to dz, dlogits and h, the adapter's whole backward but its GEMMs.

    u = dy lora_B^T     dg_k = sum over c of expert k: scaling z u     dz = scaling g u

Dims: N tokens, O outputs, E experts, K experts kept per token, R packed columns, C columns of z
(R, or the one rank of a shared A), P parts into which a sum over O is split.
"""

import triton
import triton.language as tl

from floe_kernels.triton.tiles import column_gates, dot


@triton.jit
def _expand_transposed(
    dy_ptr,
    lora_B_ptr,
    token_mask_ptr,
    first,
    r,
    first_step,
    steps,
    dy_stride_n,
    N,
    O,
    R,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Return this tile's share of u: BLOCK_O outputs a step, from step first."""
    t = tl.arange(0, BLOCK_N)
    n = first + t
    live = n < N
    if HAS_MASK:  # a padding row may hold NaN: it reads as zero
        live = live & (tl.load(token_mask_ptr + n, mask=live, other=0) != 0)
    in_r = r < R
    u = tl.zeros((BLOCK_N, r.shape[0]), tl.float32)
    for step in range(steps):
        o = (first_step + step) * BLOCK_O + tl.arange(0, BLOCK_O)
        in_o = o < O
        dy = tl.load(
            dy_ptr + first * dy_stride_n + (t[:, None] * dy_stride_n + o[None, :]),
            mask=live[:, None] & in_o[None, :],
            other=0.0,
        )
        b = tl.load(
            lora_B_ptr + r[None, :].to(tl.int64) * O + o[:, None],
            mask=in_r[None, :] & in_o[:, None],
            other=0.0,
        )
        u = dot(dy, b.to(dy.dtype), u, PRECISION, WIDEN)
    return u


@triton.jit
def _columns_backward(
    u,  # (BLOCK_N, BLOCK_R) float32
    grad_gates,  # (BLOCK_N, BLOCK_K) float32, the columns before these
    gates,
    experts,
    scaling_ptr,
    column_expert_ptr,
    z_ptr,
    h_ptr,
    dz_ptr,
    first,
    r,
    dz_stride_n,
    N,
    R,
    K: tl.constexpr,
):
    """Store h and dz of some columns and return the gates' gradient with their share in it.

    Within the tile offsets are int32 from its first row: as int64 they spill (sm_90, 128 columns).
    """
    t = tl.arange(0, gates.shape[0])
    in_r = r < R
    in_nr = (first + t < N)[:, None] & in_r[None, :]
    packed = t[:, None] * R + r[None, :]
    kept = tl.arange(0, gates.shape[1])
    scaling = tl.load(scaling_ptr + r, mask=in_r, other=0.0).to(tl.float32)
    column_expert = tl.load(column_expert_ptr + r, mask=in_r, other=-1)
    z = tl.load(z_ptr + first * R + packed, mask=in_nr, other=0.0).to(tl.float32)
    gate = column_gates(gates, experts, column_expert, K)
    # where an expert was not kept z may be unwritten: selected away, not multiplied by zero
    z = tl.where(gate != 0.0, scaling[None, :] * z, 0.0)
    h = gate * z
    dz = gate * scaling[None, :] * u
    tl.store(h_ptr + first * R + packed, h.to(h_ptr.dtype.element_ty), mask=in_nr)
    out = dz_ptr + first * dz_stride_n + (t[:, None] * dz_stride_n + r[None, :])
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=in_nr)
    zu = z * u
    for k in range(K):
        expert = tl.sum(tl.where(kept[None, :] == k, experts, 0), axis=1)
        own = tl.where(column_expert[None, :] == expert[:, None], zu, 0.0)
        grad_gates += tl.where(kept[None, :] == k, tl.sum(own, axis=1)[:, None], 0.0)
    return grad_gates


@triton.jit
def load_routing(gates_ptr, experts_ptr, n, N, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return a tile's gates and experts, of no weight and no expert beyond the last token."""
    kept = tl.arange(0, BLOCK_K)
    in_nk = (n < N)[:, None] & (kept[None, :] < K)
    gates = tl.load(gates_ptr + n[:, None] * K + kept[None, :], mask=in_nk, other=0.0)
    experts = tl.load(experts_ptr + n[:, None] * K + kept[None, :], mask=in_nk, other=-1)
    return gates, experts.to(tl.int32)


@triton.jit
def router_backward(
    grad_gates,  # (BLOCK_N, BLOCK_K)
    gates,
    experts,
    logits_ptr,
    aux_coefs_ptr,
    load_ptr,
    token_mask_ptr,
    dlogits_ptr,
    gate_score_ptr,
    n,
    dlogits_stride_n,
    load_blocks,
    N,
    E,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_AUX: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Differentiate the softmax, and the auxiliary losses with it, and store dlogits."""
    e = tl.arange(0, BLOCK_E).to(tl.int64)
    kept = tl.arange(0, gates.shape[1])
    in_n = n < N
    in_ne = in_n[:, None] & (e < E)[None, :]
    if HAS_SCORE:  # the adapter is linear in one gate on all of it
        tl.store(gate_score_ptr + n, tl.sum(gates * grad_gates, axis=1), mask=in_n)
    if HAS_AUX or not RENORMALIZE:
        logits = tl.load(logits_ptr + n[:, None] * E + e[None, :], mask=in_ne, other=0.0)
        logits = tl.where((e < E)[None, :], logits, float("-inf"))
        top = tl.max(logits, axis=1)
        p = tl.exp(logits - top[:, None])
        total = tl.sum(p, axis=1)
        p = p / total[:, None]
    if RENORMALIZE:  # a softmax over the kept logits alone
        weighted = tl.sum(gates * grad_gates, axis=1)
        grad_kept = gates * (grad_gates - weighted[:, None])
    else:
        grad_kept = tl.where(gates != 0.0, grad_gates, 0.0)
    dlogits = tl.zeros((n.shape[0], BLOCK_E), tl.float32)
    for k in range(K):
        expert = tl.sum(tl.where(kept[None, :] == k, experts, 0), axis=1)
        grad = tl.sum(tl.where(kept[None, :] == k, grad_kept, 0.0), axis=1)
        dlogits += tl.where(e[None, :] == expert[:, None], grad[:, None], 0.0)
    if not RENORMALIZE:
        dlogits = p * (dlogits - tl.sum(p * dlogits, axis=1)[:, None])
    if HAS_AUX:
        load = tl.zeros((BLOCK_E,), tl.float32)
        for block in range(load_blocks):  # picks below 2**24 add exactly, in any order
            load += tl.load(load_ptr + block * E + e, mask=e < E, other=0).to(tl.float32)
        picks = tl.maximum(tl.sum(load, axis=0), 1.0)
        load = load / picks
        spread = load[None, :] - tl.sum(p * load[None, :], axis=1)[:, None]
        balance = tl.load(aux_coefs_ptr).to(tl.float32) * E
        z_loss = tl.load(aux_coefs_ptr + 1).to(tl.float32) * 2.0 * (top + tl.log(total))
        # every unmasked token makes K picks
        dlogits += p * (balance * spread + z_loss[:, None]) * (K / picks)
    if HAS_MASK:
        live = tl.load(token_mask_ptr + n, mask=in_n, other=0) != 0
        dlogits = tl.where(live[:, None], dlogits, 0.0)
    out = dlogits_ptr + n[:, None] * dlogits_stride_n + e[None, :]
    tl.store(out, dlogits.to(dlogits_ptr.dtype.element_ty), mask=in_ne)


@triton.jit(do_not_specialize=["load_blocks", "N", "steps"])
def gate_kernel(
    dy_ptr,  # (N, O)
    lora_B_ptr,  # (R, O)
    scaling_ptr,  # (R,)
    column_expert_ptr,  # (R,) int32
    token_mask_ptr,  # (N,) uint8
    z_ptr,  # (N, R)
    gates_ptr,  # (N, K) float32
    experts_ptr,  # (N, K) int64
    logits_ptr,  # (N, E) float32
    aux_coefs_ptr,  # (2,)
    load_ptr,  # (load_blocks, E) int32
    h_ptr,  # (N, R)
    dz_ptr,  # (N, R) in rows of dz_stride_n
    dlogits_ptr,  # (N, E) in rows of dz_stride_n
    gate_score_ptr,  # (N,) float32
    dy_stride_n,
    dz_stride_n,
    load_blocks,
    N,
    O,
    R,
    E,
    steps,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_AUX: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,  # power of two >= R
    BLOCK_E: tl.constexpr,  # power of two >= E
    BLOCK_K: tl.constexpr,  # power of two >= K
) -> None:
    """Differentiate BLOCK_N tokens' gates with every column in one tile."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    u = _expand_transposed(
        dy_ptr, lora_B_ptr, token_mask_ptr, first, r, 0, steps, dy_stride_n, N, O, R,
        HAS_MASK, PRECISION, WIDEN, BLOCK_N, BLOCK_O,
    )  # fmt: skip
    gates, experts = load_routing(gates_ptr, experts_ptr, n, N, K, BLOCK_K)
    grad_gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    grad_gates = _columns_backward(
        u, grad_gates, gates, experts, scaling_ptr, column_expert_ptr, z_ptr, h_ptr, dz_ptr,
        first, r, dz_stride_n, N, R, K,
    )  # fmt: skip
    router_backward(
        grad_gates, gates, experts, logits_ptr, aux_coefs_ptr, load_ptr, token_mask_ptr,
        dlogits_ptr, gate_score_ptr, n, dz_stride_n, load_blocks, N, E,
        K, RENORMALIZE, HAS_MASK, HAS_AUX, HAS_SCORE, BLOCK_E,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "steps"])
def gate_part_kernel(
    dy_ptr,  # (N, O)
    lora_B_ptr,  # (R, O)
    token_mask_ptr,  # (N,) uint8
    part_ptr,  # (P, N, R) float32
    dy_stride_n,
    N,
    O,
    R,
    steps,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Write one part of u, for few tokens or for columns too many for one tile."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2)
    u = _expand_transposed(
        dy_ptr, lora_B_ptr, token_mask_ptr, first, r, part * steps, steps, dy_stride_n, N, O, R,
        HAS_MASK, PRECISION, WIDEN, BLOCK_N, BLOCK_O,
    )  # fmt: skip
    row = (part.to(tl.int64) * N + n) * R
    tl.store(part_ptr + row[:, None] + r[None, :], u, mask=(n < N)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["load_blocks", "P", "N"])
def gate_parts_kernel(
    part_ptr,  # (P, N, R) float32
    scaling_ptr,  # (R,)
    column_expert_ptr,  # (R,) int32
    token_mask_ptr,  # (N,) uint8
    z_ptr,  # (N, C)
    gates_ptr,  # (N, K) float32
    experts_ptr,  # (N, K) int64
    logits_ptr,  # (N, E) float32
    aux_coefs_ptr,  # (2,)
    load_ptr,  # (load_blocks, E) int32
    h_ptr,  # (N, R)
    dz_ptr,  # (N, C) in rows of dz_stride_n
    dlogits_ptr,  # (N, E) in rows of dz_stride_n
    gate_score_ptr,  # (N,) float32
    dz_stride_n,
    load_blocks,
    P,
    N,
    R,
    C,
    E,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_AUX: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= E
    BLOCK_K: tl.constexpr,  # power of two >= K
) -> None:
    """Add the parts in order, then do as :func:`gate_kernel` does."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    in_n = n < N
    gates, experts = load_routing(gates_ptr, experts_ptr, n, N, K, BLOCK_K)
    grad_gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for block in range(tl.cdiv(C, BLOCK_C)):
        c = tl.arange(0, BLOCK_C) + block * BLOCK_C
        in_c = c < C
        in_nc = in_n[:, None] & in_c[None, :]
        if SHARED:
            z = tl.load(z_ptr + n[:, None] * C + c[None, :], mask=in_nc, other=0.0).to(tl.float32)
            dz = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for expert in range(E):
                column = c + expert * C
                u = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
                for part in range(P):
                    row = (n + part * N) * R
                    u += tl.load(part_ptr + row[:, None] + column[None, :], mask=in_nc, other=0.0)
                gate = tl.sum(tl.where(experts == expert, gates, 0.0), axis=1)
                scaling = tl.load(scaling_ptr + column, mask=in_c, other=0.0).to(tl.float32)
                scaled = scaling[None, :] * u
                dz += gate[:, None] * scaled
                h = (gate[:, None] * scaling[None, :] * z).to(h_ptr.dtype.element_ty)
                tl.store(h_ptr + n[:, None] * R + column[None, :], h, mask=in_nc)
                grad = tl.sum(scaled * z, axis=1)
                grad_gates += tl.where(experts == expert, grad[:, None], 0.0)
            out = dz_ptr + n[:, None] * dz_stride_n + c[None, :]
            tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=in_nc)
        else:
            u = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for part in range(P):
                row = (n + part * N) * R
                u += tl.load(part_ptr + row[:, None] + c[None, :], mask=in_nc, other=0.0)
            grad_gates = _columns_backward(
                u, grad_gates, gates, experts, scaling_ptr, column_expert_ptr, z_ptr, h_ptr,
                dz_ptr, first, c, dz_stride_n, N, R, K,
            )  # fmt: skip
    router_backward(
        grad_gates, gates, experts, logits_ptr, aux_coefs_ptr, load_ptr, token_mask_ptr,
        dlogits_ptr, gate_score_ptr, n, dz_stride_n, load_blocks, N, E,
        K, RENORMALIZE, HAS_MASK, HAS_AUX, HAS_SCORE, BLOCK_E,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def expert_picks_kernel(
    experts_ptr,  # (N, K) int64
    token_mask_ptr,  # (N,) uint8
    picks_ptr,  # (programs, E) int32
    N,
    E,
    K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= E
) -> None:
    """Count how often BLOCK_N tokens picked each expert; whoever reads adds the programs."""
    block = tl.program_id(0).to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    live = n < N
    if HAS_MASK:
        live = live & (tl.load(token_mask_ptr + n, mask=live, other=0) != 0)
    picks = tl.zeros((BLOCK_E,), tl.int32)
    for k in range(K):
        expert = tl.load(experts_ptr + n * K + k, mask=live, other=-1)
        picks += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(picks_ptr + block * E + e, picks, mask=e < E)
