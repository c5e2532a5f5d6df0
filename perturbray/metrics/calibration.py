"""Calibration: what a value means on these data. Anchors, scaled scores, dynamic range, strata and intervals.

An anchor is a prediction that is scored by the same code as a model: the truth's replicate, the mean response, no
change, or nothing but noise. A new one is a function that returns a ``Prediction``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from perturbray.metrics.cell_metrics import drawn
from perturbray.metrics.cells import (
    Cells,
    Comparison,
    block_rows,
    dense,
    group_sums,
    pseudobulk,
    shuffled,
    signatures,
)
from perturbray.metrics.expression import FEWEST_CELLS, GATE, LEVEL, benjamini_hochberg, welch
from perturbray.metrics.metric import Metric, evaluated_by, targeted
from perturbray.prediction import LazyCells, Prediction, Pseudobulk
from perturbray.randomness import generator

SPLITS = 5
RESAMPLES = 2000
FEWEST = 10  # conditions that an interval or a mean dynamic range rests on
WEAK_RANGE, WEAK_BETTER = 0.2, 0.8  # a metric below either says little on these data


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
        yield _between(prediction, pseudobulk(truth), pseudobulk(other))


def _between(prediction: Prediction, truth: Pseudobulk, guess: Pseudobulk) -> Prediction:
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


def scaled_score(
    model: np.ndarray, baseline: np.ndarray, replicate: np.ndarray, *, higher_is_better: bool
) -> tuple[float, str]:
    """(ū − b̄)/(r̄ − b̄) of values per condition, (conditions,) each: 0 as the baseline, 1 as a replicate; not clipped.

    NaN ``uncalibrated`` unless the replicate is better than the baseline by more than 2 standard errors.
    """
    kept = ~(np.isnan(model) | np.isnan(baseline) | np.isnan(replicate))
    u, b, r = model[kept], baseline[kept], replicate[kept]
    gain = (r - b) if higher_is_better else (b - r)
    if len(gain) < 2 or not np.isfinite(gain).all() or gain.mean() <= 2 * gain.std(ddof=1) / np.sqrt(len(gain)):
        return float("nan"), "uncalibrated"
    return float((u.mean() - b.mean()) / (r.mean() - b.mean())), ""


def dynamic_range_fraction(positive: np.ndarray, negative: np.ndarray, *, best: float) -> tuple[np.ndarray, float]:
    """(pos − neg)/(best − neg) per condition, clipped to [−1, 1], and its mean over at least 10 valid ones, else NaN.

    How much of the way from the negative to the perfect prediction the positive control covers (Miller, Mejia et al.).
    """
    span = best - np.asarray(negative, dtype=float)
    valid = np.isfinite(positive) & np.isfinite(span) & (span != 0)
    share = np.full(len(span), np.nan)
    share[valid] = np.clip((positive[valid] - negative[valid]) / span[valid], -1, 1)
    return share, float(share[valid].mean()) if valid.sum() >= FEWEST else float("nan")


def better_share(positive: np.ndarray, negative: np.ndarray, *, higher_is_better: bool) -> float:
    """Share of conditions where the positive control beats the negative one, ties ½ (BDS); 0.5 is chance."""
    kept = ~(np.isnan(positive) | np.isnan(negative))
    sign = 1 if higher_is_better else -1
    a, b = sign * positive[kept], sign * negative[kept]
    return float(((a > b) + 0.5 * (a == b)).mean()) if kept.any() else float("nan")


def anchored(
    prediction: Prediction,
    comparison: Comparison,
    metrics: Sequence[Metric],
    *,
    seed: int = 0,
    splits: int = SPLITS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, np.ndarray]]:
    """By anchor and metric the values of each condition, (conditions,), mean over splits of the observed cells.

    ``model``, ``no_change``, ``baseline`` (mean response), ``replicate`` and, for metrics of means, ``interpolated`` are
    all held against the same halves of the truth. The model's effects subtract the control from which it predicted. Reads
    the observed cells a block at a time. Splits in which the truth leaves a metric undefined are left out.
    """
    content = contents(comparison.observed, comparison)
    found: dict[str, dict[str, list]] = {}
    for split in range(splits):
        progress(f"calibration: split {split + 1} of {splits}")
        parts = halve(comparison.observed, comparison, seed=seed, split=split, content=content)
        truth, other = _bulks(parts, linear=prediction.predicted.linear is not None)
        for name, anchor in _sides(prediction, truth, other, *_half_cells(prediction, seed=seed, split=split)):
            memo: dict = {}
            for metric in metrics:
                if name == "interpolated" and not isinstance(metric, Metric):
                    continue
                values = evaluated_by(metric, anchor, memo)[0]
                found.setdefault(name, {}).setdefault(metric.name, []).append(values)
    return {
        name: {metric: defined_mean(values) for metric, values in columns.items()} for name, columns in found.items()
    }


def defined_mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the first axis of what is defined, NaN where nothing is."""
    stack = np.stack(values)
    here = ~np.isnan(stack)
    return np.where(here.any(axis=0), np.where(here, stack, 0).sum(axis=0) / np.maximum(here.sum(axis=0), 1), np.nan)


def with_variance(cells: Cells, *, linear: bool = True) -> Pseudobulk:
    """Means and unbiased variances of all groups, a pass over the cells for each moment."""
    bulk = pseudobulk(cells, linear=linear)
    n = bulk.cells[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = group_sums(cells.X, cells.group, cells.groups, np.square)
        return replace(bulk, variance=np.where(n > 1, np.maximum(squares - n * bulk.mean**2, 0) / (n - 1), np.nan))


def _bulks(parts: tuple[Cells, Cells], *, linear: bool) -> list[Pseudobulk]:
    """Pseudobulks of both halves, in the same passes over the cells."""
    first, second = parts
    groups = first.groups
    code = np.where(first.group >= 0, first.group, np.where(second.group >= 0, groups + second.group, -1))
    bulk = with_variance(replace(first, group=code, groups=2 * groups), linear=linear)
    return [bulk.rows(np.arange(groups)), bulk.rows(np.arange(groups, 2 * groups))]


def _half_cells(prediction: Prediction, *, seed: int, split: int) -> list[tuple[Any, ...]]:
    """Both halves of the sampled cells of each condition."""
    halves: list[list] = [[], []]
    for row in range(len(prediction) if prediction.cells is not None else 0):
        X = prediction.cells.observed[row]
        label = (*prediction.contexts[prediction.context[row]], str(prediction.perturbation[row]))
        order = shuffled(signatures(X, prediction.genes), seed, "half", split, *label)
        for side, part in enumerate(halves):
            part.append(X[order[side * (len(order) // 2) : (side + 1) * (len(order) // 2)]])
    return [tuple(part) for part in halves]


def _sides(
    prediction: Prediction, truth: Pseudobulk, other: Pseudobulk, half: tuple[Any, ...], rest: tuple[Any, ...]
) -> Iterator[tuple[str, Prediction]]:
    """The model and the anchors against one half of the observed cells, whose rest is ``other``."""
    replicate = _between(prediction, truth, other)
    apart = replace(replicate, observed=replicate.predicted)  # the baseline never sees the truth's half
    baseline = replace(mean_response(apart), observed=replicate.observed)
    conditions = len(prediction)
    smooth = interpolate(
        replicate,
        baseline.predicted,
        variance=other.variance[:conditions],
        control_variance=other.variance[conditions:],
    )
    model = replace(replicate, predicted=prediction.predicted, control=prediction.control)
    if prediction.cells is not None:
        sample = replace(prediction.cells, observed=half)
        model = replace(model, cells=sample)
        replicate = replace(replicate, cells=replace(sample, predicted=rest))
        moved = mean_response_cells(replace(apart, cells=replace(sample, observed=rest))).cells
        baseline = replace(baseline, cells=replace(sample, predicted=moved.predicted))
    yield from (("model", model), ("no_change", no_change(model)), ("baseline", baseline))
    yield from (("replicate", replicate), ("interpolated", smooth))


def calibrate(
    prediction: Prediction, comparison: Comparison, metrics: Sequence[Metric], *, seed: int = 0, splits: int = SPLITS
) -> pd.DataFrame:
    """Model, baseline and replicate against the same halves of the truth, a row a metric.

    Columns: ``model``, ``baseline`` (mean response), ``replicate`` (means over conditions and splits), ``scaled``,
    ``status``, ``dynamic_range``, ``better`` and ``weak``, true where the metric says little on these data.
    """
    found = anchored(prediction, comparison, metrics, seed=seed, splits=splits)
    rows = []
    for metric in metrics:
        u, b, r = (found[name][metric.name] for name in ("model", "baseline", "replicate"))
        positive = found["interpolated"].get(metric.name, r)
        scaled, status = scaled_score(u, b, r, higher_is_better=metric.higher_is_better)
        share = dynamic_range_fraction(positive, b, best=metric.best)[1]
        better = better_share(positive, b, higher_is_better=metric.higher_is_better)
        kept = ~(np.isnan(u) | np.isnan(b) | np.isnan(r))
        means = (values[kept].mean() if kept.any() else np.nan for values in (u, b, r))
        names = ("model", "baseline", "replicate")
        rows.append(
            {"metric": metric.name, **dict(zip(names, means, strict=True)), "scaled": scaled, "status": status}
            | {"dynamic_range": share, "better": better, "weak": share < WEAK_RANGE or better < WEAK_BETTER}
        )
    return pd.DataFrame(rows)


def strata_by_genes(significant: np.ndarray) -> np.ndarray:
    """Strata by the number of observed differentially expressed genes: ``0``, ``1-9``, ``10-99`` or ``>=100``."""
    names = np.array(["0", "1-9", "10-99", ">=100"])
    return names[np.searchsorted([1, 10, 100], np.asarray(significant), side="right")]


def strata_by_distance(energy: np.ndarray) -> np.ndarray:
    """Thirds by the energy distance between condition and control: ``weak``, ``medium`` or ``strong``."""
    cuts = np.quantile(energy, [1 / 3, 2 / 3])
    return np.array(["weak", "medium", "strong"])[np.searchsorted(cuts, energy, side="right")]


def intervals(
    values: Mapping[str, np.ndarray],
    context: np.ndarray,
    perturbation: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """95 % percentile intervals of each model's mean, and of each difference between two, on the same resamples.

    ``values`` has (conditions,) a model, training seeds averaged before. The mean is over contexts of their means.
    Conditions are resampled within contexts; where a perturbation occurs in several, its conditions go together.
    Conditions undefined for any model are left out for all. Returns two tables: ``model, mean, low, high, status`` and
    ``model, other, difference, low, high, tied``.
    """
    models = list(values)
    stack = np.array([np.asarray(values[model], dtype=float) for model in models])
    kept = ~np.isnan(stack).any(axis=0)
    stack, context, perturbation = stack[:, kept], np.asarray(context)[kept], np.asarray(perturbation)[kept]
    few = stack.shape[1] < FEWEST
    weights = np.ones((1, stack.shape[1])) if few else _resampled(context, perturbation, resamples, seed)
    point = _macro(stack, np.ones((1, stack.shape[1])), context)[:, 0]
    draws = _macro(stack, weights, context)
    status = "few_conditions" if few else ""
    means = [
        {"model": model, "mean": point[i], **_interval(draws[i], few), "status": status}
        for i, model in enumerate(models)
    ]
    pairs = []
    for i, model in enumerate(models):
        for j in range(i + 1, len(models)):
            with np.errstate(invalid="ignore"):  # two models that failed
                found = _interval(draws[i] - draws[j], few)
                difference = point[i] - point[j]
            tied = not (found["low"] > 0 or found["high"] < 0)
            pairs.append({"model": model, "other": models[j], "difference": difference, **found, "tied": tied})
    return pd.DataFrame(means), pd.DataFrame(pairs)


def _interval(draws: np.ndarray, few: bool) -> dict[str, float]:
    if few or not np.isfinite(draws).all():
        return {"low": float("nan"), "high": float("nan")}
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def _resampled(context: np.ndarray, perturbation: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each condition is drawn, (resamples, conditions)."""
    rng = generator(seed, "bootstrap")
    names, cluster = np.unique(perturbation, return_inverse=True)
    pairs = len(set(zip(context.tolist(), perturbation.tolist(), strict=True)))
    if pairs > len(names):  # some perturbation is in several contexts
        return rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, cluster]
    weights = np.zeros((resamples, len(context)))
    for code in np.unique(context):
        rows = np.flatnonzero(context == code)
        weights[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)
    return weights


def _macro(values: np.ndarray, weights: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Mean over contexts of weighted means, (models, conditions) x (resamples, conditions) -> (models, resamples)."""
    total, count = np.zeros((len(values), len(weights))), np.zeros(len(weights))
    for code in np.unique(context):
        rows = context == code
        weight = weights[:, rows].sum(axis=1)
        part = np.einsum("mc,rc->mr", np.where(np.isfinite(values[:, rows]), values[:, rows], 0.0), weights[:, rows])
        infinite = np.isinf(values[:, rows]).any(axis=1)
        part[infinite] = values[:, rows][infinite].sum(axis=1)[:, None]
        total += np.where(weight > 0, part / np.maximum(weight, 1), 0.0)
        count += weight > 0
    return total / np.maximum(count, 1)
