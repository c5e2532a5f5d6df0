"""Evaluate: scores of predicted cells from a file, whatever model made them. No training, no sweep, no Ray.

Both files are read out of core: their rows are put in the order of the conditions in a temporary folder and mapped from
there, so that memory grows with conditions x genes and not with cells x genes.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbray.data.dataset import DatasetSpec, matrix_shape, obs_columns, open_h5ad, target_sum, var_names
from perturbray.data.matrix import LOG_LIMIT, read_rows, row_facts
from perturbray.errors import InputError
from perturbray.metrics.calibration import anchored
from perturbray.metrics.conventions import CONVENTIONS, aggregate, judge
from perturbray.metrics.standard import sizes_of
from perturbray.results import calibration as calibrated

ROW_BYTES = 8 << 20  # of dense rows that are read at once


@dataclass(frozen=True)
class Table:
    """What conventions ask of an AnnData: mapped cells in the order of their conditions."""

    X: Any  # CSR or dense float32, mapped from a file
    obs: pd.DataFrame
    var_names: pd.Index


@dataclass(frozen=True, kw_only=True)
class Files:
    """Two h5ad files, and optionally one with training cells, and the roles of their obs columns."""

    observed: str
    predicted: str
    perturbation_key: str
    control: str
    covariate_keys: tuple[str, ...] = ()
    delimiter: str = "+"
    training: str | None = None
    normalize: bool = False


@dataclass(frozen=True)
class Judged:
    """An evaluation: values by condition, and what they mean on these data."""

    values: pd.DataFrame  # as ``metrics.conventions.evaluate``
    calibration: pd.DataFrame | None = None  # a row a metric, ``results.calibration.COLUMNS``
    strata: pd.DataFrame | None = None  # means by size of effect, ``results.anchors.EFFECTS``


def evaluate_files(files: Files, *, convention: str = "perturbray", folder: Path | None = None) -> pd.DataFrame:
    """The table of a convention, as ``metrics.conventions.evaluate``; ``folder`` is where temporary files go."""
    return judge_files(files, convention=convention, folder=folder, calibration=False).values


def judge_files(
    files: Files,
    *,
    convention: str = "perturbray",
    folder: Path | None = None,
    calibration: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Judged:
    """The table of a convention, and its calibration: intervals and strata for all, anchors for the project's metrics."""
    CONVENTIONS[convention]  # an unknown name is told before hours of reading
    with tempfile.TemporaryDirectory(prefix=".evaluate-", dir=folder) as scratch:
        place = Path(scratch)
        depth = recorded = None
        tables = []
        for name in ("observed", "predicted", "training"):
            path = getattr(files, name)
            if path is None:
                continue
            progress(f"reading {path}")
            with _opened(path, files, place / name) as (spec, file):
                if files.normalize and depth is None:
                    depth = median_depth(spec, file)
                if name == "observed" and not files.normalize:
                    recorded = target_sum(file)
                genes = None if not tables else tables[0].var_names
                tables.append(_spill(spec, file, place / name, genes=genes, depth=depth if files.normalize else None))
        options: dict[str, Any] = {"target_sum": recorded} if convention == "perturbray" else {}
        if len(tables) == 3:
            if convention != "perturbray":
                raise InputError(f"--training is of use to convention perturbray alone, not to {convention}")
            options |= {"training": tables[2], "training_control": files.control}
        progress(f"scoring, convention {convention}")
        table, results = judge(
            tables[0],
            tables[1],
            perturbation_key=files.perturbation_key,
            control=files.control,
            covariate_keys=files.covariate_keys,
            convention=convention,
            delimiter=files.delimiter,
            names=(files.observed, files.predicted),
            **options,
        )
        if depth is not None:
            table.attrs["target_depth"] = depth
        if not calibration:
            return Judged(table)
        found = {}
        if results.prediction is not None:
            found = anchored(results.prediction, results.comparison, results.metrics, progress=progress)
        progress("strata and intervals")
        sizes = sizes_of(results.comparison, recorded)
        frames = calibrated.frames(
            table, found, results.metrics, sizes=sizes, macro=CONVENTIONS[convention].mean == "macro"
        )
    return Judged(table, *frames)


def summarise(table: pd.DataFrame, *, covariate_keys: Sequence[str], convention: str) -> pd.DataFrame:
    """``metric`` and ``value``: the mean over conditions that the convention itself reports, and the counts beside it."""
    frame = aggregate(table, covariate_keys)
    rule = CONVENTIONS[convention].mean
    if rule == "contaminated":  # a NaN in one condition is a NaN of the mean
        means = table.groupby("metric", sort=False)["value"].apply(lambda values: values.mean(skipna=False))
        frame["value"] = frame["metric"].map(means)
    else:
        frame["value"] = frame[rule]
    return frame[["metric", "value", "macro", "pooled", "median", "sd", "n_scored", "n_undefined", "n_failed"]]


def median_depth(spec: DatasetSpec, file: h5py.File) -> float:
    """Counts a cell, the median over cells with any; the observed side's serves both sides."""
    totals = np.concatenate([row_facts(rows).total for _, rows in _chunks(spec, file)])
    if not (totals > 0).any():
        raise InputError(f"{spec.path}: X is zero everywhere")
    return float(np.median(totals[totals > 0]))


@contextmanager
def _opened(path: str, files: Files, place: Path) -> Iterator[tuple[DatasetSpec, h5py.File]]:
    spec = DatasetSpec(
        path=path,
        perturbation=files.perturbation_key,
        control=files.control,
        covariates=files.covariate_keys or (files.perturbation_key,),
    )
    place.mkdir()
    with open_h5ad(path) as file:
        yield spec, file


def _chunks(spec: DatasetSpec, file: h5py.File) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Rows in the order of the file, a bounded number at a time, with the number of the first."""
    cells, genes = matrix_shape(spec.matrix(file))
    step = max(1, ROW_BYTES // (4 * genes))
    for start in range(0, cells, step):
        yield start, read_rows(file, spec, start, min(start + step, cells))


def _spill(spec: DatasetSpec, file: h5py.File, place: Path, *, genes: pd.Index | None, depth: float | None) -> Table:
    """The file's cells, sorted by condition, with the genes in a given order, mapped from a temporary file."""
    columns = [*dict.fromkeys([*spec.covariates, spec.perturbation])]
    obs = obs_columns(spec, file, columns)
    names = pd.Index(var_names(file))
    if not names.is_unique:
        raise InputError(f"{spec.path}: gene {names[names.duplicated()][0]!r} occurs twice in var")
    order = _gene_order(names, genes, spec.path)
    codes = obs.groupby(columns, sort=True).ngroup().to_numpy()
    position = np.empty(len(obs), dtype=np.int64)
    position[np.argsort(codes, kind="stable")] = np.arange(len(obs))
    cells, width = matrix_shape(spec.matrix(file))
    dense = isinstance(spec.matrix(file), h5py.Dataset)
    needed = cells * width * 4 if dense else 8 * int(spec.matrix(file)["indptr"][-1])
    free = shutil.disk_usage(place).free
    if needed > free:
        room = f"{needed / 1e9:.1f} GB are needed in {place.parent.parent} and {free / 1e9:.1f} GB are free"
        raise InputError(f"{spec.path}: {room}")
    writer = _DenseWriter(place, cells, width) if dense else _SparseWriter(place, spec, file, position)
    for start, rows in _chunks(spec, file):
        if depth is not None:
            rows = _normalised(rows, depth, spec.path)
        if order is not None:
            rows = rows[:, order]
            rows.sort_indices()
        writer.write(position[start : start + rows.shape[0]], rows)
    inverse = np.argsort(position, kind="stable")
    obs = obs.iloc[inverse].reset_index(drop=True)
    return Table(X=writer.finish(width), obs=obs, var_names=names if genes is None else genes)


def _gene_order(names: pd.Index, genes: pd.Index | None, path: str) -> np.ndarray | None:
    if genes is None or names.equals(genes):
        return None
    position = names.get_indexer(genes)
    if (position < 0).any() or len(names) != len(genes):
        ours, theirs = list(genes.difference(names)[:10]), list(names.difference(genes)[:10])
        raise InputError(
            f"{path}: its genes are not those of the observed file; only there: {', '.join(ours) or 'none'}; "
            f"only here: {', '.join(theirs) or 'none'}"
        )
    return position


def _normalised(rows: sparse.csr_matrix, depth: float, path: str) -> sparse.csr_matrix:
    if len(rows.data) and (rows.data.min() < 0 or not np.isfinite(rows.data).all()):
        raise InputError(f"{path}: --normalize takes counts, and X holds negative or non-finite values")
    if rows.data.max(initial=0) < LOG_LIMIT and (np.floor(rows.data) != rows.data).any():
        raise InputError(f"{path}: --normalize takes counts, and X looks log-normalised already; leave the flag away")
    totals = np.asarray(rows.sum(axis=1, dtype=np.float64)).ravel()
    scale = np.divide(depth, totals, out=np.zeros_like(totals), where=totals > 0)
    values = np.log1p(rows.data * np.repeat(scale, np.diff(rows.indptr))).astype(np.float32)
    return sparse.csr_matrix((values, rows.indices, rows.indptr), shape=rows.shape)


class _DenseWriter:
    """Dense rows to their places in a mapped array."""

    def __init__(self, place: Path, cells: int, genes: int) -> None:
        self.array = np.lib.format.open_memmap(place / "X.npy", mode="w+", dtype=np.float32, shape=(cells, genes))

    def write(self, positions: np.ndarray, rows: sparse.csr_matrix) -> None:
        self.array[positions] = rows.toarray()

    def finish(self, genes: int) -> np.ndarray:
        self.array.flush()
        return np.load(self.array.filename, mmap_mode="r")


class _SparseWriter:
    """CSR rows to their places in mapped arrays; where each row goes follows from the lengths of all."""

    def __init__(self, place: Path, spec: DatasetSpec, file: h5py.File, position: np.ndarray) -> None:
        lengths = np.diff(spec.matrix(file)["indptr"][:]) if not _by_columns(spec, file) else _row_lengths(spec, file)
        ordered = np.empty_like(lengths)
        ordered[position] = lengths
        self.indptr = np.concatenate([[0], np.cumsum(ordered, dtype=np.int64)])
        size = max(1, int(self.indptr[-1]))
        self.indices = np.lib.format.open_memmap(place / "indices.npy", mode="w+", dtype=np.int32, shape=(size,))
        self.values = np.lib.format.open_memmap(place / "values.npy", mode="w+", dtype=np.float32, shape=(size,))

    def write(self, positions: np.ndarray, rows: sparse.csr_matrix) -> None:
        lengths = np.diff(rows.indptr)
        target = np.repeat(self.indptr[positions] - rows.indptr[:-1], lengths) + np.arange(rows.nnz)
        self.indices[target], self.values[target] = rows.indices, rows.data

    def finish(self, genes: int) -> sparse.csr_matrix:
        parts = []
        for array in (self.values, self.indices):
            array.flush()
            parts.append(np.load(array.filename, mmap_mode="r")[: self.indptr[-1]])
        return sparse.csr_matrix((*parts, self.indptr), shape=(len(self.indptr) - 1, genes), copy=False)


def _by_columns(spec: DatasetSpec, file: h5py.File) -> bool:
    return len(spec.matrix(file)["indptr"]) != matrix_shape(spec.matrix(file))[0] + 1


def _row_lengths(spec: DatasetSpec, file: h5py.File) -> np.ndarray:
    return np.concatenate([np.diff(rows.indptr) for _, rows in _chunks(spec, file)])
