"""What a sweep says of itself while it runs: ``live.json`` in its results folder, replaced about once a second.

Whoever looks at the folder sees from it what no finished trial's file can say: what runs where and since when, how it
learns, what it holds of memory. It is no part of the results: without it, nothing is lost but the view.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "live.json"
RUNNING, DONE, INTERRUPTED, BROKEN = "running", "done", "interrupted", "broken"  # states of whoever runs the sweep
MOST = 120  # points of a learning curve; a longer one is thinned

Point = tuple[int, float | None, float | None]  # epoch, training loss, validation loss


@dataclass(kw_only=True)
class Run:
    """A trial that was started: how far it is, and what it takes."""

    since: float  # seconds since 1970, by the clock of whoever runs the sweep
    name: str = ""  # of a search's trial; others are named by the plan
    host: str = ""
    points: list[Point] = field(default_factory=list)
    epoch_seconds: float | None = None
    cells: float | None = None  # that an epoch visits
    memory_mb: float | None = None  # its own, without what is mapped by others too
    gpu_memory_mb: float | None = None
    gpu_percent: float | None = None
    stopped: bool = False  # trained, or failed: its score or its record is under way, or stored

    def add(self, epoch: int, train: float | None, watched: float | None) -> None:
        """A further epoch; one that was said before is said anew by a trial that was started again."""
        while self.points and self.points[-1][0] >= epoch:
            self.points.pop()
        self.points.append((epoch, train, watched))
        if len(self.points) > MOST:
            del self.points[1:-1:2]


@dataclass(kw_only=True)
class Live:
    """The file as a whole."""

    beat: int = 0  # counts the writes: while it changes, somebody lives
    time: float  # of this write, by the same clock as all others here
    began: float  # of this session: a sweep that is run again has several
    pid: int = 0
    host: str = ""
    state: str = RUNNING
    reason: str = ""  # why it is broken
    cluster: str = ""  # in words
    at_once: int = 0  # trials; 0: not known yet
    before: int = 0  # trials that had finished before this session
    said: list[str] = field(default_factory=list)  # the last lines for the user
    runs: dict[str, Run] = field(default_factory=dict)  # by key; of a search: by its folder, a slash and its number


def text(live: Live) -> str:
    """What the file holds."""
    return json.dumps(live, default=vars, allow_nan=False)


def write(folder: str | Path, content: str) -> None:
    """Replace the file. Unlike results it is not forced to the disk: after a power cut nobody runs."""
    path = Path(folder) / FILE
    temporary = path.with_name(f".{FILE}.tmp")  # one name, so that kills leave no heap of them
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)


def read(folder: str | Path) -> Live | None:
    """What was said last; None where nothing was, or nothing that can be read: the file is a view, and no evidence."""
    try:
        return _live(json.loads((Path(folder) / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _live(found: Mapping) -> Live:
    return Live(
        **{name: int(found[name]) for name in ("beat", "pid", "at_once", "before")},
        **{name: float(found[name]) for name in ("time", "began")},
        **{name: str(found[name]) for name in ("host", "state", "reason", "cluster")},
        said=[str(line) for line in found["said"]],
        runs={str(key): _run(run) for key, run in found["runs"].items()},
    )


def _run(found: Mapping) -> Run:
    amounts = ("epoch_seconds", "cells", "memory_mb", "gpu_memory_mb", "gpu_percent")
    return Run(
        since=float(found["since"]),
        name=str(found["name"]),
        host=str(found["host"]),
        stopped=bool(found["stopped"]),
        points=[(int(epoch), number(train), number(watched)) for epoch, train, watched in found["points"]],
        **{name: number(found[name]) for name in amounts},
    )
