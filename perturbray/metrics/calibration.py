"""Calibration: what a value means on these data. Scaled scores, dynamic range and intervals, between the anchors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from perturbray.metrics.anchors import (
    SPLITS,
    between,
    contents,
    halve,
    interpolate,
    mean_response,
    mean_response_cells,
    no_change,
)
from perturbray.metrics.cells import Cells, Comparison, group_sums, pseudobulk, shuffled, signatures
from perturbray.metrics.metric import Metric, evaluated_by
from perturbray.prediction import Prediction, Pseudobulk
from perturbray.randomness import generator

RESAMPLES = 2000
FEWEST = 10  # conditions that an interval or a mean dynamic range rests on
WEAK_RANGE, WEAK_BETTER = 0.2, 0.8  # a metric below either says little on these data


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
    replicate = between(prediction, truth, other)
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
