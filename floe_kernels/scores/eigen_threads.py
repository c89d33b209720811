"""How many threads find eigenvalues fastest on the CPU, on a machine as busy as it is now."""

import contextlib
import time
from collections.abc import Iterator

import torch

PROBE = 384  # size of the matrix that is tried: a few milliseconds
WORTH = 0.8  # more threads must take at most this part of the time of one


class EigenThreads:
    """Chooses between all of torch's threads and one, when it is first asked.

    LAPACK's threads wait for each other many times a matrix: beside a busy neighbour two of them
    can take ten times as long as one. The slowest of a few tries decides.

    Example:
        >>> threads = EigenThreads()
        >>> with threads.used():
        ...     torch.get_num_threads() in (1, threads.most)
        True
    """

    def __init__(self) -> None:
        self.most = torch.get_num_threads()
        self.chosen = 1 if self.most == 1 else 0

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let torch use the chosen number of threads while the block runs."""
        before = torch.get_num_threads()
        try:
            self.chosen = self.chosen or self._choose()
            torch.set_num_threads(self.chosen)
            yield
        finally:
            torch.set_num_threads(before)

    def _choose(self) -> int:
        matrix = torch.arange(PROBE * PROBE, dtype=torch.float64).remainder_(101).view(PROBE, PROBE)
        torch.linalg.eigvalsh(matrix)  # the first call loads the library
        slowest = dict.fromkeys((self.most, 1), 0.0)
        for threads in (self.most, 1) * 3:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            torch.linalg.eigvalsh(matrix)
            slowest[threads] = max(slowest[threads], time.perf_counter() - start)
        return self.most if slowest[self.most] < WORTH * slowest[1] else 1
