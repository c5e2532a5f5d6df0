"""State: what a results folder says of its sweep now. Looked at again and again; a look reads what is new, and not much of it.

Every trial that was asked for is in exactly one state: done, failed, running or queued. Files say what is done and failed,
``live.json`` what runs; it counts only while it is written: a driver that was killed says nothing that would be true.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from perturbray.errors import InputError
from perturbray.results import ledger, live, table

WAITING, RUNNING, SILENT, DONE, INTERRUPTED, BROKEN = "waiting", "running", "silent", "done", "interrupted", "broken"
QUIET_SECONDS = 20.0  # without a sign of life, after which nobody is taken to live
BATCH = 64  # finished trials whose duration is read in one look
FACTS = ("key", "model", "started", "trained")


@dataclass(frozen=True, kw_only=True)
class Active:
    """A trial that runs: it trains, or its score is under way."""

    key: str
    name: str
    seconds: float  # since it was started
    epochs: int  # that it may take; 0: it has none, or nobody knows
    run: live.Run

    @property
    def epoch(self) -> int:
        return self.run.points[-1][0] if self.run.points else 0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A trial that failed, and why."""

    key: str
    name: str
    error: str
    traceback: str = ""
    points: tuple = ()  # its learning curve, where it had one


@dataclass(frozen=True, kw_only=True)
class State:
    """All that a page shows, but what is computed from scores."""

    kind: str
    plan: Mapping = field(default_factory=dict)
    said: live.Live | None = None  # by whoever runs it
    asked: int = 0
    done: int = 0
    failures: tuple[Failure, ...] = ()
    active: tuple[Active, ...] = ()
    lost: int = 0  # trials that were under way when their driver fell silent; they are queued
    silence: float = 0.0  # seconds without a sign of life
    left: float | None = None  # seconds, as far as that can be known
    finished: frozenset[str] = frozenset()
    searches: tuple[ledger.Learnt, ...] = ()
    problem: str = ""  # a file that cannot be read

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def running(self) -> int:
        return len(self.active)

    @property
    def queued(self) -> int:
        return self.asked - self.done - self.failed - self.running


class Folder:
    """A results folder that is looked at while it fills; what was read once is kept."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._plan: tuple[object, dict] = (None, {})
        self._failures: dict[str, tuple[object, Failure]] = {}
        self._searches: tuple[object, tuple[ledger.Learnt, ...]] = (None, ())
        self._seconds: dict[str, tuple[str, float] | None] = {}  # of finished trials: model and duration
        self._heard: tuple[tuple[int, float], float] | None = None  # the last sign of life, and when it came here
        self._problems: dict[str, str] = {}

    def look(self) -> State:
        """The state as of now."""
        self._problems = {}
        said = live.read(self.path)  # before the files: what is stored meanwhile is done, and not queued
        names = self._names()
        plan = self._read_plan()
        planned = {trial["key"]: trial for trial in plan.get("trials", ())}
        done = frozenset(name.removesuffix(".parquet") for name in names if name.endswith(".parquet")) & planned.keys()
        failures = [failure for failure in self._read_failures(names) if failure.key in planned.keys() - done]
        searches = self._read_searches()
        silence = self._silence(said)
        alive = said is not None and said.state == live.RUNNING and silence < QUIET_SECONDS
        under_way = _under_way(said, planned, done | {failure.key for failure in failures}, searches, silence)
        counts = _counts(searches)
        ended = len(done) + len(failures) + counts["done"] + counts["failed"]
        asked = len(planned) + counts["asked"]
        self._read_seconds(done)
        state = State(
            kind=_kind(said, plan, alive=alive, over=bool(asked) and ended == asked, begun=bool(asked)),
            plan=plan,
            said=said,
            asked=asked,
            done=len(done) + counts["done"],
            failures=(*(self._with_curve(one, said) for one in failures), *_search_failures(searches)),
            active=tuple(under_way) if alive else (),
            lost=0 if alive else len(under_way),
            silence=silence,
            finished=done,
            searches=searches,
            problem="; ".join(self._problems.values()),
        )
        return _with_left(state, self._left(state, planned)) if alive else state

    def _names(self) -> set[str]:
        try:
            return {path.name for path in self.path.iterdir()}
        except OSError:
            return set()

    def _read_plan(self) -> dict:
        stamp = _stamp(self.path / table.PLAN)
        if stamp is None:
            return {}
        if stamp != self._plan[0]:
            try:
                plan = table.read_plan(self.path)
                self._plan = stamp, plan if _is_plan(plan) else {}
            except InputError as error:
                self._problems["plan"] = str(error)
        return self._plan[1]

    def _read_failures(self, names: set[str]) -> list[Failure]:
        found = {}
        for name in sorted(name for name in names if name.endswith(table.FAILED)):
            stamp, known = _stamp(self.path / name), self._failures.get(name)
            found[name] = known if known and known[0] == stamp else (stamp, self._read_failure(name))
        self._failures = found
        return [failure for _, failure in found.values()]

    def _read_failure(self, name: str) -> Failure:
        key = name.removesuffix(table.FAILED)
        try:
            record = json.loads((self.path / name).read_text(encoding="utf-8"))
            texts = {part: str(record.get(part) or "") for part in ("name", "error", "traceback")}
        except (OSError, ValueError, AttributeError):
            return Failure(key=key, name=key, error="the record of the failure is not readable")
        return Failure(key=key, **{**texts, "name": texts["name"] or key})

    def _with_curve(self, failure: Failure, said: live.Live | None) -> Failure:
        run = said.runs.get(failure.key) if said else None
        return Failure(**{**vars(failure), "points": tuple(run.points)}) if run else failure

    def _read_searches(self) -> tuple[ledger.Learnt, ...]:
        places = sorted((self.path / ledger.FOLDER).glob("*"))
        stamp = [(place.name, _stamp(place), _stamp(place / ledger.HEADER)) for place in places]
        if stamp != self._searches[0]:
            try:
                self._searches = stamp, tuple(ledger.read_searches(self.path, begun=True))
            except (InputError, KeyError, TypeError) as error:
                self._problems["searches"] = str(error)
        return self._searches[1]

    def _silence(self, said: live.Live | None) -> float:
        """Seconds since the last sign of life, by this machine's clock alone: that of another may be wrong."""
        now = time.monotonic()
        stamp = _stamp(self.path / live.FILE)
        if said is None or stamp is None:
            return 0.0
        sign = said.beat, said.time
        if self._heard is None:
            self._heard = sign, now - max(0.0, time.time() - stamp[0] / 1e9)
        elif self._heard[0] != sign:
            self._heard = sign, now
        return now - self._heard[1]

    def _read_seconds(self, done: frozenset[str]) -> None:
        """How long finished trials took, of those that are new, some in each look."""
        new = sorted(done - self._seconds.keys())[:BATCH]
        if not new:
            return
        self._seconds |= dict.fromkeys(new)
        try:
            found = table.read(self.path, keys=new, columns=FACTS)
        except InputError as error:
            self._problems["trial"] = str(error)
            return
        if not {*FACTS} <= {*found.columns}:
            return
        for row in found.drop_duplicates("key").itertuples():
            seconds = _between(row.started, row.trained)
            if seconds is not None:
                self._seconds[row.key] = str(row.model), seconds

    def _left(self, state: State, planned: Mapping[str, Mapping]) -> float | None:
        """Seconds to go: what trials of the same model took, or else all trials, of those that are left; as many at once as
        there is room for. Trials that are trained take no more."""
        by_model = defaultdict(list)
        for fact in filter(None, self._seconds.values()):
            by_model[fact[0]].append(fact[1])
        means = {model: float(np.mean(seconds)) for model, seconds in by_model.items()}
        for one in state.active:  # of a model of which no trial has finished, what the epochs so far say
            model = _model(planned.get(one.key, {}))
            if one.epochs and one.epoch and model not in by_model:
                means[model] = max(means.get(model, 0.0), one.seconds * one.epochs / one.epoch)
        usual = float(np.mean(list(means.values()))) if means else None
        now = {one.key: one for one in state.active}
        failed = {failure.key for failure in state.failures}
        rest = []
        for key, trial in planned.items():
            if key in state.finished or key in failed:
                continue
            whole, one = means.get(_model(trial), usual), now.get(key)
            if whole is None:
                return None
            rest.append(whole if one is None else 0.0 if one.run.stopped else max(whole - one.seconds, 0.0))
        for search in state.searches:
            samples = 0 if _over(search) else int(live.number(search.header.get("samples")) or 0)
            if len(search.trials):
                rest += [float(search.trials["seconds"].mean())] * max(samples - len(search.trials), 0)
        at_once = max(state.said.at_once, len(now), 1)
        return max(sum(rest) / at_once, max(rest)) if rest else None


def _stamp(path: Path) -> tuple[int, int] | None:
    """By which a file that was replaced is known: its time in ns and its size; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _is_plan(plan: Mapping) -> bool:
    trials = plan.get("trials")
    return isinstance(trials, list) and all(isinstance(one, dict) and isinstance(one.get("key"), str) for one in trials)


def _model(trial: Mapping) -> str:
    return str(trial.get("columns", {}).get("model", ""))


def _between(start: object, end: object) -> float | None:
    try:
        return (datetime.fromisoformat(str(end)) - datetime.fromisoformat(str(start))).total_seconds()
    except (ValueError, TypeError):
        return None


def _under_way(
    said: live.Live | None,
    planned: Mapping[str, Mapping],
    ended: frozenset[str],
    searches: tuple[ledger.Learnt, ...],
    silence: float,
) -> list[Active]:
    """What runs by what was said last, in the order of its start: trials of the plan, and of searches that go on."""
    if said is None:
        return []
    epochs = {key: _epochs(trial) for key, trial in planned.items()}
    names = {key: str(trial.get("name", key)) for key, trial in planned.items()}
    known = {one.folder: one for one in searches if not _over(one)}
    found = []
    for key, run in sorted(said.runs.items(), key=lambda pair: pair[1].since):
        seconds = max(0.0, said.time - run.since) + silence
        folder, _, number = key.rpartition("/")
        if folder in known and number.isdigit() and int(number) not in known[folder].histories:
            header = known[folder].header
            name = f"{known[folder].name}, trial {number} of the search: {run.name}"
            found.append(Active(key=key, name=name, seconds=seconds, epochs=int(header.get("epochs", 0)), run=run))
        elif key in planned and key not in ended:
            found.append(Active(key=key, name=names[key], seconds=seconds, epochs=epochs[key], run=run))
    return found


def _epochs(trial: Mapping) -> int:
    return int(live.number(trial.get("columns", {}).get("training.epochs")) or 0)


def _counts(searches: tuple[ledger.Learnt, ...]) -> Counter:
    """Of the trials of searches; one that is over asks for no more than it ran."""
    counts: Counter = Counter()
    for one in searches:
        ran = len(one.trials)
        failed = int((one.trials["state"] == "failed").sum()) if ran else 0
        samples = int(live.number(one.header.get("samples")) or 0)
        counts.update(asked=ran if _over(one) else max(ran, samples), done=ran - failed, failed=failed)
    return counts


def _over(search: ledger.Learnt) -> bool:
    return search.header.get("state") == "done"


def _search_failures(searches: tuple[ledger.Learnt, ...]) -> list[Failure]:
    return [
        Failure(
            key=f"{one.folder}/{row.number}", name=f"{one.name}, trial {row.number} of the search", error=row.reason
        )
        for one in searches
        if len(one.trials)
        for row in one.trials[one.trials["state"] == "failed"].itertuples()
    ]


def _kind(said: live.Live | None, plan: Mapping, *, alive: bool, over: bool, begun: bool) -> str:
    if alive:
        return RUNNING
    if over:
        return DONE
    if said is None:
        state = str((plan.get("status") or {}).get("state", "")) if begun else ""
        return {"interrupted": INTERRUPTED, "done": DONE, "running": SILENT}.get(state, WAITING)
    if said.state == live.BROKEN:
        return BROKEN
    return SILENT if said.state == live.RUNNING else INTERRUPTED if begun else WAITING


def _with_left(state: State, left: float | None) -> State:
    return State(**{**vars(state), "left": left})
