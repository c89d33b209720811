"""Several processes at the same training step: each takes its rows, all end in the same weights.

Every process runs the whole pipeline on the same options and the same seed, so that all decide
alike. They differ in three things only: the rows of a batch that a process computes, whose
gradients are added up over processes before they are used, and that the first one alone writes.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from floe_kernels.pipeline.runs import Run, open_run


@contextlib.contextmanager
def processes() -> Iterator[int]:
    """Join the processes that ``torchrun`` started, if it did, and leave them at the end.

    Yields:
        Their number; 1 where ``torchrun`` started none, or somebody joined already.

    Example:
        >>> with processes() as number:
        ...     number
        1
    """
    ours = (
        torch.distributed.is_available()
        and torch.distributed.is_torchelastic_launched()
        and not torch.distributed.is_initialized()
    )
    if not ours:
        yield _number()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(torch.distributed.get_node_local_rank())
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield _number()
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def open_shared(
    folder: Path, command: str, arguments: Mapping[str, Any], *, resume: bool = False
) -> Iterator[Run]:
    """Open a run in every process: the first in its folder, the others in copies they throw away.

    So all of them resume from the same state, and no code that writes need know how many they are.

    Args:
        folder: As in :func:`~floe_kernels.pipeline.runs.open_run`, like all that follows.
        command: The command's name.
        arguments: What is asked for.
        resume: Take up the run that is there.

    Raises:
        OSError: In the first process, as ``open_run`` raises it.
        ValueError: Likewise.
    """
    if is_first():
        with open_run(folder, command, arguments, resume=resume) as run:
            _wait()  # until the others may copy
            _wait()  # until they have
            yield run
        return
    with tempfile.TemporaryDirectory() as copy:
        _wait()
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        _wait()
        with open_run(Path(copy), command, arguments, resume=True) as run:
            yield run


def is_first() -> bool:
    """Tell whether this process is the one that writes files and talks to the user."""
    return _number() == 1 or torch.distributed.get_rank() == 0


def share(rows: Sequence[int]) -> Sequence[int]:
    """Return the rows of a batch that this process computes: every so many-th, maybe none.

    Args:
        rows: Of the whole batch, the same in every process.

    Example:
        >>> share([4, 1, 7])
        [4, 1, 7]
    """
    number = _number()
    return rows if number == 1 else rows[torch.distributed.get_rank() :: number]


def add_gradients(parameters: Iterable[Tensor], *further: Tensor) -> None:
    """Add up, over processes, the gradients of parameters and any further tensors, in place.

    A process without rows has no gradient and counts as zero. One reduction for each dtype; on two
    processes the sum is the same in both, to the bit.

    Args:
        parameters: The same ones in the same order in every process.
        further: Likewise: a sum of losses, a flag.
    """
    if _number() == 1:
        return
    tensors = list(further)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        tensors.append(parameter.grad)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        torch.distributed.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in alike])
        for tensor, part in zip(alike, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def add_up(total: Tensor) -> Tensor:
    """Return the sum of a tensor over processes.

    Args:
        total: What this process has of it; written to.
    """
    if _number() > 1:
        torch.distributed.all_reduce(total)
    return total


def any_of(flag: bool, device: torch.device) -> bool:
    """Tell whether any process says so: an interrupt, or that a checkpoint is due.

    Args:
        flag: What this process says.
        device: Where the processes' tensors are.
    """
    if _number() == 1:
        return flag
    said = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(said)
    return bool(said)


def _wait() -> None:
    if _number() > 1:
        torch.distributed.barrier()


def _number() -> int:
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1
