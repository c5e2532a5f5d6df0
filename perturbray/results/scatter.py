"""Condition by condition: a model against the best baseline, a dot a condition with its name; a plot is an SVG element."""

import numpy as np
from markupsafe import Markup

from perturbray.results.anchors import MEAN_RESPONSE, REPLICATE
from perturbray.results.scales import Scale
from perturbray.results.summary import COMMON, Summary
from perturbray.results.wording import number

DOTS = 200  # of a plot; of more conditions the extremes and evenly spaced ones between, by their difference
REACHED = 3  # dots at either end that the keyboard comes to
MOST = 12  # models drawn
OPEN = 3  # plots of a metric that stand open; the others fold away
SIDE, LEFT, TOP, EDGE = 300, 44, 34, 8  # of a plot, in its own units


def views(summary: Summary) -> list[dict]:
    """For the first score of the headline and the first rank: plots at the base level, the best models first."""
    metrics = [name for name in summary.headline if not name.endswith("/rank")][:1]
    metrics += [name for name in summary.headline if name.endswith("/rank")][:1]
    found = []
    for metric in metrics:
        plots = [
            plot for series in _models(summary, metric)[:MOST] if (plot := _plot(summary, metric, series)) is not None
        ]
        if plots:
            scale = summary.scales[metric]
            title = f"{scale.title} {scale.arrow}, {scale.effect}"
            found.append({"title": title, "open": plots[:OPEN], "folded": plots[OPEN:]})
    return found


def _models(summary: Summary, metric: str) -> list[str]:
    board = summary.board(summary.base, metrics=[metric]).dropna(subset=["mean"])
    board = board[~board["baseline"] & board["reference"].notna()]
    return list(board.sort_values("mean", ascending=not summary.scales[metric].higher_is_better)["series"])


def _plot(summary: Summary, metric: str, series: str) -> dict | None:
    """Of one model; None where no condition has both values."""
    cube, scale = summary.cube, summary.scales[metric]
    at = summary.differences
    at = at[(at["stratum"] == COMMON) & (at["metric"] == metric) & (at["level"] == summary.base)]
    reference = at.loc[at["series"] == series, "reference"].iloc[0]
    own, other = (
        cube.values[:, cube.find(metric=metric, level=summary.base, series=name)] for name in (series, reference)
    )
    rows = np.flatnonzero(np.isfinite(own) & np.isfinite(other))
    if not len(rows):
        return None
    gain = scale.sign * (own - other)
    rows = rows[np.argsort(gain[rows], kind="stable")]
    better = int((gain[rows] > 0).sum())
    kept = np.unique(np.linspace(0, len(rows) - 1, min(DOTS, len(rows))).round().astype(int))
    anchors = _anchors(summary, metric)
    within = np.concatenate([own[rows], other[rows], *([list(anchors.values())] if anchors else [])])
    axis = _Axis(float(within.min()), float(within.max()))
    dots = [
        _dot(axis, cube.names[row], other[row], own[row], reached=at < REACHED or at >= len(kept) - REACHED)
        for at, row in enumerate(rows[kept])
    ]
    label = f"{scale.title} of each condition: {series} against {reference}"
    svg = Markup('<svg viewBox="0 0 {0} {0}" role="group" aria-label="{1}">{2}</svg>')
    said = f"better in {better} of {len(rows)} conditions" + (f", {len(kept)} drawn" if len(kept) < len(rows) else "")
    return {
        "series": series,
        "svg": svg.format(SIDE, label, Markup("").join([*_frame(axis, scale, reference, series, anchors), *dots])),
        "caption": f"against {reference}: {said}",
    }


def _anchors(summary: Summary, metric: str) -> dict[str, float]:
    """Floor and ceiling of the metric."""
    bounds = summary.anchors.bounds
    found = bounds[bounds["metric"] == metric]
    if found.empty:
        return {}
    values = {"mean response": found[MEAN_RESPONSE].iloc[0], "replicate": found[REPLICATE].iloc[0]}
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


class _Axis:
    """Places of values, alike on both axes."""

    def __init__(self, low: float, high: float) -> None:
        spread = (high - low) or 1.0
        self.low, self.high = low - 0.03 * spread, high + 0.03 * spread

    def x(self, value: float) -> float:
        return LEFT + (SIDE - LEFT - EDGE) * (value - self.low) / (self.high - self.low)

    def y(self, value: float) -> float:
        return SIDE - LEFT - (SIDE - LEFT - TOP) * (value - self.low) / (self.high - self.low)


def _dot(axis: _Axis, name: str, other: float, own: float, *, reached: bool) -> Markup:
    scores = f"{number(own, 3)} against {number(other, 3)}"
    focus = Markup(' tabindex="0" role="img" aria-label="{}: {}"').format(name, scores) if reached else Markup("")
    text = Markup(
        '<g class="dot"{}><circle cx="{:.1f}" cy="{:.1f}" r="3"/>'
        '<text x="0" y="11">{}<tspan x="0" dy="13">{}</tspan></text></g>'
    )
    return text.format(focus, axis.x(other), axis.y(own), name, scores)


def _frame(axis: _Axis, scale: Scale, reference: str, series: str, anchors: dict[str, float]) -> list[Markup]:
    line = Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>')
    text = Markup('<text x="{:.1f}" y="{:.1f}" class="axis"{}>{}</text>')
    low, high = axis.low, axis.high
    parts = [
        line.format(axis.x(low), axis.y(low), axis.x(high), axis.y(high), "equal"),
        line.format(axis.x(low), axis.y(low), axis.x(high), axis.y(low), "frame"),
        line.format(axis.x(low), axis.y(low), axis.x(low), axis.y(high), "frame"),
        text.format((LEFT + SIDE) / 2, SIDE - 4, Markup(' text-anchor="middle"'), f"{reference} {scale.arrow}"),
    ]
    turn = Markup(' text-anchor="middle" transform="rotate(-90 10 {0})"').format((SIDE - LEFT + TOP) / 2)
    parts.append(text.format(10, (SIDE - LEFT + TOP) / 2, turn, f"{series} {scale.arrow}"))
    for value in np.linspace(low + 0.06 * (high - low), high - 0.06 * (high - low), 3):
        shown = number(float(value), 2 if high - low > 0.1 else 3)
        parts.append(text.format(axis.x(value), axis.y(low) + 13, Markup(' text-anchor="middle"'), shown))
        parts.append(text.format(LEFT - 4, axis.y(value) + 3, Markup(' text-anchor="end"'), shown))
    for name, value in anchors.items():
        parts.append(line.format(axis.x(low), axis.y(value), axis.x(high), axis.y(value), "anchor"))
        parts.append(line.format(axis.x(value), axis.y(low), axis.x(value), axis.y(high), "anchor"))
        parts.append(text.format(SIDE - EDGE, axis.y(value) - 2, Markup(' text-anchor="end"'), name))
    return parts
