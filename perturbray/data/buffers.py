"""Buffers: memory that batches are written to, used again once nobody holds what was written there."""

import sys

import numpy as np

KEPT = 6  # a batch and its controls, those of the batch before, and two to spare


class Buffers:
    """Dense float32 arrays that are taken again as soon as nothing refers to them.

    Fresh memory costs a page fault every 4 KiB, which at 5,000 genes is more than filling it. The guarantee: what ``take``
    returned is not written again while that array, a view of it, or a tensor over it is alive, however long and however
    many are held; arrays beyond ``KEPT`` are ordinary memory. It rests on reference counts. Allocated by numpy, which asks
    for huge pages; torch does not.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = [np.empty(0, dtype=np.float32)]
        self._free = self._holders(0)  # of an array that nothing but this list refers to

    def take(self, rows: int, genes: int) -> np.ndarray:
        """(rows, genes) of unknown content."""
        size = rows * genes
        free = [i for i in range(len(self._kept)) if self._holders(i) == self._free]
        for i in free:
            if len(self._kept[i]) >= size:
                return self._kept[i][:size].reshape(rows, genes)
        fresh = np.empty(size, dtype=np.float32)
        if free:  # too small: batches have grown
            self._kept[free[0]] = fresh
        elif len(self._kept) < KEPT:
            self._kept.append(fresh)
        return fresh.reshape(rows, genes)

    def _holders(self, number: int) -> int:
        return sys.getrefcount(self._kept[number])
