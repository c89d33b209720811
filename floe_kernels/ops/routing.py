"""``floe::topk_softmax``: schema, shapes, gradient, and who computes it where.

==========  =================================  ===========================
device      kernel                             present when
==========  =================================  ===========================
any         reference/routing.py               always
CPU         csrc/cpu/routing.cpp               the extension was built
CUDA        triton/routing.py                  Triton is installed
==========  =================================  ===========================
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from floe_kernels import reference
from floe_kernels.ops.define import define


@define("floe::topk_softmax")
def topk_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Serve every device for which no kernel is registered."""
    return reference.topk_softmax(logits, k, renormalize)


@torch.library.register_fake("floe::topk_softmax")
def _(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return logits.new_empty(n, k), logits.new_empty(n, k, dtype=torch.int64)


# loaded on the first call, not on import; Triton launches on the current device, whatever its
# arguments are on
if find_spec("triton"):

    @torch.library.register_kernel("floe::topk_softmax", "cuda")
    def _(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        from floe_kernels.triton import routing as kernels

        with torch.cuda.device(logits.device):
            return kernels.topk_softmax(logits, k, renormalize)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor]
) -> None:
    logits, _k, ctx.renormalize = inputs
    gates, experts = output
    ctx.save_for_backward(logits, gates, experts)


def _backward(ctx: Any, grad_gates: Tensor, _grad_experts: None) -> tuple[Tensor, None, None]:
    # plain torch, so that it differentiates again
    logits, gates, experts = ctx.saved_tensors
    weighted = gates * grad_gates
    if ctx.renormalize:
        grad_kept = weighted - gates * weighted.sum(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(1, experts, grad_kept), None, None
    # every logit is in the denominator
    grad = logits.softmax(-1) * -weighted.sum(-1, keepdim=True)
    return grad.scatter_add(1, experts, weighted), None, None


torch.library.register_autograd("floe::topk_softmax", _backward, setup_context=_setup_context)
