"""Kernels: loops over CSR rows, compiled by numba once and kept on disk. Import it only where there is much to do.

Importing and loading takes 0.4 s a process. Nothing is checked here: indices must be below the number of genes, rows
below that of the block.
"""

import os
from collections.abc import Sequence

import numba
import numpy as np

from perturbray.data.rows import Rows

# Without a place to keep what is compiled (neither beside this file nor in the home folder) each process compiles anew.
_WRITABLE = any(os.access(place, os.W_OK) for place in (os.path.dirname(__file__), os.path.expanduser("~")))
_compiled = numba.njit(cache=_WRITABLE or "NUMBA_CACHE_DIR" in os.environ, nogil=True)


MOST = 16  # blocks that one call of densify takes


def side_by_side(blocks: Sequence[Rows]) -> tuple[tuple[np.ndarray, ...], ...]:
    """The arrays of at most MOST blocks as ``densify`` takes them.

    A tuple's length is part of its type, so that 1, 4 and 16 are all that is compiled; and so is whether an array may
    be written.
    """
    room = 1
    while room < len(blocks):
        room *= 4
    padded = [*blocks, *[blocks[0]] * (room - len(blocks))]
    return tuple(tuple(_constant(getattr(block, name)) for block in padded) for name in ("indptr", "indices", "values"))


def _constant(array: np.ndarray) -> np.ndarray:
    found = array.view()
    found.flags.writeable = False
    return found


@_compiled
def densify(indptrs, indices, values, block, rows, places, out):
    """Rows as dense rows of ``out``: row ``rows[i]`` of block ``block[i]`` at ``places[i]``.

    All blocks in one pass, so that ``out`` is written from its first line to its last: a fifth less time than by block.
    """
    for i in range(len(rows)):
        ends, genes, stored = indptrs[block[i]], indices[block[i]], values[block[i]]
        line = out[places[i]]
        line[:] = 0  # here and not for all at once: the line is in the cache when the values come
        for j in range(ends[rows[i]], ends[rows[i] + 1]):
            line[genes[j]] = stored[j]


@_compiled
def collect(indptr, indices, values, rows, starts, out_indices, out_values):
    """Rows of a block as CSR: row ``rows[i]`` from ``starts[i]`` on."""
    for i in range(len(rows)):
        begin, end = indptr[rows[i]], indptr[rows[i] + 1]
        target = starts[i]
        for j in range(begin, end):
            out_indices[target + j - begin] = indices[j]
            out_values[target + j - begin] = values[j]


@_compiled
def add(indptr, indices, values, rows, groups, power, sums):
    """Add a power of the values of row ``rows[i]`` to line ``groups[i]`` of ``sums``, in float64."""
    for i in range(len(rows)):
        line = sums[groups[i]]
        for j in range(indptr[rows[i]], indptr[rows[i] + 1]):
            line[indices[j]] += np.float64(values[j]) ** power
