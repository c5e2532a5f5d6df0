"""The values of a sweep as an array, a row a condition, a column a (metric, level, series); columns compare here."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbray.results import intervals

UNDEFINED = (
    "constant_truth",
    "no_true_de",
    "single_candidate",
    "too_few_cells",
    "no_weight",
    "no_detectable_effect",
)
"""Reasons that lie in the truth: the value is NaN and left out. With any other reason a NaN is a failed prediction."""

_COLUMN = ["metric", "level", "series"]


@dataclass(frozen=True, kw_only=True)
class Cube:
    """Values of one stratum, seeds averaged."""

    columns: pd.DataFrame  # metric, level, series, failed, flagged, seeds, sd_seeds: one row a column
    values: np.ndarray  # (conditions, columns), NaN where undefined or absent
    undefined: np.ndarray  # (columns,) conditions that the truth leaves undefined
    context: np.ndarray  # (conditions,) codes
    perturbation: np.ndarray  # (conditions,) codes
    means: np.ndarray  # (columns,) macro means
    draws: np.ndarray  # (resamples, columns) macro means
    bootstrap: Mapping  # resamples, seed

    @classmethod
    def of(cls, rows: pd.DataFrame, *, bootstrap: Mapping) -> "Cube":
        """From long rows with ``level`` and ``series``."""
        unit, context, perturbation = conditions_of(rows)
        groups = rows.groupby(_COLUMN, observed=True, sort=True)
        column, columns = groups.ngroup().to_numpy(), groups.size().index.to_frame(index=False)
        shape = (len(context), len(columns))

        value, status = rows["value"].to_numpy(float), rows["status"]
        flagged = (status.notna() & (status != "")).to_numpy()
        missing = np.isnan(value)
        task = rows.groupby(_COLUMN[:2], observed=True).ngroup().to_numpy()
        hidden = np.zeros((len(context), task.max() + 1), bool)
        unscored = missing & status.isin(UNDEFINED).to_numpy()
        hidden[unit[unscored], task[unscored]] = True  # the truth is the same for every model
        undefined = hidden[unit, task]
        scored = ~undefined & ~missing
        place = unit * shape[1] + column

        def count(which: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
            weights = None if weights is None else weights[which]
            return np.bincount(place[which], weights, minlength=shape[0] * shape[1]).reshape(shape)

        times = count(scored)
        values = np.where(times > 0, count(scored, value) / np.maximum(times, 1), np.nan)
        columns["failed"] = (count(missing & ~undefined) > 0).sum(axis=0)
        columns["failed"] += _absent(rows, unit=unit, column=column, columns=len(columns))
        columns["flagged"] = (count(scored & flagged) > 0).sum(axis=0)
        columns[["sd_seeds", "seeds"]] = _spread(rows, value=np.where(scored, value, np.nan), context=context[unit])
        return cls(
            columns=columns,
            values=values,
            undefined=(count(undefined) > 0).sum(axis=0),
            context=context,
            perturbation=perturbation,
            means=np.where(columns["failed"] > 0, np.nan, intervals.macro(values, context)),
            draws=intervals.resampled(values, context=context, perturbation=perturbation, **bootstrap),
            bootstrap=bootstrap,
        )

    def differences(self, left: np.ndarray, right: np.ndarray) -> pd.DataFrame:
        """Columns ``left`` minus columns ``right``, a row a pair: difference, low, high, and the conditions of both.

        All NaN where a prediction failed; no interval from fewer than ``intervals.FEWEST`` conditions.
        """
        left, right = np.asarray(left, int), np.asarray(right, int)
        here = ~np.isnan(self.values)
        both = here[:, left] & here[:, right]
        with np.errstate(invalid="ignore"):  # inf - inf, of two failed predictions: no difference, as below
            estimate, draws = self.means[left] - self.means[right], self.draws[:, left] - self.draws[:, right]
        for pair in np.flatnonzero((here[:, left] != here[:, right]).any(axis=0)):  # split seeds that are still to run
            values = np.where(both[:, [pair]], self.values[:, [left[pair], right[pair]]], np.nan)
            estimate[pair] = np.subtract(*intervals.macro(values, self.context))
            again = {"context": self.context, "perturbation": self.perturbation, **self.bootstrap}
            draws[:, pair] = np.subtract(*intervals.resampled(values, **again).T)
        shared = both.sum(axis=0)
        failed = (self.columns["failed"] > 0).to_numpy() | np.isinf(self.values).any(axis=0)
        estimate[failed[left] | failed[right] | (shared == 0)] = np.nan
        low, high = intervals.interval(draws)
        none = np.isnan(estimate) | (shared < intervals.FEWEST)
        return pd.DataFrame(
            {
                "difference": estimate,
                "difference_low": np.where(none, np.nan, low),
                "difference_high": np.where(none, np.nan, high),
                "difference_conditions": shared,
            }
        )


def conditions_of(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Condition of each row, (rows,); context and perturbation of each condition, (conditions,); all as codes."""
    covariates = [name for name in rows.columns if name.startswith("covariate.")]
    options = {"observed": True, "dropna": False}
    perturbation = rows.groupby("perturbation", **options).ngroup().to_numpy()
    context = rows.groupby(covariates, **options).ngroup().to_numpy() if covariates else np.zeros(len(rows), int)
    pair = context * (perturbation.max() + 1) + perturbation
    first, unit = np.unique(pair, return_index=True, return_inverse=True)[1:]
    return unit, context[first], perturbation[first]


def _absent(rows: pd.DataFrame, *, unit: np.ndarray, column: np.ndarray, columns: int) -> np.ndarray:
    """Conditions that a trial lacks and others of its split, level and seed have: the most of a trial, (columns,)."""
    same = [name for name in ("metric", "level", "dataset", "split", "split_seed", "ablation", "seed") if name in rows]
    group = rows.groupby(same, observed=True, dropna=False).ngroup().to_numpy()
    units = unit.max() + 1
    expected = np.bincount(np.unique(group.astype(np.int64) * units + unit) // units)
    trial = rows["key"].astype("category").cat.codes.to_numpy().astype(np.int64)
    cell = np.unique((trial * columns + column) * (group.max() + 1) + group, return_counts=True)
    missing = expected[cell[0] % (group.max() + 1)] - cell[1]
    absent = np.zeros(columns, int)
    np.maximum.at(absent, cell[0] // (group.max() + 1) % columns, missing)
    return absent


def _spread(rows: pd.DataFrame, *, value: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Sd over trials of a trial's macro mean, and the number of trials: (columns, 2)."""
    frame = rows[[*_COLUMN, "key"]].assign(value=value, context=context)
    within = frame.groupby([*_COLUMN, "key", "context"], observed=True)["value"].mean()
    trial = within.groupby([*_COLUMN, "key"], observed=True).mean()
    finite = trial.where(np.isfinite(trial))
    return finite.groupby(_COLUMN, observed=True).agg(["std", "size"]).sort_index().to_numpy()
