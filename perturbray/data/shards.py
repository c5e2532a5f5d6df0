"""Shards while they are made: a range of rows as npy files that are written piece by piece and can be changed in place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from scipy import sparse

from perturbray.data import matrix
from perturbray.data.rows import index_type

COLUMNS = ("indptr", "indices", "values")
HEADER = 128  # bytes before the values of an npy file


class Column:
    """An npy file that is written piece by piece, read and changed in ranges, and closed with its length.

    Opened anew by every call: a screen of 10^8 cells has thousands of columns, and a process may hold a thousand files.
    """

    def __init__(self, place: Path, dtype: np.dtype, *, width: int = 0) -> None:
        self.place, self.dtype, self.width, self.length = place, np.dtype(dtype), width, 0
        place.write_bytes(bytes(HEADER))

    def append(self, values: np.ndarray) -> None:
        self.change(self.length, values)
        self.length += len(values)

    def change(self, start: int, values: np.ndarray) -> None:
        with self._at(start) as file:
            file.write(np.ascontiguousarray(values, dtype=self.dtype).data)

    def read(self, start: int, stop: int) -> np.ndarray:
        found = np.empty(stop - start, dtype=self.dtype)
        with self._at(start) as file:
            file.readinto(found.data)
        return found

    def close(self) -> None:
        """Write the header, and wait until everything is on the disk."""
        shape = f"({self.length}, {self.width})" if self.width else f"({self.length},)"
        head = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        with open(self.place, "rb+") as file:
            file.write(b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little"))
            file.write(head.encode("latin1").ljust(HEADER - 11) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _at(self, start: int) -> Iterator[BinaryIO]:
        with open(self.place, "rb+") as file:
            file.seek(HEADER + start * self.dtype.itemsize * max(1, self.width))
            yield file


class Shard:
    """The columns of a range of rows while they are made."""

    def __init__(self, folder: Path, number: int, start: int, genes: int) -> None:
        self.folder, self.number, self.start, self.genes = folder, number, start, genes
        types = {"indptr": np.int64, "indices": index_type(genes), "values": np.float32}
        self.columns = {name: Column(folder / f"{number:05d}.{name}.npy", dtype) for name, dtype in types.items()}
        self.columns["indptr"].append(np.zeros(1, dtype=np.int64))

    @property
    def rows(self) -> int:
        return self.columns["indptr"].length - 1

    @property
    def stop(self) -> int:
        return self.start + self.rows

    @property
    def stored(self) -> int:
        return self.columns["values"].length

    def append(self, lengths: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
        """More rows."""
        self.columns["indptr"].append(self.stored + np.cumsum(lengths, dtype=np.int64))
        self.columns["indices"].append(indices)
        self.columns["values"].append(values)

    def window(self, indptr: np.ndarray) -> sparse.csr_matrix:
        """The rows that lie between these bounds."""
        low, high = int(indptr[0]), int(indptr[-1])
        indices = self.columns["indices"].read(low, high).astype(np.int32)
        values = self.columns["values"].read(low, high)
        return sparse.csr_matrix((values, indices, indptr - low), shape=(len(indptr) - 1, self.genes))

    def windows(self, most: int) -> Iterator[np.ndarray]:
        """The bounds of consecutive rows: DIGEST_ROWS of them, or fewer where these hold more than ``most`` values."""
        for first in range(0, self.rows, matrix.DIGEST_ROWS):
            indptr = self.columns["indptr"].read(first, min(first + matrix.DIGEST_ROWS, self.rows) + 1)
            yield from row_pieces(indptr, most)

    def close(self) -> None:
        for column in self.columns.values():
            column.close()


def row_pieces(indptr: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Bounds of consecutive rows that hold at most ``most`` values together, or a single row."""
    first, last = 0, len(indptr) - 1
    while first < last:
        stop = int(np.searchsorted(indptr, indptr[first] + most, side="right")) - 1
        stop = min(max(stop, first + 1), last)
        yield indptr[first : stop + 1]
        first = stop
