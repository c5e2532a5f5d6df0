"""What a sweep says: means, paired differences, places, changes, from the long table alone; a statistic is a frame.

Rules (section 7 and 8 of the metric specification): seeds are averaged per condition first, conditions within a context
next, contexts last. A value that the truth leaves undefined is left out for every model alike; a failed prediction is
never left out, so that no model gains by failing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from perturbray.errors import InputError, nearest
from perturbray.results import intervals, marks
from perturbray.results.anchors import REPLICATE, Anchors
from perturbray.results.cube import UNDEFINED, Cube
from perturbray.results.reader import Reader, Results
from perturbray.results.scales import Scale
from perturbray.results.table import read_anchors, read_plan, read_reference, replace_file

COMMON = "common"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The frames of a sweep. A series is a line of the figure: a model, with the fields in which its trials differ."""

    plan: dict
    scales: dict[str, Scale]
    trials: pd.DataFrame  # one row a finished trial; columns series, level, x beside the constant columns
    means: pd.DataFrame  # one row a (stratum, metric, level, series)
    differences: pd.DataFrame  # series - reference, per (stratum, metric, level); verdict: better, worse, tie or ""
    changes: pd.DataFrame  # highest - lowest level on the same common conditions, per (metric, series)
    statuses: pd.DataFrame  # values that carry a reason, per (status, series)
    truth: pd.DataFrame  # measured against analytic, per (reference, metric); empty without a reference
    anchors: Anchors  # floor, ceiling and scaled scores of the common conditions
    controls: dict  # where effects take their control cells from: source, and the cells that say what it means
    cube: Cube | None = None  # the common conditions, for what compares columns in ways of its own
    others: int = 0  # result files of other plans in the folder, left out
    half_rows: pd.DataFrame | None = (
        None  # at the base level against half of the cells, replicates too; None: no anchors
    )

    @property
    def headline(self) -> list[str]:
        """Metrics of the headline that have values, the plan's order; without one in the plan, all."""
        present = set(self.means["metric"]) if len(self.means) else set()
        return [name for name in self.plan.get("headline") or self.scales if name in present]

    @cached_property
    def series(self) -> list[str]:
        """Series with finished trials, in the plan's order of models, so that it does not change as trials end."""
        planned = [trial.get("columns", {}).get("model") for trial in self.plan.get("trials", ())]
        place = {model: number for number, model in enumerate(dict.fromkeys(planned))}
        found = self.trials.drop_duplicates("series")
        found = found.assign(place=found["model"].map(place).fillna(len(place)))
        return list(found.sort_values(["place", "series"])["series"])

    @cached_property
    def baselines(self) -> set[str]:
        """Those series that are baselines."""
        return set(self.trials.loc[self.trials["baseline"], "series"])

    @cached_property
    def levels(self) -> pd.DataFrame:
        """Levels with finished trials by rising x: columns ``level`` and ``x``."""
        return _levels(self.trials)

    @property
    def of_data(self) -> bool:
        """Whether the levels are amounts of training data."""
        return str(self.plan.get("x", "")).startswith("train")

    @property
    def base(self) -> object:
        """The level at which nothing is taken away: the lowest, or the most data."""
        return self.levels["level"].iloc[-1 if self.of_data else 0]

    def board(self, level: object, *, metrics: Sequence[str] | None = None, stratum: str = COMMON) -> pd.DataFrame:
        """Means beside differences at one level, a row a (metric, series)."""
        at = self.means[(self.means["level"] == level) & (self.means["stratum"] == stratum)]
        at = at[at["metric"].isin(metrics or self.headline)]
        at = at.merge(self.differences, on=["stratum", "metric", "level", "series"], how="left")
        known = self.anchors.scaled.assign(stratum=COMMON)
        return at.merge(known, on=["stratum", "metric", "level", "series"], how="left")

    def order(self, level: object) -> list[str]:
        """Series by the first headline metric at a level, best first, models before baselines."""
        if not self.headline:
            return []
        at = self.board(level, metrics=self.headline[:1])
        score = -self.scales[self.headline[0]].sign * at["mean"]
        return list(at.assign(score=score).sort_values(["baseline", "score", "series"])["series"])

    def write(self, path: Path) -> None:
        """Means, differences and scaled scores as one CSV; beside it ``strata.csv``, means by size of effect."""
        joined = self.means.merge(self.differences, on=["stratum", "metric", "level", "series"], how="left")
        if len(self.anchors.scaled):
            known = self.anchors.scaled.assign(stratum=COMMON)
            joined = joined.merge(known, on=["stratum", "metric", "level", "series"], how="left")
        replace_file(path, lambda target: joined.to_csv(target, index=False))
        strata = self.anchors.effects
        replace_file(path.with_name("strata.csv"), lambda target: strata.to_csv(target, index=False))


def summarise(
    table: Results | pd.DataFrame,
    plan: Mapping,
    *,
    reference: str | None = None,
    analytic: pd.DataFrame | None = None,
    anchors: pd.DataFrame | None = None,
    resamples: int = intervals.RESAMPLES,
    seed: int = intervals.SEED,
) -> Summary:
    """Summarise results, or the long table of them.

    ``reference`` names the series that differences are taken to; by default the best baseline of each level and metric,
    which is the hardest of them, chosen on the same conditions. ``analytic``: the frame of ``read_reference``;
    ``anchors``: of ``read_anchors``.
    """
    plan, results = dict(plan), table if isinstance(table, Results) else Results.of(table)
    rows = results.rows
    recorded = {entry["name"]: entry for entry in plan.get("metrics", ())}
    found = sorted(set(rows["metric"].dropna()))
    names = [name for name in recorded if name in found] + [name for name in found if name not in recorded]
    scales = {name: Scale.of(name, recorded.get(name)) for name in names}
    runs = _runs(results.trials, plan)
    if reference is not None and reference not in set(runs["series"]):
        raise InputError(f"no finished trial is of {reference!r}: {nearest(reference, runs['series'])}")
    bootstrap = {"resamples": resamples, "seed": seed}
    means, differences, changes, common_cube = [], [], [], None
    if len(rows):
        rows = rows.merge(runs[["key", "series", "level", "x", "split_seed"]], on="key")
    common = _of_stratum(rows, COMMON)
    for stratum in sorted(set(rows["stratum"].dropna()), key=lambda name: (name != COMMON, name)):
        cube = Cube.of(common if stratum == COMMON else _of_stratum(rows, stratum), bootstrap=bootstrap)
        frame = _means(cube, runs=runs, stratum=stratum)
        difference, places = _differences(cube, frame, scales=scales, reference=reference)
        means.append(frame.merge(places, on=["metric", "level", "series"], how="left"))
        differences.append(difference.assign(stratum=stratum))
        if stratum == COMMON:
            common_cube = cube
            changes.append(_changes(cube, levels=_levels(runs), scales=scales))
    means = _stack(means, MEANS)
    lost = means[(means["stratum"] == COMMON) & ((means["failed"] > 0) | (means["status"] == "failed_prediction"))]
    truth = _truth(rows, runs, analytic) if analytic is not None and len(rows) else pd.DataFrame()
    found = Summary(
        plan=plan,
        scales=scales,
        trials=runs,
        means=means,
        differences=_stack(differences, DIFFERENCES),
        changes=_stack(changes, CHANGES),
        statuses=_statuses(rows),
        truth=truth,
        anchors=Anchors.of(common, anchors, scales=scales, failed=lost) if len(rows) else Anchors.none(),
        controls=_controls(common, plan),
        cube=common_cube,
        others=results.others,
    )
    return replace(found, half_rows=_against_halves(common, anchors, found)) if anchors is not None else found


def summary_of(folder: str | Path, *, reader: Reader | None = None) -> Summary:
    """Of a results folder as it is now, with its anchors and what is known analytically."""
    plan, results = read_plan(folder), (reader or Reader(folder)).read()
    anchors = read_anchors(folder, keys=plan.get("anchors", ()))
    return summarise(results, plan, analytic=read_reference(folder), anchors=anchors)


MEANS = [
    *[
        "stratum",
        "metric",
        "level",
        "x",
        "series",
        "model",
        "baseline",
        "mean",
        "low",
        "high",
        "status",
        "place",
        "tied",
        "letters",
    ],
    *["sd_seeds", "seeds", "conditions", "contexts", "pooled", "median", "sd_conditions"],
    *["undefined", "failed", "flagged"],
]
"""``mean``: macro. ``low``, ``high``: 95 % interval over conditions and seeds. ``status``: why there is no interval.
``place``: of its tie group; ``letters``: series that share one cannot be told apart. Counts are of conditions: ``undefined``
by the truth, ``failed`` predictions, ``flagged`` values that count but carry a reason."""
DIFFERENCES = [
    *["stratum", "metric", "level", "series", "reference", "difference", "difference_low", "difference_high"],
    *["difference_conditions", "verdict"],
]
CHANGES = ["metric", "series", "from_level", "to_level", "change", "low", "high", "conditions", "verdict", "seeds"]


def _against_halves(rows: pd.DataFrame, anchors: pd.DataFrame, summary: Summary) -> pd.DataFrame | None:
    """Rows of the base level with ``value_half`` as their value, and below them the replicate as one more series."""
    if rows.empty or "value_half" not in rows or ("dataset" in rows and len(rows["dataset"].unique()) > 1):
        return None  # of several datasets, anchors do not say of which they are
    rows = rows[(rows["level"] == summary.base) & (rows["value_half"].notna() | rows["value"].isna())]
    covariates = [name for name in rows if name.startswith("covariate.") and name in anchors]
    replicate = anchors[(anchors["reference"] == REPLICATE) & anchors["value"].notna()]
    wanted = [*covariates, "perturbation", "metric", "value", *[name for name in ("seed",) if name in anchors]]
    replicate = replicate[wanted].assign(series=REPLICATE, key=REPLICATE, level=summary.base, status="")
    text = [*covariates, "perturbation", "metric", "status", "series", "key"]
    parts = [rows.assign(value=rows["value_half"])[[*text, "value", "level", "seed", "split_seed"]], replicate]
    if "seed" in replicate:
        split = rows.drop_duplicates("seed").set_index("seed")["split_seed"]
        parts[1] = replicate.assign(split_seed=replicate["seed"].map(split))
    parts = [part.astype(dict.fromkeys(text, str)) for part in parts]
    known = set(zip(*[parts[0][name] for name in [*covariates, "perturbation"]], strict=True))
    inside = [row in known for row in zip(*[parts[1][name] for name in [*covariates, "perturbation"]], strict=True)]
    return pd.concat([parts[0], parts[1][inside]], ignore_index=True)


def _controls(rows: pd.DataFrame, plan: Mapping) -> dict:
    """``source``; ``share``: median of n/(n + n0) over conditions, n cells and n0 of control; its ``low`` and ``high``."""
    source = rows["controls"].dropna().unique() if "controls" in rows else []
    found = {"source": ", ".join(map(str, source)) or plan.get("controls", "")}
    if not {"n_observed", "n_control"} <= set(rows.columns) or rows.empty:
        return found
    n, n0 = rows["n_observed"].to_numpy(float), rows["n_control"].to_numpy(float)
    share = n[n + n0 > 0] / (n + n0)[n + n0 > 0]
    share = share[np.isfinite(share)]
    if len(share):
        found |= {"share": float(np.median(share)), "low": float(share.min()), "high": float(share.max())}
    return found


def _of_stratum(rows: pd.DataFrame, stratum: str) -> pd.DataFrame:
    """Its rows; not a copy where there is no other stratum."""
    inside = rows["stratum"] == stratum
    return rows if inside.all() else rows[inside]


def _runs(trials: pd.DataFrame, plan: Mapping) -> pd.DataFrame:
    """One row a trial, with ``series``, ``level``, ``x`` and whether it is a baseline."""
    runs = trials.copy()
    runs["model"] = runs["model"].astype(str) if "model" in runs else runs["name"].astype(str)
    runs["series"] = _series(runs)
    runs["baseline"] = runs["model"].isin(plan.get("baselines", ()))
    level = runs["ablation.level"] if "ablation.level" in runs else pd.Series(0.0, runs.index)
    level = level.astype(object).where(level.notna(), 0.0)
    numeric = pd.to_numeric(level, errors="coerce")
    runs["level"] = numeric if numeric.notna().all() else level.astype(str)
    x = plan.get("x", "")
    runs["x"] = pd.to_numeric(runs[x if x in runs else "level"], errors="coerce")
    seed = runs["split.seed"] if "split.seed" in runs else pd.Series(0, runs.index)
    runs["split_seed"] = seed.astype(str)
    return runs


def _series(runs: pd.DataFrame) -> pd.Series:
    """The model's name, with those fields in which trials of that model differ (seeds aside).

    Trials with a ``variant`` (tuned) are told apart by it, and by fields only from others of the same variant and level:
    what was searched for anew at each level is one series.
    """
    fields = [name for name in runs if name.startswith(("model.", "training.")) or name in ("dataset", "split")]
    fields = [name for name in fields if not name.endswith("seed")]
    labels = runs["model"].copy()
    if "variant" in runs:
        labels += runs["variant"].astype(object).map(lambda text: f" ({text})" if isinstance(text, str) else "")
    for _, part in runs.groupby(labels.copy(), sort=False):
        tuned = "variant" in part and all(isinstance(text, str) and text for text in part["variant"])
        by_level = tuned and "ablation.level" in part
        alike = [group for _, group in part.groupby("ablation.level", dropna=False)] if by_level else [part]
        varying = [name for name in fields if any(len(set(map(repr, group[name]))) > 1 for group in alike)]
        for index, *values in part[varying].itertuples(name=None) if varying else ():
            shown = ", ".join(
                f"{name.rpartition('.')[2]} {_short(value)}" for name, value in zip(varying, values, strict=True)
            )
            labels[index] = f"{labels[index]} ({shown})"
    return labels


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value) or "none"


def _levels(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.groupby("level", as_index=False)["x"].mean().sort_values(["x", "level"], ignore_index=True)


def _means(cube: Cube, *, runs: pd.DataFrame, stratum: str) -> pd.DataFrame:
    values, failed = cube.values, cube.columns["failed"].to_numpy() > 0
    conditions = (~np.isnan(values)).sum(axis=0)
    status = np.select(
        [failed | np.isinf(values).any(axis=0), conditions == 0, conditions < intervals.FEWEST],
        ["failed_prediction", "undefined", "few_conditions"],
        "",
    )
    low, high = intervals.interval(intervals.nested(cube.draws, cube.seed_draws, cube.seeds))
    frame = pd.DataFrame(values)
    facts = runs.groupby(["level", "series"], as_index=False).agg(
        x=("x", "mean"), model=("model", "first"), baseline=("baseline", "first")
    )
    return cube.columns.assign(
        stratum=stratum,
        mean=cube.means,
        low=np.where(status == "", low, np.nan),
        high=np.where(status == "", high, np.nan),
        status=status,
        seeds=cube.columns["seeds"].astype(int),
        conditions=conditions,
        contexts=[len(np.unique(cube.context[~np.isnan(column)])) for column in values.T],
        pooled=np.where(failed, np.nan, frame.mean().to_numpy()),
        median=np.where(failed, np.nan, frame.median().to_numpy()),
        sd_conditions=frame.where(np.isfinite(frame)).std().to_numpy(),
        undefined=cube.undefined,
    ).merge(facts, on=["level", "series"], how="left")


def _differences(
    cube: Cube, means: pd.DataFrame, *, scales: Mapping[str, Scale], reference: str | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Differences to the reference, and places with tie groups, per (metric, level).

    Rows of ``means`` are columns of the cube.
    """
    sign = means["metric"].map({name: scale.sign for name, scale in scales.items()}).astype(float)
    ranked = means.assign(score=sign * means["mean"]).dropna(subset="score")
    ranked = ranked.sort_values(["score", "series"], ascending=[False, True])
    pairs, places = [], []
    for (metric, level), part in ranked.groupby(["metric", "level"], observed=True, sort=False):
        candidates = part.index[part["baseline"] if reference is None else part["series"] == reference]
        everyone = means.index[(means["metric"] == metric) & (means["level"] == level)]
        pairs += [(index, candidates[0]) for index in everyone if len(candidates) and index != candidates[0]]
        best_first = part.index.to_numpy()
        places += [(int(row), *mark) for row, mark in zip(best_first, marks.of(cube.apart(best_first)), strict=True)]
    left, right = np.asarray(pairs, int).reshape(-1, 2).T
    found = means.loc[left, ["metric", "level", "series"]].reset_index(drop=True)
    found["reference"] = means.loc[right, "series"].to_numpy()
    found = pd.concat([found, cube.differences(left, right)], axis=1)
    found["verdict"] = verdicts(found["difference_low"], found["difference_high"], sign=sign.loc[left].to_numpy())
    places = pd.DataFrame(places, columns=["row", "place", "tied", "letters"]).set_index("row")
    return found, means[["metric", "level", "series"]].join(places)


def verdicts(low: pd.Series, high: pd.Series, *, sign: np.ndarray) -> np.ndarray:
    """better or worse where the interval excludes 0, tie where it does not, "" where there is no interval."""
    above, below = (low > 0).to_numpy(), (high < 0).to_numpy()
    good, bad = np.where(sign > 0, above, below), np.where(sign > 0, below, above)
    return np.select([low.isna().to_numpy(), good, bad], ["", "better", "worse"], "tie")


def _changes(cube: Cube, *, levels: pd.DataFrame, scales: Mapping[str, Scale]) -> pd.DataFrame:
    """The same conditions at the highest level against the lowest."""
    lowest, highest = levels["level"].iloc[0], levels["level"].iloc[-1]
    columns = cube.columns.reset_index(names="column")
    start, end = columns[columns["level"] == lowest], columns[columns["level"] == highest]
    pairs = start.merge(end, on=["metric", "series"], suffixes=("", "_end"))
    if len(levels) < 2 or pairs.empty:
        return pd.DataFrame(columns=CHANGES)
    found = cube.differences(pairs["column_end"], pairs["column"])
    found.columns = ["change", "low", "high", "conditions"]
    sign = pairs["metric"].map({name: scale.sign for name, scale in scales.items()})
    return pairs[["metric", "series"]].assign(
        from_level=lowest,
        to_level=highest,
        **found,
        verdict=verdicts(found["low"], found["high"], sign=sign.to_numpy()),
        seeds=pairs[["seeds", "seeds_end"]].min(axis=1).astype(int),
    )


def _statuses(rows: pd.DataFrame) -> pd.DataFrame:
    """How many values carry which reason, and what that means for the mean."""
    columns = ["status", "series", "metrics", "count", "of", "effect"]
    flagged = rows[rows["status"].notna() & (rows["status"] != "")]
    if flagged.empty:
        return pd.DataFrame(columns=columns)
    total = rows.groupby(["series", "metric"], observed=True).size()
    found = []
    for (reason, series), part in flagged.groupby(["status", "series"], observed=True, sort=True):
        metrics = sorted(set(part["metric"]))
        lost = bool(part["value"].isna().any())
        effect = "left out" if reason in UNDEFINED and lost else "no mean for this model" if lost else "counted"
        of = int(total.loc[[(series, metric) for metric in metrics]].sum())
        found.append([str(reason), series, ", ".join(metrics), len(part), of, effect])
    return pd.DataFrame(found, columns=columns)


def _truth(rows: pd.DataFrame, runs: pd.DataFrame, analytic: pd.DataFrame) -> pd.DataFrame:
    """Macro means of measured and analytic values on the common conditions that have both."""
    known = analytic.copy()
    if "model" not in known:
        known["model"] = known["reference"].astype(str).str.split(" ").str[0]
    if "ablation.level" not in known:
        known["ablation.level"] = _levels(runs)["level"].iloc[0]
    known = known.rename(columns={"ablation.level": "level", "value": "analytic"})
    contexts = [name for name in known if name.startswith("covariate.") and name in rows]
    names = ["model", "metric", *contexts, "perturbation"]
    measured = (
        rows[rows["stratum"] == COMMON].drop(columns="model", errors="ignore").merge(runs[["key", "model"]], on="key")
    )
    measured = measured.groupby(["level", *names], observed=True)["value"].mean().rename("measured").reset_index()
    measured, known = (frame.astype(dict.fromkeys(names, str)) for frame in (measured, known))
    both = known.merge(measured, on=["level", *names]).dropna(subset=["measured", "analytic"])
    by = ["reference", "model", "metric", "level"]
    inside = both.groupby([*by, *contexts], observed=True, as_index=False)[["measured", "analytic"]].mean()
    found = inside.groupby(by, observed=True, as_index=False, sort=False)[["measured", "analytic"]].mean()
    found["ratio"] = found["measured"] / found["analytic"].where(found["analytic"] != 0)
    counts = both.groupby(by, observed=True).size().rename("conditions").reset_index()
    return found.merge(counts, on=by)


def _stack(parts: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
