"""What a running sweep shows in the terminal: live where there is one, lines otherwise; and it keeps the page up to date."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from perturbray.cluster import Cluster
from perturbray.events import Events
from perturbray.placement import Placement
from perturbray.plan import Plan
from perturbray.results import table
from perturbray.results.reader import Reader
from perturbray.results.report import write_report
from perturbray.results.summary import Summary, summarise, summary_of
from perturbray.results.terminal import terminal

LINE_SECONDS = 10.0  # between two lines where there is no terminal
PAGE_SECONDS = 15.0  # at least, between two writes of the page
PAGE_SHARE = 0.05  # of the time that writing the page may take
ROWS = 4  # of the leaderboard, while a sweep runs
QUICK = 200  # bootstrap samples of the leaderboard of a running sweep


class Terminal(Events):
    """Prints what the engine tells."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
        self.running: dict[str, float] = {}
        self.began: float | None = None

    def line(self, text: str) -> None:
        self.console.print(Text(text))

    def connected(self, cluster: Cluster, placement: Placement, tune_folder: Path) -> None:
        self.line(f"Ray: {cluster}: {placement}")
        if cluster.dashboard:
            self.line(f"Ray dashboard: {cluster.dashboard} (it asks for the token in {cluster.token})")
        self.line(f"TensorBoard:   tensorboard --logdir {tune_folder.parent}")

    def planned(self, plan: Plan) -> None:
        for spec in plan.conditions:
            self.line(f"{spec.name}: {plan.normalisation(spec).text}")
        done, failed = len(plan.finished()), set(table.failed(plan.folder)) & set(plan.trials)
        again = f"; {len(failed)} failed before and run again" if failed else ""
        self.line(f"{len(plan.trials)} trials: {done} finished before, {len(plan.trials) - done} to run{again}")

    def started(self, key: str) -> None:
        self.running[key] = time.monotonic()
        self.began = self.began or time.monotonic()

    def stopped(self, key: str) -> None:
        self.running.pop(key, None)

    @contextmanager
    def watching(self, plan: Plan) -> Iterator[None]:
        watcher = Watcher(plan, self)
        watcher.start()
        state = "interrupted"
        try:
            yield
            state = "done"
        finally:
            watcher.stop(state)


class Watcher(threading.Thread):
    """Looks at the results folder while trials run: it alone says what is finished."""

    def __init__(self, plan: Plan, display: Terminal) -> None:
        super().__init__(daemon=True, name="watcher")
        self.plan, self.display = plan, display
        self.reader = Reader(plan.folder)
        self.before = plan.finished()
        self.summary: Summary | None = None
        self.done: set[str] = set(self.before)
        self.failed: dict[str, dict] = {}
        self.start_time = time.monotonic()
        self._halt = threading.Event()
        self._page, self._page_cost, self._line, self._shown = 0.0, 0.0, 0.0, 0
        self._page_done = -1
        self._first_row = False

    def run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # the trials go on without a display; the page is tried again at the end
            self.display.line(f"the display stopped: {error!r}; the trials go on")

    def _watch(self) -> None:
        if not self.display.console.is_terminal:
            while not self._halt.wait(0.5):
                self._look()
                self._print_line()
            return
        with Live(self._view(), console=self.display.console, refresh_per_second=4, transient=True) as live:
            while not self._halt.wait(0.25):
                self._look()
                live.update(self._view())

    def stop(self, state: str) -> None:
        """End the display and write the page a last time."""
        self._halt.set()
        self.join()
        self._write_page(state)

    def _look(self) -> None:
        self.done = self.plan.finished()
        failed = table.failed(self.plan.folder)
        self.failed = {key: failed[key] for key in failed if key in self.plan.trials}
        now = time.monotonic()
        if len(self.done) > self._shown and (self._shown == 0 or now - self._line > LINE_SECONDS / 2):
            self._shown = len(self.done)
            self.summary = summarise(self.reader.read(), table.read_plan(self.plan.folder), resamples=QUICK)
        changed = len(self.done) + len(self.failed) != self._page_done
        if changed and now - self._page > max(PAGE_SECONDS, self._page_cost / PAGE_SHARE):
            self._write_page("running")

    def _write_page(self, state: str) -> None:
        started = time.monotonic()
        stored = table.read_plan(self.plan.folder)
        stored["status"] = {"state": state, "eta_seconds": self._left()}
        table.write_plan(self.plan.folder, stored)
        write_report(self.plan.folder, reader=self.reader)
        self._page, self._page_cost = time.monotonic(), time.monotonic() - started
        self._page_done = len(self.done) + len(self.failed)

    def _left(self) -> float | None:
        """Seconds to go, from the mean time of trials so far."""
        ended = len(self.done - self.before) + len(self.failed)
        if not ended or self.display.began is None:
            return None
        elapsed = time.monotonic() - self.display.began
        return elapsed / ended * (len(self.plan.trials) - len(self.done) - len(self.failed))

    def _counts(self) -> str:
        left = self._left()
        text = f"{clock(time.monotonic() - self.start_time)}: " if not self.display.console.is_terminal else ""
        text += f"{len(self.done)} of {len(self.plan.trials)} trials done, {len(self.display.running)} running"
        text += f", {len(self.failed)} failed" if self.failed else ""
        return text + (f", about {clock(left)} to go" if left else "")

    def _print_line(self) -> None:
        now = time.monotonic()
        first = self.summary is not None and not self._first_row
        if not first and now - self._line < LINE_SECONDS:
            return
        self._line, self._first_row = now, self._first_row or first
        rows = "; ".join(f"{name} {value}" for name, value in self._best())
        self.display.line(self._counts() + (f" | {self._board_title()}: {rows}" if rows else ""))

    def _best(self) -> list[tuple[str, str]]:
        if self.summary is None or not self.summary.headline:
            return []
        metric, level = self.summary.headline[0], self.summary.levels["level"].iloc[0]
        board = self.summary.board(level, metrics=[metric]).sort_values(
            "mean", ascending=not self.summary.scales[metric].higher_is_better, kind="stable"
        )
        return [(row["series"], f"{row['mean']:.4f}") for row in board.head(ROWS).to_dict("records")]

    def _board_title(self) -> str:
        arrow = "↑" if self.summary.scales[self.summary.headline[0]].higher_is_better else "↓"
        place = f" at level {self.summary.levels['level'].iloc[0]}" if self.plan.sweep.x else ""
        return f"{self.summary.headline[0]} {arrow}{place}"

    def _view(self) -> Group:
        head = Table.grid(padding=(0, 2))
        ended = len(self.done) + len(self.failed)
        head.add_row(ProgressBar(total=len(self.plan.trials), completed=ended, width=30), Text(self._counts()))
        parts = [head]
        now = time.monotonic()
        names = [
            f"{self.plan.trials[key].name} ({clock(now - since)})" for key, since in list(self.display.running.items())
        ]
        running = "running: " + "; ".join(names[:4]) if names else "starting the first trials"
        parts.append(Text(running, style="dim", overflow="ellipsis", no_wrap=True))
        if rows := self._best():
            board = Table(box=None, padding=(0, 2), title=self._board_title(), title_justify="left", title_style="bold")
            board.add_column("model")
            board.add_column("mean", justify="right")
            for name, value in rows:
                board.add_row(name, value)
            parts.append(board)
        return Group(*parts)


def clock(seconds: float) -> str:
    """Seconds as a person says them."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_results(folder: Path, console: Console, *, summary: Summary | None = None) -> None:
    """The leaderboard of a results folder, from its summary where that is known, and where its files are."""
    console.print(terminal(summary or summary_of(folder)))
    for label, name in (("page", "report.html"), ("figure", "figure.png"), ("table", "summary.csv")):
        if (folder / name).exists():
            console.print(Text(f"{label + ':':8}{folder / name}"))
