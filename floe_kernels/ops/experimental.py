"""CUDA C++ kernels beside those in use: defined, tested, and dispatched by nothing.

Each has the arguments and results of the operator it would replace, and plain PyTorch for every
device but CUDA. They are compiled and run in an emulation in the tests, and have not yet run on a
GPU; what a GPU measures decides which replaces its Triton counterpart.

=====================================  ===================================  =====================
operator                               CUDA kernel                          stands beside
=====================================  ===================================  =====================
``experimental_topk_softmax``          csrc/cuda/routing.cu                 ``topk_softmax``
``experimental_sort_pairs``            csrc/cuda/routing.cu                 triton/grouping.py
``experimental_segment_grad_square``   csrc/cuda/grad_square.cu             ``segment_grad_square``
``experimental_linear_grad_square``    csrc/cuda/linear_grad_square.cu      ``linear_grad_square``
=====================================  ===================================  =====================

None is differentiable. The CUDA kernels take float32, bfloat16 and float16, and routing float64.
"""

import torch
from torch import Tensor

from floe_kernels import reference
from floe_kernels.ops.define import define

#: Every operator here, without its namespace.
NAMES = (
    "experimental_topk_softmax", "experimental_sort_pairs", "experimental_segment_grad_square",
    "experimental_linear_grad_square",
)  # fmt: skip


@define("floe::experimental_topk_softmax")
def topk_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Route as ``floe::topk_softmax`` does; up to 1024 experts on CUDA."""
    return reference.topk_softmax(logits, k, renormalize)


@define("floe::experimental_sort_pairs")
def sort_pairs(
    experts: Tensor, num_experts: int, mask: Tensor | None, samples: Tensor
) -> tuple[Tensor, Tensor]:
    """Sort pairs (token, slot) by expert and sample, stable in the tokens.

    Args:
        experts: ``(N, K)`` int64, with K at least 1; a pair outside ``0..num_experts - 1`` has no
            expert.
        num_experts: E, in ``1..1024``.
        mask: ``(N,)`` bool, False for a token without experts; None for none such.
        samples: ``(B + 1,)`` int64, not decreasing: the tokens ``samples[b]:samples[b + 1]`` are
            sample b; a token of no sample has no experts.

    Returns:
        The pairs, ``token * K + slot``, ``(N * K,)`` int64, those without an expert last; and
        ``(E * B + 1,)`` int64 offsets: segment ``e * B + b`` has expert e's pairs of sample b.
    """
    n, b = len(experts), len(samples) - 1
    token = torch.arange(n, device=experts.device)
    sample = torch.searchsorted(samples, token, right=True) - 1
    inside = (sample >= 0) & (sample < b)
    if mask is not None:
        inside = inside & mask
    live = inside[:, None] & (experts >= 0) & (experts < num_experts)
    key = torch.where(live, experts * b + sample[:, None], num_experts * b).flatten()
    counts = torch.zeros(num_experts * b + 1, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    offsets = torch.cat([counts.new_zeros(1), counts[:-1].cumsum(0)])
    return key.argsort(stable=True), offsets


@define("floe::experimental_segment_grad_square")
def segment_grad_square(
    g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient, the squares and the norms of ``floe::segment_grad_square``."""
    return reference.segment_grad_square(g, x, offsets, scale, reduce)


@define("floe::experimental_linear_grad_square")
def linear_grad_square(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    """Return the norms of ``floe::linear_grad_square``."""
    return reference.linear_grad_square(g, x, offsets, scale)


@torch.library.register_fake("floe::experimental_topk_softmax")
def _(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return logits.new_empty(n, k), logits.new_empty(n, k, dtype=torch.int64)


@torch.library.register_fake("floe::experimental_sort_pairs")
def _(
    experts: Tensor, num_experts: int, mask: Tensor | None, samples: Tensor
) -> tuple[Tensor, Tensor]:
    segments = num_experts * (samples.shape[0] - 1)
    return experts.new_empty(experts.numel()), experts.new_empty(segments + 1)


@torch.library.register_fake("floe::experimental_segment_grad_square")
def _(
    g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = g.shape[1], x.shape[1]
    dtype = torch.promote_types(g.dtype, x.dtype)
    score = torch.promote_types(dtype, torch.float32)
    shape = {"element": (rows, cols), "rank": (rows,), "matrix": ()}[reduce]
    return (
        g.new_empty(rows, cols, dtype=dtype),
        g.new_empty(shape, dtype=score),
        g.new_empty(offsets.shape[0] - 1, dtype=score),
    )


@torch.library.register_fake("floe::experimental_linear_grad_square")
def _(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(g.dtype, x.dtype), torch.float32)
    return g.new_empty(offsets.shape[0] - 1, dtype=dtype)


def has_cuda_kernel(name: str) -> bool:
    """Tell whether this build has the CUDA kernel of an operator named without its namespace."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"floe::{name}", "CUDA"))
