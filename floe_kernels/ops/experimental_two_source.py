"""``floe::experimental_two_source_linear`` and ``_grad``: two products, one pass over the output.

==========  =================================  ===========================
device      kernel                             present when
==========  =================================  ===========================
any         this file                          always
CUDA        csrc/cuda/two_source_linear.cu     the extension was built for
                                               CUDA; runs on sm_90 alone
==========  =================================  ===========================

A challenger: no function of the package calls it, and importing ``floe_kernels`` does not load
this file. The CUDA kernel takes bfloat16 or float16, one dtype for all arguments, each matrix with
adjacent columns, a start at a multiple of 16 bytes and rows a multiple of 16 bytes apart: hence
``h``, ``dz`` and ``dlogits`` of 8 n columns, or views of a wider buffer. It accumulates everything
in float32 and rounds once. Not differentiable; the second operator is the first one's ``grad_x``.

Dims: N tokens, I inputs, O outputs, E experts, R packed columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from floe_kernels.ops.define import define


@define("floe::experimental_two_source_linear")
def two_source_linear(
    x: Tensor, h: Tensor, weight: Tensor, lora_B: Tensor, bias: Tensor | None
) -> Tensor:
    """Return ``[x | h] [weight | lora_B^T]^T + bias``.

    Args:
        x: ``(N, I)``, ``I > 0``.
        h: ``(N, R)``; R = 0 leaves the second product out.
        weight: ``(O, I)``.
        lora_B: ``(R, O)``.
        bias: ``(O,)``.

    Returns:
        ``(N, O)``, contiguous.
    """
    return F.linear(x, weight, bias).addmm_(h, lora_B)


@torch.library.register_fake("floe::experimental_two_source_linear")
def _(x: Tensor, h: Tensor, weight: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@define("floe::experimental_two_source_grad")
def two_source_grad(
    grad_out: Tensor,
    dz: Tensor,
    dlogits: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    router_weight: Tensor,
) -> Tensor:
    """Return ``[grad_out | dz | dlogits] [weight ; lora_A ; router_weight]``.

    Nothing is concatenated: dz and dlogits may be columns of one buffer, or not, and lora_A and
    router_weight stay two parameters. Each has tensor maps of its own, and the K loop goes on from
    one to the next; a source costs at most one step of 64 more than if it were concatenated.

    Args:
        grad_out: ``(N, O)``, ``O > 0``.
        dz: ``(N, R)``; R = 0 leaves its product out.
        dlogits: ``(N, E)``; E = 0 leaves its product out.
        weight: ``(O, I)``.
        lora_A: ``(R, I)``.
        router_weight: ``(E, I)``.

    Returns:
        ``(N, I)``, contiguous: the gradient of x without dropout.
    """
    return (grad_out @ weight).addmm_(dz, lora_A).addmm_(dlogits, router_weight)


@torch.library.register_fake("floe::experimental_two_source_grad")
def _(
    grad_out: Tensor,
    dz: Tensor,
    dlogits: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    router_weight: Tensor,
) -> Tensor:
    return grad_out.new_empty(grad_out.shape[0], weight.shape[1])
