"""What several kernels do with a tile once it is loaded.

Dims: N tokens, E experts, K experts kept per token, C columns of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    """Return ``acc + a b``, summed in float32."""
    if WIDEN:  # the interpreter's product of bfloat16 is wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_exact(x, w, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    """Return ``acc + x w`` for a ``w`` that may be float32 beside a narrow ``x``: no bit is lost.

    Experts are chosen by comparing logits, so the router's weight is not rounded to x's dtype.
    """
    if WIDEN or x.dtype == w.dtype:
        acc = dot(x, w, acc, PRECISION, WIDEN)
    elif x.dtype == tl.bfloat16:
        # three bfloat16 hold the 24 bits of a float32; x stays as it was loaded
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(x, low, acc)
        acc = tl.dot(x, middle, acc)
        acc = tl.dot(x, high, acc)
    else:  # parts of a small weight would be subnormal in float16
        acc = tl.dot(x.to(tl.float32), w, acc, input_precision="ieee")
    return acc


@triton.jit
def kept_elements(counter, seed, threshold) -> tl.tensor:
    """Return which elements dropout keeps: word 0 of Philox4x32-10, as in reference/dropout.py."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return word.to(tl.int64) >= threshold


@triton.jit
def drop(x, n, i, I, seed, threshold, keep_scale) -> tl.tensor:
    """Return the tile ``x`` (rows n, columns i of an (N, I) matrix) after dropout."""
    kept = kept_elements(n[:, None] * I + i[None, :], seed, threshold)
    scaled = (x.to(tl.float32) * keep_scale).to(x.dtype)
    return tl.where(kept, scaled, tl.zeros_like(x))


@triton.jit
def select_experts(
    z,  # (BLOCK_N, BLOCK_E) logits, -inf on padding experts
    E,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,  # over the kept logits, else over all
    BLOCK_K: tl.constexpr,  # power of two >= K
) -> tuple[tl.tensor, tl.tensor]:
    """Return gates and experts (BLOCK_N, BLOCK_K), best first: K rounds of arg-max."""
    e = tl.arange(0, z.shape[1])
    kept = tl.arange(0, BLOCK_K)
    top_z = tl.max(z, axis=1)
    total = tl.sum(tl.exp(z - top_z[:, None]), axis=1)  # over all experts, before any leaves
    # NaN wins every round, as it does in a sort; compared as it is, it could name any column
    z = tl.where(z == z, z, float("inf"))
    # an expert at -inf loses to every other, but not to padding nor to one that left
    lowest = -1.7976931348623157e308 if z.dtype == tl.float64 else -3.4028234663852886e38
    z = tl.where((e < E)[None, :], tl.maximum(z, lowest), float("-inf"))
    best_z = tl.full((z.shape[0], BLOCK_K), float("-inf"), z.dtype)
    best_e = tl.zeros((z.shape[0], BLOCK_K), tl.int32)
    for k in range(K):
        top, arg = tl.max(z, axis=1, return_indices=True, return_indices_tie_break_left=True)
        best_z = tl.where(kept[None, :] == k, top[:, None], best_z)
        best_e = tl.where(kept[None, :] == k, arg[:, None].to(tl.int32), best_e)
        z = tl.where(e[None, :] == arg[:, None], float("-inf"), z)  # out of the next round
    # padding columns of best_z are -inf and weigh exp(-inf) = 0
    w = tl.exp(best_z - top_z[:, None])
    if RENORMALIZE:
        total = tl.sum(w, axis=1)
    return w / total[:, None], best_e


@triton.jit
def column_gates(
    gates,  # (BLOCK_N, BLOCK_K)
    experts,  # (BLOCK_N, BLOCK_K) int32
    column_expert,  # (BLOCK_C,) int32
    K: tl.constexpr,
) -> tl.tensor:
    """Return the gate of every column's expert, (BLOCK_N, BLOCK_C), 0 where it was not kept."""
    kept = tl.arange(0, gates.shape[1])
    out = tl.zeros((gates.shape[0], column_expert.shape[0]), tl.float32)
    for k in range(K):
        # a tile has no columns to index: the sum picks one
        expert = tl.sum(tl.where(kept[None, :] == k, experts, 0), axis=1)
        gate = tl.sum(tl.where(kept[None, :] == k, gates, 0.0), axis=1)
        out += tl.where(column_expert[None, :] == expert[:, None], gate[:, None], 0.0)
    return out
