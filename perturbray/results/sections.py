"""What the sections of the page hold, from a Summary: dictionaries and lists of text that the template lays out."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from perturbray.results import marks
from perturbray.results.anchors import (
    INTERPOLATED,
    MEAN_RESPONSE,
    NO_CHANGE,
    REPLICATE,
    WEAK_BETTER,
    WEAK_RANGE,
)
from perturbray.results.claims.claim import FAILS, HOLDS, OPEN, Claim, Finding
from perturbray.results.plots import SHOWN, scalable
from perturbray.results.scales import Scale
from perturbray.results.summary import COMMON, Summary, verdicts
from perturbray.results.wording import NONE, VERDICTS, cells, decimals, from_to, interval, level_name, number

WIDTH = 3  # metrics side by side in a leaderboard
OUTCOMES = {HOLDS: "✓", FAILS: "✗", OPEN: "?"}
LISTED = 500  # trials named on the page; a larger plan is in sweep.json

REACHING = """◆ A model that reaches the replicate is not without error. A half has n/2 cells, so the replicate carries the
noise of few cells, while a model that pools many cells averages more of it away. The interpolated duplicate, which takes
the replicate where a gene surely responds and the mean response elsewhere, has less of that noise."""

_RANKS = "Ranks: the share of other conditions whose prediction is nearer to the observation (0.5 is chance)"


def data_line(dataset: Mapping) -> str:
    """The dataset in a few words."""
    units = [unit for unit in ("cells", "genes", "perturbations", "contexts") if unit in dataset]
    counts = [f"{dataset[unit]:,} {unit}" for unit in units]
    return ", ".join([str(dataset["name"]), *counts] if "name" in dataset else counts)


def figure_caption(summary: Summary) -> str:
    common = summary.means[summary.means["stratum"] == COMMON]
    if common.empty:
        return ""
    anchored = (
        " Floor and ceiling, dashed, are the mean response and a replicate against one half of the cells, which is noisier "
        "than all cells, that models are judged against here."
    )
    line, bar = ("Each line is a model, baselines in grey and dashed", "band")
    if len(summary.levels) == 1:
        line, bar = ("Each row is a model, the best by the first score on top, baselines hollow and grey", "bar")
    return (
        f"{line}; a point is the mean over "
        f"{_span(common['conditions'], 'condition')} and {_span(common['seeds'], 'seed')}, a {bar} its 95 % interval over "
        f"conditions and seeds. Models are compared on the same conditions, so {bar}s may overlap where the paired differences "
        f"below tell models apart.{anchored * (len(summary.anchors.bounds) > 0)}"
    )


def levels(summary: Summary, *, stratum: str = COMMON) -> list[dict]:
    """The leaderboards of each level; the lowest and the highest stand open."""
    names = list(summary.levels["level"])
    ends = {names[0]: " (lowest level)", names[-1]: " (highest level)"} if len(names) > 1 else {}
    views = []
    for level in names:
        label = level_name(summary, level)
        title = label[0].upper() + label[1:] + ends.get(level, "")
        if groups := _groups(summary, level, stratum=stratum):
            views.append({"name": label, "title": title, "open": level in ends or not ends, "groups": groups})
    return views


def _groups(summary: Summary, level: object, *, stratum: str) -> list[dict]:
    """Tables of scores, then of ranks, of a few metrics each: side by side they would not fit a page."""
    scores = [name for name in summary.headline if not name.endswith("/rank")]
    ranks = [name for name in summary.headline if name.endswith("/rank")]
    kinds = (("Scores", scores), (_RANKS, ranks))
    tables = [(title, found[at : at + WIDTH]) for title, found in kinds for at in range(0, len(found), WIDTH)]
    order, baselines = summary.order(level), summary.baselines
    groups = []
    for caption, metrics in tables:
        found = cells(summary, level, metrics, stratum=stratum) if metrics else {}
        rows = [
            {"series": series, "cells": [found[series].get(metric) for metric in metrics]}
            for series in order
            if series in found
        ]
        parts = [
            {"kind": "models", "rows": [row for row in rows if row["series"] not in baselines]},
            {"kind": "baselines", "rows": [row for row in rows if row["series"] in baselines]},
        ]
        if rows:
            groups.append({"caption": caption, "scales": [summary.scales[name] for name in metrics], "parts": parts})
    return groups


def changes(summary: Summary) -> dict | None:
    found = summary.changes.dropna(subset=["change"])
    if found.empty:
        return None
    metrics = [name for name in summary.headline if name in set(found["metric"])]
    where = from_to(summary, *(found[name].iloc[0] for name in ("from_level", "to_level")))
    texts = {(row["series"], row["metric"]): _change(summary, row) for row in found.to_dict("records")}
    scales = [summary.scales[name] for name in metrics]
    return grid(
        caption=f"{where}, on the same conditions: change of the mean with its "
        "paired 95 % interval. ▲ gets better, ▼ gets worse, ≈ cannot be told from no change.",
        columns=["model", *_heads(scales)],
        rows=[
            [series, *[texts.get((series, metric), NONE) for metric in metrics]]
            for series in summary.order(found["from_level"].iloc[0])
        ],
        align="lines",
    )


def bounds(summary: Summary) -> dict | None:
    """Floor and ceiling of each headline metric."""
    found = summary.anchors.bounds
    rows = []
    for row in found[found["metric"].isin(summary.headline)].to_dict("records"):
        scale, digits = summary.scales[row["metric"]], decimals(summary, row["metric"])
        levels = [number(row[name], digits) for name in (NO_CHANGE, MEAN_RESPONSE, REPLICATE, INTERPOLATED)]
        shares = [number(row[name], 2) for name in ("dynamic_range", "better")]
        saturated = f"{row['saturated']} of {row['conditions']}"
        rows.append([f"{scale.title} {scale.arrow}, {scale.effect}", *levels, *shares, saturated, _warning(row)])
    count = _span(found["conditions"], "condition") if rows else ""
    return grid(
        rows,
        caption=f"At the lowest level, {count}, against one half of the observed cells, so values differ from those of "
        "the leaderboards. Dynamic range: the share of the way from the mean response to a perfect prediction that the "
        "interpolated duplicate (the replicate, where a metric of cells has none) covers. Better: the share of conditions "
        "in which it beats the mean response (chance 0.5). Saturated: conditions that the mean response solves, at least 0.9 "
        "of the way from no change to the replicate. "
        f"Below {WEAK_RANGE} or {WEAK_BETTER} a metric is marked: it says little on these data.",
        columns=[
            "metric",
            "no change",
            "mean response",
            "replicate",
            "interpolated",
            "dynamic range",
            "better",
            "saturated",
            "note",
        ],
        align=["", *["n"] * 7, ""],
    )


def _warning(row: Mapping) -> str:
    short = [
        f"{name} below {least}"
        for name, key, least in (("dynamic range", "dynamic_range", WEAK_RANGE), ("better", "better", WEAK_BETTER))
        if row[key] < least
    ]
    weak = [f"⚠ says little here: {' and '.join(short)}"] if short else []
    return "; ".join(weak + ([] if row["calibrated"] else ["uncalibrated: the replicate is not surely better"]))


def scaled_caption(summary: Summary) -> str:
    left = [summary.scales[name] for name in summary.headline if name not in scalable(summary)]
    names = ", ".join(f"{scale.short} of {scale.effect}" for scale in left)
    without = f" No scale, and no panel: {names}." if left else ""
    return (
        "A line is a model, as above; means over conditions and seeds. Values below "
        f"{number(SHOWN[0], 0)} or above {SHOWN[1]:g} stand at the edge, hollow; the tables hold them unclipped.{without}"
    )


def controls(facts: Mapping) -> str:
    """What the source of control cells means for scores of change from control."""
    if facts["source"] == "split":
        return (
            "Control cells: split. For the direction of a change from control (cosine, Pearson, Spearman) a model predicts "
            "from one half of the control cells, which is subtracted from its prediction; the other half is subtracted from "
            "the observation. The halves change places and both scores are averaged. So no noise is shared, and without any "
            "effect the expected score is 0."
        )
    if facts["source"] != "reference":
        return ""
    text = (
        "Control cells: reference. The same control cells are subtracted from prediction and observation, so their noise "
        "counts as agreement."
    )
    if "share" not in facts:
        return text
    return (
        f"{text} Without any effect a cosine of about n/(n + n₀) = {facts['share']:.2f} is expected ({facts['low']:.2f} to "
        f"{facts['high']:.2f} over conditions; n cells of the condition, n₀ of control)."
    )


def claims(judged: Mapping[Claim, Mapping[str, Finding]]) -> list[dict]:
    """The claims that a sweep tests: what was found by the first score and the first rank in full, the rest folded."""
    views = []
    for claim, found in judged.items():
        said = [
            {"mark": OUTCOMES[one.outcome], "outcome": one.outcome, "text": " ".join([one.sentence, *one.beside])}
            for one in found.values()
        ]
        lead = [
            next((at for at, name in enumerate(found) if name.endswith("/rank") is rank), None)
            for rank in (False, True)
        ]
        lead = [at for at in lead if at is not None]
        rest = [view for at, view in enumerate(said) if at not in lead]
        folded = ", ".join(
            f"{sum(view['outcome'] == one for view in rest)} {mark} {one}" for one, mark in OUTCOMES.items()
        )
        views.append(
            {
                **{"name": claim.name, "text": claim.text, "source": claim.source},
                **{"found": [said[at] for at in lead], "rest": rest, "folded": folded},
            }
        )
    return views


def variants(summary: Summary) -> list[dict]:
    """Models of which there are several series: each against the model's first, in pairs, at either end."""
    found = []
    by = summary.trials.drop_duplicates("series").set_index("series")["model"]
    metrics = [name for name in summary.headline if not name.endswith("/rank")][:WIDTH]
    metrics += [name for name in summary.headline if name.endswith("/rank")][:1]
    for level in dict.fromkeys([summary.levels["level"].iloc[0], summary.levels["level"].iloc[-1]]) if metrics else ():
        rows = []
        for _, group in by.groupby(by, sort=False):
            first, *others = sorted(group.index, key=summary.series.index)[: marks.MOST]
            rows += [[one, first, *[_against(summary, name, level, one, first) for name in metrics]] for one in others]
        title = level_name(summary, level)
        found += [
            grid(
                rows,
                caption=f"{title[0].upper()}{title[1:]}: the paired difference to the model's first series with its 95 % "
                "interval. ▲ better, ▼ worse, ≈ cannot be told.",
                columns=["series", "against", *_heads([summary.scales[name] for name in metrics])],
                align="lines",
            )
        ]
    return [view for view in found if view]


def _against(summary: Summary, metric: str, level: object, one: str, other: str) -> str:
    cube = summary.cube
    columns = [cube.find(metric=metric, level=level, series=series) for series in (one, other)]
    if None in columns:
        return NONE
    row = cube.differences(columns[:1], columns[1:])
    low, high = row["difference_low"], row["difference_high"]
    verdict = str(verdicts(low, high, sign=np.array([summary.scales[metric].sign]))[0])
    return _change(
        summary,
        {"metric": metric, "change": row["difference"][0], "low": low[0], "high": high[0], "verdict": verdict},
    )


def effects(summary: Summary) -> list[dict]:
    """Headline means in strata of the conditions: a title and tables for each way to part them."""
    found = summary.anchors.effects
    metrics = [name for name in summary.headline if name in set(found["metric"])]
    at = level_name(summary, summary.levels["level"].iloc[0]) if metrics else ""
    titles = {
        "effect": f"Thirds of the conditions at {at}, by {summary.anchors.measure}",
        "de_genes": f"By the number of genes that respond at {at}: Welch's test of the observed cells against control, "
        "Benjamini-Hochberg q < 0.05",
        "saturated": f"By what the mean response already solves at {at}",
    }
    views = []
    for by, title in titles.items():
        part = found[(found["by"] == by) & found["metric"].isin(metrics)]
        grids = [_stratum(summary, rows, metrics, by, stratum) for stratum, rows in part.groupby("stratum", sort=False)]
        views += [{"title": title, "grids": grids}] if grids else []
    return views


def _stratum(summary: Summary, part: pd.DataFrame, metrics: list[str], by: str, stratum: str) -> dict:
    means = {(row.series, row.metric): row.mean for row in part.itertuples()}
    rows = [
        [name, *[number(means.get((name, metric), np.nan), decimals(summary, metric)) for metric in metrics]]
        for name in summary.order(summary.levels["level"].iloc[0])
    ]
    low, high = (number(part[name].iloc[0], 3) for name in ("low", "high"))
    count = _span(part["conditions"], "condition")
    saturated = "the mean response goes at least 0.9 of the way from no change to the replicate"
    captions = {
        "effect": f"{stratum.capitalize()} effects: {count}, {low} to {high} from control",
        "de_genes": f"{stratum.replace('-', ' to ').replace('>=', '≥ ')} genes: {count}",
        "saturated": f"{stratum.capitalize()}: {count} by metric, in which {saturated}"
        if stratum == "saturated"
        else f"{stratum.capitalize()}: {count} by metric, in which there is more to find",
    }
    columns = ["model", *_heads([summary.scales[name] for name in metrics])]
    return grid(rows, caption=captions[by], columns=columns, align="n")


def _change(summary: Summary, row: Mapping) -> str:
    digits = decimals(summary, row["metric"])
    change = number(row["change"], digits, sign=True)
    return f"{VERDICTS[row['verdict']]} {change}\n{interval(row['low'], row['high'], digits)}"


def truth(summary: Summary) -> dict | None:
    rows = [
        [
            *(row.reference, row.metric, level_name(summary, row.level), f"{row.measured:.4g}", f"{row.analytic:.4g}"),
            *(NONE if np.isnan(row.ratio) else f"{row.ratio:.3f}", row.conditions),
        ]
        for row in summary.truth.itertuples()
    ]
    return grid(
        rows,
        caption="This screen is simulated, so some values are known before anything is run. A ratio of 1 means that "
        "the measured mean is the known one.",
        columns=["value", "metric", "at", "measured", "known", "measured / known", "conditions"],
        align="n",
    )


def strata(summary: Summary) -> list[dict]:
    return [
        {
            "name": stratum,
            "conditions": _span(part["conditions"], "condition"),
            "levels": levels(summary, stratum=stratum),
        }
        for stratum, part in summary.means.groupby("stratum", sort=False)
        if stratum != COMMON
    ]


def statuses(summary: Summary) -> dict | None:
    rows = []
    for (reason, metrics, effect), part in summary.statuses.groupby(["status", "metrics", "effect"], sort=False):
        everyone = set(part["series"]) == set(summary.series) and len(part) > 1
        who = "every model" if everyone else ", ".join(part["series"])
        values = f"{part['count'].sum():,} of {part['of'].sum():,}"
        rows.append([reason.replace("_", " "), who, metrics, values, effect])
    return grid(
        rows,
        caption="Values with a reason, over all trials. What the truth leaves undefined is left out for every model.",
        columns=["reason", "model", "metrics", "values", "what was done"],
    )


def cost(summary: Summary) -> dict | None:
    wanted = {
        "parameters": ("parameters", "mean", "{:,.0f}"),
        "epochs": ("epochs", "mean", "{:.0f}"),
        "fit_seconds": ("fit, s", "mean", "{:.1f}"),
        "predict_seconds": ("predict, s", "mean", "{:.1f}"),
        "score_seconds": ("score, s", "mean", "{:.1f}"),
        "peak_memory_mb": ("peak memory, MB", "max", "{:,.0f}"),
    }
    have = {name: facts for name, facts in wanted.items() if name in summary.trials}
    if not have:
        return None
    spent = [name for name in ("fit_seconds", "predict_seconds", "score_seconds") if name in have]
    whole = summary.trials[spent].apply(pd.to_numeric).sum(axis=1)
    rows = []
    for series in summary.series:
        part = summary.trials[summary.trials["series"] == series]
        values = [(pd.to_numeric(part[name]).agg(how), form) for name, (_, how, form) in have.items()]
        shown = [NONE if pd.isna(value) else form.format(value) for value, form in values]
        own = whole[part.index].sum()
        rows.append([series, len(part), *shown, f"{own / 60:,.1f}", f"{own / max(whole.sum(), 1e-9):.0%}"])
    hosts = summary.trials["host"].nunique() if "host" in summary.trials else 1
    return grid(
        rows,
        caption=f"Means over finished trials, memory the most of any; in all: fitting, predicting and scoring of all trials of "
        f"the model, one after the other; on {hosts} host{'s' * (hosts != 1)}.",
        columns=["model", "trials", *[title for title, *_ in have.values()], "in all, min", "share"],
        align="n",
    )


def versions(summary: Summary) -> list[tuple[str, str]]:
    names = [name for name in summary.trials if name.startswith("version.")]
    names += [name for name in ("perturbray", "ray", "torch", "host") if name in summary.trials]
    found = [
        (name.removeprefix("version."), ", ".join(sorted(summary.trials[name].dropna().astype(str).unique())))
        for name in names
    ]
    created = summary.plan.get("created")
    return [*([("plan made", created)] if created else []), *found]


def terms(mapping: Mapping) -> list[tuple[str, str]]:
    return [(str(name).replace("_", " "), shown(value)) for name, value in mapping.items()]


def shared(planned: list[dict]) -> list[tuple[str, str]]:
    """The fields in which no trial differs."""
    columns = _columns(planned)
    return [(name, shown(columns[name].iloc[0])) for name in columns if _alike(columns[name])]


def listing(summary: Summary, planned: list[dict], failures: Mapping) -> dict:
    """The trials of the plan, with the fields in which they differ."""
    done, columns = set(summary.trials["key"]), _columns(planned)
    varying = [name for name in columns if not _alike(columns[name])]
    rows = []
    for trial in planned[:LISTED]:
        key, values = trial["key"], trial.get("columns", {})
        state = "done" if key in done else "failed" if key in failures else "to run"
        rows.append([trial.get("name", key), state, key, *[shown(values.get(name)) for name in varying]])
    more = f" The first {LISTED} of {len(planned)}; the rest are in sweep.json." if len(planned) > LISTED else ""
    caption = f"The fields in which trials differ; the key is the name of the trial's file.{more}"
    columns = ["trial", "state", "key", *varying]
    return {"caption": caption, "columns": columns, "rows": rows, "align": [""] * len(columns)}


def grid(rows: list[list], *, caption: str, columns: list[str], align: str | list[str] = "") -> dict | None:
    """``align``: the class of all columns, or of each."""
    align = [align] * len(columns) if isinstance(align, str) else align
    return {"caption": caption, "columns": columns, "rows": rows, "align": align} if rows else None


def _heads(scales: list[Scale]) -> list[str]:
    titles = [scale.title for scale in scales]
    named = [f"{s.title} ({s.effect})" if titles.count(s.title) > 1 else s.title for s in scales]
    return [f"{name}\N{NO-BREAK SPACE}{scale.arrow}" for name, scale in zip(named, scales, strict=True)]


def _columns(planned: list[dict]) -> pd.DataFrame:
    return pd.DataFrame([trial.get("columns", {}) for trial in planned]).astype(object)


def _alike(column: pd.Series) -> bool:
    return len(set(map(repr, column))) == 1


def _span(values: pd.Series, noun: str) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low}{f' to {high}' * (low != high)} {noun}{'s' * (high != 1)}"


def shown(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return NONE
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    return ", ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)
