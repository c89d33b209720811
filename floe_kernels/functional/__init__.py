"""The public, stateless operations."""

from floe_kernels.functional.grad_square import (
    SegmentGradSquare,
    linear_grad_square,
    segment_grad_square,
)
from floe_kernels.functional.moe_lora import MoELoRAOutput, moe_lora, moe_lora_linear
from floe_kernels.functional.routing import (
    Routing,
    expert_load,
    load_balance_loss,
    router_z_loss,
    topk_softmax,
)
from floe_kernels.functional.spectrum import gram_eigenvalues, hill_alpha
from floe_kernels.reference.moe_lora import FisherBuffers

__all__ = [
    "FisherBuffers",
    "MoELoRAOutput",
    "Routing",
    "SegmentGradSquare",
    "expert_load",
    "gram_eigenvalues",
    "hill_alpha",
    "linear_grad_square",
    "load_balance_loss",
    "moe_lora",
    "moe_lora_linear",
    "router_z_loss",
    "segment_grad_square",
    "topk_softmax",
]
