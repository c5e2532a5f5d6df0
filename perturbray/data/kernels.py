"""Kernels: loops over CSR rows, compiled by numba once and kept on disk. Import it only where there is much to do.

Importing and loading takes 0.4 s a process. Nothing is checked here: indices must be below the number of genes, rows
below that of the block.
"""

import os

import numba
import numpy as np

# Without a place to keep what is compiled (neither beside this file nor in the home folder) each process compiles anew.
_WRITABLE = any(os.access(place, os.W_OK) for place in (os.path.dirname(__file__), os.path.expanduser("~")))
_compiled = numba.njit(cache=_WRITABLE or "NUMBA_CACHE_DIR" in os.environ, nogil=True)


@_compiled
def densify(indptr, indices, values, rows, places, out):
    """Rows of a block as dense rows of ``out``: row ``rows[i]`` at ``places[i]``."""
    for i in range(len(rows)):
        line = out[places[i]]
        line[:] = 0  # here and not for all at once: the line is in the cache when the values come
        for j in range(indptr[rows[i]], indptr[rows[i] + 1]):
            line[indices[j]] = values[j]


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
