"""The calibration of one evaluation: its predictions as a model between the anchors, by the same code as a sweep's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from perturbray.results import intervals
from perturbray.results.anchors import INTERPOLATED, MEAN_RESPONSE, NO_CHANGE, REPLICATE, Anchors
from perturbray.results.cube import conditions_of
from perturbray.results.scales import Scale
from perturbray.results.summary import verdicts

PREDICTION = "prediction"  # the one model of an evaluation
MODELS = {PREDICTION: "model", NO_CHANGE: "no_change", MEAN_RESPONSE: "baseline"}  # our names -> those of `anchored`
REFERENCES = {REPLICATE: "replicate", INTERPOLATED: "interpolated"}

INTERVALS = ["metric", "value", "low", "high", "interval_status", "conditions"]
"""``value``: mean over the conditions with a value; ``low``, ``high``: its 95 % interval over conditions."""
ANCHORED = [
    *("half", NO_CHANGE, "mean_response", REPLICATE, INTERPOLATED, "scaled", "scaled_status", "reaches"),
    *("difference", "difference_low", "difference_high", "verdict", "dynamic_range", "better", "weak", "saturated"),
    "anchored_conditions",
]
"""All against one half of the observed cells, mean over five cuts: ``half`` the prediction, then the anchors.
``difference``: ``half`` minus ``mean_response``, paired; ``verdict``: better, worse or tie."""
COLUMNS = [*INTERVALS, *ANCHORED]


def frames(
    values: pd.DataFrame,
    found: Mapping[str, Mapping[str, np.ndarray]],
    metrics: Sequence[Any],
    *,
    sizes: Any,
    macro: bool,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a metric (``COLUMNS``), and means in strata of the conditions (``EFFECTS`` without the series).

    ``values``: the table of an evaluation, in which each metric has the same conditions in the same order; ``found``: by
    anchor and metric the values of conditions, as ``metrics.calibration.anchored`` gives them, empty for conventions whose
    metrics are not the project's own; ``metrics``: those; ``sizes``: the observed effects of the conditions. Means are
    over contexts of their means where ``macro``, else over conditions.
    """
    names = list(dict.fromkeys(values["metric"]))
    keys = list(values.columns[: list(values.columns).index("metric")])
    conditions = values.loc[values["metric"] == names[0], keys].reset_index(drop=True)
    conditions.columns = [f"covariate.{name}" for name in keys[:-1]] + ["perturbation"]
    table = np.stack([values.loc[values["metric"] == name, "value"].to_numpy(float) for name in names], axis=1)
    scales = {name: Scale.of(name) for name in names}
    for metric in metrics:
        facts = {"higher_is_better": metric.higher_is_better, "best": metric.best, "chance": metric.chance}
        scales[metric.name] = Scale.of(metric.name, facts)
    rows = [_long(conditions, names, table, found.get("model", {}), model=PREDICTION)]
    for model in (NO_CHANGE, MEAN_RESPONSE) if found else ():
        halves = found[MODELS[model]]
        columns = np.stack([halves[name] for name in names], axis=1)
        rows.append(_long(conditions, names, columns, halves, model=model))
    rows = pd.concat(rows, ignore_index=True)
    beside = []
    for reference, name in REFERENCES.items():
        known = list(found.get(name, {})) if found else names[:1]
        columns = np.stack(
            [found[name][metric] if found else np.full(len(conditions), np.nan) for metric in known], axis=1
        )
        beside.append(_long(conditions, known, columns, {}, reference=reference))
    beside = pd.concat(beside, ignore_index=True)
    beside["effect_size"] = sizes.effect[beside["condition"]]
    beside["de_genes"] = sizes.de_genes[beside["condition"]]
    anchors = Anchors.of(rows, beside, scales=scales, failed=_failed(values))
    _, context, perturbation = conditions_of(conditions)
    context = context if macro else np.zeros_like(context)
    place = {"context": context, "perturbation": perturbation}
    frame = _intervals(names, table, place)
    strata = anchors.effects[anchors.effects["series"] == PREDICTION].drop(columns="series").reset_index(drop=True)
    if not found:
        return frame, strata
    return frame.merge(_anchored(names, anchors, found, scales, place), on="metric", how="left")[COLUMNS], strata


def _long(
    conditions: pd.DataFrame, names: Sequence[str], columns: np.ndarray, halves: Mapping[str, np.ndarray], **labels: str
) -> pd.DataFrame:
    """Rows as those of a sweep: one trial at one level."""
    count, times = len(conditions), len(names)
    long = pd.concat([conditions] * times, ignore_index=True)
    none = np.full(count, np.nan)
    model = labels.get("model", "")
    return long.assign(
        **labels,
        **{"key": model, "name": model, "series": model, "level": 0.0, "x": 0.0, "seed": 0, "stratum": "common"},
        condition=np.tile(np.arange(count), times),
        metric=np.repeat(list(names), count),
        value=columns.T.ravel(),
        value_half=np.concatenate([halves.get(name, none) for name in names]),
        status="",
    )


def _failed(values: pd.DataFrame) -> pd.DataFrame:
    """Metrics with a failed prediction get no scaled score."""
    lost = values["status"].isin(["failed_prediction", "missing_prediction"])
    names = list(dict.fromkeys(values.loc[lost, "metric"]))
    return pd.DataFrame({"metric": names, "level": 0.0, "series": PREDICTION}, columns=["metric", "level", "series"])


def _intervals(names: Sequence[str], table: np.ndarray, place: Mapping[str, np.ndarray]) -> pd.DataFrame:
    conditions = (~np.isnan(table)).sum(axis=0)
    low, high = intervals.interval(intervals.resampled(table, **place))
    status = np.select(
        [np.isinf(table).any(axis=0), conditions == 0, conditions < intervals.FEWEST],
        ["failed_prediction", "undefined", "few_conditions"],
        "",
    )
    none = status != ""
    return pd.DataFrame(
        {
            **{"metric": list(names), "value": intervals.macro(table, place["context"])},
            **{"low": np.where(none, np.nan, low), "high": np.where(none, np.nan, high)},
            **{"interval_status": status, "conditions": conditions},
        }
    )


def _anchored(
    names: Sequence[str],
    anchors: Anchors,
    found: Mapping[str, Mapping[str, np.ndarray]],
    scales: Mapping[str, Scale],
    place: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    scaled = anchors.scaled[anchors.scaled["series"] == PREDICTION]
    scaled = scaled[["metric", "half", "scaled", "scaled_status", "reaches", "scaled_conditions"]]
    bounds = anchors.bounds.drop(columns=["calibrated", "conditions"])
    u, b = (np.stack([found[key][name] for name in names], axis=1) for key in ("model", "baseline"))
    both = np.isnan(u) | np.isnan(b)
    u, b = np.where(both, np.nan, u), np.where(both, np.nan, b)
    with np.errstate(invalid="ignore"):  # inf - inf, of failed predictions
        gap = intervals.macro(u, place["context"]) - intervals.macro(b, place["context"])
        low, high = intervals.interval(intervals.resampled(u, **place) - intervals.resampled(b, **place))
    none = ~np.isfinite(gap) | ((~both).sum(axis=0) < intervals.FEWEST)
    low, high = np.where(none, np.nan, low), np.where(none, np.nan, high)
    sign = np.array([scales[name].sign for name in names])
    gaps = pd.DataFrame(
        {
            **{"metric": list(names), "difference": np.where(np.isfinite(gap), gap, np.nan)},
            **{"difference_low": low, "difference_high": high},
            "verdict": verdicts(pd.Series(low), pd.Series(high), sign=sign),
        }
    )
    joined = gaps.merge(scaled, on="metric", how="left").merge(bounds, on="metric", how="left")
    return joined.rename(columns={MEAN_RESPONSE: "mean_response", "scaled_conditions": "anchored_conditions"})
