"""What a value means on these data: floor, ceiling, scaled score, strata by effect; an anchor is a column beside models.

Everything here is on the scale of ``value_half``: the truth is one half of the observed cells, for models, baselines and
the replicate alike. Formulas are those of ``metrics.calibration``, restated on the long table; means are macro means.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbray.results.cube import conditions_of
from perturbray.results.scales import Scale

NO_CHANGE, MEAN_RESPONSE = "no_change", "perturbed_mean"  # values of the column ``model``
REPLICATE, INTERPOLATED = "split_half", "interpolated_duplicate"  # values of the column ``reference`` of anchors
FEWEST = 10  # conditions that a dynamic range rests on
WEAK_RANGE, WEAK_BETTER = 0.2, 0.8  # a metric below either says little on these data
TERTILES = ("weak", "medium", "strong")
EFFECT = "rmse/average"  # of no_change: the distance of a condition from its control

SCALED = [
    *("metric", "level", "series", "half", "baseline_half", "replicate_half"),
    *("scaled", "scaled_status", "reaches", "scaled_conditions"),
]
"""``half``, ``baseline_half``, ``replicate_half``: u, b and r, macro means on the conditions that have all three.
``scaled`` is (u - b)/(r - b), not clipped, or NaN with ``scaled_status``. ``reaches``: u is at least as good as r."""
BOUNDS = [
    *("metric", NO_CHANGE, MEAN_RESPONSE, REPLICATE, INTERPOLATED),
    *("dynamic_range", "better", "weak", "calibrated", "conditions"),
]
"""A row a metric, at the lowest level. ``dynamic_range``, ``better``: DRF and BDS of the interpolated duplicate against the
mean response; ``weak``: either is too low; ``calibrated``: the replicate is surely better than the mean response."""
EFFECTS = ["tertile", "metric", "series", "mean", "conditions", "low", "high"]
"""``mean``: of ``value``, macro, at the lowest level. ``low``, ``high``: the least and largest effect in the tertile."""


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """The frames that put a sweep's values into their range; empty where the folder has no anchors."""

    scaled: pd.DataFrame  # one row a (metric, level, series)
    bounds: pd.DataFrame  # one row a metric
    effects: pd.DataFrame  # one row a (tertile, metric, series)

    @classmethod
    def none(cls) -> "Anchors":
        return cls(**{name: pd.DataFrame(columns=columns) for name, columns in _FRAMES.items()})

    @classmethod
    def of(
        cls, rows: pd.DataFrame, anchors: pd.DataFrame | None, *, scales: Mapping[str, Scale], failed: pd.DataFrame
    ) -> "Anchors":
        """From the long rows of one stratum, with ``series``, ``level`` and ``x``, and the frame of ``read_anchors``.

        ``failed`` has the (metric, level, series) with failed predictions: they get no score, so that none gains by it.
        """
        found = cls.none()
        if rows.empty:
            return found
        lowest = rows.loc[rows["x"].idxmin() if rows["x"].notna().any() else rows.index[0], "level"]
        effects = by_effect(rows[rows["level"] == lowest])
        effects.loc[_among(effects, failed[failed["level"] == lowest], ["metric", "series"]), "mean"] = np.nan
        several = "dataset" in rows and len(rows["dataset"].unique()) > 1  # anchors do not say of which they are
        if anchors is None or anchors.empty or several or "value_half" not in rows:
            return cls(scaled=found.scaled, bounds=found.bounds, effects=effects)
        field = _Field.of(rows, anchors, metrics=list(scales))
        scaled = field.scaled(scales)
        lost = _among(scaled, failed, ["metric", "level", "series"])
        scaled.loc[lost, ["half", "scaled"]] = np.nan
        scaled.loc[lost, "scaled_status"], scaled.loc[lost, "reaches"] = "failed_prediction", False
        return cls(scaled=scaled, bounds=field.bounds(scales, at=(rows["level"] == lowest).to_numpy()), effects=effects)


_FRAMES = {"scaled": SCALED, "bounds": BOUNDS, "effects": EFFECTS}


@dataclass(frozen=True, kw_only=True)
class _Field:
    """Values of rows with those of the anchors for the same metric and condition beside them."""

    rows: pd.DataFrame  # metric, level, series, model
    unit: np.ndarray  # (rows,) condition
    metric: np.ndarray  # (rows,) place among the metrics
    context: np.ndarray  # (conditions,)
    half: np.ndarray  # (rows,)
    baseline: np.ndarray  # (rows,) mean response of the same metric, level, seed and condition
    replicate: np.ndarray  # (metrics, conditions)
    interpolated: np.ndarray  # (metrics, conditions)

    @classmethod
    def of(cls, rows: pd.DataFrame, anchors: pd.DataFrame, *, metrics: list[str]) -> "_Field":
        names = [name for name in rows if name.startswith("covariate.") and name in anchors] + ["perturbation"]
        both = pd.concat([rows[names].astype(str), anchors[names].astype(str)], ignore_index=True)
        unit, context, _ = conditions_of(both)
        place = {name: number for number, name in enumerate(metrics)}
        metric = rows["metric"].map(place).to_numpy(int)
        shape = (len(metrics), len(context))
        beside = anchors["metric"].map(place).to_numpy(float)
        planes = []
        for name in (REPLICATE, INTERPOLATED):
            which = (anchors["reference"] == name).to_numpy() & ~np.isnan(beside)
            at = beside[which].astype(int) * shape[1] + unit[len(rows) :][which]
            planes.append(_mean(at, anchors["value"].to_numpy(float)[which], shape))
        unit, half = unit[: len(rows)], rows["value_half"].to_numpy(float)
        same = [name for name in ("metric", "level", "split", "split_seed", "ablation", "seed") if name in rows]
        task = rows.groupby(same, observed=True, dropna=False).ngroup().to_numpy()
        response = (rows["model"].astype(str) == MEAN_RESPONSE).to_numpy()
        width = (task.max() + 1, len(context))
        baseline = _mean((task * width[1] + unit)[response], half[response], width)
        return cls(
            rows=rows[["metric", "level", "series", "model"]],
            unit=unit,
            metric=metric,
            context=context,
            half=half,
            baseline=baseline[task, unit],
            replicate=planes[0],
            interpolated=planes[1],
        )

    def scaled(self, scales: Mapping[str, Scale]) -> pd.DataFrame:
        groups = self.rows.groupby(["metric", "level", "series"], observed=True, sort=True)
        column, frame = groups.ngroup().to_numpy(), groups.size().index.to_frame(index=False)
        replicate = self.replicate[self.metric, self.unit]
        kept = ~(np.isnan(self.half) | np.isnan(self.baseline) | np.isnan(replicate))
        shape = (len(self.context), len(frame))
        at = (self.unit * shape[1] + column)[kept]
        u, b, r = (_mean(at, values[kept], shape) for values in (self.half, self.baseline, replicate))
        sign = frame["metric"].astype(str).map({name: scale.sign for name, scale in scales.items()}).to_numpy(float)
        weights = macro_weights(~np.isnan(r), self.context)
        means = [_weighted(weights, values) for values in (u, b, r)]
        known = calibrated(sign * (r - b), weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = (means[0] - means[1]) / (means[2] - means[1])
            reaches = sign * (means[0] - means[2]) >= 0
        frame = frame.assign(
            half=means[0],
            baseline_half=means[1],
            replicate_half=means[2],
            scaled=np.where(known & np.isfinite(scale), scale, np.nan) + 0.0,
            scaled_status=np.select([~np.isfinite(means[0]), ~known], ["failed_prediction", "uncalibrated"], ""),
            reaches=reaches,
            scaled_conditions=(~np.isnan(r)).sum(axis=0),
        )
        return frame[frame["scaled_conditions"] > 0].reset_index(drop=True)[SCALED]

    def bounds(self, scales: Mapping[str, Scale], *, at: np.ndarray) -> pd.DataFrame:
        """``at``: the rows of the lowest level, (rows,)."""
        planes = {REPLICATE: self.replicate, INTERPOLATED: self.interpolated}
        for model in (NO_CHANGE, MEAN_RESPONSE):
            which = at & (self.rows["model"].astype(str) == model).to_numpy() & ~np.isnan(self.half)
            place = self.metric[which] * self.replicate.shape[1] + self.unit[which]
            planes[model] = _mean(place, self.half[which], self.replicate.shape)
        found = []
        for number, (name, scale) in enumerate(scales.items()):
            values = {anchor: plane[number] for anchor, plane in planes.items()}
            present = [anchor for anchor, value in values.items() if not np.isnan(value).all()]
            if REPLICATE not in present or MEAN_RESPONSE not in present:
                continue
            kept = ~np.isnan([values[anchor] for anchor in present]).any(axis=0)
            weights = macro_weights(kept[:, None], self.context)
            row = {anchor: float(_weighted(weights, value[:, None])[0]) for anchor, value in values.items()}
            row |= {anchor: np.nan for anchor in values if anchor not in present}
            # Against the mean response as centre, the mean response is no prediction at all, so control stands in.
            negative = values[NO_CHANGE if "delta_mean" in name.split("/") else MEAN_RESPONSE]
            share = dynamic_range(values[INTERPOLATED], negative, best=np.nan if scale.best is None else scale.best)
            better = better_share(values[INTERPOLATED], negative, sign=scale.sign)
            gain = scale.sign * (values[REPLICATE] - values[MEAN_RESPONSE])
            found.append(
                {"metric": name, **row, "dynamic_range": share, "better": better}
                | {"weak": bool(share < WEAK_RANGE or better < WEAK_BETTER), "conditions": int(kept.sum())}
                | {"calibrated": bool(calibrated(np.where(kept, gain, np.nan)[:, None], weights)[0])}
            )
        return pd.DataFrame(found, columns=BOUNDS)


def by_effect(rows: pd.DataFrame) -> pd.DataFrame:
    """Macro means in thirds of the conditions by effect: the RMSE between condition and control, which no_change has."""
    unit, context, _ = conditions_of(rows)
    value = rows["value"].to_numpy(float)
    still = (rows["model"].astype(str) == NO_CHANGE).to_numpy() & (rows["metric"] == EFFECT).to_numpy()
    still &= np.isfinite(value)
    effect = _mean(unit[still], value[still], (len(context),))
    if np.isnan(effect).all():
        return pd.DataFrame(columns=EFFECTS)
    cuts = np.nanquantile(effect, [1 / 3, 2 / 3])
    third = np.where(np.isnan(effect), -1, np.searchsorted(cuts, effect, side="right"))
    groups = rows.groupby(["metric", "series"], observed=True, sort=True)
    column, frame = groups.ngroup().to_numpy(), groups.size().index.to_frame(index=False)
    kept = ~np.isnan(value)
    values = _mean((unit * len(frame) + column)[kept], value[kept], (len(context), len(frame)))
    parts = []
    for number, name in enumerate(TERTILES):
        inside = third == number
        if inside.any():
            here = np.where(inside[:, None], values, np.nan)
            weights = macro_weights(~np.isnan(here), context)
            part = frame.assign(tertile=name, mean=_weighted(weights, here), conditions=(weights > 0).sum(axis=0))
            parts.append(part.assign(low=effect[inside].min(), high=effect[inside].max()))
    return pd.concat(parts, ignore_index=True)[EFFECTS]


def _among(frame: pd.DataFrame, others: pd.DataFrame, names: list[str]) -> np.ndarray:
    listed = set(others[names].itertuples(index=False, name=None))
    return np.array([row in listed for row in frame[names].itertuples(index=False, name=None)], dtype=bool)


def macro_weights(kept: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Weight of each condition in the mean over contexts of their means, (conditions, columns); columns sum to 1."""
    inside = np.zeros((context.max() + 1, kept.shape[1]))
    np.add.at(inside, context, kept)
    return kept / np.maximum(inside[context], 1) / np.maximum((inside > 0).sum(axis=0), 1)


def calibrated(gain: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Whether the mean gain exceeds 2 standard errors over conditions, (conditions, columns) x weights -> (columns,).

    The error of a weighted mean, √(n/(n − 1)·Σ w²(g − ḡ)²), is s/√n for one context. Never from one condition.
    """
    mean, count = _weighted(weights, gain), (weights > 0).sum(axis=0)
    squares = _weighted(weights**2, np.where(weights > 0, gain - mean, 0.0) ** 2)
    with np.errstate(invalid="ignore"):
        return (count > 1) & np.isfinite(mean) & (mean > 2 * np.sqrt(squares * count / np.maximum(count - 1, 1)))


def dynamic_range(positive: np.ndarray, negative: np.ndarray, *, best: float) -> float:
    """Mean of (pos − neg)/(best − neg), each clipped to [−1, 1], over at least 10 conditions, else NaN (DRF)."""
    span = best - negative
    valid = np.isfinite(positive) & np.isfinite(span) & (span != 0)
    share = np.clip((positive[valid] - negative[valid]) / span[valid], -1, 1)
    return float(share.mean()) if valid.sum() >= FEWEST else float("nan")


def better_share(positive: np.ndarray, negative: np.ndarray, *, sign: int) -> float:
    """Share of conditions where the positive control beats the negative one, ties ½ (BDS); chance is 0.5."""
    gain = sign * (positive - negative)
    gain = gain[~np.isnan(gain)]
    return float(((gain > 0) + 0.5 * (gain == 0)).mean()) if len(gain) else float("nan")


def _weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(columns,); NaN where no condition has a weight."""
    total = (weights * np.where(weights > 0, values, 0.0)).sum(axis=0)
    return np.where((weights > 0).any(axis=0), total, np.nan)


def _mean(place: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Mean of the values that fall on each place of an array, NaN where none does."""
    size = int(np.prod(shape))
    count, total = np.bincount(place, minlength=size), np.bincount(place, values, minlength=size)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).reshape(shape)
