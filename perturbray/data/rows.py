"""Rows: a range of a screen's cells as three flat arrays, mapped or in memory. What stores hold and batches gather from."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from perturbray.errors import InputError

SMALL = 65_536  # genes that an index of two bytes tells apart


def index_type(genes: int) -> np.dtype:
    """The type of gene numbers: two bytes where they are enough, a quarter less to read and to keep."""
    return np.dtype(np.uint16 if genes <= SMALL else np.int32)


@dataclass(frozen=True)
class Rows:
    """CSR rows without scipy's class, which would copy two-byte indices to four. Within a row, indices ascend."""

    indptr: np.ndarray  # (rows + 1,) int64, from 0
    indices: np.ndarray  # (stored values,) uint16 or int32, all below ``genes``
    values: np.ndarray  # (stored values,) float32
    genes: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.genes

    @property
    def nbytes(self) -> int:
        return self.indptr.nbytes + self.indices.nbytes + self.values.nbytes

    @classmethod
    def of(cls, matrix: sparse.csr_matrix) -> "Rows":
        """The rows of a CSR matrix; values and wide indices are not copied where the matrix is canonical float32."""
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        genes = matrix.shape[1]
        if matrix.nnz and not 0 <= matrix.indices.min() <= matrix.indices.max() < genes:
            wrong = matrix.indices[(matrix.indices < 0) | (matrix.indices >= genes)][0]
            raise InputError(f"a row names gene number {wrong}, but there are {genes}")  # two bytes would hide it
        return cls(
            indptr=matrix.indptr.astype(np.int64, copy=False),
            indices=matrix.indices.astype(index_type(genes), copy=False),
            values=matrix.data.astype(np.float32, copy=False),
            genes=genes,
        )

    def csr(self) -> sparse.csr_matrix:
        """All rows as scipy's CSR; indices are copied to four bytes, values are not."""
        return sparse.csr_matrix((self.values, self.indices, self.indptr), shape=self.shape, copy=False)

    def __getitem__(self, rows: np.ndarray | slice) -> sparse.csr_matrix:
        """A copy of rows by number, (len(rows), genes), in their order."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        start = self.indptr[rows]
        length = self.indptr[np.add(rows, 1)] - start
        indptr = np.concatenate([[0], np.cumsum(length)])
        at = np.repeat(start - indptr[:-1], length) + np.arange(indptr[-1])
        return sparse.csr_matrix((self.values[at], self.indices[at], indptr), shape=(len(length), self.genes))
