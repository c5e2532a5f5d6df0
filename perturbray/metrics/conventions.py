"""Conventions: named rules from two sets of cells to a table of values. Add one with ``@convention(name)``.

A convention is a function of a ``Comparison`` that fills a ``Results``. ``perturbray`` is the project's own; those in
``upstream`` reproduce the numbers of other packages, odd choices included, so that published values can be compared.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from perturbray.errors import InputError, nearest
from perturbray.metrics.cells import Comparison, compare
from perturbray.prediction import Prediction
from perturbray.registry import Registry


@dataclass(frozen=True)
class Convention:
    """A rule and its version: a change of any number it gives is a new version."""

    name: str
    version: int
    function: Callable[..., None]
    drops_missing: bool = False  # conditions without a prediction are left out, not refused
    mean: str = "pooled"  # its headline: pooled or macro as in ``aggregate``; contaminated: one NaN makes the mean NaN


CONVENTIONS: Registry[Convention] = Registry("convention")


def convention(name: str, *, version: int = 1, drops_missing: bool = False, mean: str = "pooled") -> Callable:
    """Register a function of (comparison, results) as a convention."""

    def keep(function: Callable[..., None]) -> Callable[..., None]:
        CONVENTIONS.register(name)(Convention(name, version, function, drops_missing, mean))
        return function

    return keep


@dataclass
class Results:
    """Values by metric as a convention finds them; a condition without a value stays NaN."""

    comparison: Comparison
    notes: dict[str, Any] = field(default_factory=dict)  # numbers to print beside the table
    prediction: Prediction | None = None  # what was scored, by a convention of the project's own metrics
    metrics: tuple[Any, ...] = ()  # the metrics that it was scored by
    _values: dict[str, np.ndarray] = field(default_factory=dict)
    _status: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, metric: str, rows: np.ndarray, values: Any, status: Any = "") -> None:
        """Values, or one value for all, of some conditions."""
        if metric not in self._values:
            missing = self.comparison.missing
            self._values[metric] = np.full(len(self.comparison), np.nan)
            self._status[metric] = np.where(missing, "missing_prediction", "").astype(object)
        self._values[metric][rows] = values
        self._status[metric][rows] = status

    def table(self, convention: str) -> pd.DataFrame:
        """A row a condition and metric."""
        c = self.comparison
        conditions = {name: [c.contexts[code][i] for code in c.context] for i, name in enumerate(c.covariates)}
        conditions[c.perturbation_key] = c.perturbation.astype(object)
        n_obs, n_pred = (side.count()[: len(c)] for side in (c.observed, c.predicted))
        tables = [
            pd.DataFrame(
                {
                    **conditions,
                    "metric": metric,
                    "value": values,
                    "status": self._status[metric],
                    "n_obs": n_obs,
                    "n_pred": n_pred,
                    "convention": convention,
                }
            )
            for metric, values in self._values.items()
        ]
        return pd.concat(tables, ignore_index=True)


def evaluate(
    observed: Any,
    predicted: Any,
    *,
    perturbation_key: str,
    control: str,
    covariate_keys: Sequence[str] = (),
    **options: Any,
) -> pd.DataFrame:
    """Score predicted against observed cells, both AnnData-like with ``X`` (log1p), ``obs`` and ``var_names``.

    Returns one row a condition and metric: a column a covariate, the perturbation column, ``metric``, ``value``,
    ``status`` (why a value is undefined or special, else empty), ``n_obs``, ``n_pred`` and ``convention``. Its ``attrs``
    hold the convention's version and notes. ``options`` are those of ``judge`` and of the convention.
    """
    roles = {"perturbation_key": perturbation_key, "control": control, "covariate_keys": covariate_keys}
    return judge(observed, predicted, **roles, **options)[0]


def judge(
    observed: Any,
    predicted: Any,
    *,
    perturbation_key: str,
    control: str,
    covariate_keys: Sequence[str] = (),
    convention: str = "perturbray",
    delimiter: str = "+",
    names: tuple[str, str] = ("observed", "predicted"),
    **options: Any,
) -> tuple[pd.DataFrame, Results]:
    """The table of ``evaluate``, and what it was made of, for a calibration; ``names`` stand in errors."""
    rule = CONVENTIONS[convention]
    known = list(inspect.signature(rule.function).parameters)[2:]
    if unknown := sorted(set(options) - set(known)):
        raise InputError(f"convention {convention!r} has no option {unknown[0]!r}: {nearest(unknown[0], known)}")
    comparison = compare(
        observed,
        predicted,
        perturbation_key=perturbation_key,
        control=control,
        covariate_keys=covariate_keys,
        delimiter=delimiter,
        failed="drop" if rule.drops_missing else options.get("failed", "error"),
        names=names,
    )
    results = Results(comparison)
    rule.function(comparison, results, **options)
    table = results.table(convention)
    table.attrs = {"version": rule.version, **results.notes}
    return table, results


def aggregate(table: pd.DataFrame, covariate_keys: Sequence[str] = ()) -> pd.DataFrame:
    """Means over conditions, a row a metric.

    ``macro`` is the mean over contexts of their means, ``pooled`` gives every condition weight 1. Undefined values are
    left out of both; a failed condition counts with its worst value, so infinity makes the mean infinite.
    """
    rows = []
    for metric, part in table.groupby("metric", sort=False):
        value = part["value"].to_numpy(dtype=float)
        scored = part[~np.isnan(value)]
        kept = scored["value"].to_numpy(dtype=float)
        by_context = scored.groupby(list(covariate_keys), observed=True)["value"].mean() if covariate_keys else kept
        finite = kept if len(kept) and np.isfinite(kept).all() else np.array([])
        rows.append(
            {
                "metric": metric,
                "macro": np.mean(by_context) if len(kept) else np.nan,
                "pooled": kept.mean() if len(kept) else np.nan,
                "median": np.median(kept) if len(kept) else np.nan,
                "sd": finite.std(ddof=1) if len(finite) > 1 else np.nan,
                "n_scored": len(kept),
                "n_undefined": int(np.isnan(value).sum()),
                "n_failed": int(part["status"].isin(["failed_prediction", "missing_prediction"]).sum()),
            }
        )
    return pd.DataFrame(rows)
