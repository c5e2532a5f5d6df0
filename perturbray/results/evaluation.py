"""The record of one evaluation: table, summary and page of predicted cells from a file; a note is an entry of `_NOTES`."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from markupsafe import Markup
from rich.console import Group
from rich.table import Table
from rich.text import Text

from perturbray.results import calibration as calibrated
from perturbray.results import page, table
from perturbray.results.sections import grid, shown
from perturbray.results.wording import NONE, digits, interval, number

DOTS = 400  # drawn of a metric; of more conditions, evenly spaced ones in the order of their values
WIDTH, HEIGHT, LEFT, EDGE = 320, 130, 52, 8  # of a plot, in its own units

_TEMPLATE = page.template(page.EVALUATION)

_NOTES = {
    "version": "version of the convention",
    "controls": "control cells of the prediction",
    "target_sum": "target sum of log fold changes, counts a cell",
    "target_depth": "both sides normalised to, counts a cell",
    "pca_fitted_on": "PCA fitted on",
    "mean_response_from": "mean response from",
    "clamped_genes": "predicted means below 0, taken as 0",
    "noise": "noise added to predicted cells",
    "rank_error": "standard error of a mean rank at chance",
    "test": "test",
}
"""What notes are called on the page; a note without an entry keeps its name."""

_COUNTS = {"n_scored": "scored", "n_undefined": "undefined", "n_failed": "failed"}


def write_evaluation(
    folder: str | Path,
    values: pd.DataFrame,
    summary: pd.DataFrame,
    *,
    notes: Mapping[str, object],
    calibration: pd.DataFrame | None = None,
    strata: pd.DataFrame | None = None,
    title: str = "How near are the predicted cells to the observed ones?",
) -> Path:
    """Write ``metrics.parquet``, ``metrics.csv``, ``summary.csv`` and ``report.html``, each atomically; returns the page.

    With ``calibration`` and ``strata``, the frames of ``results.calibration``, also ``calibration.csv`` and ``strata.csv``.

    ``values``: a row a condition and metric, with a column a covariate, the perturbation, then ``metric``, ``value``,
    ``status``, ``n_obs``, ``n_pred`` and ``convention``. ``summary``: a row a metric, with ``value`` (the convention's
    own mean), ``macro``, ``pooled``, ``median``, ``sd`` and the counts. ``notes``: facts beside them, and ``command``.
    """
    folder = table.create(folder)
    plain = values.copy(deep=False)
    plain.attrs = {}  # pandas would write them into the file as JSON, which not every note is
    content = pa.Table.from_pandas(plain, preserve_index=False)
    table.write_parquet(folder / "metrics.parquet", content)
    table.replace_file(folder / "metrics.csv", lambda path: plain.to_csv(path, index=False))
    table.replace_file(folder / "summary.csv", lambda path: summary[["metric", "value"]].to_csv(path, index=False))
    for name, frame in (("calibration.csv", calibration), ("strata.csv", strata)):
        if frame is None:
            (folder / name).unlink(missing_ok=True)  # of an evaluation before, which this one replaces
        else:
            table.replace_file(folder / name, lambda path, frame=frame: frame.to_csv(path, index=False))
    text = render_evaluation(values, summary, notes=notes, title=title, calibration=calibration, strata=strata)
    path = folder / "report.html"
    table.replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))
    return path


def render_evaluation(
    values: pd.DataFrame,
    summary: pd.DataFrame,
    *,
    notes: Mapping[str, object],
    title: str,
    calibration: pd.DataFrame | None = None,
    strata: pd.DataFrame | None = None,
) -> str:
    """The page as text."""
    names = condition_columns(values)
    statuses = _statuses(values)
    conditions = values[names].drop_duplicates()
    kinds = [f"{conditions[name].nunique():,} of {name}" for name in names] if len(names) > 1 else []
    plots = [_plot(metric, part, names) for metric, part in values.groupby("metric", sort=False, observed=True)]
    anchors = calibrated.anchors(calibration, summary)
    parts = calibrated.strata(strata, summary)
    sections = [
        ("summary", "Summary", True),
        ("anchors", "Floor and ceiling", anchors),
        ("effects", "By effect", parts),
        ("conditions", "Conditions", True),
        ("statuses", "Reasons", statuses),
        ("notes", "How it was scored", True),
        ("repeat", "Repeat it", True),
    ]
    view = {
        "style": Markup(page.STYLE),
        "title": title,
        "convention": ", ".join(map(str, values["convention"].unique())),
        "conditions": _count(len(conditions)) + (f" ({', '.join(kinds)})" if kinds else ""),
        "written": datetime.now(UTC),
        "sections": [(anchor, name) for anchor, name, present in sections if present],
        "summary": _summary(summary, calibration),
        "anchors": anchors,
        "anchors_text": calibrated.SCALE,
        "reaching": calibrated.REACHING,
        "strata": parts,
        "further": calibration is not None,
        "plots": plots,
        "plots_caption": "A dot is a condition, in the order of its value; the dashed line is the median. "
        "The name of a condition shows where the pointer rests on its dot.",
        "statuses": statuses,
        "sentences": sentences(notes),
        "facts": facts(notes),
        "command": notes.get("command", ""),
    }
    return _TEMPLATE.render(view)


def terminal_evaluation(
    summary: pd.DataFrame, notes: Mapping[str, object], calibration: pd.DataFrame | None = None
) -> Group:
    """The summary as something that rich prints: ``console.print(terminal_evaluation(summary, notes))``."""
    scaled = calibrated.scaled_texts(calibration)
    board = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    board.add_column("metric", overflow="fold")
    beside = ("scaled",) if scaled else ("median", "sd")  # as much as 80 columns hold
    for name in ("value", *beside, *_COUNTS.values()):
        board.add_column(name, justify="right", no_wrap=True)
    for row in summary.to_dict("records"):
        counts = [str(row[name]) for name in _COUNTS]
        style = "red" if row["n_failed"] else ""
        numbers = [
            scaled.get(row["metric"], NONE) if name == "scaled" else number(row[name], _digits(row)) for name in beside
        ]
        value = Text(number(row["value"], _digits(row)), style="bold")
        board.add_row(Text(str(row["metric"])), value, *numbers, *counts, style=style)
    lines = [Text(text, style="dim") for text in [*sentences(notes), *([calibrated.LEGEND] if scaled else [])]]
    pairs = [f"{name}: {value}" for name, value in facts(notes)]
    return Group(board, Text(), *lines, *([Text("; ".join(pairs), style="dim")] if pairs else []))


def condition_columns(values: pd.DataFrame) -> list[str]:
    """The covariates and the perturbation: the columns in front of ``metric``."""
    return list(values.columns[: list(values.columns).index("metric")])


def sentences(notes: Mapping[str, object]) -> list[str]:
    """What a reader must know before the numbers."""
    share = notes.get("shared_control_cosine")
    if not share:
        return []
    return [
        "The same observed control cells are subtracted from prediction and observation, so their noise counts as agreement: "
        f"without any effect a cosine of about n/(n + n₀) = {share:.2f} is expected, the mean over conditions with n cells "
        "of the condition and n₀ of control."
    ]


def facts(notes: Mapping[str, object]) -> list[tuple[str, str]]:
    """Notes as names and values, those of ``_NOTES`` first."""
    told = ("command", "shared_control_cosine")
    names = [name for name in _NOTES if name in notes] + [name for name in notes if name not in _NOTES]
    return [(_NOTES.get(name, name.replace("_", " ")), _fact(notes[name])) for name in names if name not in told]


def _fact(value: object) -> str:
    if isinstance(value, Mapping):  # keys are contexts: tuples of covariate values
        return ", ".join(f"{_named(name)} {_fact(part)}".strip() for name, part in value.items())
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and np.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return shown(value)


def _named(labels: object) -> str:
    return ", ".join(map(str, labels)) if isinstance(labels, tuple) else str(labels)


def _digits(row: Mapping) -> int:
    return digits(row["value"])


def _summary(summary: pd.DataFrame, calibration: pd.DataFrame | None) -> dict | None:
    names = ("macro", "pooled", "median", "sd")
    known = {} if calibration is None else calibration.set_index("metric")[["low", "high"]].to_dict("index")
    rows = []
    for row in summary.to_dict("records"):
        places = _digits(row)
        ends = known.get(row["metric"])
        spread = [interval(ends["low"], ends["high"], places, sign=False) or NONE] if ends else []
        rest = [number(row[name], places) for name in names]
        rows.append([row["metric"], number(row["value"], places), *spread, *rest, *[row[name] for name in _COUNTS]])
    return grid(
        rows,
        caption="Value: the mean that the convention reports"
        + (
            ", with its 95 % interval over conditions (paired bootstrap, perturbations drawn with all contexts)"
            * bool(known)
        )
        + ". Macro: the mean over contexts of their means. Pooled: each "
        "condition counts the same. Undefined: the observation gives no value; macro, pooled, median and sd leave it out.",
        columns=["metric", "value", *(["95 % interval"] if known else []), *names, *_COUNTS.values()],
        align="n",
    )


def _statuses(values: pd.DataFrame) -> dict | None:
    flagged = values[values["status"].notna() & (values["status"] != "")]
    totals = values.groupby("metric", sort=False, observed=True).size()
    rows = [
        [
            str(reason).replace("_", " "),
            metric,
            f"{len(part):,} of {totals[metric]:,}",
            f"{part['value'].isna().sum():,}",
        ]
        for (reason, metric), part in flagged.groupby(["status", "metric"], sort=False, observed=True)
    ]
    return grid(
        rows,
        caption="Conditions whose value carries a reason; those without a number are left out of the means.",
        columns=["reason", "metric", "conditions", "without a number"],
    )


def _plot(metric: str, part: pd.DataFrame, names: Sequence[str]) -> dict:
    part = part[part["value"].notna()].sort_values(["value", *names], kind="stable")
    values = part["value"].to_numpy(float)
    if not len(values):
        return {"metric": metric, "svg": "", "caption": "has no value"}
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    spread = high - low or 1.0
    low, high = (low, high) if high > low else (low - 0.5 * spread, high + 0.5 * spread)
    chosen = np.unique(np.linspace(0, len(values) - 1, min(DOTS, len(values))).round().astype(int))
    x = LEFT + EDGE + (WIDTH - LEFT - 2 * EDGE) * (chosen / (len(values) - 1) if len(values) > 1 else chosen + 0.5)

    def height(value: np.ndarray | float) -> np.ndarray | float:
        return EDGE + (HEIGHT - 2 * EDGE) * (high - np.clip(value, low, high)) / (high - low)

    labels = part[list(names)].astype(str).agg(" · ".join, axis=1).to_numpy()[chosen]
    count = part["n_obs"].to_numpy()[chosen]
    dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6"{}><title>{}: {}, {} observed cells</title></circle>')
    edge = Markup(' class="edge"')
    dots = [
        dot.format(at, y, "" if np.isfinite(value) else edge, label, f"{value:.4g}", n)
        for at, y, value, label, n in zip(x, height(values[chosen]), values[chosen], labels, count, strict=True)
    ]
    line = Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"{}/>')
    tick = Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>')
    axis = [line.format(LEFT, WIDTH, height(value), height(value), "") for value in (low, high)]
    axis += [tick.format(LEFT - 4, height(value) + 3.5, f"{value:.3g}") for value in (low, high)]
    median = float(np.median(values))
    if np.isfinite(median):
        axis.append(line.format(LEFT, WIDTH, height(median), height(median), Markup(' class="median"')))
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{} of each condition">{}</svg>')
    return {
        "metric": metric,
        "svg": svg.format(WIDTH, HEIGHT, metric, Markup("").join(axis + dots)),
        "caption": _plot_caption(values, median, drawn=len(chosen)),
    }


def _plot_caption(values: np.ndarray, median: float, *, drawn: int) -> str:
    said = [f"median {f'{median:.3g}' if np.isfinite(median) else NONE}, {_count(len(values))}"]
    said += [f"{drawn} of them drawn"] if drawn < len(values) else []
    infinite = int(np.isinf(values).sum())
    said += [f"{infinite} infinite, hollow at the edge"] if infinite else []
    return "; ".join(said)


def _count(conditions: int) -> str:
    return f"{conditions:,} condition{'s' * (conditions != 1)}"
