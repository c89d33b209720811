"""Routing kernels.

Dims: N tokens, E experts, K experts kept per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_kernels.triton.launch import options
from floe_kernels.triton.tiles import select_experts


@triton.jit(do_not_specialize=["N"])
def _topk_softmax_kernel(
    logits_ptr,  # (N, E)
    gates_ptr,  # (N, K)
    experts_ptr,  # (N, K) int64
    logits_stride_n,
    N,
    E,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,  # over the kept logits, else over all
    ACC: tl.constexpr,  # dtype of the softmax
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= E
    BLOCK_K: tl.constexpr,  # power of two >= K
):
    """Route BLOCK_N tokens: K rounds of arg-max over the experts, then softmax the winners."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    kept = tl.arange(0, BLOCK_K)
    in_n = n < N

    in_ne = in_n[:, None] & (e[None, :] < E)
    z = tl.load(logits_ptr + n[:, None] * logits_stride_n + e[None, :], mask=in_ne, other=0.0)
    # padding experts must lose every round; padding tokens may hold anything finite
    z = tl.where(e[None, :] < E, z.to(ACC), float("-inf"))  # (BLOCK_N, BLOCK_E)

    gates, best_e = select_experts(z, E, K, RENORMALIZE, BLOCK_K)
    out = n[:, None] * K + kept[None, :]
    mask = in_n[:, None] & (kept[None, :] < K)
    tl.store(gates_ptr + out, gates.to(gates_ptr.dtype.element_ty), mask=mask)
    tl.store(experts_ptr + out, best_e.to(tl.int64), mask=mask)


def topk_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Launch :func:`_topk_softmax_kernel`. Unit stride over experts is all it asks of layout."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    n, e = logits.shape
    gates = logits.new_empty(n, k)
    experts = logits.new_empty(n, k, dtype=torch.int64)
    block_e = triton.next_power_of_2(e)
    # 1024 logits a program: at 4096 one thread holds up to 247 registers, of 255 (sm_90, E 64, K 8)
    block_n = max(1, min(64, 1024 // block_e))
    if n:
        _topk_softmax_kernel[(triton.cdiv(n, block_n),)](
            logits, gates, experts, logits.stride(0), n, e,
            K=k, RENORMALIZE=renormalize,
            ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32,
            BLOCK_N=block_n, BLOCK_E=block_e, BLOCK_K=triton.next_power_of_2(k), **options(),
        )  # fmt: skip
    return gates, experts
