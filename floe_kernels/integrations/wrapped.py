"""What frameworks put around a model, its modules and its tensors, and how to see through it."""

from typing import Any

from torch import Tensor, nn

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def model_of(model: nn.Module) -> nn.Module:
    """Return the model inside what ``torch.compile``, DDP and PEFT wrap around it, or itself."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, _PARALLEL):
            inner = inner.module
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            found: nn.Module = inner
            return found


def is_tuned(module: nn.Module) -> bool:
    """Tell whether PEFT put this module in the place of one of the model's."""
    return hasattr(module, "adapter_layer_names")


def original_of(module: nn.Module) -> nn.Module:
    """Return the module that PEFT's stands for, or the module itself."""
    inner: Any = module
    while is_tuned(inner):
        inner = inner.base_layer if hasattr(inner, "base_layer") else inner.original_module
    original: nn.Module = inner
    return original


def is_sharded(model: nn.Module) -> bool:
    """Tell whether processes share the model's parameters out among them (FSDP2)."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor's values; a sharded one is gathered, which takes all of its processes."""
    gather: Any = getattr(tensor.detach(), "full_tensor", None)
    full: Tensor = tensor.detach() if gather is None else gather()
    return full


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Copy a whole tensor's values into one that may be sharded; no process talks to another."""
    target: Any = tensor.detach()
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements
        moved = values.to(target.device, target.dtype)
        values = distribute_tensor(moved, mesh, placements, src_data_rank=None)
    target.copy_(values)
