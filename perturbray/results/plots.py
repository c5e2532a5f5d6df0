"""A figure per question; a figure is a function of a Summary that returns a matplotlib Figure, and `save` writes it."""

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from perturbray.results.anchors import MEAN_RESPONSE, REPLICATE
from perturbray.results.scales import Scale
from perturbray.results.summary import COMMON, Summary
from perturbray.results.table import replace_file

# Okabe and Ito's colours, which stay apart for colour-blind readers, in an order whose first five stand on white and on
# black; each also has a marker, so that colour is never alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES = ((0, (1, 1.6)), (0, (4, 1.6)), (0, (6, 1.6, 1, 1.6)), (0, (2.5, 1.2)), (0, (8, 2)))
BASELINE = "#8a8a8a"
INK = "#262626"  # the page replaces these three by its own colours, light or dark
FAINT = "#e4e4e4"
PAPER = "#fefefe"

PANEL = (2.75, 2.35)  # inches
SHOWN = (-1.0, 1.5)  # of scaled scores
CURVED = 30  # series with learning curves on a page
CURVES = 5  # learning curves side by side

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "grid.color": FAINT,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: sharp, selectable, found by a search
    "svg.hashsalt": "perturbray",  # the same numbers give the same file
}


def against_x(summary: Summary, *, metrics: Sequence[str] | None = None) -> Figure:
    """Each metric against the sweep's x, a panel a metric: a line a series, its band the 95 % interval over conditions.

    A score stands above its rank form where both are shown. Baselines are grey and dashed.
    """
    return _panels(summary, list(metrics or summary.headline), draw=_panel)


def scaled(summary: Summary) -> Figure:
    """Scaled scores against the sweep's x, a panel a metric that has a scale: 0 the mean response, 1 a replicate.

    Drawn within ``SHOWN``; a value beyond it stands at the edge, hollow.
    """
    found = summary.anchors.scaled
    values = np.clip(found["scaled"].dropna(), *SHOWN)
    low, high = min(-0.1, values.min() - 0.05), max(1.2, values.max() + 0.05)
    return _panels(summary, scalable(summary), draw=partial(_scaled_panel, limits=(low, high)))


def curves(summary: Summary) -> Figure | None:
    """Loss against epoch at the base level, a panel a series that trains in epochs and a line a seed; None without any."""
    trials = summary.trials
    if "curve" not in trials:
        return None
    trials = trials[
        (trials["level"] == summary.base)
        & trials["curve"].astype(object).map(lambda text: isinstance(text, str)).astype(bool)
    ]
    losses = {
        series: [np.array(rows, float) for text in part["curve"] if (rows := json.loads(text))]
        for series, part in trials.groupby("series", observed=True)
    }
    shown = [series for series in summary.series if losses.get(series)][:CURVED]
    if not shown:
        return None
    looks = looks_of(summary)
    across = min(CURVES, len(shown))
    down = -(-len(shown) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(2.3 * across, 4.4), 1.9 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for panel, series in zip(axes, shown, strict=False):
            colour = looks[series]["color"]
            for rows in losses[series]:
                epoch, train, watched = rows.T
                panel.plot(epoch, train, color=colour, linewidth=0.8, linestyle=(0, (2, 1.5)), alpha=0.8)
                panel.plot(epoch, watched, color=colour, linewidth=1.2)
                best = int(np.nanargmin(watched)) if np.isfinite(watched).any() else 0
                panel.plot(epoch[best], watched[best], marker=looks[series]["marker"], color=colour, markersize=4)
            panel.set_title(plain_text(series), fontsize=8, parse_math=False)
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            panel.yaxis.set_major_locator(MaxNLocator(4))
        for panel in axes[len(shown) :]:
            panel.set_visible(False)
        figure.supxlabel("epoch", fontsize=8)
        figure.supylabel("loss", fontsize=8)
    return figure


def scalable(summary: Summary) -> list[str]:
    """Headline metrics with a scaled score somewhere."""
    known = set(summary.anchors.scaled.dropna(subset=["scaled"])["metric"])
    return [name for name in summary.headline if name in known]


def _panels(summary: Summary, metrics: list[str], *, draw: Callable) -> Figure:
    with mpl.rc_context(STYLE):
        stacks = columns(metrics)
        depth = max((len(column) for column in stacks), default=1)
        looks = looks_of(summary)
        width = max(PANEL[0] * max(len(stacks), 1), 4.4)
        rows, per_row = _legend_rows(looks, width)
        legend, height = 0.17 * rows + 0.1, PANEL[1] * depth
        size = width, legend + height + 0.3
        figure = Figure(figsize=size)
        axes = figure.subplots(depth, max(len(stacks), 1), squeeze=False, sharex=True)
        # Places in inches: a layout engine would draw the figure twice, and take half of the page's time.
        step = width / max(len(stacks), 1), PANEL[1]
        for (down, across), panel in np.ndenumerate(axes):
            left, bottom = step[0] * across + 0.62, 0.3 + step[1] * (depth - 1 - down) + 0.3
            panel.set_position(
                (left / size[0], bottom / size[1], (step[0] - 0.75) / size[0], (step[1] - 0.78) / size[1])
            )
        for across, column in enumerate(stacks):
            for down in range(depth):
                if down < len(column):
                    draw(axes[down, across], summary, summary.scales[column[down]], looks=looks)
                else:
                    axes[down, across].set_visible(False)
        if stacks:
            label = summary.plan.get("x_label") or summary.plan.get("x", "level")
            figure.text(0.5, 0.1 / size[1], label, fontsize=8.5, ha="center", va="bottom")
            _legend(figure, looks, columns=per_row)
        return figure


def looks_of(summary: Summary) -> dict[str, dict]:
    """Colour, marker and dashes of each series, by its place in the plan, so that a line keeps its look as trials end."""
    planned = dict.fromkeys(trial.get("columns", {}).get("model") for trial in summary.plan.get("trials", ()))
    baselines = {*summary.baselines, *summary.plan.get("baselines", ())}
    names = list(dict.fromkeys([*planned, *summary.series]))
    models = [name for name in names if name not in baselines]
    grey = [name for name in names if name in baselines]
    looks = {}
    for series in [name for name in models + grey if name in set(summary.series)]:
        number = (grey if series in baselines else models).index(series)
        marker, dashes = MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
        if series in baselines:
            look = {"color": BASELINE, "markerfacecolor": PAPER, "linestyle": dashes, "linewidth": 1.1, "zorder": 2}
        else:
            solid = number < len(COLOURS)
            look = {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if solid else dashes, "linewidth": 1.5}
            look["zorder"] = 3
        looks[series] = {"marker": marker, **look}
    return looks


def svg(figure: Figure) -> str:
    """The figure as an SVG element, without the XML prologue."""
    with mpl.rc_context(STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, folder: Path, *, name: str = "figure", png: bool = True) -> str:
    """Write ``<name>.svg``, and ``<name>.png`` at 200 dots an inch on white; returns the SVG element."""
    text = svg(figure)
    replace_file(folder / f"{name}.svg", lambda target: target.write_text(text, encoding="utf-8"))
    if png:
        options = {"format": "png", "dpi": 200, "facecolor": "white"}
        with mpl.rc_context(STYLE):
            replace_file(folder / f"{name}.png", lambda target: figure.savefig(target, **options))
    return text


def columns(metrics: list[str]) -> list[list[str]]:
    """Panels: a score with its rank form beneath it."""
    scores = [name for name in metrics if not name.endswith("/rank")]
    columns = [[name] + [f"{name}/rank"] * (f"{name}/rank" in metrics) for name in scores]
    return columns + [[name] for name in metrics if name.endswith("/rank") and name.removesuffix("/rank") not in scores]


def _panel(axes: Axes, summary: Summary, scale: Scale, *, looks: dict[str, dict]) -> None:
    means = summary.means
    means = means[(means["stratum"] == COMMON) & (means["metric"] == scale.name)].sort_values("x")
    for series, look in looks.items():
        line = means[means["series"] == series]
        line = line[np.isfinite(line["mean"].to_numpy(float))]
        if line.empty:
            continue
        x, mean, low, high = (line[name].to_numpy(float) for name in ("x", "mean", "low", "high"))
        faint = 0.10 if look["color"] == BASELINE else 0.16
        axes.fill_between(x, low, high, color=look["color"], alpha=faint, linewidth=0, zorder=1)
        if len(x) == 1:  # a band needs two points
            axes.vlines(x, low, high, color=look["color"], linewidth=1.1, zorder=look["zorder"])
        axes.plot(x, mean, markersize=4, markeredgewidth=0.9, **look)
    _chance(axes, scale)
    _anchors(axes, summary, scale)
    axes.set_ylabel(f"{scale.direction}" + (f" ({scale.unit})" if scale.unit else ""), fontsize=7.5)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    _frame(axes, scale, arrow=scale.arrow)


def _scaled_panel(
    axes: Axes, summary: Summary, scale: Scale, *, looks: dict[str, dict], limits: tuple[float, float]
) -> None:
    known = summary.anchors.scaled
    known = known[known["metric"] == scale.name].dropna(subset=["scaled"]).merge(summary.levels, on="level")
    for series, look in looks.items():
        line = known[known["series"] == series].sort_values("x")
        x, value = line["x"].to_numpy(float), line["scaled"].to_numpy(float)
        shown, beyond = np.clip(value, *SHOWN), (value < SHOWN[0]) | (value > SHOWN[1])
        axes.plot(x, shown, markersize=4, markeredgewidth=0.9, clip_on=False, **look)
        if beyond.any():  # an empty line has no extent, and the layout collapses
            hollow = look | {"linestyle": "", "markerfacecolor": PAPER}
            axes.plot(x[beyond], shown[beyond], markersize=5, clip_on=False, **hollow)
    for level in (0, 1):
        axes.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1.5)
    axes.set_ylim(limits)
    axes.set_ylabel("0 mean response, 1 replicate", fontsize=7.5)
    _frame(axes, scale, arrow="")


def _frame(axes: Axes, scale: Scale, *, arrow: str) -> None:
    """Title, effect and ticks, alike in all figures."""
    axes.set_title(f"{scale.title} {arrow}".rstrip(), pad=17)
    axes.annotate(
        scale.effect, (0, 1), xycoords="axes fraction", xytext=(0, 7), textcoords="offset points", fontsize=7.5
    )
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(length=3, labelbottom=True)
    axes.grid(visible=True, axis="y")


def _chance(axes: Axes, scale: Scale) -> None:
    if scale.chance is None:
        return
    axes.axhline(scale.chance, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1.5)
    axes.margins(y=0.08)
    axes.annotate(
        f"chance {scale.chance:g}",
        (1, scale.chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2.5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=7,
    )


def _anchors(axes: Axes, summary: Summary, scale: Scale) -> None:
    """Floor and ceiling, as the table of anchors has them: left and right, so that their names do not meet; one that lies
    far off is named at the edge that it lies beyond."""
    bounds = summary.anchors.bounds
    found = bounds[bounds["metric"] == scale.name]
    low, high = axes.get_ylim()
    room = high - low
    for anchor, name, side in ((MEAN_RESPONSE, "floor", 1), (REPLICATE, "ceiling", 0)) if len(found) else ():
        value = float(found[anchor].iloc[0])
        if not np.isfinite(value) or (scale.chance is not None and np.isclose(value, scale.chance, atol=1e-3)):
            continue
        near = low - room <= value <= high + room
        at = value if near else low if value < low else high
        if near:
            axes.axhline(value, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.5)
        beneath = (side == 1 and near) or (not near and value > high)
        axes.annotate(
            name if near else f"{name} {value:.2g} {'↓' if value < low else '↑'}",
            (side, at),
            xycoords=("axes fraction", "data"),
            xytext=(-2 if side else 2, -2.5 if beneath else 2.5),
            textcoords="offset points",
            fontsize=7,
            ha="right" if side else "left",
            va="top" if beneath else "bottom",
        )


def _legend_rows(looks: dict[str, dict], width: float) -> tuple[int, int]:
    """Rows of the legend, and series in a row, in a figure of so many inches."""
    longest = max((len(series) for series in looks), default=1)
    fit = min(max(1, int(width / (0.42 + 0.068 * longest))), max(1, len(looks)))
    return -(-len(looks) // fit), fit


def _legend(figure: Figure, looks: dict[str, dict], *, columns: int) -> None:
    handles = [
        Line2D([], [], markersize=4.5, markeredgewidth=0.9, label=plain_text(series), **look)
        for series, look in looks.items()
    ]
    legend = figure.legend(handles=handles, loc="upper left", ncols=columns, frameon=False, handlelength=2.6)
    for text, series in zip(legend.get_texts(), looks, strict=True):
        text.set_parse_math(False)  # $ in a name is a character
        if looks[series]["color"] == BASELINE:
            text.set_style("italic")


def plain_text(label: str) -> str:
    """A name as it is: matplotlib hides a label that starts with an underscore."""
    return f"\u200b{label}" if label.startswith("_") else label
