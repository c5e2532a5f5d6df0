"""Scoring: a finished trial's prediction becomes its rows in the table. Run by scorer actors, so it imports no torch.

Sweeps score effects of a shared control by the `split` rule: the model predicts from one half of the control cells and
subtracts it, the truth subtracts the other half, the roles are exchanged, and the two scores are averaged. Otherwise the
noise of the shared control would count as agreement.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from perturbray import plugin
from perturbray.metrics.anchors import effect_sizes, interpolate, mean_response, mean_response_cells
from perturbray.metrics.calibration import defined_mean
from perturbray.metrics.effects import EFFECTS
from perturbray.metrics.metric import Metric, evaluated_by, score_prediction, score_split
from perturbray.prediction import (
    CellSample,
    LostCellsError,
    Predicted,
    Prediction,
    Pseudobulk,
    Truth,
    assemble,
    matrices,
)
from perturbray.results import table

ANGLES = ("cosine", "pearson", "spearman")  # scores of direction: they see what both sides share with the control
SOURCES = ("split", "reference")  # where the control cells of control-based effects come from
COMMON = "common"  # the stratum of conditions that models are compared on
REPLICATE, INTERPOLATED = "split_half", "interpolated_duplicate"  # anchors beside the models


@dataclass(frozen=True, kw_only=True)
class Scorable:
    """All that a scorer needs of a trial."""

    key: str
    name: str
    columns: dict[str, str | int | float | bool]
    truth: str  # digest of the truth that it is judged against
    predicted: Predicted
    stratum: np.ndarray  # (conditions of the truth,) str
    baseline: bool = False  # it is the mean response, which has a version for metrics of cells


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A truth whose replicate and interpolated duplicate are to be scored like models, for one division into strata."""

    key: str
    truth: str
    stratum: np.ndarray  # (conditions of the truth,) str
    seed: int


def now() -> str:
    """The time in UTC to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def score(
    item: Scorable | Anchor,
    truths: Mapping[str, Truth],
    *,
    folder: Path,
    metrics: Sequence[Metric],
    source: str = "split",
    plugins: tuple[plugin.Plugin, ...] = (),
) -> None:
    """Evaluate every metric and write the Parquet file of a trial or an anchor: the last thing that happens to it.

    An error is recorded beside the finished trials, with the trial's name, and raised. A trial that is stored stays as it
    is: one whose process died after it had handed its prediction over is run again, and comes twice.
    """
    plugin.install(plugins)  # a user's scores and effects
    truth = truths[item.truth]
    if isinstance(item, Anchor):
        table.write_anchor(folder, item.key, rows=_anchor_rows(item, truth, metrics))
        return
    if table.has(folder, item.key):  # sent twice: whoever trained it was killed before Tune had its word, and run again
        return
    began, started = now(), time.perf_counter()
    try:
        rows = _trial_rows(item, truth, metrics, source)
        columns = {**item.columns, "controls": source}
        columns |= {"scoring": began, "score_seconds": time.perf_counter() - started, "ended": now()}
        if not table.has(folder, item.key):  # another scorer may have been at it
            table.write_trial(folder, item.key, columns=columns, rows=rows)
    except LostCellsError:  # not the trial's fault: without a result and without a record, it is run again
        raise
    except Exception as error:
        error.add_note(f"while scoring trial {item.key} ({item.name})")
        table.write_failure(folder, item.key, name=item.name, error=error)
        raise


def means(
    truth: Truth, predicted: Predicted, stratum: np.ndarray, metrics: Sequence[Metric], *, source: str = "split"
) -> dict[str, float]:
    """The mean of each metric over conditions of the common stratum within a context, then over contexts, as a leaderboard
    has it; NaN where the truth leaves it undefined throughout."""
    whole = assemble(truth, predicted, stratum)
    halved = [metric for metric in metrics if source == "split" and shares_control(metric)]
    plain = [metric for metric in metrics if metric not in halved]
    exchanged = (_split(whole, predicted, halving=0, half=half) for half in (1, 0))
    found = {}
    for scored in [score_prediction(whole, plain)] + ([score_split(*exchanged, halved)] if halved else []):
        for name in dict.fromkeys(scored["metric"]):
            values = scored["value"][scored["metric"] == name]
            kept = ~np.isnan(values) & (whole.stratum == COMMON)
            contexts = whole.context[kept]
            parts = [values[kept][contexts == context].mean() for context in np.unique(contexts)]
            found[str(name)] = float(np.mean(parts)) if parts else math.nan
    return found


def shares_control(metric: Metric) -> bool:
    """Whether the noise of one set of control cells on both sides would count as agreement."""
    return isinstance(metric, Metric) and metric.score in ANGLES and EFFECTS[metric.effect].control


def _split(whole: Prediction, predicted: Predicted, *, halving: int, half: int) -> Prediction:
    """The model predicts from one half of the controls and subtracts it; the truth subtracts the other half."""
    counts = whole.control.cells
    lin, control = predicted.linear_halves, predicted.control_linear_halves
    own, other = (
        Pseudobulk(
            mean=predicted.control_halves[halving, side],
            linear=None if control is None else control[halving, side],
            cells=counts // 2,
        )
        for side in (half, 1 - half)
    )
    bulk = Pseudobulk(
        mean=predicted.halves[halving, half],
        linear=None if lin is None else lin[halving, half],
        cells=whole.predicted.cells,
    )
    return replace(whole, cells=None, predicted=bulk, control=own, observed_control=other)


def _half(truth: Truth, halving: int, side: int) -> Pseudobulk:
    """One half of the observed cells of each condition."""
    lin = truth.linear_halves
    return Pseudobulk(
        mean=truth.observed_halves[halving, side],
        linear=None if lin is None else lin[halving, side],
        cells=truth.half_cells[halving, side],
    )


def _half_cells(truth: Truth, halving: int, side: int) -> tuple[Any, ...]:
    """The sampled cells of each condition that are in one half."""
    return tuple(
        cells[np.flatnonzero(half[halving] == side)]
        for cells, half in zip(truth.observed_sample, truth.sample_half, strict=True)
    )


def against_halves(metrics: Sequence[Metric], whole: Prediction, predicted: Predicted, truth: Truth) -> np.ndarray:
    """(metrics, conditions) the mean over halvings of each metric against one half of the observed cells.

    The same truth as an anchor's, so that a model, a baseline and a replicate can be put on one scale. Halvings in which
    the truth leaves a metric undefined are left out.
    """
    found = []
    for halving in range(len(truth.observed_halves)):
        observed, memos = _half(truth, halving, 0).rows(predicted.rows), ({}, {})
        cells = whole.cells
        if cells is not None:
            cells = replace(cells, observed=matrices(_half_cells(truth, halving, 0), predicted.rows))
        shared = replace(whole, observed=observed, cells=cells)
        apart = replace(_split(whole, predicted, halving=halving, half=1), observed=observed)
        scores = [
            evaluated_by(metric, *((apart, memos[0]) if shares_control(metric) else (shared, memos[1])))[0]
            for metric in metrics
        ]
        found.append(np.where(observed.cells > 0, np.reshape(scores, (len(metrics), len(observed.cells))), np.nan))
    return defined_mean(found)


def _trial_rows(item: Scorable, truth: Truth, metrics: Sequence[Metric], source: str) -> dict[str, np.ndarray]:
    whole, at = assemble(truth, item.predicted, item.stratum), item.predicted.rows
    halved = [metric for metric in metrics if source == "split" and shares_control(metric)]
    plain = [metric for metric in metrics if metric not in halved]
    exchanged = (_split(whole, item.predicted, halving=0, half=half) for half in (1, 0))
    tables = [score_prediction(whole, plain)] + ([score_split(*exchanged, halved)] if halved else [])
    noisy = mean_response_cells(whole) if item.baseline and whole.cells is not None else whole
    shape = len(metrics), len(truth)
    values, half = np.full(shape, np.nan), np.full(shape, np.nan)
    status = np.full(shape, "unseen_perturbation", dtype="U24")
    for number, metric in enumerate(metrics):
        for scored in tables:
            chosen = scored["metric"] == metric.name
            if chosen.any():
                values[number, at], status[number, at] = scored["value"][chosen], scored["status"][chosen]
    half[:, at] = against_halves(metrics, noisy, item.predicted, truth)
    rows = _long(truth, item.stratum, metrics)
    rows |= {"value": values.ravel(), "value_half": half.ravel(), "status": status.ravel()}
    rows["n_observed"] = np.tile(truth.observed.cells, len(metrics))
    rows["n_control"] = np.tile(item.predicted.control.cells[truth.context], len(metrics))
    return rows


def _long(truth: Truth, stratum: np.ndarray, metrics: Sequence[Metric]) -> dict[str, np.ndarray]:
    """The columns that name a row, metric by metric."""
    times = len(metrics)
    rows = {
        "condition": np.tile(truth.rows, times),
        "perturbation": np.tile(truth.perturbation, times),
        "stratum": np.tile(stratum, times),
        "metric": np.repeat([metric.name for metric in metrics], len(truth)),
    }
    for i, covariate in enumerate(truth.covariates):
        rows[f"covariate.{covariate}"] = np.tile(
            np.array([values[i] for values in truth.contexts])[truth.context], times
        )
    return rows


def _anchor_rows(item: Anchor, truth: Truth, metrics: Sequence[Metric]) -> dict[str, np.ndarray]:
    """The replicate and the interpolated duplicate as predictions of the other half, mean over halvings.

    The duplicate of metrics of cells is the replicate alone. Beside them how much is observed of each condition.
    """
    of_means = [metric for metric in metrics if isinstance(metric, Metric)]
    found: dict[str, list] = {REPLICATE: [], INTERPOLATED: []}
    for halving in range(len(truth.observed_halves)):
        duplicate = _replicate(truth, item.stratum, halving)
        whole = (truth.half_cells[halving] > 0).all(axis=0)  # a condition of one cell has no replicate
        # The baseline of the other half: it never sees the half that is the truth.
        baseline = mean_response(replace(duplicate, observed=duplicate.predicted, cells=None))
        smooth = interpolate(
            duplicate,
            baseline.predicted,
            variance=truth.observed_variance[halving],
            control_variance=truth.control_variance[halving],
        )
        for name, prediction, asked in ((REPLICATE, duplicate, metrics), (INTERPOLATED, smooth, of_means)):
            memo: dict = {}
            scores = [np.where(whole, evaluated_by(metric, prediction, memo)[0], np.nan) for metric in asked]
            found[name].append(np.reshape(scores, (len(asked), len(truth))))
    sizes = effect_sizes(
        truth.observed,
        truth.control,
        context=truth.context,
        perturbation=truth.perturbation,
        genes=truth.genes,
        target_sum=truth.target_sum,
    )
    parts = []
    for name, asked in ((REPLICATE, metrics), (INTERPOLATED, of_means)):
        times = len(asked)
        rows = _long(truth, item.stratum, asked) | {"value": defined_mean(found[name]).ravel()}
        rows |= {"de_genes": np.tile(sizes.de_genes, times), "effect_size": np.tile(sizes.effect, times)}
        length = times * len(truth)
        parts.append(rows | {"reference": np.full(length, name), "seed": np.full(length, item.seed)})
    return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}


def _replicate(truth: Truth, stratum: np.ndarray, halving: int) -> Prediction:
    """The second half of the observed cells as the prediction of the first, each with its own half of the controls."""
    lin = truth.control_linear_halves
    sizes = np.array([len(rows) // 2 for rows in truth.control_rows])
    first, second = (
        Pseudobulk(mean=half, linear=None if lin is None else lin[halving, side], cells=sizes)
        for side, half in enumerate(truth.control_halves[halving])
    )
    cells = None
    if truth.observed_sample:
        sides = (_half_cells(truth, halving, side) for side in (0, 1))
        cells = CellSample(
            **dict(zip(("observed", "predicted"), sides, strict=True)),
            control=truth.control_sample,
            pca_mean=truth.pca_mean,
            pca_loadings=truth.pca_loadings,
        )
    return Prediction(
        genes=truth.genes,
        covariates=truth.covariates,
        contexts=truth.contexts,
        context=truth.context,
        perturbation=truth.perturbation,
        stratum=stratum,
        predicted=_half(truth, halving, 1),
        observed=_half(truth, halving, 0),
        control=second,
        observed_control=first,
        target_sum=truth.target_sum,
        cells=cells,
    )
