"""Drawing: what the page shows of scores and losses: leaderboard, figure, learning curves, searches; in a thread of its own.

It is drawn anew when another trial has finished, and takes no more than a share of the time: of many trials it costs seconds.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from perturbray.errors import InputError
from perturbray.results import dots, plots, search, sections, table
from perturbray.results.intervals import RESAMPLES
from perturbray.results.reader import Reader
from perturbray.results.report import apart, drawn, figure_title, themed
from perturbray.results.summary import summarise
from perturbray.watch.state import RUNNING, State

SECONDS = 4.0  # between two drawings, at least
SHARE = 0.3  # of the time that drawing may take
QUICK = 200  # bootstrap samples while a sweep runs


@dataclass(frozen=True)
class Drawing:
    """Views for the page's template."""

    trials: int = 0  # that are in it
    levels: tuple[dict, ...] = ()
    figure: Markup | None = None
    figure_title: str = ""
    curves: Markup | None = None
    searches: tuple[dict, ...] = ()
    problem: str = ""


def draw(reader: Reader, state: State) -> Drawing:
    """What is known now. Raises InputError for a file that cannot be read."""
    searches = [drawn(search.view(one), number) for number, one in enumerate(state.searches) if len(one.trials)]
    if not state.finished:
        return Drawing(searches=tuple(searches))
    plan = dict(state.plan)
    resamples = QUICK if state.kind == RUNNING else RESAMPLES
    summary = summarise(reader.read(), plan, anchors=table.read_anchors(reader.folder), resamples=resamples)
    alone = len(summary.levels) == 1
    figure = dots.board(summary) if alone else plots.against_x(summary)
    curves = plots.curves(summary)
    return Drawing(
        trials=len(summary.trials),
        levels=tuple(level for level in sections.levels(summary) if level["open"]),
        figure=Markup(themed(plots.svg(figure))),
        figure_title=figure_title("" if alone else str(plan.get("x", ""))),
        curves=None if curves is None else Markup(themed(apart(plots.svg(curves), "curves-"))),
        searches=tuple(searches),
    )


class Drawer(threading.Thread):
    """Draws whenever there is something new; ``changed`` is called with each drawing."""

    def __init__(self, folder: Path, changed: Callable[[Drawing], None]) -> None:
        super().__init__(daemon=True, name="drawer")
        self.reader, self.changed = Reader(folder), changed
        self._state: State | None = None
        self._wanted = threading.Event()
        self._seen: object = None

    def want(self, state: State) -> None:
        """This is the state now; drawn if it has more scores than what was drawn last."""
        seen = state.finished, tuple(len(one.trials) for one in state.searches), state.kind == RUNNING
        if seen != self._seen:
            self._seen, self._state = seen, state
            self._wanted.set()

    def run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            began = time.monotonic()
            try:
                found = draw(self.reader, self._state)
            except InputError as error:
                found = Drawing(problem=str(error))
            except Exception as error:  # the page goes on, and says so: a sweep that runs may be of another version
                found = Drawing(problem=f"{type(error).__name__}: {error}")
            self.changed(found)
            time.sleep(max(SECONDS, (time.monotonic() - began) / SHARE) if self._state.kind == RUNNING else 0.5)
