"""Truth: what is observed of the evaluated conditions, computed once for all trials that are judged on the same cells."""

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
from scipy import sparse

from perturbray.data.batches import Cells
from perturbray.data.dataset import Conditions
from perturbray.data.splits import SUBSETS, TEST, Split
from perturbray.errors import InputError
from perturbray.prediction import Pseudobulk, Truth
from perturbray.randomness import generator

MAX_CONTROLS = 1000  # control cells of a context from which its conditions are predicted (PerturBench's number)
CELLS_SEED = 0  # of the cells of a condition that metrics of distributions see, observed and predicted
CHUNK = 4096  # cells whose expm1 is held at once
HALVINGS = 5  # times that cells are cut in two halves; the first serves the split control source


def digest(conditions: Conditions, split: Split, *, subset: int = TEST) -> str:
    """The identity of a truth: which cells it rests on."""
    kept = np.flatnonzero(split.cell == subset)
    return hashlib.blake2b(kept.tobytes() + conditions.cell_condition[kept].tobytes(), digest_size=8).hexdigest()


def control_rows(conditions: Conditions, split: Split, context: int, *, subset: int = TEST) -> np.ndarray:
    """At most MAX_CONTROLS of a context's control cells of a subset, by cell name: the same for every trial."""
    rows = split.cells(subset, conditions=conditions, controls=True)
    rows = rows[conditions.context[conditions.cell_condition[rows]] == context]
    rows = rows[np.argsort(conditions.cell_names[rows], kind="stable")]
    if len(rows) > MAX_CONTROLS:
        rng = generator(0, "prediction", SUBSETS[subset], *conditions.contexts[context])
        rows = rows[np.sort(rng.choice(len(rows), MAX_CONTROLS, replace=False))]
    return rows


def observe(
    cells: Cells,
    conditions: Conditions,
    split: Split,
    *,
    subset: int = TEST,
    sample: int = 0,
    linear: bool = False,
    target_sum: float | None = None,
) -> Truth:
    """What is observed of a subset. ``sample``: cells of a condition kept for metrics of distributions; 0 keeps none.

    ``linear``: also means of expm1, for effects that need them. ``target_sum``: counts to which cells were normalised, by
    default the median over the control cells of Σ expm1(X). Raises InputError for a context whose control cells cannot
    be cut in two.
    """
    rows = np.flatnonzero((split.condition == subset) & ~conditions.is_control)
    position = np.full(len(conditions), -1)
    position[rows] = np.arange(len(rows))
    seen = split.cells(subset, conditions=conditions, controls=False)
    seen = seen[np.argsort(conditions.cell_names[seen], kind="stable")]
    seen = seen[position[conditions.cell_condition[seen]] >= 0]
    code = position[conditions.cell_condition[seen]]
    controls = [control_rows(conditions, split, context, subset=subset) for context in range(len(conditions.contexts))]
    used = np.unique(conditions.context[rows])
    for context in used:
        if len(controls[context]) < 2:
            raise InputError(
                f"context {conditions.context_name(context)} has {len(controls[context])} {SUBSETS[subset]} control cell(s), "
                "and scores need two that share none; raise split.min_controls"
            )
    condition_labels = [
        (*conditions.contexts[conditions.context[row]], str(conditions.perturbation[row])) for row in rows
    ]
    half = np.stack([_cut(code, condition_labels, number) for number in range(HALVINGS)])
    control_code = np.repeat(np.arange(len(controls)), [len(part) for part in controls])
    flat = np.concatenate(controls)
    labels = [("control", *context) for context in conditions.contexts]
    control_half = np.stack([_cut(control_code, labels, number) for number in range(HALVINGS)])
    means, counts, variance = _moments(cells, seen, code, half, groups=len(rows))
    control_means, _, control_variance = _moments(cells, flat, control_code, control_half, groups=len(controls))
    starts = np.cumsum([0] + [len(part) for part in controls])
    sampled, halves = _sampled(cells, seen, code, condition_labels, half, sample) if sample else ((), ())
    return Truth(
        genes=conditions.genes,
        covariates=conditions.covariates,
        contexts=conditions.contexts,
        rows=rows,
        context=conditions.context[rows],
        perturbation=conditions.perturbation[rows],
        observed=_bulk(cells, seen, code, groups=len(rows), linear=linear),
        control=_bulk(cells, flat, control_code, groups=len(controls), linear=True),
        observed_halves=means,
        observed_variance=variance,
        half_cells=counts,
        control_halves=control_means,
        control_variance=control_variance,
        control_rows=tuple(controls),
        control_weights=tuple(_weights(control_half[:, start:stop]) for start, stop in itertools.pairwise(starts)),
        target_sum=target_sum or _target_sum(cells, flat),
        linear_halves=_linear_halves(cells, seen, code, half, groups=len(rows)) if linear else None,
        control_linear_halves=(
            _linear_halves(cells, flat, control_code, control_half, groups=len(controls)) if linear else None
        ),
        observed_sample=sampled,
        sample_half=halves,
        control_sample=_sampled(cells, flat, control_code, labels, control_half, sample)[0] if sample else (),
    )


def _cut(code: np.ndarray, labels: list[tuple[str, ...]], number: int) -> np.ndarray:
    """Each cell's half, 0 or 1, of its group; cells come by name, so the draw does not know the order of the file."""
    half = np.zeros(len(code), dtype=np.int8)
    order = np.argsort(code, kind="stable")
    starts = np.searchsorted(code[order], np.arange(len(labels) + 1))
    for group, label in enumerate(labels):
        members = order[starts[group] : starts[group + 1]]
        shuffled = generator(number, "half", *label).permutation(members)
        half[shuffled[: (len(members) + number % 2) // 2]] = 1  # an odd cell falls to either side in turn
    return half


def _moments(
    cells: Cells, rows: np.ndarray, code: np.ndarray, half: np.ndarray, *, groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of both halves of every halving, their numbers of cells, and the variance of the second half."""
    halvings = len(half)
    means, variance = np.empty((halvings, 2, groups, cells.genes)), np.empty((halvings, groups, cells.genes))
    counts = np.empty((halvings, 2, groups), dtype=np.int64)
    total = cells.group_sums(rows, code, groups=groups)
    every = np.bincount(code, minlength=groups)
    for number in range(halvings):
        second = half[number] == 1
        counts[number, 1] = np.bincount(code[second], minlength=groups)
        counts[number, 0] = every - counts[number, 1]
        part = cells.group_sums(rows[second], code[second], groups=groups)
        squares = cells.group_sums(rows[second], code[second], groups=groups, power=2)
        with np.errstate(invalid="ignore", divide="ignore"):
            means[number] = np.stack([total - part, part]) / counts[number][:, :, None]
            n = counts[number, 1][:, None]
            variance[number] = np.maximum(squares - part**2 / n, 0) / (n - 1)
    return means, counts, variance


def _bulk(cells: Cells, rows: np.ndarray, code: np.ndarray, *, groups: int, linear: bool) -> Pseudobulk:
    """Means and unbiased variances of groups, and the means of expm1 where asked; NaN variance for fewer than 2 cells."""
    count = np.bincount(code, minlength=groups)
    n = np.maximum(count, 1)[:, None]
    mean = cells.group_sums(rows, code, groups=groups) / n
    squares = cells.group_sums(rows, code, groups=groups, power=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.where(n > 1, np.maximum(squares - n * mean**2, 0) / (n - 1), np.nan)
    lin = _linear_sums(cells, rows, code, groups=groups) / n if linear else None
    return Pseudobulk(mean=mean, cells=count, variance=variance, linear=lin)


def _linear_sums(cells: Cells, rows: np.ndarray, code: np.ndarray, *, groups: int) -> np.ndarray:
    """(groups, genes) float64 sums of expm1 over rows by code, a bounded number of rows at a time."""
    sums = np.zeros((groups, cells.genes))
    for chunk, part in _expm1(cells, rows):
        member = sparse.csr_matrix(
            (np.ones(len(chunk)), (code[chunk], np.arange(len(chunk)))), shape=(groups, len(chunk))
        )
        sums += (member @ part).toarray()
    return sums


def _linear_halves(cells: Cells, rows: np.ndarray, code: np.ndarray, half: np.ndarray, *, groups: int) -> np.ndarray:
    """Means of expm1 of both halves of every halving, (halvings, 2, groups, genes)."""
    total, every = _linear_sums(cells, rows, code, groups=groups), np.bincount(code, minlength=groups)
    means = np.empty((len(half), 2, groups, cells.genes))
    for number in range(len(half)):
        second = half[number] == 1
        part, count = _linear_sums(cells, rows[second], code[second], groups=groups), np.zeros((2, groups))
        count[1] = np.bincount(code[second], minlength=groups)
        count[0] = every - count[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            means[number] = np.stack([total - part, part]) / count[:, :, None]
    return means


def _target_sum(cells: Cells, rows: np.ndarray) -> float:
    """Counts to which cells were normalised: the median over control cells of Σ expm1(X)."""
    return float(np.median(np.concatenate([np.asarray(part.sum(axis=1)).ravel() for _, part in _expm1(cells, rows)])))


def _expm1(cells: Cells, rows: np.ndarray) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Positions among ``rows`` and expm1 of those cells, CSR float64, a bounded number at a time."""
    for start in range(0, len(rows), CHUNK):
        chunk = np.arange(start, min(start + CHUNK, len(rows)))
        part = cells.select(rows[chunk]).astype(np.float64)
        part.data = np.expm1(part.data)
        yield chunk, part


def _weights(half: np.ndarray) -> np.ndarray:
    """(halvings * 2, cells): a row for each half that averages its cells."""
    member = np.stack([half == 0, half == 1], axis=1).reshape(2 * len(half), half.shape[1]).astype(np.float64)
    return member / np.maximum(member.sum(axis=1, keepdims=True), 1)


def _sampled(
    cells: Cells, rows: np.ndarray, code: np.ndarray, labels: list[tuple[str, ...]], half: np.ndarray, size: int
) -> tuple[tuple[sparse.csr_matrix, ...], tuple[np.ndarray, ...]]:
    """At most ``size`` cells of each group, by name and a fixed seed, and the halves of these cells."""
    found, halves = [], []
    order = np.argsort(code, kind="stable")
    starts = np.searchsorted(code[order], np.arange(len(labels) + 1))
    for group, label in enumerate(labels):
        members = order[starts[group] : starts[group + 1]]
        if len(members) > size:
            rng = generator(CELLS_SEED, "sample", *label)
            members = members[np.sort(rng.choice(len(members), size, replace=False))]
        found.append(cells.select(rows[members]))
        halves.append(half[:, members])
    return tuple(found), tuple(halves)
