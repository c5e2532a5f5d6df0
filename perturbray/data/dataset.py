"""DatasetSpec says which columns of a screen play which role; Conditions are its distinct (context, perturbation) pairs."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from perturbray.errors import InputError, nearest

NORMALIZE = ("auto", "log1p", "none")

MOST_LEVELS = 100_000  # of a column that may play a role

Group = Any  # h5py.File | h5py.Group | zarr.Group; zarr is imported where a path is a folder
Node = Any  # a group or an array of either


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """An h5ad file or a zarr folder, and the roles of its obs columns. A trial's key holds the content, not ``path``."""

    path: str
    name: str = ""  # shown in tables; the file's stem unless given
    perturbation: str = "condition"  # obs column with the label of what was done to the cell
    control: str = "control"  # the label of unperturbed cells
    covariates: tuple[str, ...] = ("cell_type",)  # obs columns whose values together are the context
    delimiter: str | None = "+"  # joins single perturbations to a combination; None: labels are never split
    layer: str | None = None  # a named layer instead of X
    normalize: str = "auto"  # auto | log1p | none

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZE:
            raise InputError(f"normalize={self.normalize!r}: {nearest(self.normalize, NORMALIZE)}")
        # A list does not hash, and a string would be taken letter by letter.
        covariates = (self.covariates,) if isinstance(self.covariates, str) else tuple(self.covariates)
        object.__setattr__(self, "covariates", covariates)
        if not self.covariates:
            raise InputError("a dataset needs at least one covariate column; a constant column will do")
        if not self.name:
            object.__setattr__(self, "name", Path(self.path).stem)

    def conditions(self) -> "Conditions":
        """Read ``obs`` and ``var``, never ``X``. Raises InputError where a role cannot be filled."""
        with open_screen(self.path) as file:
            return _read_conditions(self, file)

    def matrix(self, file: Group) -> Node:
        """X or the named layer of an open file."""
        if self.layer is None:
            if "X" not in file:
                raise InputError(f"{self.path}: there is no X; name a layer with --layer, {nearest('', _layers(file))}")
            return file["X"]
        if self.layer not in _layers(file):
            raise InputError(f"{self.path}: no layer {self.layer!r}: {nearest(self.layer, _layers(file))}")
        return file["layers"][self.layer]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The distinct (context, perturbation) pairs of a screen in canonical order, and each cell's code.

    The order (contexts by value, then perturbations by label) does not depend on the order of rows or categories.
    """

    covariates: tuple[str, ...]
    contexts: tuple[tuple[str, ...], ...]  # one value a covariate each, sorted
    context: np.ndarray  # (conditions,) int64, codes into contexts
    perturbation: np.ndarray  # (conditions,) str; the control label for control conditions
    control: str
    singles: tuple[tuple[str, ...], ...]  # (conditions,) the single perturbations of each; () for control
    cell_condition: np.ndarray  # (cells,) int32
    cell_names: np.ndarray = field(repr=False)  # (cells,) str
    genes: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.perturbation)

    @cached_property
    def is_control(self) -> np.ndarray:
        """(conditions,) bool."""
        return np.array([not singles for singles in self.singles], dtype=bool)

    @cached_property
    def cells(self) -> np.ndarray:
        """(conditions,) int64, the number of cells of each."""
        return np.bincount(self.cell_condition, minlength=len(self)).astype(np.int64)

    @cached_property
    def perturbations(self) -> tuple[str, ...]:
        """The distinct labels without the control, sorted."""
        return tuple(sorted(set(self.perturbation[~self.is_control].tolist())))

    def context_name(self, code: int) -> str:
        """A context for display: its values joined. Never parsed back."""
        return " / ".join(self.contexts[code])

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], str]]:
        return ((self.contexts[c], p) for c, p in zip(self.context, self.perturbation.tolist(), strict=True))


@contextmanager
def open_screen(path: str) -> Iterator[Group]:
    """An h5ad file or an AnnData zarr folder open for reading, or an InputError that says why it cannot be."""
    with _open_zarr(path) if Path(path).is_dir() else open_h5ad(path) as file:
        yield file


@contextmanager
def _open_zarr(path: str) -> Iterator[Group]:
    import zarr

    try:
        group = zarr.open_group(path, mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: this folder is neither a zarr store nor an h5ad file ({type(error).__name__}); "
            "write one with AnnData.write_zarr or write_h5ad"
        ) from None
    if "obs" not in group or "var" not in group:
        raise InputError(f"{path}: this zarr store is not an AnnData: it has no obs and var; it has {', '.join(group)}")
    yield group


@contextmanager
def open_h5ad(path: str) -> Iterator[h5py.File]:
    """An h5ad file open for reading, or an InputError that says why it cannot be."""
    place = Path(path)
    if not place.exists():
        beside = [p.name for p in place.parent.glob("*.h5ad")] if place.parent.is_dir() else []
        raise InputError(f"{path}: there is no such file" + (f"; {nearest(place.name, beside)}" if beside else ""))
    if not place.is_file() or not h5py.is_hdf5(place):
        raise InputError(f"{path}: this is not an h5ad file (HDF5); write one with AnnData.write_h5ad")
    try:
        opened = h5py.File(place, "r")
    except OSError as error:
        raise InputError(f"{path}: this file is cut off or damaged, or cannot be read ({error})") from None
    with opened as file:
        if "obs" not in file or "var" not in file:
            raise InputError(f"{path}: this HDF5 file is not an h5ad: it has no obs and var; it has {', '.join(file)}")
        yield file


def is_array(node: Node) -> bool:
    """Whether a node of a file is an array, and not a group of them."""
    return hasattr(node, "dtype")


def _layers(file: Group) -> list[str]:
    return list(file["layers"]) if "layers" in file else []


def _names(frame: Node) -> np.ndarray:
    from anndata.io import read_elem

    if is_array(frame):  # a table of the oldest h5ad files
        return np.asarray(read_elem(frame).index.astype(str), dtype=object)
    return np.asarray(pd.Index(read_elem(frame[frame.attrs["_index"]])).astype(str), dtype=object)


def _columns(frame: Node) -> list[str]:
    if is_array(frame):
        return list(frame.dtype.names)
    return [str(name) for name in frame.attrs["column-order"]]


def _column(spec: DatasetSpec, frame: Node, column: str) -> pd.Series:
    """One obs column as strings with missing values kept."""
    from anndata.io import read_elem

    if column not in _columns(frame):
        there = ", ".join(_columns(frame))
        guess = nearest(column, _columns(frame))
        guess = f"; {guess}" if guess.startswith("did") else ""
        raise InputError(f"{spec.path}: obs has no column {column!r}; it has {there}{guess}")
    whole = is_array(frame) or frame.attrs.get("encoding-version") == "0.1.0"
    values = read_elem(frame)[column] if whole else read_elem(frame[column])
    values = pd.Series(values).astype(object)
    missing = values.isna().to_numpy()
    if missing.any():
        first = _names(frame)[np.flatnonzero(missing)[0]]
        raise InputError(
            f"{spec.path}: obs[{column!r}] is missing in {missing.sum()} cells (the first is {first}); "
            "drop them or give them a value"
        )
    return values.astype(str)


def obs_columns(spec: DatasetSpec, file: Group, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of obs as text. Raises InputError for one that is not there or has gaps."""
    return pd.DataFrame({column: _column(spec, file["obs"], column).to_numpy() for column in columns})


def obs_table(spec: DatasetSpec, file: Group) -> "pyarrow.Table":  # noqa: F821  # imported where it is needed
    """The columns of obs that may play a role, as text: the spec's, and those whose values stand for groups of cells."""
    import pyarrow as pa
    from anndata.io import read_elem

    frame = file["obs"]
    whole = is_array(frame) or frame.attrs.get("encoding-version") == "0.1.0"
    table = read_elem(frame) if whole else None
    wanted, found = {*spec.covariates, spec.perturbation}, {}
    for column in _columns(frame):
        try:
            values = pd.Series(read_elem(frame[column]) if table is None else table[column])
        except (KeyError, TypeError, ValueError):  # of a kind that anndata does not know, and no role of a screen
            continue
        code, levels = pd.factorize(values)
        if column in wanted or len(levels) <= min(MOST_LEVELS, len(code) // 2):
            text = pd.Series(levels).astype(object).astype(str).tolist()
            code = pa.array(code.astype(np.int32), mask=code < 0)
            found[column] = pa.DictionaryArray.from_arrays(code, pa.array(text, type=pa.string()))
    return pa.table(found)


def target_sum(file: Group) -> float | None:
    """Counts to which the cells of a log-normalised file were scaled, where its ``uns["target_sum"]`` says so."""
    found = file.get("uns/target_sum")
    if not is_array(found) or found.shape != () or found.dtype.kind not in "iuf":
        return None
    return float(found[()])


def var_names(file: Group) -> np.ndarray:
    """Gene names, (genes,) str."""
    return _names(file["var"])


def split_label(label: str, *, control: str, delimiter: str | None) -> tuple[str, ...]:
    """The single perturbations of a label, sorted, () for control.

    Compared with the control label first, since that label may hold the delimiter (OP3's DMSO does).
    """
    if label == control:
        return ()
    parts = label.split(delimiter) if delimiter else [label]
    return tuple(sorted({part.strip() for part in parts} - {control, ""}))


def _read_conditions(spec: DatasetSpec, file: Group) -> Conditions:
    obs = file["obs"]
    labels = _column(spec, obs, spec.perturbation)
    levels = [_column(spec, obs, column) for column in spec.covariates]
    genes = var_names(file)
    shape = matrix_shape(spec.matrix(file))
    if shape != (len(labels), len(genes)):
        raise InputError(f"{spec.path}: the matrix is {shape}, but obs has {len(labels)} rows and var {len(genes)}")
    return conditions_of(spec, labels, levels, cell_names=_names(obs), genes=genes)


def conditions_of(
    spec: DatasetSpec, labels: pd.Series, levels: Sequence[pd.Series], *, cell_names: np.ndarray, genes: np.ndarray
) -> Conditions:
    """The conditions of cells from their labels and covariates as text. Raises InputError as ``DatasetSpec.conditions``."""
    if len(set(genes)) != len(genes):
        twice = pd.Index(genes)[pd.Index(genes).duplicated()][0]
        raise InputError(f"{spec.path}: gene {twice!r} occurs twice in var; use AnnData.var_names_make_unique")
    if spec.control not in set(labels):
        raise InputError(
            f"{spec.path}: no cell has obs[{spec.perturbation!r}] == {spec.control!r} (the control); "
            f"{nearest(spec.control, set(labels))}"
        )

    names = {label: split_label(label, control=spec.control, delimiter=spec.delimiter) for label in set(labels)}
    for label, singles in names.items():
        if not singles and label != spec.control and spec.control not in label:
            first = cell_names[np.flatnonzero(labels.to_numpy() == label)[0]]
            raise InputError(
                f"{spec.path}: obs[{spec.perturbation!r}] is {label!r} in {(labels == label).sum()} cells (the first is "
                f"{first}), which names no perturbation; drop them or label them"
            )
    joiner = spec.delimiter or "+"
    canonical = {label: joiner.join(singles) if singles else spec.control for label, singles in names.items()}
    singles_of = {canonical[label]: singles for label, singles in names.items()}
    frame = pd.DataFrame({f"c{i}": level.to_numpy() for i, level in enumerate(levels)})
    frame["label"] = labels.map(canonical).to_numpy()
    keys = [*frame.columns]
    found = frame.drop_duplicates().sort_values(keys, kind="stable").reset_index(drop=True)
    contexts = tuple(sorted({tuple(row) for row in found[keys[:-1]].itertuples(index=False)}))
    code = {context: i for i, context in enumerate(contexts)}
    found["code"] = np.arange(len(found), dtype=np.int32)
    cell_condition = frame.merge(found, on=keys, how="left", sort=False)["code"].to_numpy(np.int32)
    conditions = Conditions(
        covariates=spec.covariates,
        contexts=contexts,
        context=np.array([code[tuple(row)] for row in found[keys[:-1]].itertuples(index=False)], dtype=np.int64),
        perturbation=found["label"].to_numpy(dtype=object).astype(str),
        control=spec.control,
        singles=tuple(singles_of[label] for label in found["label"]),
        cell_condition=cell_condition,
        cell_names=cell_names,
        genes=tuple(genes.tolist()),
    )
    with_control = set(conditions.context[conditions.is_control].tolist())
    bare = [conditions.context_name(c) for c in range(len(contexts)) if c not in with_control]
    if bare:
        raise InputError(
            f"{spec.path}: {'/'.join(spec.covariates)} = {', '.join(bare[:10])} has no control cells "
            f"(obs[{spec.perturbation!r}] == {spec.control!r}); every context needs some: drop it or choose other covariates"
        )
    if conditions.is_control.all():
        raise InputError(
            f"{spec.path}: every cell of obs[{spec.perturbation!r}] is {spec.control!r}: nothing to predict"
        )
    return conditions


def matrix_shape(matrix: Node) -> tuple[int, int]:
    """(cells, genes), from the attributes alone."""
    shape = matrix.shape if is_array(matrix) else matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
    return int(shape[0]), int(shape[1])


def fingerprint(conditions: Conditions, matrix_digest: str) -> str:
    """The content of a dataset as a trial sees it: matrix, genes, and each cell's name, context and perturbation."""
    hasher = hashlib.blake2b(matrix_digest.encode(), digest_size=12)
    table = [conditions.covariates, list(conditions), conditions.control, conditions.singles, conditions.genes]
    hasher.update(json.dumps(table).encode())
    hasher.update(conditions.cell_condition.tobytes())
    hasher.update("\n".join(conditions.cell_names.tolist()).encode())
    return hasher.hexdigest()
