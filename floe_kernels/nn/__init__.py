"""Modules: they own parameters, and no mathematics."""

from floe_kernels.nn.batch import BatchContext
from floe_kernels.nn.fused_moe_lora import FusedMoELoRA, LayerRouting

__all__ = ["BatchContext", "FusedMoELoRA", "LayerRouting"]
