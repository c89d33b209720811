"""Whole files or none: every file of a run is written beside itself, forced to disk, renamed."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, whole or not at all.

    Args:
        path: The file; its folder exists.
        text: What it is to hold, as UTF-8.

    Raises:
        OSError: The file system refused; the old file is as it was.
    """
    replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace a file by ``value`` as JSON; numbers that are not finite become null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a new file beside ``path``, then put it in its place.

    Args:
        path: The file to replace.
        write: Writes the whole file at the path it is given.

    Raises:
        OSError: The file system refused; the old file is as it was.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself survives a power cut
        finally:
            os.close(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file holds something else, or only half of it.
        OSError: It cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be whole JSON, but is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def finite(value: Any) -> Any:
    """Copy ``value`` with None for every number that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def check_writable(folder: Path) -> None:
    """Make a folder, and make sure that files can be written there.

    Raises:
        OSError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe", suffix=PARTIAL):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot write there: {reason}", str(folder)) from error


def remove_partials(folder: Path) -> None:
    """Delete what killed processes left half-written."""
    for path in folder.rglob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Own a folder; the system gives it back when the process is gone, however it went.

    Raises:
        BlockingIOError: Another process owns it.
    """
    import fcntl  # POSIX alone has it

    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 32).decode(errors="replace").strip() or "unknown"
            raise BlockingIOError(
                f"one process at a time may work in {folder}, "
                f"and process {owner} does: wait for it, or choose another folder"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)
