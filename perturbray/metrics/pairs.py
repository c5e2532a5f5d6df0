"""Pairs: squared distances of all pairs of cells, a tile at a time, in float64; no larger matrix is ever held.

A tile is norms minus product, in one matrix product, and direct differences wherever that cancels. Of sparse cells the
genes that few express are multiplied as sparse x dense, which costs less than their share of the matrix product.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from scipy import sparse

from perturbray.metrics.cells import Matrix, dense

TILE, BLOCK = 256, 256  # cells of both sides: a tile of distances stays in the cache of a core
WIDE = 512  # coordinates from which the matrix product wants larger tiles than the rest does
CLOSE = 1e-5  # of the squared norms: below, a squared distance from a product has lost digits
RARE, RARE_COMPILED = 0.12, 0.4  # share of cells that express a gene below which a sparse product costs less
COMPILED = 2e9  # products of numbers in all pairs from which it pays to load compiled loops
REPAIRED = 2**20  # coordinates of pairs that are computed directly at once


def compiled(pairs: float, coordinates: int) -> ModuleType | None:
    """Compiled loops where they save more than loading them takes; a question of size alone, so the same in any process."""
    if pairs * coordinates < COMPILED:
        return None
    from perturbray.metrics import engine_numba

    return engine_numba


def rare_genes(parts: Iterable[Matrix], share: float) -> np.ndarray | None:
    """Genes that a smaller ``share`` of these cells expresses, (genes,) bool; None for dense cells."""
    expressing, cells = 0, 0
    for X in parts:
        if not sparse.issparse(X):
            return None
        expressing = expressing + np.bincount(X.indices, minlength=X.shape[1])
        cells += X.shape[0]
    return expressing < share * cells


@dataclass(frozen=True)
class Cloud:
    """Cells ready for squared distances to others."""

    left: np.ndarray  # (cells, d + 2): centred coordinates or frequent genes, squared norms over all genes, ones
    rare: Any = None  # CSR (cells, rare genes) as it came, not centred; or None

    @classmethod
    def of(cls, cells: Matrix, centre: np.ndarray, rare: np.ndarray | None = None) -> "Cloud":
        """``centre`` is subtracted from both sides of a distance; from rare genes nothing is."""
        if rare is None:
            return cls(_left(dense(cells), centre))
        apart, cells = cells[:, np.flatnonzero(rare)], cells[:, np.flatnonzero(~rare)]
        left = _left(cells.toarray(), centre[~rare])
        squared = sparse.csr_matrix((apart.data.astype(np.float64) ** 2, apart.indices, apart.indptr), apart.shape)
        left[:, -2] += np.asarray(squared.sum(axis=1)).ravel()
        return cls(left, apart)

    def __len__(self) -> int:
        return len(self.left)

    def cells(self, rows: np.ndarray) -> np.ndarray:
        parts = [self.left[rows, :-2]]
        return np.concatenate([*parts, self.rare[rows].toarray()] if self.rare is not None else parts, axis=1)


def _left(cells: np.ndarray, centre: np.ndarray | float) -> np.ndarray:
    """Filled in place: in gene space a copy is tens of MB."""
    left = np.empty((len(cells), cells.shape[1] + 2))
    np.subtract(cells, centre, out=left[:, :-2])
    left[:, -2], left[:, -1] = np.einsum("ij,ij->i", left[:, :-2], left[:, :-2]), 1
    return left


class Target:
    """Cells to which distances are taken, in blocks."""

    def __init__(self, cloud: Cloud, engine: ModuleType | None = None):
        left = cloud.left
        self.cloud, self.engine = cloud, engine
        self.width = BLOCK if left.shape[1] < WIDE or cloud.rare is not None else 4 * BLOCK
        self.right = np.empty(
            left.shape[::-1]
        )  # multiplied with the left of others: the norms are added in the product
        np.multiply(left[:, :-2].T, -2, out=self.right[:-2])
        self.right[-2], self.right[-1] = left[:, -1], left[:, -2]
        self.rare = []  # a (rare genes, cells) array for each block
        if cloud.rare is not None:
            kind = cloud.rare.dtype if engine else np.float64
            self.rare = [
                np.ascontiguousarray(cloud.rare[j].toarray().T, dtype=kind) for j in self.blocks(0, len(cloud))
            ]
        self._buffer = np.empty(TILE * min(self.width, len(cloud)))

    def blocks(self, start: int, stop: int) -> Iterator[slice]:
        """Consecutive cells, cut where a new block begins."""
        while start < stop:
            end = min(stop, start - start % self.width + self.width)
            yield slice(start, end)
            start = end

    def product(self, x: Cloud, i: slice, j: slice) -> np.ndarray:
        """‖x_i − y_j‖² of cells i to cells j of one block, as norms minus product; overwritten by the next tile."""
        rows, columns = i.stop - i.start, j.stop - j.start
        out = self._buffer[: rows * columns].reshape(rows, columns)
        np.matmul(x.left[i], self.right[:, j], out=out)
        if self.rare:
            first = j.start % self.width
            block = self.rare[j.start // self.width][:, first : first + columns]
            if self.engine:
                self.engine.subtract_twice(x.rare.indptr, x.rare.indices, x.rare.data, i.start, block, out)
            else:
                out -= x.rare[i].astype(np.float64) @ (2 * block)
        return out

    def bound(self, x: Cloud, i: slice, j: slice) -> float:
        """No squared distance of the tile from here on has lost digits."""
        return CLOSE * (x.left[i, -2].max() + self.right[-1, j].max())

    def repair(self, x: Cloud, i: slice, j: slice, squares: np.ndarray, *, same: bool = False) -> None:
        """Pairs so close that the product cancelled, computed directly in place; ``same`` leaves out the diagonal."""
        close = squares < CLOSE * (x.left[i, -2][:, None] + self.right[-1, j])
        if same:
            np.fill_diagonal(close, False)
        near = np.nonzero(close)
        step = max(1, REPAIRED // (self.right.shape[0] + (0 if x.rare is None else x.rare.shape[1])))
        for start in range(0, len(near[0]), step):
            a, b = (side[start : start + step] for side in near)
            difference = x.cells(a + i.start) - self.cloud.cells(b + j.start)
            squares[a, b] = np.einsum("ij,ij->i", difference, difference)

    def squares(self, x: Cloud, i: slice, j: slice, *, same: bool = False) -> np.ndarray:
        """‖x_i − y_j‖², (i, j); overwritten by the next tile. ``same``: the first cells of j are i, at distance 0."""
        squares = self.product(x, i, j)
        if same:
            np.fill_diagonal(squares, np.inf)
        if squares.min() < self.bound(x, i, j):
            self.repair(x, i, j, squares, same=same)
        if same:
            np.fill_diagonal(squares, 0)
        return squares

    def root_sums(self, x: Cloud, edges: np.ndarray) -> np.ndarray:
        """Sums of distances from each cell of x to each group of consecutive cells, ``edges[k]`` .. ``edges[k + 1]``."""
        sums = np.zeros((len(x), len(edges) - 1))
        for j in self.blocks(0, len(self.cloud)):
            first, last = np.searchsorted(edges, [j.start, j.stop - 1], side="right") - 1
            groups = slice(first, last + 1)
            cuts = edges[first : last + 2].clip(j.start, j.stop) - j.start
            for i in tiles(0, len(x)):
                sums[i, groups] += self._root_sums(x, i, j, cuts)
        return sums

    def _root_sums(self, x: Cloud, i: slice, j: slice, cuts: np.ndarray) -> np.ndarray:
        if not self.engine:
            squares = self.squares(x, i, j)
            return np.add.reduceat(np.sqrt(squares, out=squares), cuts[:-1], axis=1)
        squares, sums = self.product(x, i, j), np.empty((i.stop - i.start, len(cuts) - 1))
        if self.engine.root_sums(squares, cuts, self.bound(x, i, j), sums):
            self.repair(x, i, j, squares)
            self.engine.root_sums(squares, cuts, 0.0, sums)
        return sums


def tiles(start: int, stop: int, size: int | None = None) -> Iterator[slice]:
    size = size or TILE
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """‖x_i − y_j‖², (n, d) x (m, d) -> (n, m) float64."""
    x, y = Cloud.of(x, np.zeros(x.shape[1])), Target(Cloud.of(y, np.zeros(y.shape[1])))
    out = np.empty((len(x), len(y.cloud)))
    for i in tiles(0, len(x)):
        for j in y.blocks(0, len(y.cloud)):
            out[i, j] = y.squares(x, i, j)
    return out
