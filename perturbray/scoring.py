"""Scoring: a finished trial's prediction becomes its rows in the table. Run by scorer actors, so it imports no torch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from perturbray.metrics.metric import Metric, score_prediction
from perturbray.prediction import Prediction
from perturbray.results import table


@dataclass(frozen=True, kw_only=True)
class Unpredicted:
    """Conditions of the evaluated subset whose perturbation training never showed: rows with NaN and a status."""

    condition: np.ndarray  # (conditions,) int64
    context: np.ndarray  # (conditions,) int64
    perturbation: np.ndarray  # (conditions,) str
    stratum: np.ndarray  # (conditions,) str


@dataclass(frozen=True, kw_only=True)
class Scorable:
    """All that a scorer needs of a trial."""

    key: str
    name: str
    columns: dict[str, str | int | float | bool]
    prediction: Prediction
    condition: np.ndarray  # (conditions,) int64, codes of the prediction's rows in the dataset
    unpredicted: Unpredicted


def now() -> str:
    """The time in UTC to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def score(trial: Scorable, *, folder: Path, metrics: Sequence[Metric]) -> None:
    """Evaluate every metric and write the trial's Parquet file: the last thing that happens to it.

    An error is recorded beside the finished trials, with the trial's name, and raised.
    """
    began, started = now(), time.perf_counter()
    try:
        rows = _rows(trial, metrics)
        columns = {**trial.columns, "scoring": began, "score_seconds": time.perf_counter() - started, "ended": now()}
        table.write_trial(folder, trial.key, columns=columns, rows=rows)
    except Exception as error:
        error.add_note(f"while scoring trial {trial.key} ({trial.name})")
        table.write_failure(folder, trial.key, name=trial.name, error=error)
        raise


def _rows(trial: Scorable, metrics: Sequence[Metric]) -> dict[str, np.ndarray]:
    prediction, missing = trial.prediction, trial.unpredicted
    scores = score_prediction(prediction, metrics)
    at = scores["condition"]
    rows = {
        "condition": trial.condition[at],
        "perturbation": prediction.perturbation[at],
        "stratum": prediction.stratum[at],
        "metric": scores["metric"],
        "value": scores["value"],
        "status": scores["status"],
        "n_observed": prediction.observed.cells[at],
        "n_control": prediction.control.cells[prediction.context[at]],
    }
    context = prediction.context[at]
    if len(missing.condition):
        times = len(metrics)
        tail = {
            "condition": np.tile(missing.condition, times),
            "perturbation": np.tile(missing.perturbation, times),
            "stratum": np.tile(missing.stratum, times),
            "metric": np.repeat([metric.name for metric in metrics], len(missing.condition)),
            "value": np.full(times * len(missing.condition), np.nan),
            "status": np.full(times * len(missing.condition), "unseen_perturbation"),
            "n_observed": np.zeros(times * len(missing.condition), dtype=np.int64),
            "n_control": np.zeros(times * len(missing.condition), dtype=np.int64),
        }
        rows = {
            name: np.concatenate([values.astype(tail[name].dtype.type, copy=False), tail[name]])
            for name, values in rows.items()
        }
        context = np.concatenate([context, np.tile(missing.context, times)])
    for i, covariate in enumerate(prediction.covariates):
        levels = np.array([values[i] for values in prediction.contexts])
        rows[f"covariate.{covariate}"] = levels[context]
    return rows
