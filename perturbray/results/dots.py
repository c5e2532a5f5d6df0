"""Dots: the figure of a sweep that has one level, where a line against x would put all models on one spot.

A row a series, the best by the first metric on top, and the same rows in every panel.
"""

from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from perturbray.results import plots
from perturbray.results.anchors import MEAN_RESPONSE, REPLICATE
from perturbray.results.scales import Scale
from perturbray.results.summary import COMMON, Summary

ROW, PANEL, CHARACTER = 0.155, 2.1, 0.062  # inches: a series, the width of a panel, of a letter in a name
ABOVE, BELOW = 0.72, 0.42  # inches of a panel for its title and for its axis


def board(summary: Summary, *, metrics: Sequence[str] | None = None) -> Figure:
    """Each metric's means over conditions with their 95 % intervals, a panel a metric; baselines hollow and grey.

    A score stands above its rank form where both are shown. Chance, floor and ceiling are upright lines.
    """
    return _panels(summary, list(metrics or summary.headline), draw=_panel)


def scaled(summary: Summary) -> Figure:
    """Scaled scores, a panel a metric that has a scale: 0 the mean response, 1 a replicate; those beyond
    ``plots.SHOWN`` stand at the edge."""
    return _panels(summary, plots.scalable(summary), draw=_scaled_panel)


def _panels(summary: Summary, metrics: list[str], *, draw: Callable) -> Figure:
    columns, order = plots.columns(metrics), _order(summary)
    depth, across = max(map(len, columns), default=1), max(len(columns), 1)
    margin = 0.25 + CHARACTER * max((len(series) for series in order), default=1)
    high = ROW * (len(order) + 0.6)
    size = margin + PANEL * across, depth * (ABOVE + high + BELOW)
    with mpl.rc_context(plots.STYLE):
        figure, looks = Figure(figsize=size), plots.looks_of(summary)
        for number, column in enumerate(columns):
            for down, name in enumerate(column):
                left, bottom = margin + PANEL * number, (depth - 1 - down) * (ABOVE + high + BELOW) + BELOW
                place = left / size[0], bottom / size[1], (PANEL - 0.28) / size[0], high / size[1]
                axes = figure.add_axes(place)
                draw(axes, summary, summary.scales[name], order=order, looks=looks)
                _frame(axes, summary.scales[name], order=order, looks=looks)
                axes.tick_params(axis="y", labelleft=not number)
    return figure


def _order(summary: Summary) -> list[str]:
    """Series by the mean of the first metric, best first, baselines among them."""
    at = summary.board(summary.base, metrics=summary.headline[:1])
    score = {row.series: -summary.scales[row.metric].sign * row.mean for row in at.itertuples()}
    return sorted(summary.series, key=lambda series: score.get(series, np.inf))


def _panel(axes: Axes, summary: Summary, scale: Scale, *, order: list[str], looks: dict[str, dict]) -> None:
    means = summary.means
    means = means[(means["stratum"] == COMMON) & (means["metric"] == scale.name)].set_index("series")
    for row, series in enumerate(order):
        if series in means.index and np.isfinite(means.at[series, "mean"]):
            axes.hlines(
                row, means.at[series, "low"], means.at[series, "high"], color=looks[series]["color"], linewidth=1.1
            )
            axes.plot(means.at[series, "mean"], row, **_point(looks[series]))
    axes.set_xlabel(scale.direction + (f" ({scale.unit})" if scale.unit else ""), fontsize=7.5)
    _lines(axes, _anchors(summary, scale))


def _scaled_panel(axes: Axes, summary: Summary, scale: Scale, *, order: list[str], looks: dict[str, dict]) -> None:
    found = summary.anchors.scaled
    found = found[found["metric"] == scale.name].dropna(subset=["scaled"]).set_index("series")["scaled"]
    for row, series in enumerate(order):
        if series in found.index:
            beyond = {} if plots.SHOWN[0] <= found[series] <= plots.SHOWN[1] else {"markerfacecolor": plots.PAPER}
            axes.plot(np.clip(found[series], *plots.SHOWN), row, **_point(looks[series] | beyond))
    axes.set_xlabel("0 mean response, 1 replicate", fontsize=7.5)
    axes.set_xlim(min(-0.1, axes.get_xlim()[0]), max(1.2, axes.get_xlim()[1]))
    _lines(axes, {"": 0.0, " ": 1.0})


def _point(look: dict) -> dict:
    """The look of a dot from that of a line."""
    own = {name: value for name, value in look.items() if name not in ("linestyle", "linewidth", "zorder")}
    return {"linestyle": "", "markersize": 4.5, "markeredgewidth": 0.9, "zorder": 3, **own}


def _frame(axes: Axes, scale: Scale, *, order: list[str], looks: dict[str, dict]) -> None:
    """Title, names of rows and ticks, alike in all figures."""
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_yticks(range(len(order)), [plots.plain_text(series) for series in order])
    for label, series in zip(axes.get_yticklabels(), order, strict=True):
        label.set_parse_math(False)  # $ in a name is a character
        label.set_style("italic" if looks[series]["color"] == plots.BASELINE else "normal")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.set_title(f"{scale.title} {scale.arrow}".rstrip(), pad=24)
    axes.annotate(
        scale.effect, (0, 1), xycoords="axes fraction", xytext=(0, 15), textcoords="offset points", fontsize=7.5
    )
    axes.grid(visible=True, axis="x")
    axes.tick_params(length=3)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _anchors(summary: Summary, scale: Scale) -> dict[str, float]:
    """What the upright lines of a metric are, by name."""
    bounds = summary.anchors.bounds
    found = bounds[bounds["metric"] == scale.name]
    named = [("floor", MEAN_RESPONSE), ("ceiling", REPLICATE)] if len(found) else []
    values = {name: float(found[anchor].iloc[0]) for name, anchor in named}
    values = {name: value for name, value in values.items() if np.isfinite(value)}
    if scale.chance is None:
        return values
    others = {name: value for name, value in values.items() if not np.isclose(value, scale.chance, atol=1e-3)}
    return {"chance": scale.chance, **others}


def _lines(axes: Axes, values: dict[str, float]) -> None:
    """Upright lines, each named above where it stands, or at the edge that it lies beyond."""
    low, high = axes.get_xlim()
    room = high - low
    above = blended_transform_factory(axes.transData, axes.transAxes)
    placed = sorted((float(np.clip(value, low, high)), value, name) for name, value in values.items())
    for number, (at, value, name) in enumerate(placed):
        beyond = not low - room <= value <= high + room
        if not beyond:
            at = value
            axes.axvline(value, color=plots.INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.5)
        before, after = (
            0 <= number + step < len(placed) and abs(placed[number + step][0] - at) < 0.3 * room for step in (-1, 1)
        )
        side = "left" if before else "right" if after else "center"  # away from the next name
        axes.annotate(
            f"{name} {value:.2g} {'←' if value < low else '→'}" if beyond else name,
            (at, 1),
            xycoords=above,
            xytext=({"left": 2, "right": -2, "center": 0}[side], 1.5),
            textcoords="offset points",
            fontsize=7,
            ha=side,
            va="bottom",
        )
