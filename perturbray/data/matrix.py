"""Rows of a screen's matrix: read from the file in ranges, checked, digested, and what their values look like."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import platformdirs
from scipy import sparse

from perturbray.data.dataset import DatasetSpec, Group, Node, is_array, matrix_shape
from perturbray.errors import InputError

DIGEST_ROWS = 4096  # rows behind one partial digest: read ranges are multiples of it, so that blocks do not change it
PIECE = 2**20  # values that are digested at once, where they are read for it
LOG_LIMIT = 15.0  # log1p of 3 million: nothing log-normalised is above


@dataclass(frozen=True)
class RowFacts:
    """What a range of rows holds, a value a row."""

    total: np.ndarray  # float64, sum over genes
    minimum: np.ndarray  # float32
    maximum: np.ndarray  # float32
    whole: np.ndarray  # bool, every value an integer
    bad_gene: np.ndarray  # int32, first gene that is NaN or infinite, -1 if none


@dataclass(frozen=True)
class MatrixFacts:
    """What a whole matrix holds; remembered by path, size and time, so that a dry run need not read X again."""

    digest: str
    whole: bool
    minimum: float
    maximum: float
    depth: float  # median over cells with any count of the sum over genes


@dataclass(frozen=True)
class Normalisation:
    """What is done to the values before a model sees them."""

    log1p: bool  # scale each cell to ``depth`` and take log1p
    depth: float  # counts a cell
    text: str  # for the user and the results

    def same(self, other: "Normalisation") -> bool:
        """Whether both give the same values, whatever they say about it."""
        return (self.log1p, self.depth) == (other.log1p, other.depth)

    def apply(self, values: np.ndarray, row_lengths: np.ndarray, totals: np.ndarray) -> np.ndarray:
        """Values of CSR rows, (nnz,) float32, with their row lengths and row totals."""
        if not self.log1p:
            return values
        scale = np.divide(self.depth, totals, out=np.zeros_like(totals), where=totals > 0)
        return np.log1p(values * np.repeat(scale, row_lengths)).astype(np.float32)


def read_rows(file: Group, spec: DatasetSpec, start: int, stop: int) -> sparse.csr_matrix:
    """Rows [start, stop) of the matrix as CSR with float32 values. Indices are checked against the number of genes."""
    matrix = spec.matrix(file)
    genes = matrix_shape(matrix)[1]
    if is_array(matrix):
        return sparse.csr_matrix(matrix[start:stop].astype(np.float32))
    if by_columns(matrix):
        return _from_columns(matrix, start, stop)
    indptr = matrix["indptr"][start : stop + 1].astype(np.int64)
    indices = matrix["indices"][indptr[0] : indptr[-1]].astype(np.int32)
    if len(indices) and (indices.min() < 0 or indices.max() >= genes):
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise InputError(f"{spec.path}: rows {start} to {stop} of X name gene number {wrong}, but there are {genes}")
    values = matrix["data"][indptr[0] : indptr[-1]].astype(np.float32)
    return sparse.csr_matrix((values, indices, indptr - indptr[0]), shape=(stop - start, genes))


def _from_columns(matrix: Group, start: int, stop: int) -> sparse.csr_matrix:
    """Rows [start, stop) of a matrix that is stored by columns: all of it is read, a piece at a time, and they are kept."""
    bounds = matrix["indptr"][:].astype(np.int64)
    parts: list[tuple[np.ndarray, ...]] = []
    for first in range(0, int(bounds[-1]), PIECE):
        piece = slice(first, min(first + PIECE, int(bounds[-1])))
        row = matrix["indices"][piece].astype(np.int64) - start
        here = np.flatnonzero((row >= 0) & (row < stop - start))
        gene = np.searchsorted(bounds, first + here, side="right") - 1
        parts.append((row[here], gene, matrix["data"][piece][here].astype(np.float32)))
    row, gene, values = (np.concatenate(part) for part in zip(*parts, strict=True)) if parts else ([], [], [])
    order = np.argsort(row, kind="stable")  # genes came in order, and stay so within a row
    indptr = np.concatenate([[0], np.cumsum(np.bincount(np.asarray(row, dtype=np.int64), minlength=stop - start))])
    values = np.asarray(values, dtype=np.float32)[order]
    return sparse.csr_matrix((values, np.asarray(gene)[order], indptr), shape=(stop - start, matrix_shape(matrix)[1]))


def by_columns(matrix: Node) -> bool:
    """Whether a sparse matrix is stored by columns."""
    return str(matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "csr_matrix"))).startswith("csc")


def row_facts(rows: sparse.csr_matrix) -> RowFacts:
    """One pass over the stored values; zeros that are not stored count."""
    n, genes = rows.shape
    lengths = np.diff(rows.indptr)
    bad_gene = np.full(n, -1, dtype=np.int32)
    bad = np.flatnonzero(~np.isfinite(rows.data))
    if len(bad):
        row_of = np.searchsorted(rows.indptr, bad, side="right") - 1
        bad_gene[row_of[::-1]] = rows.indices[bad[::-1]]
    filled = np.flatnonzero(lengths)
    minimum, maximum = np.zeros(n, dtype=np.float32), np.zeros(n, dtype=np.float32)
    whole = np.ones(n, dtype=bool)
    total = np.asarray(rows.sum(axis=1, dtype=np.float64)).ravel()
    if len(filled):
        at = rows.indptr[filled]
        minimum[filled] = np.minimum.reduceat(rows.data, at)
        maximum[filled] = np.maximum.reduceat(rows.data, at)
        whole[filled] = np.logical_and.reduceat(rows.data == np.floor(rows.data), at)
        sparse_rows = lengths < genes
        minimum[sparse_rows] = np.minimum(minimum[sparse_rows], 0)
        maximum[sparse_rows] = np.maximum(maximum[sparse_rows], 0)
    return RowFacts(total=total, minimum=minimum, maximum=maximum, whole=whole, bad_gene=bad_gene)


def digests(rows: sparse.csr_matrix) -> list[str]:
    """A digest for each DIGEST_ROWS rows."""
    found = []
    for start in range(0, rows.shape[0], DIGEST_ROWS):
        indptr = rows.indptr[start : start + DIGEST_ROWS + 1].astype(np.int64)
        part = slice(indptr[0], indptr[-1])
        found.append(digest(np.diff(indptr), [rows.indices[part]], [rows.data[part]]))
    return found


def digest(lengths: np.ndarray, indices: Iterable[np.ndarray], values: Iterable[np.ndarray]) -> str:
    """The digest of rows: their lengths, then their gene numbers and their values, both in pieces of any size."""
    hasher = hashlib.blake2b(lengths.astype(np.int64).tobytes(), digest_size=16)
    for pieces, dtype in ((indices, np.int32), (values, np.float32)):
        for piece in pieces:
            hasher.update(np.ascontiguousarray(piece, dtype=dtype).data)
    return hasher.hexdigest()


def gather(facts: list[RowFacts], digests: list[str], *, spec: DatasetSpec, cell_names, genes) -> MatrixFacts:
    """The facts of a matrix from those of its ranges in order. Raises InputError naming a cell and gene that is not finite."""
    bad = np.concatenate([f.bad_gene for f in facts])
    if (bad >= 0).any():
        row = int(np.flatnonzero(bad >= 0)[0])
        raise InputError(
            f"{spec.path}: X is NaN or infinite in {(bad >= 0).sum()} cells; the first is cell {cell_names[row]}, "
            f"gene {genes[bad[row]]}"
        )
    total = np.concatenate([f.total for f in facts])
    return MatrixFacts(
        digest=hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest(),
        whole=all(bool(f.whole.all()) for f in facts),
        minimum=float(min(f.minimum.min() for f in facts)),
        maximum=float(max(f.maximum.max() for f in facts)),
        depth=float(np.median(total[total > 0])) if (total > 0).any() else 0.0,
    )


def decide(spec: DatasetSpec, facts: MatrixFacts) -> Normalisation:
    """What ``spec.normalize`` means for a matrix. Raises InputError where it fits none of the known scales."""
    place = f"{spec.path}: {'X' if spec.layer is None else f'layer {spec.layer}'}"
    if facts.minimum < 0:
        raise InputError(
            f"{place} has negative values (down to {facts.minimum:.4g}); raw counts or log1p of normalised counts are "
            "needed: name a layer that holds them with --layer"
        )
    if facts.maximum == 0:
        raise InputError(f"{place} is zero everywhere")
    counts = f"counts; each cell scaled to the median depth of {facts.depth:.6g}, then log1p"
    if spec.normalize == "none":
        if facts.whole:
            raise InputError(
                f"{place} holds integers (counts), and normalize=none would train on them as they are: use log1p"
            )
        return Normalisation(log1p=False, depth=0.0, text="used as it is (normalize=none)")
    if spec.normalize == "log1p":
        return Normalisation(log1p=True, depth=facts.depth, text=f"taken as {counts} (normalize=log1p)")
    if facts.whole:
        return Normalisation(log1p=True, depth=facts.depth, text=f"every value is an integer: taken as {counts}")
    if facts.maximum < LOG_LIMIT:
        return Normalisation(
            log1p=False, depth=0.0, text=f"non-negative and below {LOG_LIMIT:g}: taken as log-normalised, used as it is"
        )
    raise InputError(
        f"{place} is neither counts (values are not all integers) nor log-normalised (the maximum is {facts.maximum:.4g}, "
        f"not below {LOG_LIMIT:g}); give --normalize log1p or none, or name another layer"
    )


def cache_folder() -> Path:
    """``$PERTURBRAY_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("PERTURBRAY_CACHE") or platformdirs.user_cache_dir("perturbray"))


def stamp(spec: DatasetSpec) -> dict:
    """What tells without reading whether a matrix is still the same: its place, its size, and when it was changed."""
    place = Path(spec.path).resolve()
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    stats = [path.stat() for path in files]
    return {
        "path": str(place),
        "layer": spec.layer,
        "size": sum(stat.st_size for stat in stats),
        "mtime_ns": max((stat.st_mtime_ns for stat in stats), default=0),
    }


def _memory(spec: DatasetSpec) -> tuple[Path, dict]:
    identity = {**stamp(spec), "version": 1}
    name = hashlib.blake2b(f"{identity['path']}\n{spec.layer}".encode(), digest_size=12).hexdigest()
    return cache_folder() / "facts" / f"{name}.json", identity


def remembered(spec: DatasetSpec) -> MatrixFacts | None:
    """The facts of a file that was read before and has not changed since, by size and time."""
    place, identity = _memory(spec)
    try:
        known = json.loads(place.read_text())
        return MatrixFacts(**known["facts"]) if known["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never read before, or written by another version: reading it again is all that is lost


def remember(spec: DatasetSpec, facts: MatrixFacts) -> None:
    """Keep the facts for the next run. A cache that cannot be written costs that run a read, and nothing else."""
    place, identity = _memory(spec)
    temporary = place.with_suffix(f".{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"identity": identity, "facts": asdict(facts)}))
        temporary.replace(place)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
