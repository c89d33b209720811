"""One file that several processes search on, and that survives the death of any of them.

Beside the file lies a folder ``<file>.locks``. Its locks belong to open files, so the system
drops them when their process dies, however it dies: a trial whose worker's lock is free is stale.
The file system must support ``flock`` among all the machines that share the file.
"""

from __future__ import annotations

import contextlib
import os
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna

SQLITE = (".db", ".sqlite", ".sqlite3")
JOURNAL = (".log", ".journal", ".jsonl")
BUSY_S = 60  # an SQLite file that another process writes to is waited for this long


class FileLock:
    """An exclusive lock between processes; free again as soon as its process is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock; if it is held and ``wait`` is False, return False at once."""
        try:
            import fcntl
        except ImportError as error:
            raise ImportError(
                "a search in a file needs POSIX file locks: use no storage"
            ) from error
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException as error:
            os.close(file)
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._file = file
        return True

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class JournalLock(FileLock):
    """The lock of Optuna's journal; whoever takes it first cuts off a half-written last line."""

    def __init__(self, path: Path, journal: Path) -> None:
        super().__init__(path)
        self._journal = journal

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock and mend the journal's end."""
        taken = super().acquire(wait=wait)
        if taken:
            _mend(self._journal)
        return taken


class SearchStorage:
    """Opens an SQLite or journal file for Optuna, and knows which workers are alive.

    Args:
        path: A file ending in ``.db``, ``.sqlite`` or ``.sqlite3`` (one SQLite file), or in
            ``.log``, ``.journal`` or ``.jsonl`` (Optuna's journal). Its folder is made.

    Raises:
        ValueError: The name ends in anything else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        if self.path.suffix.lower() not in (*SQLITE, *JOURNAL):
            known = ", ".join((*SQLITE, *JOURNAL))
            raise ValueError(f"storage must end in one of {known}, got {str(path)!r}")
        self.locks = self.path.with_name(self.path.name + ".locks")
        self.worker = ""

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count as a worker, a new one, that is alive while the block runs."""
        self.locks.mkdir(parents=True, exist_ok=True)
        self.worker = uuid.uuid4().hex[:12]
        lock = FileLock(self.locks / self.worker)
        lock.acquire()
        try:
            yield
        finally:
            lock.path.unlink(missing_ok=True)
            lock.release()

    @contextlib.contextmanager
    def claiming(self) -> Iterator[None]:
        """Let one worker at a time open the file, judge who is alive, and start a trial."""
        self.locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.locks / "claims")
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def alive(self, worker: object) -> bool:
        """Tell whether a worker still holds its lock; forgets it if not. Only while claiming."""
        path = self.locks / str(worker)
        if not path.exists():
            return False
        lock = FileLock(path)
        if not lock.acquire(wait=False):
            return True
        path.unlink(missing_ok=True)
        lock.release()
        return False

    @contextlib.contextmanager
    def open(self) -> Iterator[optuna.storages.BaseStorage]:
        """Open the file for Optuna; only while claiming."""
        from optuna.storages import BaseStorage, JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from sqlalchemy.exc import DatabaseError

        try:
            if self.path.suffix.lower() in JOURNAL:
                lock = JournalLock(self.locks / "append", self.path)
                # Optuna asks for its own class and uses these two methods
                backend = JournalFileBackend(str(self.path), lock)  # type: ignore[arg-type]
                storage: BaseStorage = JournalStorage(backend)
            else:
                storage = _sqlite(self.path)
        except (DatabaseError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{self.path} must be a search's file, got {error}") from error
        try:
            yield storage
        finally:
            storage.remove_session()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's log and its notes on experimental samplers away from the user's terminal."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _sqlite(path: Path) -> optuna.storages.BaseStorage:
    import sqlite3

    import optuna
    from sqlalchemy.pool import NullPool

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=BUSY_S)

    # a connection per use: none outlives the search or crosses a fork; and a path needs no
    # quoting where it is no part of an address
    keywords = {"creator": connect, "poolclass": NullPool}
    return optuna.storages.RDBStorage("sqlite://", engine_kwargs=keywords)


def _mend(journal: Path) -> None:
    """Drop a last line without its end: its writer died before the line counted."""
    with journal.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep:
            file.seek(keep - 1)
            if file.read(1) == b"\n":
                break
            keep -= 1
        if keep < end:
            file.truncate(keep)
