"""Ctrl-C and SIGTERM wait for the end of a training step, so that it can be saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold interrupts back while the block runs; a second one acts at once.

    Only the main thread can do that; in any other, interrupts stay as they are.

    Yields:
        A function that tells whether one came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in SIGNALS:
        before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        restore()
