"""Doing once what all processes of a training run ask for."""

from collections.abc import Callable
from typing import Any

import torch


def once(work: Callable[[], None]) -> None:
    """Do ``work`` on the first process of the default group, while the others wait.

    Without a group this process does it.

    Args:
        work: Called without arguments, and with no communication inside.

    Raises:
        BaseException: Whatever ``work`` raised, in every process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return work()
    outcome: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            work()
        except BaseException as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
    return None
