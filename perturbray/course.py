"""Course: how a search runs, whoever runs the trials: what to try next, when to stop a trial, and what is known.

All that is known lies in a folder, one file a trial that ended, written before anything is proposed after it. A search
that was killed is the same object made again from that folder: it proposes what it would have proposed.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from perturbray.proposals import Seen, propose
from perturbray.results import ledger
from perturbray.search import Search
from perturbray.space import Values, borders
from perturbray.validation import OBJECTIVE

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
LIMITS = ("time limit of a trial", "time limit of the search")


class SearchError(RuntimeError):
    """A search ended without what it was to find."""


@dataclass
class Running:
    """A trial that is under way."""

    number: int
    key: str
    values: Values
    way: str
    started: str
    began: float
    reports: dict[int, dict[str, float]] = field(default_factory=dict)  # by epoch; again after a restart
    stopped: str = ""  # why, where it was told to stop


class Course:
    """The state of a search. ``fingerprint``: of the data, which goes into keys; without ``keep`` nothing is written."""

    def __init__(
        self,
        search: Search,
        folder: Path,
        fingerprint: str,
        *,
        facts: Mapping[str, Any] | None = None,
        keep: bool = True,
    ) -> None:
        self.search, self.fingerprint = search, fingerprint
        self.folder = Path(folder) / f"{search.model}-{search.identity(fingerprint)}"
        self.records = ledger.read_records(self.folder)  # by key
        self.running: dict[str, Running] = {}  # by what whoever runs them calls them
        self.seconds = ledger.read_header(self.folder).get("seconds", 0.0)
        self.since = time.monotonic()
        self.facts = dict(facts or {})
        self.exhausted = False
        if keep:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_header("running")

    # what is known

    @property
    def done(self) -> list[dict]:
        """Records of ended trials by their numbers."""
        return sorted(self.records.values(), key=lambda record: record["number"])

    @property
    def failed(self) -> list[dict]:
        return [record for record in self.done if record["state"] == FAILED]

    @property
    def best(self) -> dict | None:
        """The record with the lowest objective; the first of equals."""
        known = [record for record in self.done if record["state"] != FAILED]
        return min(known, key=lambda record: record[OBJECTIVE], default=None)

    @property
    def spent(self) -> float:
        """Seconds, those of earlier sessions included."""
        return self.seconds + time.monotonic() - self.since

    @property
    def over(self) -> str:
        """Why nothing more is to be proposed, "" where something is."""
        if len(self.failed) >= self.search.max_failed:
            return "failures"
        if self.search.seconds and self.spent >= self.search.seconds:
            return "time"
        if self.exhausted:
            return "space"
        return "samples" if len(self.records) + len(self.running) >= self.search.samples else ""

    def borders(self) -> dict[str, str]:
        """The hyperparameters of the best trial that lie at an end of the space."""
        return borders(self.search.space, self.best["values"]) if self.best else {}

    # what to try

    def begin(self, name: str) -> Values | None:
        """The values of the next trial, which its runner calls ``name``; None where the search is over."""
        if self.over:
            return None
        taken = {record["number"] for record in self.records.values()} | {one.number for one in self.running.values()}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        values, way = self._proposal(number)
        if values is None:
            self.exhausted = True
            return None
        one = Running(number, self._key(values), values, way, _now(), time.monotonic())
        self.running[name] = one
        return dict(values)

    def _proposal(self, number: int) -> tuple[Values | None, str]:
        known = {record["key"] for record in self.records.values()} | {one.key for one in self.running.values()}
        for values in self.search.first:
            if self._key(values) not in known:
                return dict(values), "first"
        under_way = [(one.number, Seen(one.values, None)) for one in self.running.values()]
        ended = [(record["number"], Seen(record["values"], record.get(OBJECTIVE))) for record in self.done]
        seen = [one for _, one in sorted([*ended, *under_way], key=lambda pair: pair[0])]
        search = self.search
        values = propose(search.space, seen, way=search.way, seed=search.seed, number=number, startup=search.startup)
        return values, search.way

    def _key(self, values: Values) -> str:
        return self.search.trial(values).key(self.fingerprint)

    # what trials say

    def report(self, name: str, *, epoch: int, values: Mapping[str, float], seconds: float | None = None) -> bool:
        """What a trial says after an epoch; whether it is to stop. Epochs that it says again, restarted, change nothing."""
        one = self.running[name]
        if OBJECTIVE in values:
            one.reports[epoch] = {key: float(value) for key, value in values.items()}
        seconds = time.monotonic() - one.began if seconds is None else seconds
        if self.search.trial_seconds and seconds >= self.search.trial_seconds:
            one.stopped = LIMITS[0]
        elif self.search.seconds and self.spent >= self.search.seconds:
            one.stopped = LIMITS[1]
        elif OBJECTIVE in values and not self._goes_on(one, epoch):
            one.stopped = f"not among the best 1/{self.search.halving.factor} at epoch {epoch}"
        return bool(one.stopped)

    def _goes_on(self, one: Running, epoch: int) -> bool:
        """The rule of halving, at a rung; what a trial did there counts for those that come later, whatever it did then."""
        halving = self.search.halving
        if halving is None or epoch not in halving.rungs(self.search.base.training.epochs):
            return True
        before = [found for found in self._at(epoch, but=one.number) if math.isfinite(found)]
        mine = one.reports[epoch][OBJECTIVE]
        return not before or mine <= np.percentile(before, 100 / halving.factor)

    def _at(self, epoch: int, *, but: int) -> list[float]:
        """The objectives that other trials had at an epoch."""
        ended = [dict(map(tuple, record["history"])).get(epoch) for record in self.records.values()]
        others = [one.reports.get(epoch, {}).get(OBJECTIVE) for one in self.running.values() if one.number != but]
        return [value for value in [*ended, *others] if value is not None]

    def end(self, name: str, *, final: Mapping[str, float] | None = None, error: BaseException | str = "") -> dict:
        """A trial ended; what is known of it is stored before this returns. ``final``: what it is worth, if it came to its
        own end; ``error``: why it failed."""
        one = self.running.pop(name)
        last = dict(final) if final else one.reports[max(one.reports)] if one.reports else {}
        if not error and not math.isfinite(last.get(OBJECTIVE, math.nan)):
            error = f"its objective is {last.get(OBJECTIVE, 'unknown')}"
        record = {
            "number": one.number,
            "key": one.key,
            "values": one.values,
            "way": one.way,
            "state": FAILED if error else STOPPED if one.stopped and not final else FINISHED,
            "reason": reason(error) if error else one.stopped,
            "epochs": int(last.get("epochs", max(one.reports, default=0))),
            "history": [[epoch, values[OBJECTIVE]] for epoch, values in sorted(one.reports.items())],
            "started": one.started,
            "ended": _now(),
            "seconds": time.monotonic() - one.began,
        }
        if not error:
            names = [OBJECTIVE, *(metric.name for metric in self.search.objective.metrics)]
            record |= {"metrics": {name: last[name] for name in names[1:]}, OBJECTIVE: last[OBJECTIVE]}
        ledger.write_record(self.folder, record)
        self.records[one.key] = record
        self._write_header("running")
        return record

    def lose(self, name: str) -> None:
        """A trial was lost with whoever ran it, without a fault of its own: its number is free again."""
        self.running.pop(name, None)

    def close(self) -> dict:
        """The end: the best record. Raises SearchError where too many failed, or nothing was found."""
        self._write_header("done" if self.over else "interrupted")
        if len(self.failed) >= self.search.max_failed:
            reasons = "; ".join(f"trial {record['number']}: {record['reason']}" for record in self.failed[:3])
            raise SearchError(
                f"search of {self.search.shown}: {len(self.failed)} of {len(self.records)} trials failed, and "
                f"{self.search.max_failed} end it ({reasons}); raise max_failed to go on"
            )
        if self.best is None:
            raise SearchError(f"search of {self.search.shown}: no trial came to an end within the time that it had")
        return self.best

    def run(
        self, work: Callable[[Values, Callable[[int, Mapping[str, float]], bool]], Mapping[str, float] | None]
    ) -> dict:
        """Run in this process, one trial at a time: ``work(values, report)`` gives what a trial is worth, or None where
        ``report(epoch, values)`` told it to stop."""
        while (values := self.begin("here")) is not None:
            final, error = None, ""
            try:
                final = work(values, lambda epoch, found: self.report("here", epoch=epoch, values=found))
            except Exception as raised:
                error = raised
            self.end("here", final=final, error=error)
        return self.close()

    def _write_header(self, state: str) -> None:
        search = self.search
        ledger.write_header(
            self.folder,
            {
                "model": search.shown,
                "objective": search.objective.name,
                "way": search.way,
                "samples": search.samples,
                "seed": search.seed,
                "epochs": search.base.training.epochs,
                "rungs": [] if search.halving is None else list(search.halving.rungs(search.base.training.epochs)),
                "factor": None if search.halving is None else search.halving.factor,
                "space": {path: ledger.describe(part) for path, part in search.space.items()},
                "borders": self.borders(),
                "seconds": self.spent,
                "state": state,
                **self.facts,
            },
        )


def reason(error: BaseException | str) -> str:
    """Why a trial failed, in a line."""
    if isinstance(error, str):
        return error
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in str(error):
        return f"out of memory: {' '.join(str(error).split())[:200]}".rstrip(": ")
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
