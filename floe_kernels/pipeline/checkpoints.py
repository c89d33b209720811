"""Training state in one safetensors file, replaced whole."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels.pipeline import files

FORMAT = "1"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside its step count


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> None:
    """Write parameters, AdamW's state, the random state and ``facts``.

    Args:
        path: The file, which is replaced whole or left as it was.
        parameters: Name -> what is trained.
        optimizer: An AdamW over exactly these.
        facts: What JSON can hold: the step, and whatever must agree on resuming.

    Raises:
        OSError: The file system refused.
        ImportError: safetensors is missing.
    """
    save_file, error_type = _safetensors()
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    steps: dict[str, float] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        state = optimizer.state.get(parameter, {})
        for moment in MOMENTS:
            if moment in state:
                tensors[f"{moment}/{name}"] = state[moment].cpu().contiguous()
        steps[name] = float(state.get("step", 0))
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    metadata = {"format": FORMAT, "facts": json.dumps(facts), "steps": json.dumps(steps)}

    def write(partial: Path) -> None:
        try:
            save_file(tensors, str(partial), metadata=metadata)
        except error_type as error:  # it wraps the system's error in words of its own
            full = "StorageFull" in str(error) or "code: 28" in str(error)
            number = errno.ENOSPC if full else errno.EIO
            reason = "no space left on the disk" if full else str(error)
            raise OSError(number, f"cannot write a checkpoint: {reason}", str(path)) from error

    files.replace(path, write)


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a checkpoint's state back, and return its facts.

    Args:
        path: The file.
        parameters: As when saving.
        optimizer: As when saving.
        facts: Facts that the checkpoint must agree with.

    Returns:
        All facts that were saved.

    Raises:
        ValueError: The file is damaged, or of other parameters or facts.
        OSError: It cannot be read.
    """
    tensors, metadata = _read(path)
    saved: dict[str, Any] = json.loads(metadata["facts"])
    for name, value in files.finite(dict(facts)).items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} must be a checkpoint with {name} {value!r}, got {saved.get(name)!r}"
            )
    steps: dict[str, float] = json.loads(metadata["steps"])
    if set(steps) != set(parameters):
        different = sorted(set(steps) ^ set(parameters))[0]
        raise ValueError(f"{path} must hold the parameters that are trained, {different!r} differs")
    for name, parameter in parameters.items():
        value = tensors[f"parameter/{name}"]
        if value.shape != parameter.shape:
            raise ValueError(
                f"{path} must hold {name!r} as {tuple(parameter.shape)}, got {tuple(value.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(value)
        if steps[name]:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(steps[name], dtype=torch.float32)
            if optimizer.defaults.get("fused"):
                state["step"] = state["step"].to(parameter.device)
            for moment in MOMENTS:
                state[moment] = tensors[f"{moment}/{name}"].to(parameter.device)
    torch.set_rng_state(tensors["rng"])
    if torch.cuda.is_available() and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return saved


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _safetensors()
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:  # the library has one error type, and it is not exported
        raise ValueError(
            f"{path} is a damaged checkpoint ({error}): delete it to train this part again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of format {FORMAT}, got {metadata}")
    return tensors, metadata


def _safetensors() -> tuple[Any, type[Exception]]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            "checkpoints need safetensors: pip install floe-kernels[transformers]"
        ) from error
    return save_file, SafetensorError
