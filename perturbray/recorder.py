"""The recorder: keeps ``live.json`` of a running sweep up to date, in a thread, from what the engine tells."""

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbray.events import Events
from perturbray.results import ledger, live, table

if TYPE_CHECKING:
    from perturbray.cluster import Cluster
    from perturbray.placement import Placement
    from perturbray.plan import Plan

SECONDS = 1.0  # between two writes, at least
SHARE = 0.05  # of the time that writing may take: on slow storage, or with very many trials, there are fewer writes
LINES = 8  # of those for the user that are kept
FAILURES = 20  # failed trials whose learning curves are kept


@contextmanager
def recording(folder: Path, events: Events) -> Iterator[Events]:
    """Events that are told to ``events`` and recorded in the folder."""
    recorder = Recorder(folder, events)
    recorder.start()
    state, reason = live.BROKEN, ""
    try:
        yield recorder
        state = live.DONE
    except KeyboardInterrupt:
        state = live.INTERRUPTED
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        recorder.stop(state, reason)


class Recorder(Events):
    """Passes on what it is told, and writes at most once a second what follows from it."""

    def __init__(self, folder: Path, events: Events, *, seconds: float = SECONDS) -> None:
        self.folder, self.events, self.seconds = Path(folder), events, seconds
        now = time.time()
        self.live = live.Live(time=now, began=now, pid=os.getpid(), host=socket.gethostname())
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="recorder")
        self._troubled = False

    def start(self) -> None:
        self._thread.start()

    def stop(self, state: str, reason: str = "") -> None:
        """Write a last time; nothing is left where nothing else came into the folder."""
        self._halt.set()
        self._thread.join()
        with self._lock:
            self.live.state, self.live.reason = state, reason
        if (self.folder / table.PLAN).exists() or (self.folder / ledger.FOLDER).exists():
            self._write()
        else:
            (self.folder / live.FILE).unlink(missing_ok=True)

    def _beat(self) -> None:
        pause = 0.0
        while not self._halt.wait(pause):
            began = time.monotonic()
            self._write()
            pause = max(self.seconds, (time.monotonic() - began) / SHARE)

    def _write(self) -> None:
        with self._lock:
            self._forget()
            self.live.beat += 1
            self.live.time = time.time()
            content = live.text(self.live)
        try:
            live.write(self.folder, content)
            self._troubled = False
        except OSError as error:  # the trials go on; the next write may succeed
            if not self._troubled:
                self.events.line(f"{self.folder / live.FILE}: cannot be written ({error.strerror}); the trials go on")
            self._troubled = True

    def _forget(self) -> None:
        """Trials whose result is stored; of those that failed the curves of the last are kept."""
        ended = [key for key, run in self.live.runs.items() if run.stopped]
        failures = []
        for key in ended:
            if (self.folder / f"{key}.parquet").exists():
                del self.live.runs[key]
            elif (self.folder / f"{key}{table.FAILED}").exists():
                failures.append(key)
        for key in failures[:-FAILURES]:
            del self.live.runs[key]

    # what the engine tells

    def line(self, text: str) -> None:
        with self._lock:
            self.live.said = [*self.live.said[1 - LINES :], text]
        self.events.line(text)

    def connected(self, cluster: "Cluster", placement: "Placement", tune_folder: Path) -> None:
        with self._lock:
            self.live.cluster, self.live.at_once = str(cluster), placement.at_once
        self.events.connected(cluster, placement, tune_folder)

    def planned(self, plan: "Plan") -> None:
        before = len(plan.finished())
        with self._lock:
            self.live.before = before
        self.events.planned(plan)

    def started(self, key: str) -> None:
        self._start(key)
        self.events.started(key)

    def reported(self, key: str, values: Mapping[str, Any]) -> None:
        self._report(key, values)
        self.events.reported(key, values)

    def stopped(self, key: str) -> None:
        with self._lock:
            if key in self.live.runs:
                self.live.runs[key].stopped = True
        self.events.stopped(key)

    def lost(self, key: str) -> None:
        with self._lock:
            self.live.runs.pop(key, None)
        self.events.lost(key)

    def tried(self, search: str, number: int, values: Mapping[str, Any]) -> None:
        self._start(f"{search}/{number}", name=", ".join(f"{path} {_short(value)}" for path, value in values.items()))
        self.events.tried(search, number, values)

    def learnt(self, search: str, number: int, values: Mapping[str, Any]) -> None:
        self._report(f"{search}/{number}", values)
        self.events.learnt(search, number, values)

    def judged(self, search: str, number: int) -> None:
        with self._lock:
            self.live.runs.pop(f"{search}/{number}", None)
        self.events.judged(search, number)

    def watching(self, plan: "Plan") -> AbstractContextManager[None]:
        return self.events.watching(plan)

    def _start(self, key: str, **fields: str) -> None:
        with self._lock:
            before = self.live.runs.get(key)
            if before is None or before.stopped:  # else it goes on after its process died
                self.live.runs[key] = live.Run(since=time.time(), **fields)

    def _report(self, key: str, values: Mapping[str, Any]) -> None:
        epoch = live.number(values.get("epoch"))
        with self._lock:
            run = self.live.runs.get(key)
            if run is None or epoch is None:
                return
            run.add(int(epoch), live.number(values.get("train_loss")), live.number(values.get("val_loss")))
            run.host = str(values.get("hostname", run.host))
            run.epoch_seconds = live.number(values.get("time_this_iter_s"))
            for name in ("cells", "memory_mb", "gpu_memory_mb", "gpu_percent"):
                setattr(run, name, live.number(values.get(name)))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
