"""Kernels for training mixtures of LoRA experts, and methods to decide where experts pay."""

import contextlib
import importlib

from floe_kernels import allocation, functional, nn, reference, scores
from floe_kernels.integrations.transformers import (
    apply_plan,
    load_adapter,
    remove_adapters,
    save_adapter,
)
from floe_kernels.nn import FusedMoELoRA
from floe_kernels.nn.shared_inputs import fuse_shared_inputs
from floe_kernels.scores import FisherCollector

with contextlib.suppress(ModuleNotFoundError):  # built with FLOE_BUILD=none
    importlib.import_module("floe_kernels._C")  # adds native kernels to the ops; adds no names

__version__ = "0.1.0"
__all__ = [
    "FisherCollector",
    "FusedMoELoRA",
    "allocation",
    "apply_plan",
    "functional",
    "fuse_shared_inputs",
    "load_adapter",
    "nn",
    "reference",
    "remove_adapters",
    "save_adapter",
    "scores",
]
