"""Ingest: a matrix from an h5ad or zarr file into shards of checked, normalised rows, in bounded memory.

The source is read once, in its own order and in pieces; what needs a second look is read from the shards. Every layout
goes the way that suits it: rows are copied as they lie, columns are sorted into row ranges through files, dense rows are
thinned. Only totals grow with the number of cells: 8 bytes each.
"""

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from scipy import sparse

from perturbray.data import matrix
from perturbray.data.dataset import Conditions, DatasetSpec, Group, Node, is_array, matrix_shape
from perturbray.data.rows import index_type
from perturbray.data.shards import Column, Shard
from perturbray.errors import InputError

MEMORY_MB = 256  # what reading and sorting may hold, beside 8 bytes a cell
SHARD_ROWS = 65_536  # at most; two bytes number the rows of a shard
SHARD_BYTES = 128 * 2**20  # a shard ends at the first DIGEST_ROWS above it
RECORD = np.dtype([("row", "<u4"), ("gene", "<u4"), ("value", "<f4")])
COPY, SPILL, SORT, EXAMINE = 32, 80, 56, 64  # bytes held a stored value while it is copied, parted, sorted, examined
REMEDY = "free some, or set PERTURBRAY_CACHE to a folder with more"

Progress = Callable[[float], None]  # the share that is done, 0 to 1


@dataclass(frozen=True)
class Limits:
    """How much is held in memory, and where shards end."""

    memory: int  # bytes
    rows: int = SHARD_ROWS
    shard: int = SHARD_BYTES

    @classmethod
    def of(cls, memory_mb: float | None = None, shard_rows: int | None = None) -> "Limits":
        """The limits asked for, those of ``$PERTURBRAY_INGEST_MB``, or the defaults. Raises InputError."""
        text = str(os.environ.get("PERTURBRAY_INGEST_MB", MEMORY_MB) if memory_mb is None else memory_mb)
        try:
            size = float(text)
        except ValueError:
            raise InputError(f"PERTURBRAY_INGEST_MB={text}: a number of megabytes is needed") from None
        if not size >= 1:
            raise InputError(f"PERTURBRAY_INGEST_MB={text}: reading needs 1 MB at least")
        rows = SHARD_ROWS if shard_rows is None else max(1, shard_rows // matrix.DIGEST_ROWS) * matrix.DIGEST_ROWS
        return cls(memory=int(size * 2**20), rows=min(rows, SHARD_ROWS))


@dataclass(frozen=True)
class Ingested:
    """What ingest made of a matrix."""

    facts: matrix.MatrixFacts
    normalisation: matrix.Normalisation
    rows: tuple[int, ...]  # of each shard
    stored: int  # values


def write(
    spec: DatasetSpec, file: Group, conditions: Conditions, folder: Path, *, limits: Limits, progress: Progress
) -> Ingested:
    """Write the shards of a matrix to a folder. Raises InputError for a matrix that is wrong, and where there is too little
    space from the start."""
    node = spec.matrix(file)
    cells, genes = matrix_shape(node)
    copy = _copy_dense if is_array(node) else _copy_columns if matrix.by_columns(node) else _copy_rows
    source = _Source(spec=spec, node=node, cells=cells, genes=genes, folder=folder, limits=limits)
    _check_space(source)
    shards = copy(source, lambda share: progress(0.6 * share))
    facts, totals = _examine(source, shards, conditions, lambda share: progress(0.6 + 0.25 * share))
    normalisation = matrix.decide(spec, facts)
    for number, shard in enumerate(shards):
        if normalisation.log1p:
            _normalise(shard, normalisation, totals[shard.start : shard.stop], limits)
        shard.close()
        progress(0.85 + 0.15 * (number + 1) / len(shards))
    return Ingested(
        facts=facts,
        normalisation=normalisation,
        rows=tuple(shard.rows for shard in shards),
        stored=sum(shard.stored for shard in shards),
    )


def embeddings(spec: DatasetSpec, file: Group, folder: Path, *, limits: Limits) -> dict[str, int]:
    """Write every numeric matrix of obsm as rows of float32, ``obsm.<key>.npy``; their widths by key."""
    found = {}
    for key in file.get("obsm", ()):
        node = file["obsm"][key]
        if not is_array(node) or len(node.shape) != 2 or node.dtype.kind not in "fiu" or not node.shape[1]:
            continue
        cells, width = node.shape
        out = Column(folder / embedding_file(key), np.float32, width=width)
        step = max(1, limits.memory // (COPY * width))
        for start in range(0, cells, step):
            out.append(np.asarray(node[start : start + step]))
        out.close()
        found[key] = int(width)
    return found


def embedding_file(key: str) -> str:
    """The name of the file of an obsm matrix."""
    return f"obsm.{quote(key, safe='')}.npy"


@dataclass(frozen=True, kw_only=True)
class _Source:
    spec: DatasetSpec
    node: Node
    cells: int
    genes: int
    folder: Path
    limits: Limits

    @property
    def name(self) -> str:
        return f"{self.spec.path}: {'X' if self.spec.layer is None else f'layer {self.spec.layer}'}"

    def shard(self, number: int, start: int) -> Shard:
        return Shard(self.folder, number, start, self.genes)

    def full(self, shard: Shard, rows: int) -> bool:
        """Whether a shard should take no more rows."""
        return shard.rows + rows > self.limits.rows or shard.stored * 6 >= self.limits.shard

    def pieces(self, array: Node, cost: int) -> Iterator[tuple[int, int]]:
        """Ranges of a flat array that the limit admits, along its chunks, so that none is decompressed twice."""
        most = self.limits.memory // cost
        length = array.shape[0]
        chunk = max(1, (array.chunks or (1,))[0])  # a contiguous array has none
        if chunk > most:
            raise InputError(
                f"{self.name} is stored in chunks of {chunk:,} values, which take {_mb(chunk * cost)} MB to read, and "
                f"ingest may hold {_mb(self.limits.memory)} MB: set PERTURBRAY_INGEST_MB={_mb(chunk * cost)} or more"
            )
        step = most // chunk * chunk
        return ((start, min(start + step, length)) for start in range(0, length, step))

    def flat(self, name: str, *, cost: int) -> Iterator[tuple[int, np.ndarray]]:
        """Pieces of one of the flat arrays, with the number of the first value."""
        for start, stop in self.pieces(self.node[name], cost):
            yield start, np.asarray(self.node[name][start:stop])

    def check_numbers(self, numbers: np.ndarray, bound: int, kind: str, where: Callable[[int], str]) -> None:
        """Raise InputError for a row or gene number that the matrix does not have. ``where`` says where one stands."""
        if not len(numbers):
            return
        if numbers.dtype.kind not in "iu":
            raise InputError(f"{self.name}: its indices are {numbers.dtype}, and whole numbers are needed")
        if numbers.min() < 0 or numbers.max() >= bound:
            at = int(np.flatnonzero((numbers < 0) | (numbers >= bound))[0])
            raise InputError(f"{self.name}: {where(at)} names {kind} number {numbers[at]}, but there are {bound}")

    def check_lengths(self, bounds: int) -> None:
        """Raise InputError where the flat arrays do not belong together."""
        lengths = {name: self.node[name].shape[0] for name in ("indptr", "indices", "data")}
        if lengths["indptr"] != bounds + 1 or lengths["indices"] != lengths["data"]:
            text = ", ".join(f"{n:,} {name}" for name, n in lengths.items())
            raise InputError(f"{self.name} is damaged: {text} for {self.cells:,} cells x {self.genes:,} genes")

    def check_bounds(self, bounds: np.ndarray, before: int | None) -> None:
        """Raise InputError where row (or column) bounds do not ascend from 0 within what is stored."""
        stored = self.node["data"].shape[0]
        wrong = bounds[0] != 0 if before is None else bounds[0] < before
        if wrong or (np.diff(bounds) < 0).any() or bounds[-1] > stored:
            raise InputError(f"{self.name} is damaged: its indptr does not ascend from 0 to {stored:,}")


def _mb(size: float) -> str:
    return f"{-(-size // 2**20):.0f}"


def _needed(source: _Source) -> int:
    """Bytes of the shards, and of what is spilled on the way; 0 where it is not known before reading."""
    if is_array(source.node):
        return 0
    stored = source.node["data"].shape[0]
    spilled = RECORD.itemsize if matrix.by_columns(source.node) else 0
    return stored * (4 + index_type(source.genes).itemsize + spilled) + 8 * source.cells


def _check_space(source: _Source) -> None:
    """Raise InputError in numbers where the disk is too small, as far as that is known before anything is written."""
    needed, free = _needed(source), shutil.disk_usage(source.folder).free
    if needed > free:
        place = source.folder.parent
        raise InputError(
            f"{source.name} needs {needed / 1e9:.2f} GB in {place} and {free / 1e9:.2f} GB are free: {REMEDY}"
        )


@contextmanager
def space(spec: DatasetSpec, folder: Path) -> Iterator[None]:
    """Around all that is written to a folder: an InputError in numbers where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        written = sum(path.stat().st_size for path in folder.iterdir())
        free = shutil.disk_usage(folder).free
        raise InputError(
            f"{spec.path}: {folder.parent} is full ({free / 1e9:.2f} GB free) after {written / 1e9:.2f} GB were written: "
            f"{REMEDY}"
        ) from None


def _cuts(source: _Source, stored: np.ndarray, most: int) -> list[int]:
    """Where shards begin and the last ends, in units of DIGEST_ROWS rows, of which each holds ``stored`` values."""
    cuts, rows, held = [0], 0, 0
    for number, values in enumerate(stored.tolist()):
        if rows and (rows + matrix.DIGEST_ROWS > source.limits.rows or held + values > most):
            cuts.append(number)
            rows = held = 0
        rows, held = rows + matrix.DIGEST_ROWS, held + values
    return [*cuts, len(stored)]


def _copy_rows(source: _Source, progress: Progress) -> list[Shard]:
    """Stored by rows: indptr, indices and values one after the other, cut where shards end."""
    source.check_lengths(source.cells)
    marks, before = [], None  # bounds at every DIGEST_ROWS
    for start, bounds in source.flat("indptr", cost=COPY):
        bounds = bounds.astype(np.int64)
        source.check_bounds(bounds, before)
        before = int(bounds[-1])
        marks.append(bounds[-start % matrix.DIGEST_ROWS :: matrix.DIGEST_ROWS])
    marks = np.concatenate(marks)[: -(-source.cells // matrix.DIGEST_ROWS)]
    marks = np.append(marks, before)
    cuts = _cuts(source, np.diff(marks), source.limits.shard // 6)
    shards = [source.shard(i, cut * matrix.DIGEST_ROWS) for i, cut in enumerate(cuts[:-1])]
    ends = [shard.start for shard in shards[1:]] + [source.cells]
    bases = marks[cuts].tolist()
    for start, bounds in source.flat("indptr", cost=COPY):
        for i, part in _parts(start - 1, bounds.astype(np.int64), [0, *ends]):  # the first bound opens the first row
            shards[i].columns["indptr"].append(part - bases[i])
    stored = max(1, 2 * bases[-1])
    for number, (name, column) in enumerate((("indices", "indices"), ("data", "values"))):
        for start, piece in source.flat(name, cost=COPY):
            if name == "indices":
                source.check_numbers(
                    piece, source.genes, "gene", lambda at, start=start: f"row {_row(shards, bases, start + at)}"
                )
            for i, part in _parts(start, piece, bases):
                shards[i].columns[column].append(part.astype(shards[i].columns[column].dtype))
            progress((number * bases[-1] + start + len(piece)) / stored)
    return shards


def _parts(start: int, piece: np.ndarray, bases: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The part of a piece of a flat array that falls to each shard, which own [bases[i], bases[i + 1])."""
    for i in range(max(0, int(np.searchsorted(bases, start, side="right")) - 1), len(bases) - 1):
        low, high = max(bases[i], start) - start, min(bases[i + 1] - start, len(piece))
        if low >= len(piece):
            return
        if low < high:
            yield i, piece[low:high]


def _row(shards: list[Shard], bases: list[int], at: int) -> int:
    """The row that owns a stored value."""
    i = int(np.searchsorted(bases[:-1], at, side="right")) - 1
    indptr = shards[i].columns["indptr"].read(0, shards[i].rows + 1)
    return shards[i].start + int(np.searchsorted(indptr, at - bases[i], side="right")) - 1


def _copy_columns(source: _Source, progress: Progress) -> list[Shard]:
    """Stored by columns: counted by rows, spilled to a file for each range of rows, and sorted there."""
    source.check_lengths(source.genes)
    bounds = np.asarray(source.node["indptr"][:]).astype(np.int64)
    source.check_bounds(bounds, None)
    total = int(bounds[-1])
    column = lambda at: f"gene {int(np.searchsorted(bounds, at, side='right')) - 1}"  # noqa: E731
    units = -(-source.cells // matrix.DIGEST_ROWS)
    stored = np.zeros(units, dtype=np.int64)
    for start, rows in source.flat("indices", cost=COPY):
        source.check_numbers(rows, source.cells, "cell", lambda at, start=start: column(start + at))
        stored += np.bincount(rows[: max(0, total - start)] // matrix.DIGEST_ROWS, minlength=units)
        progress(0.2 * (start + len(rows)) / max(1, total))
    most = source.limits.memory // SORT
    if stored.max(initial=0) > most:
        raise InputError(
            f"{source.name} is stored by columns, and sorting {matrix.DIGEST_ROWS:,} rows takes {_mb(stored.max() * SORT)} MB; "
            f"ingest may hold {_mb(source.limits.memory)} MB: set PERTURBRAY_INGEST_MB={_mb(stored.max() * SORT)} or more"
        )
    cuts = _cuts(source, stored, most)
    starts = [cut * matrix.DIGEST_ROWS for cut in cuts[:-1]]
    spilled = [source.folder / f"{i:05d}.spill" for i in range(len(starts))]
    for start, rows in source.flat("indices", cost=SPILL):
        stop = min(start + len(rows), total)
        _spill(source, bounds, start, rows[: stop - start], starts, spilled)
        progress(0.2 + 0.5 * stop / max(1, total))
    shards: list[Shard] = []
    for i, (start, stop) in enumerate(itertools.pairwise([*starts, source.cells])):
        if not shards or source.full(shards[-1], stop - start):
            shards.append(source.shard(len(shards), start))
        records = np.fromfile(spilled[i], dtype=RECORD) if spilled[i].exists() else np.empty(0, dtype=RECORD)
        row = (records["row"] - start).astype(np.uint16)
        order = np.argsort(row, kind="stable")  # genes came in order, and stay so within a row
        shards[-1].append(np.bincount(row, minlength=stop - start), records["gene"][order], records["value"][order])
        spilled[i].unlink(missing_ok=True)
        progress(0.7 + 0.3 * (i + 1) / len(starts))
    return shards


def _spill(
    source: _Source, bounds: np.ndarray, start: int, rows: np.ndarray, starts: list[int], spilled: list[Path]
) -> None:
    """Append stored values to the files of the shards that their rows belong to."""
    stop = start + len(rows)
    first, last = (int(np.searchsorted(bounds, at, side="right")) - 1 for at in (start, max(start, stop - 1)))
    inside = np.clip(bounds[first : last + 2], start, stop)
    records = np.empty(len(rows), dtype=RECORD)
    records["row"] = rows
    records["gene"] = np.repeat(np.arange(first, last + 1, dtype=np.uint32), np.diff(inside))
    records["value"] = source.node["data"][start:stop]
    shard = (np.searchsorted(starts, rows, side="right") - 1).astype(np.uint16)
    records = records[np.argsort(shard, kind="stable")]
    edges = np.concatenate([[0], np.cumsum(np.bincount(shard, minlength=len(starts)))])
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        if low < high:
            with open(spilled[i], "ab") as file:
                file.write(records[low:high].data)


def _copy_dense(source: _Source, progress: Progress) -> list[Shard]:
    """Stored dense: some rows at a time, what is not zero of them."""
    shards: list[Shard] = []
    step = max(1, source.limits.memory // (COPY * source.genes))
    chunk = (source.node.chunks or (1,))[0]
    step = step // chunk * chunk or step
    ends = sorted({*range(0, source.cells, step), *range(0, source.cells, matrix.DIGEST_ROWS), source.cells})
    for start, stop in itertools.pairwise(ends):
        block = np.asarray(source.node[start:stop]).astype(np.float32, copy=False)
        at = np.flatnonzero(block)
        if start % matrix.DIGEST_ROWS == 0 and (not shards or source.full(shards[-1], matrix.DIGEST_ROWS)):
            shards.append(source.shard(len(shards), start))
        lengths = np.bincount(at // source.genes, minlength=stop - start)
        shards[-1].append(lengths, (at % source.genes), block.ravel()[at])
        progress(stop / source.cells)
    return shards


def _examine(
    source: _Source, shards: list[Shard], conditions: Conditions, progress: Progress
) -> tuple[matrix.MatrixFacts, np.ndarray]:
    """What the matrix holds, its digest, and the sum of every row. Rows that are not in order are put in order."""
    facts: list[matrix.RowFacts] = []
    digests: list[str] = []
    most = source.limits.memory // EXAMINE
    for number, shard in enumerate(shards):
        ordered = True
        hasher = _Digests(shard)
        for indptr in shard.windows(most):
            rows = shard.window(indptr)
            hasher.add(indptr, rows)
            facts.append(matrix.row_facts(rows))
            ordered &= bool(rows.has_canonical_format)
        digests += hasher.finish()
        if not ordered:
            shards[number] = _ordered(shard, most)
        progress((number + 1) / len(shards))
    found = matrix.gather(facts, digests, spec=source.spec, cell_names=conditions.cell_names, genes=conditions.genes)
    return found, np.concatenate([part.total for part in facts])


class _Digests:
    """The digests of a shard from its windows; one that is cut into several windows is read again from the shard."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self.found, self.next = shard, [], 0

    def add(self, indptr: np.ndarray, rows: sparse.csr_matrix) -> None:
        first = self.next
        self.next += rows.shape[0]
        whole = rows.shape[0] == min(
            matrix.DIGEST_ROWS, self.shard.rows - first // matrix.DIGEST_ROWS * matrix.DIGEST_ROWS
        )
        if whole:
            self.found += matrix.digests(rows)
        elif self.next % matrix.DIGEST_ROWS == 0 or self.next == self.shard.rows:
            self._again((self.next - 1) // matrix.DIGEST_ROWS * matrix.DIGEST_ROWS)

    def _again(self, first: int) -> None:
        bounds = self.shard.columns["indptr"].read(first, self.next + 1)
        pieces = [
            (start, min(start + matrix.PIECE, int(bounds[-1])))
            for start in range(int(bounds[0]), int(bounds[-1]), matrix.PIECE)
        ]
        columns = self.shard.columns
        self.found.append(
            matrix.digest(
                np.diff(bounds),
                (columns["indices"].read(*piece) for piece in pieces),
                (columns["values"].read(*piece) for piece in pieces),
            )
        )

    def finish(self) -> list[str]:
        return self.found


def _ordered(shard: Shard, most: int) -> Shard:
    """The shard with genes ascending in every row, and those that stand twice added up."""
    (aside := shard.folder / "ordered").mkdir(exist_ok=True)
    made = Shard(aside, shard.number, shard.start, shard.genes)
    for indptr in shard.windows(most):
        rows = shard.window(indptr)
        rows.sum_duplicates()
        made.append(np.diff(rows.indptr), rows.indices, rows.data)
    for column in made.columns.values():
        column.place = column.place.rename(shard.folder / column.place.name)
    aside.rmdir()
    made.folder = shard.folder
    return made


def _normalise(shard: Shard, normalisation: matrix.Normalisation, totals: np.ndarray, limits: Limits) -> None:
    """Scale and log the values of a shard where they lie."""
    first = 0
    for indptr in shard.windows(limits.memory // EXAMINE):
        last = first + len(indptr) - 1
        values = shard.columns["values"].read(int(indptr[0]), int(indptr[-1]))
        values = normalisation.apply(values, np.diff(indptr), totals[first:last])
        shard.columns["values"].change(int(indptr[0]), values)
        first = last
