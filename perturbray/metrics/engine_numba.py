"""Loops over pairs of cells, compiled once a machine by numba. Importing this needs numba, which illico brings."""

import numpy as np
from numba import njit

# Sums may be taken in the order that suits the processor; all else is as IEEE 754 has it.
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(fastmath={"contract"}, **_OPTIONS)
def subtract_twice(indptr, indices, data, first, block, out):
    """out[i] −= 2·(row ``first`` + i of a CSR matrix)·block, in float64 whatever the inputs are."""
    width = out.shape[1]
    for i in range(out.shape[0]):
        row, start, stop = out[i], indptr[first + i], indptr[first + i + 1]
        fours = start + (stop - start) // 4 * 4
        for k in range(start, fours, 4):  # four at once: the row is loaded and stored once for all
            a, b, c, d = block[indices[k]], block[indices[k + 1]], block[indices[k + 2]], block[indices[k + 3]]
            va, vb = -2.0 * np.float64(data[k]), -2.0 * np.float64(data[k + 1])
            vc, vd = -2.0 * np.float64(data[k + 2]), -2.0 * np.float64(data[k + 3])
            for j in range(width):
                row[j] += va * np.float64(a[j]) + vb * np.float64(b[j]) + vc * np.float64(c[j]) + vd * np.float64(d[j])
        for k in range(fours, stop):
            a, va = block[indices[k]], -2.0 * np.float64(data[k])
            for j in range(width):
                row[j] += va * np.float64(a[j])


@njit(fastmath={"reassoc", "nsz"}, **_OPTIONS)
def root_sums(squares, cuts, bound, sums):
    """sums[i, k] = Σ √squares[i, cuts[k]:cuts[k + 1]]; returns how many squares are below ``bound``."""
    close = np.int64(0)
    for i in range(squares.shape[0]):
        row = squares[i]
        for k in range(len(cuts) - 1):
            total, below = 0.0, np.int64(0)
            for j in range(cuts[k], cuts[k + 1]):
                total += np.sqrt(row[j])
                below += np.int64(row[j] < bound)
            sums[i, k] = total
            close += below
    return close
