"""Scoring: a finished trial's prediction becomes its rows in the table. Run by scorer actors, so it imports no torch.

Sweeps score effects of a shared control by the `split` rule: the model predicts from one half of the control cells and
subtracts it, the truth subtracts the other half, the roles are exchanged, and the two scores are averaged. Otherwise the
noise of the shared control would count as agreement.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from perturbray import plugin
from perturbray.metrics.calibration import interpolate, mean_response
from perturbray.metrics.effects import EFFECTS
from perturbray.metrics.metric import Metric, score_prediction, score_split
from perturbray.prediction import Predicted, Prediction, Pseudobulk, Truth, assemble
from perturbray.results import table

ANGLES = ("cosine", "pearson", "spearman")  # scores of direction: they see what both sides share with the control
SOURCES = ("split", "reference")  # where the control cells of control-based effects come from
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

    An error is recorded beside the finished trials, with the trial's name, and raised.
    """
    plugin.install(plugins)  # a user's scores and effects
    truth = truths[item.truth]
    if isinstance(item, Anchor):
        table.write_anchor(folder, item.key, rows=_anchor_rows(item, truth, metrics))
        return
    began, started = now(), time.perf_counter()
    try:
        rows = _trial_rows(item, truth, metrics, source)
        columns = {**item.columns, "controls": source}
        columns |= {"scoring": began, "score_seconds": time.perf_counter() - started, "ended": now()}
        table.write_trial(folder, item.key, columns=columns, rows=rows)
    except Exception as error:
        error.add_note(f"while scoring trial {item.key} ({item.name})")
        table.write_failure(folder, item.key, name=item.name, error=error)
        raise


def shares_control(metric: Metric) -> bool:
    """Whether the noise of one set of control cells on both sides would count as agreement."""
    return isinstance(metric, Metric) and metric.score in ANGLES and EFFECTS[metric.effect].control


def _split(whole: Prediction, predicted: Predicted, *, halving: int, half: int) -> Prediction:
    """The model predicts from one half of the controls and subtracts it; the truth subtracts the other half."""
    counts = whole.control.cells
    return _with(
        whole,
        predicted=predicted.halves[halving, half],
        control=Pseudobulk(mean=predicted.control_halves[halving, half], cells=counts // 2),
        observed_control=Pseudobulk(mean=predicted.control_halves[halving, 1 - half], cells=counts // 2),
    )


def _with(whole: Prediction, *, predicted: np.ndarray | None = None, **parts) -> Prediction:
    if predicted is not None:
        parts["predicted"] = Pseudobulk(mean=predicted, cells=whole.predicted.cells)
    return replace(whole, cells=None, **parts)


def against_half(
    metric: Metric, whole: Prediction, predicted: Predicted, truth: Truth, memos: list[dict]
) -> np.ndarray:
    """(conditions,) the mean over halvings of the metric against one half of the observed cells.

    The same truth as an anchor's, so that a model, a baseline and a replicate can be put on one scale.
    """
    found = []
    for halving, memo in enumerate(memos):
        part = _split(whole, predicted, halving=halving, half=1) if shares_control(metric) else whole
        observed = truth.observed_halves[halving, 0][predicted.rows]
        cells = truth.half_cells[halving, 0][predicted.rows]
        part = _with(part, observed=Pseudobulk(mean=observed, cells=cells))
        values = metric.evaluate(part, memo.setdefault(shares_control(metric), {}))[0]
        found.append(np.where(cells > 0, values, np.nan))
    return np.mean(found, axis=0)


def _trial_rows(item: Scorable, truth: Truth, metrics: Sequence[Metric], source: str) -> dict[str, np.ndarray]:
    whole, at = assemble(truth, item.predicted, item.stratum), item.predicted.rows
    halved = [metric for metric in metrics if source == "split" and shares_control(metric)]
    plain = [metric for metric in metrics if metric not in halved]
    exchanged = (_split(whole, item.predicted, halving=0, half=half) for half in (1, 0))
    tables = [score_prediction(whole, plain)] + ([score_split(*exchanged, halved)] if halved else [])
    memos: list[dict] = [{} for _ in range(len(truth.observed_halves))]
    shape = len(metrics), len(truth)
    values, half = np.full(shape, np.nan), np.full(shape, np.nan)
    status = np.full(shape, "unseen_perturbation", dtype="U24")
    for number, metric in enumerate(metrics):
        for scored in tables:
            chosen = scored["metric"] == metric.name
            if chosen.any():
                values[number, at], status[number, at] = scored["value"][chosen], scored["status"][chosen]
        if isinstance(metric, Metric):
            half[number, at] = against_half(metric, whole, item.predicted, truth, memos)
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
    """The replicate and the interpolated duplicate as predictions of the other half, mean over halvings."""
    metrics = [metric for metric in metrics if isinstance(metric, Metric)]
    found = {REPLICATE: np.zeros((len(metrics), len(truth))), INTERPOLATED: np.zeros((len(metrics), len(truth)))}
    halvings = len(truth.observed_halves)
    for halving in range(halvings):
        duplicate = _replicate(truth, item.stratum, halving)
        whole = (truth.half_cells[halving] > 0).all(axis=0)  # a condition of one cell has no replicate
        # The baseline of the other half: it never sees the half that is the truth.
        baseline = mean_response(_with(duplicate, observed=duplicate.predicted))
        smooth = interpolate(
            duplicate,
            baseline.predicted.mean,
            variance=truth.observed_variance[halving],
            control_variance=truth.control_variance[halving],
        )
        for name, prediction in ((REPLICATE, duplicate), (INTERPOLATED, smooth)):
            memo: dict = {}
            for number, metric in enumerate(metrics):
                values = np.where(whole, metric.evaluate(prediction, memo)[0], np.nan)
                found[name][number] += values / halvings
    named = [_long(truth, item.stratum, metrics) | {"value": values.ravel()} for values in found.values()]
    rows = {column: np.concatenate([part[column] for part in named]) for column in named[0]}
    length = len(metrics) * len(truth)
    return rows | {"reference": np.repeat(list(found), length), "seed": np.full(2 * length, item.seed)}


def _replicate(truth: Truth, stratum: np.ndarray, halving: int) -> Prediction:
    """The second half of the observed cells as the prediction of the first, each with its own half of the controls."""
    first, second = truth.observed_halves[halving]
    counts = truth.half_cells[halving]
    controls = [
        Pseudobulk(mean=half, cells=np.array([len(rows) // 2 for rows in truth.control_rows]))
        for half in truth.control_halves[halving]
    ]
    return Prediction(
        genes=truth.genes,
        covariates=truth.covariates,
        contexts=truth.contexts,
        context=truth.context,
        perturbation=truth.perturbation,
        stratum=stratum,
        predicted=Pseudobulk(mean=second, cells=counts[1]),
        observed=Pseudobulk(mean=first, cells=counts[0]),
        control=controls[1],
        observed_control=controls[0],
    )
