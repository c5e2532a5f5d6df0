"""Numbers and findings as text, for the terminal and the page: a number is rounded here and nowhere before."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbray.results.summary import COMMON, Summary

VERDICTS = {"better": "▲", "worse": "▼", "tie": "≈", "": ""}
MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"  # where there is no number

ALL = "all trials"  # the only level of a sweep along no axis


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One (series, metric) of a leaderboard, ready to print."""

    mean: str
    sd: str  # over seeds; "" with one seed
    place: str  # "1", or "2=" in a tie group
    letters: str  # shared with series that it cannot be told from
    difference: str  # to the reference; "" for the reference itself
    interval: str
    verdict: str  # better, worse, tie or ""
    reference: str  # series that the difference is to; "" where there is none
    note: str  # why something is missing
    scaled: str  # "scaled 0.62" between the mean response and a replicate; "" without anchors
    reaches: bool  # as good as a replicate, or better

    @property
    def mark(self) -> str:
        return VERDICTS[self.verdict]


def decimals(summary: Summary, metric: str) -> int:
    """Digits after the point that show the differences of a metric: two significant ones of the typical half-width."""
    rows = summary.differences[summary.differences["metric"] == metric]
    widths = (rows["difference_high"] - rows["difference_low"]).to_numpy(float) / 2
    widths = widths[np.isfinite(widths) & (widths > 0)]
    if not len(widths):
        return 3
    return int(np.clip(1 - np.floor(np.log10(np.median(widths))), 2, 4))


def digits(value: float) -> int:
    """Digits after the point: three significant ones of a value, at least 3 and at most 6."""
    value = abs(value)
    return int(np.clip(2 - np.floor(np.log10(value)), 3, 6)) if np.isfinite(value) and value > 0 else 3


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """Fixed digits with a true minus; an en dash where there is no number."""
    if value is None or np.isnan(value):
        return NONE
    if np.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not text.strip("+-0."):  # -0.000 is 0.000
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def interval(low: float, high: float, digits: int, *, sign: bool = True) -> str:
    """[low, high]; with more digits where rounding would move an end of a one-sided interval onto zero."""
    if np.isnan(low):
        return ""
    nearest = min(abs(low), abs(high))
    while low * high > 0 and nearest < 0.5 * 10.0**-digits and digits < 8:
        digits += 1
    return f"[{number(low, digits, sign=sign)}, {number(high, digits, sign=sign)}]"


def ends(low: float, high: float, digits: int, *, sign: bool = True) -> str:
    """The ends of an interval in prose: "0.01 to 0.05"."""
    return interval(low, high, digits, sign=sign)[1:-1].replace(", ", " to ")


def _spread(sd: float, digits: int) -> str:
    return f"<{10.0**-digits:.{digits}f}" if 0 < sd < 0.5 * 10.0**-digits else number(sd, digits)


def cells(
    summary: Summary, level: object, metrics: Iterable[str], *, stratum: str = COMMON
) -> dict[str, dict[str, Cell]]:
    """Series -> metric -> cell, of one level."""
    board = summary.board(level, metrics=list(metrics), stratum=stratum)
    digits = {metric: decimals(summary, metric) for metric in board["metric"].unique()}
    found: dict[str, dict[str, Cell]] = {}
    for row in board.to_dict("records"):
        found.setdefault(row["series"], {})[row["metric"]] = _cell(row, digits[row["metric"]])
    return found


def _cell(row: dict, digits: int) -> Cell:
    compared = isinstance(row["reference"], str)
    note = str(row["status"]).replace("_", " ")
    if row["failed"]:
        note = f"{row['failed']} failed predictions"
    return Cell(
        mean=number(row["mean"], digits),
        sd="" if np.isnan(row["sd_seeds"]) else _spread(row["sd_seeds"], digits),
        place="" if pd.isna(row["place"]) else f"{int(row['place'])}{'=' if row['tied'] else ''}",
        letters=row["letters"] if isinstance(row["letters"], str) else "",
        difference=number(row["difference"], digits, sign=True) if compared else "",
        interval=interval(row["difference_low"], row["difference_high"], digits) if compared else "",
        verdict=row["verdict"] if compared else "",
        reference=row["reference"] if compared else "",
        note=note,
        scaled=_scaled(row),
        reaches=row["reaches"] is True,
    )


def _scaled(row: dict) -> str:
    if not isinstance(row["scaled_status"], str) or row["scaled_status"] == "failed_prediction":
        return ""
    return row["scaled_status"].replace("_", " ") or f"scaled {number(row['scaled'], 2)}"


def answer(summary: Summary) -> tuple[str, list[str]]:
    """What the sweep found: a paragraph on the first headline metric, and a sentence on each other score.

    Each number comes with its interval, and what an interval leaves open is said to be open. ("", []) before anything
    finished.
    """
    levels = summary.levels
    scores = [name for name in summary.headline if not name.endswith("/rank")] or summary.headline
    if levels.empty or not scores:
        return "", []
    lowest, highest = levels["level"].iloc[0], levels["level"].iloc[-1]
    lead = [_best(summary, lowest, scores[0]), _change(summary, scores[0])]
    lead += [_best(summary, highest, scores[0])] if len(levels) > 1 else []
    others = [
        " ".join(filter(None, [_best(summary, lowest, metric), _change(summary, metric)])) for metric in scores[1:]
    ]
    return " ".join(filter(None, lead)), [text for text in others if text]


def level_name(summary: Summary, level: object) -> str:
    """What a level is called in prose, by its measured x: "imbalance 0.30", "1,184 training cells"."""
    if not summary.plan.get("x", "level") and len(summary.levels) == 1:
        return ALL
    return _unit(summary, _x(summary, level))


def from_to(summary: Summary, low: object, high: object) -> str:
    """Two levels in prose: "From imbalance 0.00 to 0.30", "From 300 to 1,184 training cells"."""
    start, end = _x(summary, low), _x(summary, high)
    if summary.of_data:
        return f"From {start} to {_unit(summary, end)}"
    return f"From {_unit(summary, start)} to {end}"


def _x(summary: Summary, level: object) -> str:
    """The measured x of a level as text, or the level itself."""
    x = summary.levels.set_index("level")["x"].get(level, np.nan)
    return str(level) if not np.isfinite(x) else f"{x:.2f}" if abs(x) < 10 else f"{x:,.0f}"


def _unit(summary: Summary, shown: str) -> str:
    name = summary.plan.get("x", "level")
    return f"{shown} training {name.removeprefix('train_')}" if summary.of_data else f"{name.replace('_', ' ')} {shown}"


def _best(summary: Summary, level: object, metric: str) -> str:
    """The best model at a level, whom it cannot be told from, and whether it beats the best baseline."""
    scale, digits = summary.scales[metric], decimals(summary, metric)
    board = summary.board(level, metrics=[metric]).dropna(subset=["mean"])
    models = board[~board["baseline"]].sort_values("mean", ascending=not scale.higher_is_better)
    if models.empty:
        return ""
    best = models.iloc[0]
    rest = models.iloc[1:]
    tied = list(rest.loc[[bool(set(letters) & set(best["letters"])) for letters in rest["letters"]], "series"])
    open_to = f" (not told apart from {listed(tied)})" if tied else ""
    mean = number(best["mean"], digits)
    by = f"is {mean}, by {best['series']}{open_to}"
    where = level_name(summary, level)
    lead = "The best" if where == ALL else f"At {where} the best"
    text = f"{lead} {short(summary, metric)} of a model {by}"
    if not isinstance(best["reference"], str):
        return f"{text}; no baseline has finished to compare it with."
    counts = f"{_number_of(best['seeds'], 'seed')}, {_number_of(best['difference_conditions'], 'condition')}"
    unclear = f"{text}; whether that beats {best['reference']}, the best baseline, cannot be told"
    if not best["verdict"]:
        return f"{unclear} ({counts})."
    gap, spread = _size(best["difference"], best["difference_low"], best["difference_high"], digits, best["verdict"])
    if best["verdict"] == "tie":
        return f"{unclear} (difference {gap}, {spread}; {counts})."
    return f"{text}: {gap} {best['verdict']} than {best['reference']}, the best baseline ({spread}; {counts})."


def _change(summary: Summary, metric: str) -> str:
    """How the model that is best at the lowest level changes to the highest."""
    scale, digits = summary.scales[metric], decimals(summary, metric)
    if summary.changes.empty:
        return ""
    board = summary.board(summary.levels["level"].iloc[0], metrics=[metric]).dropna(subset=["mean"])
    models = board[~board["baseline"]].sort_values("mean", ascending=not scale.higher_is_better)["series"]
    changes = summary.changes[summary.changes["metric"] == metric]
    changes = changes[changes["series"].isin(models.iloc[:1])].dropna(subset=["change"])
    if changes.empty:
        return ""
    row = changes.iloc[0]
    where = from_to(summary, row["from_level"], row["to_level"])
    what = f"{where} the {short(summary, metric)} of {row['series']}"
    counts = f"{_number_of(row['seeds'], 'seed')}, {_number_of(row['conditions'], 'condition')}"
    if not row["verdict"]:
        return f"{what} changes by {number(row['change'], digits, sign=True)} (no interval; {counts})."
    gap, spread = _size(row["change"], row["low"], row["high"], digits, row["verdict"])
    if row["verdict"] == "tie":
        return f"{what} changes by {gap}, which cannot be told from no change ({spread}; {counts})."
    return f"{what} {'rises' if row['change'] > 0 else 'falls'} by {gap} ({spread}; {counts})."


def short(summary: Summary, metric: str) -> str:
    """The score inside a sentence, with what it is taken on where another score of the headline has its title."""
    scale = summary.scales[metric]
    alike = [name for name in summary.headline if summary.scales[name].title == scale.title]
    return f"{scale.short} ({scale.effect})" if len(alike) > 1 else scale.short


def _size(value: float, low: float, high: float, digits: int, verdict: str) -> tuple[str, str]:
    """A difference and its interval; without their sign where the words carry it."""
    if verdict != "tie" and value < 0:
        value, low, high = -value, -high, -low
    sign = verdict == "tie"
    return number(value, digits, sign=sign), f"95\N{NO-BREAK SPACE}% interval {ends(low, high, digits, sign=sign)}"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _number_of(count: float, noun: str) -> str:
    return f"{int(count)} {noun}" + ("s" if int(count) != 1 else "")
