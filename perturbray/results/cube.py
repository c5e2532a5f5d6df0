"""The values of a sweep as an array, a row a condition, a column a (metric, level, series); columns compare here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

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

AT_ONCE = 20_000_000  # differences of pairs in samples, above which ``apart`` takes fewer samples ...
FEWEST_DRAWS = 400  # ... but no fewer than this

_COLUMN = ["metric", "level", "series"]


@dataclass(frozen=True, kw_only=True)
class Cube:
    """Values of one stratum, seeds averaged; what seeds add to an interval is kept beside them."""

    columns: pd.DataFrame  # metric, level, series, failed, flagged, seeds, sd_seeds: one row a column
    values: np.ndarray  # (conditions, columns), NaN where undefined or absent
    undefined: np.ndarray  # (columns,) conditions that the truth leaves undefined
    context: np.ndarray  # (conditions,) codes
    perturbation: np.ndarray  # (conditions,) codes
    names: np.ndarray  # (conditions,) str, "A549 · aspirin"
    means: np.ndarray  # (columns,) macro means
    draws: np.ndarray  # (resamples, columns) macro means of samples of the conditions
    trials: np.ndarray  # (seeds, columns) macro means of trials, NaN where there is none
    seed_draws: np.ndarray  # (resamples, columns) deviations of samples of the seeds
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
        scores = np.where(scored, value, np.nan)
        columns[["sd_seeds", "seeds"]] = _spread(rows, value=scores, context=context[unit])
        trained = _trials(rows, value=scores, column=column, context=context[unit], columns=len(columns))
        return cls(
            columns=columns,
            values=values,
            undefined=(count(undefined) > 0).sum(axis=0),
            context=context,
            perturbation=perturbation,
            names=_names(rows, unit),
            means=np.where(columns["failed"] > 0, np.nan, intervals.macro(values, context)),
            draws=intervals.resampled(values, context=context, perturbation=perturbation, **bootstrap),
            trials=trained,
            seed_draws=intervals.of_seeds(trained, **bootstrap),
            bootstrap=bootstrap,
        )

    @property
    def seeds(self) -> np.ndarray:
        """Seeds of each column, (columns,)."""
        return np.isfinite(self.trials).sum(axis=0)

    @property
    def failed(self) -> np.ndarray:
        """Whether a prediction of the column failed, (columns,)."""
        return (self.columns["failed"] > 0).to_numpy() | np.isinf(self.values).any(axis=0)

    @cached_property
    def _found(self) -> dict[tuple, int]:
        return {tuple(one): at for at, one in enumerate(self.columns[_COLUMN].itertuples(index=False))}

    def find(self, *, metric: str, level: object, series: str) -> int | None:
        """The number of a column, or None."""
        return self._found.get((metric, level, series))

    def joint(self, columns: np.ndarray) -> "Joint":
        """Columns on the conditions that all of them have."""
        columns = np.asarray(columns, int)
        here = ~np.isnan(self.values[:, columns])
        both = here.all(axis=1)
        means, draws = self.means[columns], self.draws[:, columns]
        if (here != both[:, None]).any():
            values = np.where(both[:, None], self.values[:, columns], np.nan)
            means = intervals.macro(values, self.context)
            again = {"context": self.context, "perturbation": self.perturbation, **self.bootstrap}
            draws = intervals.resampled(values, **again)
        seeds = self.seeds[columns]
        return Joint(
            means=means,
            draws=draws,
            seed_draws=self.seed_draws[:, columns],
            seeds=int(seeds[seeds > 1].min()) if (seeds > 1).any() else 1,
            conditions=int(both.sum()),
            failed=bool(self.failed[columns].any()),
        )

    def differences(self, left: np.ndarray, right: np.ndarray) -> pd.DataFrame:
        """Columns ``left`` minus columns ``right``, a row a pair: difference, low, high, and the conditions of both.

        All NaN where a prediction failed; no interval from fewer than ``intervals.FEWEST`` conditions.
        """
        left, right = np.asarray(left, int), np.asarray(right, int)
        estimate, draws, shared = self._gaps(left, right)
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

    def apart(self, columns: np.ndarray) -> np.ndarray:
        """Which columns can be told apart, (columns, columns) bool: paired, and corrected for the number of pairs.

        The intervals of all pairs hold at once (``intervals.simultaneous``), so equal columns are told apart in no more
        than 1 of 20 sweeps, however many there are. A failed prediction is told from one that did not fail.
        """
        columns = np.asarray(columns, int)
        gap, size = np.full((2, len(columns), len(columns)), np.nan)
        step = int(np.clip(len(columns) ** 2 * len(self.draws) // AT_ONCE, 1, max(1, len(self.draws) // FEWEST_DRAWS)))
        thinned = replace(self, draws=self.draws[::step], seed_draws=self.seed_draws[::step]) if step > 1 else self
        largest = np.zeros(len(thinned.draws))
        for at in range(len(columns) - 1):
            rest = columns[at + 1 :]
            estimate, draws, shared = thinned._gaps(np.full(len(rest), columns[at]), rest, tails=True)
            none = np.isnan(estimate) | (shared < intervals.FEWEST)
            scale, highest = intervals.deviation(np.where(none, np.nan, draws))
            largest = np.maximum(largest, highest)
            gap[at, at + 1 :], size[at, at + 1 :] = np.abs(estimate), scale
        with np.errstate(invalid="ignore"):
            found = gap > intervals.critical(largest) * size
        infinite = np.isinf(self.means[columns])
        found |= np.triu(infinite[:, None] != infinite)
        return found | found.T

    def _gaps(
        self, left: np.ndarray, right: np.ndarray, *, tails: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Differences of pairs, (pairs,), their draws, (resamples, pairs), and the conditions of both, (pairs,).

        ``tails``: those of few conditions too, where the draws are taken for a scale and not for their percentiles.
        """
        here = ~np.isnan(self.values)
        both = here[:, left] & here[:, right]
        with np.errstate(invalid="ignore"):  # inf - inf, of two failed predictions: no difference, as below
            estimate, draws = self.means[left] - self.means[right], self.draws[:, left] - self.draws[:, right]
        for pair in np.flatnonzero((here[:, left] != here[:, right]).any(axis=0)):  # split seeds that are still to run
            values = np.where(both[:, [pair]], self.values[:, [left[pair], right[pair]]], np.nan)
            estimate[pair] = np.subtract(*intervals.macro(values, self.context))
            again = {"context": self.context, "perturbation": self.perturbation, **self.bootstrap}
            draws[:, pair] = np.subtract(*intervals.resampled(values, **again).T)[: len(draws)]
        shared, failed, seeds = both.sum(axis=0), self.failed, self.seeds
        estimate[failed[left] | failed[right] | (shared == 0)] = np.nan
        fewer, more = np.minimum(seeds[left], seeds[right]), np.maximum(seeds[left], seeds[right])
        several = np.where(fewer > 1, fewer, more)  # one seed does not vary, and has no degrees of freedom to count
        of_seeds = self.seed_draws[:, left] - self.seed_draws[:, right]
        return estimate, intervals.nested(draws, of_seeds, several, conditions=shared if tails else None), shared


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Some columns on the conditions that all of them have."""

    means: np.ndarray  # (columns,)
    draws: np.ndarray  # (resamples, columns)
    seed_draws: np.ndarray  # (resamples, columns)
    seeds: int  # the fewest of a column that has several, else 1
    conditions: int
    failed: bool  # a prediction of a column failed

    def estimate(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """A function of the means, (..., columns) -> (..., parts): its value, (parts,), and its draws, (resamples, parts)."""
        value, inside = function(self.means), function(self.draws)
        between = function(self.means + self.seed_draws) - value
        enough = np.full(inside.shape[1], self.conditions)
        return value, intervals.nested(inside, between, np.full(inside.shape[1], self.seeds), conditions=enough)


def conditions_of(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Condition of each row, (rows,); context and perturbation of each condition, (conditions,); all as codes."""
    covariates = [name for name in rows.columns if name.startswith("covariate.")]
    options = {"observed": True, "dropna": False}
    perturbation = rows.groupby("perturbation", **options).ngroup().to_numpy()
    context = rows.groupby(covariates, **options).ngroup().to_numpy() if covariates else np.zeros(len(rows), int)
    pair = context * (perturbation.max() + 1) + perturbation
    first, unit = np.unique(pair, return_index=True, return_inverse=True)[1:]
    return unit, context[first], perturbation[first]


def texts(values: pd.Series) -> pd.Categorical:
    """What ``astype(str)`` gives, as categories in their order: of a million rows it makes only the texts that differ."""
    codes, found = pd.factorize(values, use_na_sentinel=False)
    names, places = np.unique([str(value) for value in np.asarray(found, object)], return_inverse=True)
    return pd.Categorical.from_codes(places[codes], names.astype(object))


def _names(rows: pd.DataFrame, unit: np.ndarray) -> np.ndarray:
    """Covariates and perturbation of each condition, (conditions,)."""
    first = rows.iloc[np.unique(unit, return_index=True)[1]]
    columns = [*[name for name in rows.columns if name.startswith("covariate.")], "perturbation"]
    parts = [first[name].astype(str).to_numpy() for name in columns]
    return np.array([" · ".join(part) for part in zip(*parts, strict=True)], dtype=object)


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


def _trials(
    rows: pd.DataFrame, *, value: np.ndarray, column: np.ndarray, context: np.ndarray, columns: int
) -> np.ndarray:
    """Macro means of trials, (seeds, columns), NaN where there is none; a seed is one of training and of the split."""
    names = [name for name in ("seed", "split_seed") if name in rows]
    seed = rows.groupby(names, observed=True, dropna=False).ngroup().to_numpy() if names else np.zeros(len(rows), int)
    shape = (seed.max() + 1, columns, context.max() + 1)
    place = (seed * shape[1] + column) * shape[2] + context
    kept = np.isfinite(value)
    count = np.bincount(place[kept], minlength=np.prod(shape)).reshape(shape)
    total = np.bincount(place[kept], value[kept], minlength=np.prod(shape)).reshape(shape)
    inside = total / np.maximum(count, 1)
    contexts = (count > 0).sum(axis=2)
    return np.where(contexts > 0, (inside * (count > 0)).sum(axis=2) / np.maximum(contexts, 1), np.nan)


def _spread(rows: pd.DataFrame, *, value: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Sd over trials of a trial's macro mean, and the number of trials: (columns, 2)."""
    frame = rows[[*_COLUMN, "key"]].assign(value=value, context=context)
    within = frame.groupby([*_COLUMN, "key", "context"], observed=True)["value"].mean()
    trial = within.groupby([*_COLUMN, "key"], observed=True).mean()
    finite = trial.where(np.isfinite(trial))
    return finite.groupby(_COLUMN, observed=True).agg(["std", "size"]).sort_index().to_numpy()
