"""Every operation in plain PyTorch: the specification the kernels are held to."""

from floe_kernels.reference.dropout import dropout
from floe_kernels.reference.grad_square import linear_grad_square, segment_grad_square
from floe_kernels.reference.moe_lora import moe_lora, moe_lora_backward
from floe_kernels.reference.routing import (
    expert_load,
    load_balance_loss,
    router_z_loss,
    topk_softmax,
)

__all__ = [
    "dropout",
    "expert_load",
    "linear_grad_square",
    "load_balance_loss",
    "moe_lora",
    "moe_lora_backward",
    "router_z_loss",
    "segment_grad_square",
    "topk_softmax",
]
