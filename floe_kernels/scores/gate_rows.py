"""Rows of gate gradients, step after step, in memory that grows with them alone."""

import torch
from torch import Tensor

ROWS_PER_BLOCK = 1024  # 4 MB of 1,000 modules in float32


class GateRows:
    """Every sample's row, written into blocks: two small tensors a step would cost 5 KB more.

    Which rows count is known on their device alone, so a step waits for nothing.

    Args:
        columns: Numbers in a row.

    Example:
        >>> import torch
        >>> rows = GateRows(2)
        >>> rows.add(torch.ones(3, 2), torch.tensor(True))
        >>> rows.add(torch.full((3, 2), torch.nan), torch.tensor(False))
        >>> rows.kept().shape
        torch.Size([3, 2])
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._blocks: list[tuple[Tensor, Tensor]] = []  # rows, and whether each counts
        self._free = 0  # rows of the last block

    def add(self, rows: Tensor, counts: Tensor) -> None:
        """Add one step's rows.

        Args:
            rows: ``(S, columns)``.
            counts: ``()`` bool on the same device, whether :meth:`kept` shall return them.
        """
        while len(rows):
            if not self._free:
                block = rows.new_empty(ROWS_PER_BLOCK, self._columns)
                self._blocks.append((block, counts.new_zeros(ROWS_PER_BLOCK)))
                self._free = ROWS_PER_BLOCK
            block, kept = self._blocks[-1]
            begin, n = ROWS_PER_BLOCK - self._free, min(self._free, len(rows))
            block[begin : begin + n] = rows[:n]
            kept[begin : begin + n] = counts
            self._free, rows = self._free - n, rows[n:]

    def kept(self) -> Tensor:
        """Return a copy of the rows that count, in order, ``(samples, columns)``."""
        if not self._blocks:
            return torch.zeros(0, self._columns)
        return torch.cat([block[kept] for block, kept in self._blocks])
