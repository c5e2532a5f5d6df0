"""What a value means on these data: floor, ceiling, scaled score, strata by effect; an anchor is a column beside models.

Everything here is on the scale of ``value_half``: the truth is one half of the observed cells, for models, baselines and
the replicate alike. Formulas are those of ``metrics.calibration``, restated on the long table; means are macro means.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from perturbray.results.cube import conditions_of, texts
from perturbray.results.scales import Scale

NO_CHANGE, MEAN_RESPONSE = "no_change", "perturbed_mean"  # values of the column ``model``
REPLICATE, INTERPOLATED = "split_half", "interpolated_duplicate"  # values of the column ``reference`` of anchors
FEWEST = 10  # conditions that a dynamic range rests on
WEAK_RANGE, WEAK_BETTER = 0.2, 0.8  # a metric below either says little on these data
TERTILES = ("weak", "medium", "strong")
DE_GENES = ("0", "1-9", "10-99", ">=100")  # differentially expressed genes of a condition, observed
MEASURES = (
    "the RMSE between condition and control",
    "the distance between condition and control: the energy statistic with squared distances, without the bias of few cells",
)
SOLVED = 0.9  # of the way from no change to the replicate: a condition that the mean response solves is saturated
EFFECT = "rmse/average"  # of no_change: the distance of a condition from its control

SCALED = [
    *("metric", "level", "series", "half", "baseline_half", "replicate_half"),
    *("scaled", "scaled_status", "reaches", "scaled_conditions"),
]
"""``half``, ``baseline_half``, ``replicate_half``: u, b and r, macro means on the conditions that have all three.
``scaled`` is (u - b)/(r - b), not clipped, or NaN with ``scaled_status``. ``reaches``: u is at least as good as r."""
BOUNDS = [
    *("metric", NO_CHANGE, MEAN_RESPONSE, REPLICATE, INTERPOLATED),
    *("dynamic_range", "better", "weak", "calibrated", "saturated", "conditions"),
]
"""A row a metric, at the lowest level. ``dynamic_range``, ``better``: DRF and BDS of the interpolated duplicate (the
replicate where a metric has none) against the mean response; ``weak``: either is too low; ``calibrated``: the replicate is
surely better than the mean response; ``saturated``: conditions that the mean response solves, as ``Field.saturated``."""
EFFECTS = ["by", "stratum", "metric", "series", "mean", "conditions", "low", "high"]
"""Headline values in strata of the conditions: ``by`` tertile of effect, number of differentially expressed genes
(``de_genes``), or whether the mean response solves them (``saturated``, which depends on the metric). ``mean``: of
``value``, macro, at the lowest level. ``low``, ``high``: the least and largest effect, or number of genes."""


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """The frames that put a sweep's values into their range; empty where the folder has no anchors."""

    scaled: pd.DataFrame  # one row a (metric, level, series)
    bounds: pd.DataFrame  # one row a metric
    effects: pd.DataFrame  # one row a (by, stratum, metric, series)
    measure: str = MEASURES[0]  # what the effect of a condition is

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
        at = (rows["level"] == lowest).to_numpy()
        several = "dataset" in rows and len(rows["dataset"].unique()) > 1  # anchors do not say of which they are
        field = None
        if anchors is not None and len(anchors) and not several and "value_half" in rows:
            field = _Field.of(rows, anchors, metrics=list(scales))
        effects = in_strata(rows[at], None if field is None else field.strata(scales, at=at))
        effects.loc[_among(effects, failed[failed["level"] == lowest], ["metric", "series"]), "mean"] = np.nan
        if field is None:
            return cls(scaled=found.scaled, bounds=found.bounds, effects=effects)
        scaled = field.scaled(scales)
        lost = _among(scaled, failed, ["metric", "level", "series"])
        scaled.loc[lost, ["half", "scaled"]] = np.nan
        scaled.loc[lost, "scaled_status"], scaled.loc[lost, "reaches"] = "failed_prediction", False
        return cls(
            scaled=scaled,
            bounds=field.bounds(scales, at=at),
            effects=effects,
            measure=MEASURES[int(np.isfinite(field.effect).any())],
        )


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
    effect: np.ndarray  # (conditions,) observed distance from control, NaN where anchors do not say
    de_genes: np.ndarray  # (conditions,) observed differentially expressed genes, NaN where they are not tested

    @classmethod
    def of(cls, rows: pd.DataFrame, anchors: pd.DataFrame, *, metrics: list[str]) -> "_Field":
        names = [name for name in rows if name.startswith("covariate.") and name in anchors] + ["perturbation"]
        both = {
            name: union_categoricals([texts(rows[name]), texts(anchors[name])], sort_categories=True) for name in names
        }
        unit, context, _ = conditions_of(pd.DataFrame(both))
        place = {name: number for number, name in enumerate(metrics)}
        metric = rows["metric"].map(place).to_numpy(int)
        shape = (len(metrics), len(context))
        beside = anchors["metric"].map(place).to_numpy(float)
        planes = []
        for name in (REPLICATE, INTERPOLATED):
            which = (anchors["reference"] == name).to_numpy() & ~np.isnan(beside)
            at = beside[which].astype(int) * shape[1] + unit[len(rows) :][which]
            planes.append(_mean(at, anchors["value"].to_numpy(float)[which], shape))
        sizes = []
        for name in ("effect_size", "de_genes"):
            size = anchors[name].to_numpy(float) if name in anchors else np.full(len(anchors), np.nan)
            which = np.isfinite(size) & ((size >= 0) | (name != "de_genes"))
            sizes.append(_mean(unit[len(rows) :][which], size[which], (len(context),)))
        unit, half = unit[: len(rows)], rows["value_half"].to_numpy(float)
        same = [name for name in ("metric", "level", "split", "split_seed", "ablation", "seed") if name in rows]
        task = rows.groupby(same, observed=True, dropna=False).ngroup().to_numpy()
        response = (rows["model"] == MEAN_RESPONSE).to_numpy()
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
            effect=sizes[0],
            de_genes=sizes[1],
        )

    def planes(self, *, at: np.ndarray) -> dict[str, np.ndarray]:
        """Anchors and baselines on halves, each (metrics, conditions); ``at``: the rows of the lowest level, (rows,)."""
        found = {REPLICATE: self.replicate, INTERPOLATED: self.interpolated}
        for model in (NO_CHANGE, MEAN_RESPONSE):
            which = at & (self.rows["model"] == model).to_numpy() & ~np.isnan(self.half)
            place = self.metric[which] * self.replicate.shape[1] + self.unit[which]
            found[model] = _mean(place, self.half[which], self.replicate.shape)
        return found

    def saturated(self, scales: Mapping[str, Scale], *, at: np.ndarray) -> np.ndarray:
        """Whether the mean response solves a condition, (metrics, conditions): 1 or 0, NaN where that cannot be said.

        It does if it goes at least ``SOLVED`` of the way from no change to the replicate, where the replicate is better.
        """
        planes = self.planes(at=at)
        sign = np.array([scale.sign for scale in scales.values()])[:, None]
        with np.errstate(invalid="ignore"):
            way = sign * (planes[REPLICATE] - planes[NO_CHANGE])
            gone = sign * (planes[MEAN_RESPONSE] - planes[NO_CHANGE])
            return np.where((way > 0) & np.isfinite(gone), gone >= SOLVED * way, np.nan)

    def strata(self, scales: Mapping[str, Scale], *, at: np.ndarray) -> "Strata":
        """For the rows of the lowest level."""
        saturated = self.saturated(scales, at=at)
        return Strata(
            unit=self.unit[at],
            effect=self.effect,
            de_genes=self.de_genes,
            saturated=dict(zip(scales, saturated, strict=True)),
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
        planes, saturated = self.planes(at=at), self.saturated(scales, at=at)
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
            positive = values[INTERPOLATED if INTERPOLATED in present else REPLICATE]
            share = dynamic_range(positive, negative, best=np.nan if scale.best is None else scale.best)
            better = better_share(positive, negative, sign=scale.sign)
            gain = scale.sign * (values[REPLICATE] - values[MEAN_RESPONSE])
            found.append(
                {"metric": name, **row, "dynamic_range": share, "better": better}
                | {"weak": bool(share < WEAK_RANGE or better < WEAK_BETTER), "conditions": int(kept.sum())}
                | {"saturated": int(np.nansum(saturated[number]))}
                | {"calibrated": bool(calibrated(np.where(kept, gain, np.nan)[:, None], weights)[0])}
            )
        return pd.DataFrame(found, columns=BOUNDS)


@dataclass(frozen=True, kw_only=True)
class Strata:
    """What conditions are parted by."""

    unit: np.ndarray  # (rows,) condition
    effect: np.ndarray  # (conditions,)
    de_genes: np.ndarray  # (conditions,)
    saturated: Mapping[str, np.ndarray]  # by metric (conditions,): 1, 0 or NaN


def in_strata(rows: pd.DataFrame, strata: Strata | None) -> pd.DataFrame:
    """Macro means in strata of the conditions, by the size of what is observed and by what the mean response solves.

    Without anchors by thirds alone, of the RMSE between condition and control, which no_change has.
    """
    unit, context, _ = conditions_of(rows)
    value = rows["value"].to_numpy(float)
    if strata is None or np.isnan(strata.effect).all():
        still = (rows["model"] == NO_CHANGE).to_numpy() & (rows["metric"] == EFFECT).to_numpy()
        still &= np.isfinite(value)
        size, genes = _mean(unit[still], value[still], (len(context),)), np.full(len(context), np.nan)
    else:
        size, genes = (_mean(unit, part[strata.unit], (len(context),)) for part in (strata.effect, strata.de_genes))
    groups = rows.groupby(["metric", "series"], observed=True, sort=True)
    column, frame = groups.ngroup().to_numpy(), groups.size().index.to_frame(index=False)
    kept = ~np.isnan(value)
    values = _mean((unit * len(frame) + column)[kept], value[kept], (len(context), len(frame)))
    parts = []
    for by, names, number, of in (
        ("effect", TERTILES, _third(size), size),
        (
            "de_genes",
            DE_GENES,
            np.where(np.isnan(genes), -1, np.searchsorted([1, 10, 100], genes, side="right")),
            genes,
        ),
    ):
        for code, name in enumerate(names):
            inside = number == code
            if inside.any():
                part = _stratum(frame, values, context, inside[:, None], by=by, stratum=name)
                parts.append(part.assign(low=of[inside].min(), high=of[inside].max()))
    if strata is not None:
        solved = {name: _mean(unit, part[strata.unit], (len(context),)) for name, part in strata.saturated.items()}
        mark = np.stack([solved[name] for name in frame["metric"].astype(str)], axis=1)
        for code, name in ((1, "saturated"), (0, "not saturated")):
            if (mark == code).any():
                part = _stratum(frame, values, context, mark == code, by="saturated", stratum=name)
                parts.append(part.assign(low=np.nan, high=np.nan))
    return pd.concat(parts, ignore_index=True)[EFFECTS] if parts else pd.DataFrame(columns=EFFECTS)


def _third(size: np.ndarray) -> np.ndarray:
    """The third of each condition, -1 where its size is not known."""
    if np.isnan(size).all():
        return np.full(len(size), -1)
    cuts = np.nanquantile(size, [1 / 3, 2 / 3])
    return np.where(np.isnan(size), -1, np.searchsorted(cuts, size, side="right"))


def _stratum(
    frame: pd.DataFrame, values: np.ndarray, context: np.ndarray, inside: np.ndarray, **names: str
) -> pd.DataFrame:
    """Macro means of the columns over the conditions inside, (conditions, columns) or (conditions, 1) bool."""
    here = np.where(inside, values, np.nan)
    weights = macro_weights(~np.isnan(here), context)
    return frame.assign(**names, mean=_weighted(weights, here), conditions=(weights > 0).sum(axis=0))


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
