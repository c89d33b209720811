"""A checksum that tells one base model from another."""

import hashlib
import json
import struct
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from floe_kernels.integrations.wrapped import model_of, original_of, whole
from floe_kernels.nn import FusedMoELoRA

_SAMPLES = 16  # values a weight
_TINY = 2.0**-17  # float16 begins to round bfloat16's 8 significant bits below this


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a base model: names and shapes of its weights, and a few values.

    Adapters do not count, so it is the same before and after :func:`apply_plan`, and training the
    adapters leaves it. From every weight 16 values are read, evenly strided, rounded to bfloat16,
    those up to 2**-17 taken for zero: so float64, float32 and bfloat16 copies of one model agree,
    and so does a float16 copy, if the weights were published in bfloat16 or float16. **No checksum
    of rounded values survives every rounding**: a float16 copy of a float32 model has another
    fingerprint, and so has a quantised copy, of whose packed weights only name and shape count.
    Buffers do not count; device and training mode do not matter. Wrappers of ``torch.compile``,
    DDP and PEFT do not count either. Of a model that FSDP2 shards, every process must ask.

    Args:
        model: Any module; its weights are loaded.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: A weight is on the meta device, so it has no values.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> fingerprint(model) == fingerprint(model.bfloat16())
        True
    """
    model = model_of(model)
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None) or type(model).__name__
    digest = hashlib.sha256(f"{kind}\n".encode())
    for name, weight in sorted(_base_weights(model), key=lambda pair: pair[0]):
        digest.update(json.dumps([name, list(weight.shape)]).encode())
        if weight.is_floating_point():
            digest.update(_sample(name, weight))
    return digest.hexdigest()


def _base_weights(
    module: nn.Module, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) as if no module were adapted; a tied weight under its first name."""
    seen = set() if seen is None else seen
    if isinstance(module, FusedMoELoRA):
        module = module.base_layer
    module = original_of(module)
    for name, weight in module._parameters.items():
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            yield prefix + name, weight
    for name, child in module._modules.items():
        if child is not None:
            yield from _base_weights(child, f"{prefix}{name}.", seen)


def _sample(name: str, weight: Tensor) -> bytes:
    if weight.is_meta:
        raise ValueError(f"a model must be loaded to have a fingerprint, {name} is on meta")
    flat = whole(weight).reshape(-1)
    count = min(_SAMPLES, flat.numel())
    index = torch.tensor([i * flat.numel() // count for i in range(count)], device=flat.device)
    values = flat[index].float().bfloat16().float()
    values = torch.where(values.abs() <= _TINY, values.new_zeros(()), values)
    return struct.pack(f"<{count}f", *values.tolist())
