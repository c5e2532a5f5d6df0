"""Gather: rows by number out of blocks of CSR rows, as CSR, as dense rows of a buffer, or added up by group.

Knows neither torch nor Ray: a read worker that imports it starts at once. ``compiled`` takes numba's loops, which are two to
three times as fast once 0.4 s of loading are paid.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import sparse

from perturbray.data.rows import Rows, index_type

PIECE = 256  # rows at once without numba, so that the indices made for them stay in the processor's cache
SUMMED = 4096  # rows at once that are added up without numba: bounds the memory


def locate(
    starts: np.ndarray, rows: np.ndarray, *, ascending: bool = False
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Blocks that hold some of the rows, with the places of those in ``rows`` and their numbers in the block.

    ``ascending``: in the order of the file, which a disk likes, and memory that is read more than it is written.
    """
    if len(starts) == 2 and not ascending:
        yield 0, np.arange(len(rows)), rows
        return
    block = np.searchsorted(starts, rows, side="right") - 1
    order = np.argsort(rows if ascending else block, kind="stable")
    ends = np.cumsum(np.bincount(block, minlength=len(starts) - 1))
    for b in np.flatnonzero(np.diff(ends, prepend=0)):
        places = order[ends[b - 1] if b else 0 : ends[b]]
        yield int(b), places, rows[places] - starts[b]


def collect(
    blocks: Sequence[Rows],
    starts: np.ndarray,
    rows: np.ndarray,
    *,
    compiled: bool = False,
    allocate: Callable[[int, np.dtype], np.ndarray] = np.empty,
) -> Rows:
    """A copy of rows as CSR, in their order. ``starts`` (blocks + 1,) says which rows a block holds."""
    genes = blocks[0].genes
    parts = list(locate(starts, rows, ascending=True))
    length = np.empty(len(rows), dtype=np.int64)
    for b, places, local in parts:
        length[places] = blocks[b].indptr[local + 1] - blocks[b].indptr[local]
    indptr = np.concatenate([[0], np.cumsum(length)])
    indices, values = allocate(int(indptr[-1]), index_type(genes)), allocate(int(indptr[-1]), np.dtype(np.float32))
    for b, places, local in parts:
        block = blocks[b]
        if compiled:
            from perturbray.data import kernels

            kernels.collect(block.indptr, block.indices, block.values, local, indptr[places], indices, values)
            continue
        for i in range(0, len(local), PIECE):
            part, at = local[i : i + PIECE], places[i : i + PIECE]
            source, target = _spread(block.indptr[part], length[at]), _spread(indptr[at], length[at])
            indices[target], values[target] = block.indices[source], block.values[source]
    return Rows(indptr=indptr, indices=indices, values=values, genes=genes)


def densify(
    blocks: Sequence[Rows], starts: np.ndarray, rows: np.ndarray, out: np.ndarray, *, compiled: bool = False
) -> None:
    """Write rows to the lines of ``out``, (len(rows), genes) float32, contiguous, whatever it held."""
    if compiled:
        from perturbray.data import kernels

        block = np.searchsorted(starts, rows, side="right") - 1
        for first in range(0, len(blocks), kernels.MOST):
            some = kernels.side_by_side(blocks[first : first + kernels.MOST])
            places = np.flatnonzero(block // kernels.MOST == first // kernels.MOST)
            own = block[places]
            kernels.densify(*some, own - first, rows[places] - starts[own], places, out)
        return
    for b, places, local in locate(starts, rows):
        block = blocks[b]
        flat, genes = out.reshape(-1), out.shape[1]
        for i in range(0, len(local), PIECE):
            part, lines = local[i : i + PIECE], places[i : i + PIECE]
            out[lines] = 0
            length = block.indptr[part + 1] - block.indptr[part]
            source, target = _spread(block.indptr[part], length), np.repeat(lines * genes, length)
            target += block.indices[source]
            flat[target] = block.values[source]


def add(
    blocks: Sequence[Rows],
    starts: np.ndarray,
    rows: np.ndarray,
    group: np.ndarray,
    sums: np.ndarray,
    *,
    power: int = 1,
    compiled: bool = False,
) -> None:
    """Add a power of the values of each row to the line of its group in ``sums``, (groups, genes) float64."""
    for b, places, local in locate(starts, rows, ascending=True):  # so that blocks do not change how sums are rounded
        block = blocks[b]
        if compiled:
            from perturbray.data import kernels

            kernels.add(block.indptr, block.indices, block.values, local, group[places], power, sums)
            continue
        for i in range(0, len(local), SUMMED):
            part = block[local[i : i + SUMMED]].astype(np.float64)
            part.data **= power
            n = part.shape[0]
            member = (np.ones(n), (group[places[i : i + SUMMED]], np.arange(n)))
            sums += (sparse.csr_matrix(member, shape=(len(sums), n)) @ part).toarray()


def _spread(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Every place of runs that start somewhere and have a length, run after run."""
    spread = np.repeat(start - (np.cumsum(length) - length), length)
    spread += np.arange(len(spread))
    return spread
