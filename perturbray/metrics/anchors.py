"""Anchors: predictions that a model is held against, scored by the same code. A new one returns a ``Prediction``.

The truth itself, its replicate, the mean response, no change, or nothing but noise; and how much there is to predict.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from perturbray.metrics.cell_metrics import drawn
from perturbray.metrics.cells import Cells, Comparison, block_rows, dense, pseudobulk, shuffled, signatures
from perturbray.metrics.expression import FEWEST_CELLS, GATE, LEVEL, benjamini_hochberg, welch
from perturbray.metrics.metric import targeted
from perturbray.prediction import LazyCells, Prediction, Pseudobulk
from perturbray.randomness import generator

SPLITS = 5


def predicting(prediction: Prediction, mean: np.ndarray, linear: np.ndarray | None = None) -> Prediction:
    """The same question with other predicted means, (conditions, genes)."""
    bulk = Pseudobulk(mean=mean, cells=prediction.predicted.cells, linear=linear)
    return replace(prediction, predicted=bulk, cells=None)


def perfect(prediction: Prediction) -> Prediction:
    """The truth itself."""
    cells = prediction.cells and replace(prediction.cells, predicted=prediction.cells.observed)
    return replace(prediction, predicted=prediction.observed, cells=cells)


def no_change(prediction: Prediction) -> Prediction:
    """The observed control of each context."""
    control = prediction.control.rows(prediction.context)
    cells = prediction.cells
    if cells is not None:
        cells = replace(cells, predicted=tuple(cells.control[code] for code in prediction.context))
    return replace(prediction, predicted=control, cells=cells)


def mean_response(prediction: Prediction) -> Prediction:
    """The mean over the training perturbations of each context: the negative baseline.

    Without training means, the unweighted mean over the context's other scored conditions, of other contexts where
    there are none, and the control where there are none at all: never the condition itself.
    """
    context = prediction.context
    if prediction.training_mean is not None:
        known = (prediction.training_mean, prediction.training_linear)
        return predicting(prediction, *(None if part is None else part[context] for part in known))
    others = [_others(prediction, row) for row in range(len(prediction))]
    found = []
    for name in ("mean", "linear"):
        observed, control = getattr(prediction.observed, name), getattr(prediction.control, name)
        if observed is None or control is None:
            found.append(None)
            continue
        rows = [
            observed[there].mean(axis=0) if there.any() else control[context[row]] for row, there in enumerate(others)
        ]
        found.append(np.stack(rows))
    return predicting(prediction, *found)


def _others(prediction: Prediction, row: int) -> np.ndarray:
    """The conditions that the mean response of a condition is taken over, (conditions,) bool."""
    apart = prediction.perturbation != prediction.perturbation[row]
    here = apart & (prediction.context == prediction.context[row])
    return here if here.any() else apart


def shifted(cells: Any, shift: np.ndarray) -> np.ndarray:
    """Cells moved by a profile, (cells, genes) float32, clamped at 0: a mean with the noise of control cells."""
    return np.maximum(dense(cells) + shift, 0).astype(np.float32)


def mean_response_cells(prediction: Prediction) -> Prediction:
    """The cell-level mean response: control cells of the context plus its mean effect, as many as were observed."""
    shift = mean_response(prediction).predicted.mean - prediction.control.mean[prediction.context]
    sample, moved = prediction.cells, []
    for row, code in enumerate(prediction.context):
        size = max(2, sample.observed[row].shape[0])
        cells = drawn(prediction, sample.control[code], size, "mean response", row)
        moved.append(partial(shifted, cells, shift[row]))  # dense, so it is made when it is looked at
    return replace(prediction, cells=replace(sample, predicted=LazyCells(tuple(moved))))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is observed of each condition: what strata are made of, (conditions,) each. Never of a prediction."""

    de_genes: np.ndarray  # int64, -1 where it cannot be tested
    effect: np.ndarray  # float64, unbiased, so that it may be negative


def effect_sizes(
    observed: Pseudobulk,
    control: Pseudobulk,
    *,
    context: np.ndarray,
    perturbation: np.ndarray,
    genes: Sequence[str],
    target_sum: float,
) -> Sizes:
    """Differentially expressed genes and the energy distance with squared distances, of condition against control.

    From means and variances over all cells. Genes: Welch's test, Benjamini-Hochberg q < 0.05 over the genes above the
    gate in control that the condition does not target. Distance: the U statistic 2·(‖m − m₀‖² − Σv/n − Σv₀/n₀).
    """
    count, distance = np.full(len(context), -1), np.full(len(context), np.nan)
    name = np.asarray(genes)
    for row, code in enumerate(context):
        sides = [
            (bulk.mean[at], bulk.variance[at], int(bulk.cells[at])) for bulk, at in ((observed, row), (control, code))
        ]
        if min(n for *_, n in sides) < 2:
            continue
        (m, v, n), (m0, v0, n0) = sides
        distance[row] = 2 * (((m - m0) ** 2).sum() - v.sum() / n - v0.sum() / n0)
        tested = (control.linear[code] > GATE * target_sum) & ~np.isin(name, sorted(targeted([perturbation[row]])))
        if min(n, n0) >= FEWEST_CELLS:
            q = benjamini_hochberg(welch(*((m[tested], v[tested], n) for m, v, n in sides))[1])
            count[row] = int((q < LEVEL).sum())
    return Sizes(de_genes=count, effect=distance)


def additive(prediction: Prediction, singles: Mapping[tuple[int, str], np.ndarray]) -> Prediction:
    """Control plus the sum of single effects, for the combinations whose singles are all known.

    ``singles`` maps (context code, perturbation) to its training effect on means, (genes,).
    """
    parts = [str(name).split("+") for name in prediction.perturbation]
    known = [
        len(names) > 1 and all((code, name) in singles for name in names)
        for code, names in zip(prediction.context, parts, strict=True)
    ]
    rows = np.flatnonzero(known)
    kept = prediction.rows(rows)
    effect = [sum(singles[code, name] for name in parts[row]) for code, row in zip(kept.context, rows, strict=True)]
    mean = kept.control.mean[kept.context] + np.array(effect).reshape(len(rows), -1)
    return predicting(kept, mean) if len(rows) else kept


def contents(cells: Cells, comparison: Comparison) -> np.ndarray:
    """``signatures`` of all cells, (cells,), a block of rows at a time."""
    step = block_rows(cells.X)
    parts = [signatures(cells.X[start : start + step], comparison.genes) for start in range(0, len(cells.group), step)]
    return np.concatenate(parts)


def halve(
    cells: Cells, comparison: Comparison, *, seed: int, split: int, content: np.ndarray | None = None
) -> tuple[Cells, Cells]:
    """Two disjoint random halves of every condition and every control; an odd cell is left out of both.

    ``content``: ``contents`` of the cells, where they are cut more than once.
    """
    content = contents(cells, comparison) if content is None else content
    groups = [np.full(len(cells.group), -1), np.full(len(cells.group), -1)]
    for group in range(cells.groups):
        rows = cells.rows(group)
        order = shuffled(content[rows], seed, "half", split, *comparison.label(group))
        half = len(rows) // 2
        groups[0][rows[order[:half]]] = group
        groups[1][rows[order[half : 2 * half]]] = group
    return tuple(replace(cells, group=group) for group in groups)


def replicates(
    prediction: Prediction, comparison: Comparison, *, seed: int = 0, splits: int = SPLITS
) -> Iterator[Prediction]:
    """Technical duplicates: one half of the observed cells is the truth, the other the prediction, each with its control.

    A half has n/2 cells, so a model that pools many cells can be better than its replicate.
    """
    for split in range(splits):
        truth, other = halve(comparison.observed, comparison, seed=seed, split=split)
        yield between(prediction, pseudobulk(truth), pseudobulk(other))


def between(prediction: Prediction, truth: Pseudobulk, guess: Pseudobulk) -> Prediction:
    inside = np.arange(len(prediction))
    controls = len(prediction) + np.arange(len(prediction.contexts))
    return replace(
        prediction,
        observed=truth.rows(inside),
        observed_control=truth.rows(controls),
        predicted=guess.rows(inside),
        control=guess.rows(controls),
        cells=None,
    )


def interpolate(
    duplicate: Prediction, baseline: Pseudobulk, *, variance: np.ndarray, control_variance: np.ndarray
) -> Prediction:
    """Gene-wise α·duplicate + (1 − α)·baseline with α = 1 − q, q of the duplicate's half against its control.

    What a replicate would be with its noise taken out where there is no effect (Miller, Mejia et al. 2025). Variances
    over cells are unbiased, (conditions, genes) and (contexts, genes); q is 1 for a condition of fewer than two cells.
    """
    q = np.ones(duplicate.predicted.mean.shape)
    for row, code in enumerate(duplicate.context):
        sides = (duplicate.predicted, row, variance[row]), (duplicate.control, code, control_variance[code])
        parts = [(bulk.mean[at], spread, int(bulk.cells[at])) for bulk, at, spread in sides]
        if min(n for *_, n in parts) > 1:
            q[row] = benjamini_hochberg(welch(*parts)[1])
    sides = ((getattr(bulk, name) for bulk in (duplicate.predicted, baseline)) for name in ("mean", "linear"))
    mixed = (None if one is None or other is None else (1 - q) * one + q * other for one, other in sides)
    return predicting(duplicate, *mixed)


def null(prediction: Prediction, comparison: Comparison, *, seed: int = 0) -> Prediction:
    """Pseudo-perturbations without any effect: the level of every metric where there is nothing to predict.

    A context's control cells are cut into thirds. Each condition's truth is a random half (or as many cells as the
    condition has) of the first, its prediction one of the second, and the last is the control. Truth and prediction are
    not drawn from one pool, because what one takes from it the other lacks.
    """
    genes = len(prediction.genes)
    sides = np.full((2, len(prediction), genes), np.nan)
    control, left = np.full((len(prediction.contexts), genes), np.nan), np.zeros(len(prediction.contexts), dtype=int)
    count = np.zeros(len(prediction), dtype=int)
    for code, rows in comparison.by_context():
        group = comparison.control(code)
        cells = comparison.observed.of(group)
        signature = signatures(comparison.observed.X[comparison.observed.rows(group)], comparison.genes)
        order = shuffled(signature, seed, "null", *comparison.label(group))
        *pools, rest = (cells[part] for part in np.array_split(order, 3))
        control[code], left[code] = rest.mean(axis=0), len(rest)
        for row in rows:
            rng = generator(seed, "null", *comparison.label(row))
            count[row] = min(min(map(len, pools)) // 2, int(prediction.observed.cells[row]))
            for side, pool in zip(sides, pools, strict=True):
                if count[row]:
                    side[row] = pool[rng.permutation(len(pool))[: count[row]]].mean(axis=0)
    truth, guess = (Pseudobulk(mean=side, cells=count) for side in sides)
    control = Pseudobulk(mean=control, cells=left)
    return replace(prediction, observed=truth, predicted=guess, control=control, observed_control=None, cells=None)
