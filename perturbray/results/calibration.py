"""The calibration of one evaluation: its predictions as a model between the anchors, by the same code as a sweep's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from perturbray.results import intervals
from perturbray.results.anchors import (
    INTERPOLATED,
    MEAN_RESPONSE,
    NO_CHANGE,
    REPLICATE,
    WEAK_BETTER,
    WEAK_RANGE,
    Anchors,
)
from perturbray.results.cube import conditions_of
from perturbray.results.scales import Scale
from perturbray.results.sections import REACHING, grid
from perturbray.results.summary import verdicts
from perturbray.results.wording import NONE, VERDICTS, digits, interval, number

__all__ = [
    "ANCHORED",
    "COLUMNS",
    "INTERVALS",
    "LEGEND",
    "REACHING",
    "SCALE",
    "anchors",
    "frames",
    "scaled_texts",
    "strata",
]

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
    _, context, perturbation = conditions_of(conditions)
    place = {"context": context if macro else np.zeros_like(context), "perturbation": perturbation}
    if not macro:  # conditions of one context, so that each weighs the same
        conditions = pd.DataFrame({"perturbation": conditions.astype(str).agg("\x1f".join, axis=1)})
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
    frame = _intervals(names, table, place)
    strata = anchors.effects[anchors.effects["series"] == PREDICTION].drop(columns="series").reset_index(drop=True)
    if not found:
        return frame, strata
    return frame.merge(_anchored(names, anchors, found, scales, place), on="metric", how="left")[COLUMNS], strata


SCALE = """The prediction u, the mean response b, which knows nothing of the single perturbation, no change, and a
replicate r, where one half of a condition's observed cells predicts the other, are all held against the same halves, five
times over, so values differ from those above. For metrics of cells the mean response is control cells plus its mean
effect. The scaled score (u − b)/(r − b) is 0 as good as the mean response and 1 as
good as a replicate. It is given only where the replicate is better than the mean response by more than 2 standard errors
over conditions; elsewhere the metric is uncalibrated."""

LEGEND = "scaled: 0 as good as the mean response, 1 as good as a replicate; ⚠ the metric says little on these data"

_STRATA = {
    "effect": "Thirds of the conditions by the distance between condition and control: the energy statistic with squared "
    "distances, without the bias of few cells.",
    "de_genes": "By the number of genes that respond: Welch's test of the observed cells against control, "
    "Benjamini-Hochberg q < 0.05.",
    "saturated": "By what the mean response already solves: saturated are the conditions, for each metric its own, in which "
    "it goes at least 0.9 of the way from no change to the replicate.",
}


def scaled_texts(calibration: pd.DataFrame | None) -> dict[str, str]:
    """The scaled score of each metric in a few characters; empty without anchors."""
    if calibration is None or "scaled" not in calibration:
        return {}
    return {
        row["metric"]: f"{'⚠ ' if row['weak'] is True else ''}{number(row['scaled'], 2)}"
        for row in calibration.to_dict("records")
    }


def anchors(calibration: pd.DataFrame | None, summary: pd.DataFrame) -> list[dict]:
    """Two tables: where the prediction stands between the anchors, and what the metrics can say on these data."""
    if calibration is None or "scaled" not in calibration:
        return []
    places = {row.metric: digits(row.value) for row in summary.itertuples()}
    stands, says = [], []
    for row in calibration[calibration["anchored_conditions"].notna()].to_dict("records"):
        at, count = places[row["metric"]], int(row["anchored_conditions"])
        levels = [number(row[name], at) for name in ("half", NO_CHANGE, "mean_response", REPLICATE, INTERPOLATED)]
        scaled = number(row["scaled"], 2) if not row["scaled_status"] else row["scaled_status"].replace("_", " ")
        stands.append([row["metric"], *levels, scaled, "◆ reaches the replicate" if row["reaches"] is True else ""])
        gap = f"{VERDICTS[row['verdict']]} {number(row['difference'], at, sign=True)}"
        gap = f"{gap} {interval(row['difference_low'], row['difference_high'], at)}".strip()
        shares = [number(row[name], 2) for name in ("dynamic_range", "better")]
        weak = "⚠ says little here" if row["weak"] is True else ""
        says.append([row["metric"], gap, *shares, f"{int(row['saturated'])} of {count}", weak])
    return [
        grid(
            stands,
            caption="Means over the conditions that have all anchors.",
            columns=["metric", "prediction", "no change", "mean response", "replicate", "interpolated", "scaled", ""],
            align=["", *["n"] * 6, "lines"],
        ),
        grid(
            says,
            caption="Against the mean response: the prediction minus it, with the paired 95 % interval; ▲ better, ▼ worse, "
            "≈ cannot be told. Dynamic range: the share of the way from the mean response to a perfect prediction that the "
            "interpolated duplicate (the replicate, where a metric of cells has none) covers. Better: the share of "
            "conditions in which it beats the mean response (chance 0.5). Below "
            f"{WEAK_RANGE} or {WEAK_BETTER} a metric is marked. Saturated: conditions that the mean response solves.",
            columns=["metric", "against the mean response", "dynamic range", "better", "saturated", "note"],
            align=["", *["n"] * 4, ""],
        ),
    ]


def strata(frame: pd.DataFrame | None, summary: pd.DataFrame) -> list[dict]:
    """A table for each way to part conditions: a row a metric, a column a stratum."""
    if frame is None:
        return []
    places = {row.metric: digits(row.value) for row in summary.itertuples()}
    tables = []
    for by, caption in _STRATA.items():
        part = frame[frame["by"] == by]
        names = list(dict.fromkeys(part["stratum"]))
        means = {(row.stratum, row.metric): (row.mean, row.conditions) for row in part.itertuples()}
        rows = []
        for metric, at in places.items():
            found = [means.get((name, metric), (np.nan, 0)) for name in names]
            rows.append([metric, *[f"{number(mean, at)} ({count})" if count else NONE for mean, count in found]])
        caption += " Means of the prediction against all observed cells; in brackets the conditions that have a value."
        named = [
            name.replace("-", " to ").replace(">=", "≥ ") + (" genes" if by == "de_genes" else "") for name in names
        ]
        tables += [grid(rows, caption=caption, columns=["metric", *named], align="n")] if names else []
    return tables


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
