"""What a search learnt, for the page: objective against trial, slices, importance, borders, and what stopping saved.

A figure is a function of a `Learnt`; a search's part of the page is an entry of `view`.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from perturbray.results import plots
from perturbray.results.ledger import Learnt, read_searches
from perturbray.results.sections import grid

PERMUTATIONS = 500
FEWEST = 12  # trials with a value, below which importance says nothing
BINS = 4  # of a range without steps
LOOKS = {
    "finished": {"marker": "o", "color": plots.COLOURS[0]},
    "stopped": {"marker": "o", "color": plots.COLOURS[1], "markerfacecolor": plots.PAPER},
}
LABELS = {"finished": "came to its end", "stopped": "stopped early"}


def views(folder: Path) -> list[dict]:
    """The part of each search of a results folder; empty where there is none."""
    return [view(learnt) for learnt in read_searches(folder)]


def view(learnt: Learnt) -> dict:
    """A search's part of the page, figures as SVG elements."""
    worth = len(known(learnt)) > 0
    return {
        "title": f"{learnt.name}: {learnt.header.get('way', '')}, {len(learnt.trials)} trials",
        "sentences": sentences(learnt),
        "figures": [plots.svg(progress(learnt)), plots.svg(slices(learnt))] if worth else [],
        "captions": [
            "Objective on the validation conditions against trial, lower is better; the line is the best so far. A trial "
            "that was stopped early stands at what it had then, on fewer epochs than those that came to their end.",
            "Objective against the value of each hyperparameter where it counts; marks as above, the best trial ringed.",
        ],
        "importance": importance_table(learnt),
        "space": space_table(learnt),
        "failures": failures(learnt),
    }


def known(learnt: Learnt) -> pd.DataFrame:
    """The trials with a value."""
    return learnt.trials[learnt.trials["objective"].notna()]


def best(learnt: Learnt) -> pd.Series | None:
    """The trial with the lowest objective."""
    found = known(learnt)
    return None if found.empty else found.loc[found["objective"].astype(float).idxmin()]


# what it says


def sentences(learnt: Learnt) -> list[str]:
    """Best, borders, and what early stopping saved."""
    top, found = best(learnt), []
    if top is None:
        return ["No trial has a value."]
    found.append(
        f"Minimised: {learnt.header.get('objective', 'the objective')}. The best is trial {top['number']} with "
        f"{top['objective']:.5g}{', tried before any proposal' if top['way'] == 'first' else ''}."
    )
    borders = learnt.header.get("borders", {})
    if borders:
        listed = ", ".join(f"{path} ({_shown(top[path])}, {side} end)" for path, side in borders.items())
        found.append(
            f"At an end of the space: {listed}. A better value may lie beyond it; --widen searches once more there."
        )
    else:
        found.append("No best value lies at an end of the space.")
    saved = savings(learnt)
    if saved["stopped"]:
        found.append(
            f"Stopped early: {saved['stopped']} of {len(learnt.trials)} trials. They took {saved['taken']:.0f} epochs; as "
            f"long as the trials that came to their end ({saved['length']:.0f} epochs on average) they would have taken "
            f"{saved['taken'] + saved['saved']:.0f}, so about {saved['share']:.0%} of the search's epochs and "
            f"{_duration(saved['seconds'])} were saved."
        )
    return found


def savings(learnt: Learnt) -> dict[str, float]:
    """``saved``: epochs that stopped trials would have gone on, if they had been as long as finished ones; ``share``: of
    the epochs that the search would have taken then; ``seconds``: at the mean time of an epoch of all trials."""
    trials = learnt.trials[learnt.trials["state"] != "failed"]
    stopped, finished = (trials[trials["state"] == state] for state in ("stopped", "finished"))
    length = float(finished["epochs"].mean()) if len(finished) else 0.0
    saved = float(np.maximum(length - stopped["epochs"], 0).sum())
    total = float(trials["epochs"].sum())
    each = float(trials["seconds"].sum()) / total if total else 0.0
    return {
        "stopped": len(stopped),
        "taken": float(stopped["epochs"].sum()),
        "length": length,
        "saved": saved,
        "share": saved / (total + saved) if total + saved else 0.0,
        "seconds": saved * each,
    }


def importance(learnt: Learnt, *, seed: int = 0) -> pd.DataFrame:
    """How much of the objective goes with each hyperparameter alone: a row each, columns share, chance, trials.

    ``share``: epsilon squared of the objective's ranks between the values of the hyperparameter, ranges in quarters of the
    trials; it is adjusted for the number of values, so that it is 0 on average where there is nothing. ``chance``: the
    95th percentile of the share when objectives are permuted. Ranks, since a few very bad trials would else be all that
    counts. An effect that shows only together with another is not seen.
    """
    found, rng, rows = known(learnt), np.random.default_rng(seed), []
    for path in learnt.header.get("space", {}):
        part = found[found[path].notna()] if path in found else found.iloc[:0]
        if len(part) < FEWEST:
            continue
        groups = _groups(part[path], learnt.header["space"][path])
        if len(np.unique(groups)) < 2:
            continue
        ranks = part["objective"].astype(float).rank().to_numpy()
        null = [_epsilon(rng.permutation(ranks), groups) for _ in range(PERMUTATIONS)]
        rows.append((path, _epsilon(ranks, groups), float(np.quantile(null, 0.95)), len(part)))
    frame = pd.DataFrame(rows, columns=["hyperparameter", "share", "chance", "trials"])
    return frame.sort_values("share", ascending=False, ignore_index=True)


def _groups(values: pd.Series, part: Mapping) -> np.ndarray:
    if "values" in part:
        return np.unique(values.astype(str), return_inverse=True)[1]
    ranks = values.astype(float).rank(method="first").to_numpy() - 1
    return (ranks * BINS // len(values)).astype(int)


def _epsilon(ranks: np.ndarray, groups: np.ndarray) -> float:
    """Epsilon squared: eta squared, less what it is without any effect."""
    total = ((ranks - ranks.mean()) ** 2).sum()
    if total == 0:
        return 0.0
    levels = np.unique(groups)
    within = sum(((ranks[groups == g] - ranks[groups == g].mean()) ** 2).sum() for g in levels)
    n, k = len(ranks), len(levels)
    return float(1 - (within / (n - k)) / (total / (n - 1))) if n > k else 0.0


def importance_table(learnt: Learnt) -> dict | None:
    found = importance(learnt)
    rows = [
        [row.hyperparameter, f"{max(row.share, 0):.2f}", f"{row.chance:.2f}", row.trials, _note(row)]
        for row in found.itertuples()
    ]
    return grid(
        rows,
        caption="Importance: the share of the variance of the objective's ranks that goes with a hyperparameter alone, "
        "adjusted for its number of values. At or below what permuted objectives reach in 95 % of cases it cannot be told "
        "from chance. A search does not sample evenly, and stopped trials had fewer epochs: read it as a hint.",
        columns=["hyperparameter", "share", "chance", "trials", "note"],
        align=["", "n", "n", "n", ""],
    )


def _note(row: tuple) -> str:
    return "" if row.share > row.chance else "≈ chance"


def space_table(learnt: Learnt) -> dict:
    top, borders = best(learnt), learnt.header.get("borders", {})
    rows = []
    for path, part in learnt.header.get("space", {}).items():
        value = "" if top is None or path not in top or pd.isna(top[path]) else _shown(top[path])
        rows.append([path, _range(part), value, f"{borders[path]} end" if path in borders else ""])
    return grid(
        rows,
        caption="The space that was searched, and the best values.",
        columns=["hyperparameter", "range", "best", "at"],
    )


def failures(learnt: Learnt) -> list[str]:
    failed = learnt.trials[learnt.trials["state"] == "failed"]
    return [f"trial {row.number}: {row.reason}" for row in failed.itertuples()]


def _range(part: Mapping) -> str:
    if "values" in part:
        steps = part["values"]
        ends = f"{_shown(steps[0])} to {_shown(steps[-1])} in {len(steps)} steps"
        text = ", ".join(map(_shown, steps)) if len(steps) <= 6 else ends
    else:
        scale = " (log)" if "Log" in part["kind"] else ""
        text = f"{part['low']:g} to {part['high']:g}{scale}"
    return text + (f", where {part['when'][0]} is {part['when'][1]}" if "when" in part else "")


def _shown(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return str(value)
    return f"{value:.4g}" if isinstance(value, int | float | np.number) else str(value)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


# what it shows


def progress(learnt: Learnt) -> Figure:
    """Objective against trial, and the best so far; failed trials at the upper edge."""
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.4, 2.7))
        axes = figure.add_axes((0.11, 0.17, 0.86, 0.68))
        found = known(learnt).sort_values("number")
        number, value = found["number"].to_numpy(int), found["objective"].to_numpy(float)
        axes.step(
            np.append(number, learnt.trials["number"].max() + 0.5),
            np.append(np.minimum.accumulate(value), value.min()),
            where="post",
            color=plots.INK,
            linewidth=1.2,
            label="best so far",
            zorder=2,
        )
        _marks(axes, found, number)
        axes.set_ylim(*_limits(value))
        failed = learnt.trials.loc[learnt.trials["state"] == "failed", "number"].to_numpy(int)
        if len(failed):
            top = np.full(len(failed), axes.get_ylim()[1])
            axes.plot(failed, top, "x", color=plots.COLOURS[3], label="failed", clip_on=False, markersize=5)
        axes.set_xlabel("trial")
        axes.set_ylabel("objective")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="upper left", ncols=4, frameon=False, bbox_to_anchor=(0.1, 1.0))
        return figure


def slices(learnt: Learnt) -> Figure:
    """Objective against each hyperparameter, a panel each."""
    found, space = known(learnt), learnt.header.get("space", {})
    paths = [path for path in space if path in found and found[path].notna().any()]
    top, across = best(learnt), 3
    down = max(1, math.ceil(len(paths) / across))
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(7.2, 2.1 * down))
        grid_axes = figure.subplots(down, across, squeeze=False, sharey=True)
        figure.subplots_adjust(left=0.09, right=0.98, top=1 - 0.12 / down, bottom=0.2 / down, hspace=0.6, wspace=0.16)
        limits = _limits(found["objective"].to_numpy(float))
        for axes, path in zip(grid_axes.flat, paths, strict=False):
            part = found[found[path].notna()]
            place = _places(part[path], space[path])
            _marks(axes, part, place)
            if pd.notna(top[path]):
                at = place[part["number"].to_numpy() == top["number"]]
                axes.plot(at, [top["objective"]], "o", markersize=9, markerfacecolor="none", color=plots.INK, zorder=4)
            if "values" in space[path]:
                steps = space[path]["values"]
                axes.set_xticks(
                    range(len(steps)), [_shown(step) for step in steps], rotation=45 if len(steps) > 5 else 0
                )
                axes.set_xlim(-0.5, len(steps) - 0.5)
            elif "Log" in space[path]["kind"]:
                axes.set_xscale("log")
            axes.set_ylim(*limits)
            axes.set_title(path, fontsize=8)
        for axes in list(grid_axes.flat)[len(paths) :]:
            axes.set_visible(False)
        for row in grid_axes:
            row[0].set_ylabel("objective")
        return figure


def _marks(axes: Axes, found: pd.DataFrame, place: np.ndarray) -> None:
    """The trials, by how they ended; a value beyond the panel stands at its edge."""
    low, high = _limits(found["objective"].to_numpy(float))
    for state, look in LOOKS.items():
        chosen = (found["state"] == state).to_numpy()
        if chosen.any():
            values = np.clip(found["objective"].to_numpy(float)[chosen], low, high)
            axes.plot(
                place[chosen], values, linestyle="", markersize=4, label=LABELS[state], zorder=3, clip_on=False, **look
            )


def _limits(value: np.ndarray) -> tuple[float, float]:
    """From below the best to somewhat above three quarters of the trials: the worst would take all the room."""
    low, high = float(value.min()), float(np.quantile(value, 0.75))
    reach = max(high - low, 1e-9 + abs(low) * 1e-3)
    return low - 0.1 * reach, min(high + 1.2 * reach, max(float(value.max()) + 0.1 * reach, low + reach))


def _places(values: pd.Series, part: Mapping) -> np.ndarray:
    if "values" not in part:
        return values.to_numpy(float)
    steps = {_shown(step): number for number, step in enumerate(part["values"])}
    return np.array([steps.get(_shown(value), len(steps) - 1) for value in values], dtype=float)
