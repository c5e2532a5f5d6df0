"""Calibration: what a value means on these data. Anchors, scaled scores, dynamic range, strata and intervals.

An anchor is a prediction that is scored by the same code as a model: the truth's replicate, the mean response, no
change, or nothing but noise. A new one is a function that returns a ``Prediction``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from perturbray.metrics.cells import Cells, Comparison, moments, pseudobulk, shuffled, signatures
from perturbray.metrics.expression import benjamini_hochberg, welch
from perturbray.metrics.metric import Metric
from perturbray.prediction import Prediction, Pseudobulk
from perturbray.randomness import generator

SPLITS = 5
RESAMPLES = 2000
FEWEST = 10  # conditions that an interval or a mean dynamic range rests on
WEAK_RANGE, WEAK_BETTER = 0.2, 0.8  # a metric below either says little on these data


def predicting(prediction: Prediction, mean: np.ndarray) -> Prediction:
    """The same question with other predicted means, (conditions, genes)."""
    bulk = Pseudobulk(mean=mean, cells=prediction.predicted.cells)
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
    if prediction.training_mean is not None:
        return predicting(prediction, prediction.training_mean[prediction.context])
    observed, context = prediction.observed.mean, prediction.context
    mean = prediction.control.mean[context].copy()
    for row in range(len(prediction)):
        others = (np.arange(len(prediction)) != row) & (prediction.perturbation != prediction.perturbation[row])
        here = others & (context == context[row])
        if here.any() or others.any():
            mean[row] = observed[here if here.any() else others].mean(axis=0)
    return predicting(prediction, mean)


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


def halve(cells: Cells, comparison: Comparison, *, seed: int, split: int) -> tuple[Cells, Cells]:
    """Two disjoint random halves of every condition and every control; an odd cell is left out of both."""
    groups = [np.full(len(cells.group), -1), np.full(len(cells.group), -1)]
    for group in range(cells.groups):
        rows = cells.rows(group)
        signature = signatures(cells.X[rows], comparison.genes)
        order = shuffled(signature, seed, "half", split, *comparison.label(group))
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


def interpolated_duplicate(
    duplicate: Prediction, baseline: Prediction, half: Cells, comparison: Comparison
) -> Prediction:
    """``interpolate`` with the variances of the duplicate's half."""
    variance, control = np.full(duplicate.predicted.mean.shape, np.nan), np.full(duplicate.control.mean.shape, np.nan)
    for code, rows in comparison.by_context():
        control[code] = moments(half.of(comparison.control(code)))[1]
        for row in rows:
            variance[row] = moments(half.of(row))[1]
    return interpolate(duplicate, baseline.predicted.mean, variance=variance, control_variance=control)


def interpolate(
    duplicate: Prediction, baseline: np.ndarray, *, variance: np.ndarray, control_variance: np.ndarray
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
    mean = (1 - q) * duplicate.predicted.mean + q * baseline
    return predicting(duplicate, mean)


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


def calibrate(
    prediction: Prediction, comparison: Comparison, metrics: Sequence[Metric], *, seed: int = 0, splits: int = SPLITS
) -> pd.DataFrame:
    """Model, baseline and replicate against the same halves of the truth, a row a metric.

    Columns: ``model``, ``baseline`` (mean response), ``replicate`` (means over conditions and splits), ``scaled``,
    ``status``, ``dynamic_range``, ``better`` and ``weak``, true where the metric says little on these data. The model's
    effects subtract the control from which it predicted.
    """
    found: dict[str, dict[str, list]] = {m.name: {"u": [], "b": [], "r": [], "positive": []} for m in metrics}
    for split in range(splits):
        truth, other = halve(comparison.observed, comparison, seed=seed, split=split)
        replicate = _between(prediction, pseudobulk(truth), pseudobulk(other))
        apart = replace(replicate, observed=replicate.predicted)  # the baseline never sees the truth's half
        baseline = replace(mean_response(apart), observed=replicate.observed)
        positive = interpolated_duplicate(replicate, baseline, other, comparison)
        model = replace(replicate, predicted=prediction.predicted, control=prediction.control)
        for metric in metrics:
            for key, anchor in (("u", model), ("b", baseline), ("r", replicate), ("positive", positive)):
                found[metric.name][key].append(metric.evaluate(anchor)[0])
    rows = []
    for metric in metrics:
        u, b, r, positive = (np.mean(found[metric.name][key], axis=0) for key in ("u", "b", "r", "positive"))
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
