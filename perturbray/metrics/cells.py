"""Cells: observed and predicted cells of one evaluation, matched by condition. Conventions and cell metrics start here.

A pass over cells never densifies X whole: means are sparse group sums, all else takes one condition at a time.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbray.errors import InputError, nearest
from perturbray.prediction import Pseudobulk
from perturbray.randomness import derive

BLOCK_BYTES = 32 << 20  # of dense float64 that a pass over cells holds at once
LARGEST = 15.0  # log1p of anything real is smaller
SHOWN = 20  # conditions listed in an error

Matrix = np.ndarray | sparse.csr_matrix


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Cells of one side with their groups: conditions are 0 .. K−1, the control of context c is K + c, others −1."""

    X: Matrix  # (cells, genes) log1p of normalised counts, CSR or dense
    group: np.ndarray  # (cells,) int64
    groups: int  # K + number of contexts
    file: str = "cells"

    def count(self) -> np.ndarray:
        """Cells of each group, (groups,) int64."""
        return np.bincount(self.group[self.group >= 0], minlength=self.groups)

    def rows(self, group: int) -> np.ndarray:
        return self._order[self._start[group] : self._start[group + 1]]

    def of(self, group: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Expression of one group, dense float64 (cells, genes); of its cells numbered ``rows`` where given."""
        chosen = self.rows(group) if rows is None else self.rows(group)[rows]
        return dense(self.X[chosen])

    def parts(self, groups: Sequence[int]) -> "Parts":
        return Parts(self, tuple(groups))

    def __post_init__(self) -> None:
        order = np.argsort(self.group, kind="stable")
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_start", np.searchsorted(self.group[order], np.arange(self.groups + 1)))


@dataclass(frozen=True)
class Parts(Sequence):
    """Expression of some groups, each cut out of all cells only when it is asked for, in the form of X."""

    cells: Cells
    groups: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int | slice) -> "Matrix | Parts":
        chosen = self.groups[index]
        return Parts(self.cells, chosen) if isinstance(index, slice) else self.cells.X[self.cells.rows(chosen)]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Observed and predicted cells over the same genes, conditions and contexts."""

    genes: tuple[str, ...]
    perturbation_key: str
    covariates: tuple[str, ...]
    contexts: tuple[tuple[str, ...], ...]
    context: np.ndarray  # (K,) int64, code into contexts
    perturbation: np.ndarray  # (K,) str
    observed: Cells
    predicted: Cells
    missing: np.ndarray  # (K,) bool: no predicted cells
    own_control: np.ndarray  # (contexts,) bool: the prediction brings control cells

    def __len__(self) -> int:
        return len(self.perturbation)

    def control(self, context: int) -> int:
        """The group number of a context's control cells."""
        return len(self) + context

    def label(self, group: int) -> tuple[str, ...]:
        """Covariate values and perturbation of a group; the perturbation of a control is empty."""
        if group >= len(self):
            return *self.contexts[group - len(self)], ""
        return *self.contexts[self.context[group]], str(self.perturbation[group])

    def by_context(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each context with the conditions in it."""
        for code in range(len(self.contexts)):
            rows = np.flatnonzero(self.context == code)
            if len(rows):
                yield code, rows


def dense(X: Matrix) -> np.ndarray:
    return np.asarray(X.toarray() if sparse.issparse(X) else X, dtype=np.float64)


def block_rows(X: Matrix) -> int:
    """Rows of a matrix that are held at once, as float64."""
    return max(1, BLOCK_BYTES // (8 * max(1, X.shape[1])))


def group_sums(
    X: Matrix, group: np.ndarray, groups: int, transform: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Sums over the cells of each group, (groups, genes) float64; cells of group −1 are left out.

    ``transform`` acts on the stored values and must keep 0 at 0. Rows are taken in blocks, in float64.
    """
    sums = np.zeros((groups, X.shape[1]))
    step = block_rows(X)
    for start in range(0, X.shape[0], step):
        code = group[start : start + step]
        kept = np.flatnonzero(code >= 0)
        block = X[start : start + step].astype(np.float64)
        if transform is not None:
            if sparse.issparse(block):
                block.data = transform(block.data)
            else:
                block = transform(block)
        member = sparse.csr_matrix((np.ones(len(kept)), (code[kept], kept)), shape=(groups, len(code)))
        added = member @ block
        sums += added.toarray() if sparse.issparse(added) else added
    return sums


def pseudobulk(cells: Cells, *, linear: bool = False) -> Pseudobulk:
    """Means of all groups; groups without cells are NaN. ``linear`` adds the means of expm1."""
    count = cells.count()
    size = np.where(count > 0, count, np.nan)[:, None]
    mean = group_sums(cells.X, cells.group, cells.groups) / size
    expm1 = group_sums(cells.X, cells.group, cells.groups, np.expm1) / size if linear else None
    return Pseudobulk(mean=mean, cells=count, linear=expm1)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased two-pass variance over rows; exactly 0 for a column of equal values, NaN for fewer than 2 rows.

    One-pass formulas leave rounding noise where a variance is 0, which gives t statistics of 1e8.
    """
    mean = x.mean(axis=0)
    if len(x) < 2:
        return mean, np.full(x.shape[1], np.nan)
    variance = ((x - mean) ** 2).sum(axis=0) / (len(x) - 1)
    constant = x.max(axis=0) == x.min(axis=0)
    return np.where(constant, x[0], mean), np.where(constant, 0.0, variance)


@lru_cache(maxsize=8)
def _gene_codes(genes: tuple[str, ...]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(gene.encode(), digest_size=8).digest() for gene in genes)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def signatures(X: Matrix, genes: tuple[str, ...]) -> np.ndarray:
    """A number for the content of each cell, (cells,) uint64: the same for CSR and dense and in any order of genes."""
    codes = _gene_codes(tuple(genes))
    if not sparse.issparse(X):
        X = sparse.csr_matrix(X)
    whole = np.rint(X.data.astype(np.float64) * 2**20).astype(np.int64).astype(np.uint64)
    return sparse.csr_matrix((whole, X.indices, X.indptr), shape=X.shape) @ codes  # modulo 2^64, so exact in any order


def shuffled(signature: np.ndarray, *scope: str | int) -> np.ndarray:
    """A random order of cells that follows from their content and ``scope``, not from where they stand in a file.

    Equal cells count as different: the second of two has a place of its own.
    """
    order = np.argsort(signature, kind="stable")
    ascending = signature[order]
    first = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1])) if len(order) else order
    occurrence = np.empty(len(order), dtype=np.uint64)
    occurrence[order] = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    key = _mix(signature ^ _mix(occurrence + np.uint64(derive(0, *scope))))
    return np.argsort(key, kind="stable")


def _mix(key: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of the key moves every bit of the result."""
    key = key + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def canonical(name: str, control: str, delimiter: str = "+") -> str:
    """One name for a set of perturbations: parts sorted, the control token inside a combination dropped."""
    parts = sorted({part.strip() for part in str(name).split(delimiter)} - {control, ""})
    return delimiter.join(parts) if parts else control


def compare(
    observed: Any,
    predicted: Any,
    *,
    perturbation_key: str,
    control: str,
    covariate_keys: Sequence[str] = (),
    delimiter: str = "+",
    failed: str = "error",
    names: tuple[str, str] = ("observed", "predicted"),
) -> Comparison:
    """Match two AnnData-like inputs (``X``, ``obs``, ``var_names``) by gene names and conditions.

    Genes in another order are aligned; another set of genes, a context without observed control cells, or expression
    that is not log1p raise ``InputError``. So do conditions without predicted cells, unless ``failed`` is ``"worst"``
    or ``"drop"``, and predicted NaN or infinity, unless it is ``"worst"``. Predicted conditions that were not observed
    are left out.
    """
    genes, order = _align(observed, predicted, names)
    matrices = [check(observed.X, names[0]), check(predicted.X, names[1], predicted=True)]
    if order is not None:
        matrices[1] = matrices[1][:, order]
    spelling: dict[str, str] = {}  # canonical name -> as the observed file writes it
    ours, theirs = (
        _labels(table.obs, [*covariate_keys, perturbation_key], control, delimiter, name, spelling)
        for table, name in zip((observed, predicted), names, strict=True)
    )
    conditions = sorted(label for label in ours[1] if label[-1] != control)
    if not conditions:
        raise InputError(f"{names[0]}: no condition to score; every cell is control ({control!r})")
    contexts = sorted({label[:-1] for label in conditions})
    if without := [context for context in contexts if (*context, control) not in ours[1]]:
        raise InputError(f"{names[0]}: no control cells ({control!r}) in {_show(without)}")
    codes = {label: code for code, label in enumerate([*conditions, *((*context, control) for context in contexts)])}
    sides = [
        Cells(X=X, group=np.array([codes.get(label, -1) for label in found])[code], groups=len(codes), file=name)
        for X, (code, found), name in zip(matrices, (ours, theirs), names, strict=True)
    ]
    count = sides[1].count()
    missing = count[: len(conditions)] == 0
    if missing.any() and failed == "error":
        lost = [label for label, is_lost in zip(conditions, missing, strict=True) if is_lost]
        raise InputError(f"{names[1]}: no cells of {len(lost)} observed conditions: {_show(lost)}")
    broken = [list(codes)[code] for code in _broken_groups(sides[1])]
    if broken and (failed != "worst" or any(label[-1] == control for label in broken)):
        raise InputError(f"{names[1]}: X holds NaN or infinity in {len(broken)} conditions: {_show(broken)}")
    return Comparison(
        genes=genes,
        perturbation_key=perturbation_key,
        covariates=tuple(covariate_keys),
        contexts=tuple(contexts),
        context=np.array([contexts.index(label[:-1]) for label in conditions]),
        perturbation=np.array([label[-1] for label in conditions], dtype=str),
        observed=sides[0],
        predicted=sides[1],
        missing=missing,
        own_control=count[len(conditions) :] > 0,
    )


def _broken_groups(cells: Cells) -> np.ndarray:
    """Groups with a cell that holds NaN or infinity."""
    step, rows = block_rows(cells.X), [np.empty(0, dtype=int)]
    for start in range(0, cells.X.shape[0], step):
        block = cells.X[start : start + step]
        if sparse.issparse(block):
            bad = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))[~np.isfinite(block.data)]
        else:
            bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        rows.append(start + bad)
    groups = np.unique(cells.group[np.concatenate(rows)])
    return groups[groups >= 0]


def check(X: Any, file: str, *, predicted: bool = False) -> Matrix:
    """X as CSR or dense; an ``InputError`` where it is anything but log1p of normalised counts.

    A model may predict NaN, which is a failed condition, or slightly negative values; observed ones are neither.
    """
    if sparse.issparse(X):
        X = X.tocsr()
        if not X.has_canonical_format:
            X = X.copy()  # not the caller's
            X.sum_duplicates()
        values = X.data
    else:
        X = values = np.asarray(X)
    if X.shape[0] == 0 or X.shape[1] == 0:
        raise InputError(f"{file}: X is empty ({X.shape[0]} cells x {X.shape[1]} genes)")
    lowest, highest = (values.min(), values.max()) if values.size else (0.0, 0.0)
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        if not predicted:
            raise InputError(f"{file}: X holds NaN or infinity; it must be log1p of normalised counts")
        finite = values[np.isfinite(values)]
        lowest, highest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if lowest < 0 and not predicted:
        raise InputError(f"{file}: X holds negative values ({lowest:g}); it must be log1p of normalised counts")
    if highest >= LARGEST:
        raise InputError(f"{file}: X reaches {highest:g}, so it is not log1p of normalised counts; pass --normalize")
    if highest > 0 and looks_like_counts(X):
        raise InputError(f"{file}: X holds integers only, so it is raw counts, not their log1p; pass --normalize")
    return X


def looks_like_counts(X: Matrix) -> bool:
    """Whether every finite value is an integer, as in raw counts."""
    values = X.data if sparse.issparse(X) else X.reshape(-1)
    for start in range(0, values.size, 2**16):  # the first block tells in nearly all files
        block = values[start : start + 2**16]
        if (np.floor(block) != block)[np.isfinite(block)].any():
            return False
    return values.size > 0


def _align(observed: Any, predicted: Any, names: tuple[str, str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    ours, theirs = (pd.Index(table.var_names).astype(str) for table in (observed, predicted))
    for index, name in zip((ours, theirs), names, strict=True):
        if not index.is_unique:
            twice = list(index[index.duplicated()].unique()[:10])
            raise InputError(f"{name}: gene names occur twice: {', '.join(twice)}")
    if ours.equals(theirs):
        return tuple(ours), None
    position = theirs.get_indexer(ours)
    if (position < 0).any() or len(ours) != len(theirs):
        only = [list(a.difference(b)[:10]) for a, b in ((ours, theirs), (theirs, ours))]
        raise InputError(
            f"genes differ: only in {names[0]}: {', '.join(only[0]) or 'none'}; "
            f"only in {names[1]}: {', '.join(only[1]) or 'none'}"
        )
    return tuple(ours), position


def _labels(
    obs: pd.DataFrame, keys: Sequence[str], control: str, delimiter: str, file: str, spelling: dict[str, str]
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Each cell's code into a list of (covariate values, perturbation), and that list.

    ``spelling`` maps canonical names of perturbations to what is written, and learns those that it does not know.
    """
    for key in keys:
        if key not in obs.columns:
            raise InputError(f"{file}: obs has no column {key!r}; {nearest(key, obs.columns)}")
        if obs[key].isna().any():
            raise InputError(f"{file}: obs[{key!r}] is missing for {int(obs[key].isna().sum())} cells")
    factors = [pd.factorize(obs[key].astype(str), sort=True) for key in keys]
    names = {name: canonical(name, control, delimiter) for name in factors[-1][1]}
    written = [control if own == control else spelling.setdefault(own, name) for name, own in names.items()]
    combined = np.zeros(len(obs), dtype=np.int64)
    for code, levels in factors:
        combined = combined * len(levels) + code
    first, code = np.unique(combined, return_index=True, return_inverse=True)[1:]
    levels = [*(list(found) for _, found in factors[:-1]), written]
    labels = [tuple(level[own[row]] for level, (own, _) in zip(levels, factors, strict=True)) for row in first]
    unique = {label: position for position, label in enumerate(dict.fromkeys(labels))}  # two spellings are one
    return np.array([unique[label] for label in labels])[code], list(unique)


def _show(labels: Sequence[tuple[str, ...]]) -> str:
    shown = "; ".join(", ".join(label) or "all cells" for label in labels[:SHOWN])
    return shown + (f" ... ({len(labels)} in all)" if len(labels) > SHOWN else "")
