"""Nodes of a real Ray cluster on this machine, each a process of its own that may be blind to folders, and may be killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import small

import perturbray as pr
from perturbray.metrics.metric import Metric

RAY = str(Path(sys.executable).parent / "ray")
START = 120  # seconds that a node may take on a busy machine
# Of a node that is switched off Ray knows after five checks that nobody answers, three seconds apart where nothing is said.
SOON = {"RAY_health_check_period_ms": "500"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def can_hide() -> bool:
    """Whether a process here may have a view of the file system of its own."""
    hide = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return (
        shutil.which("unshare") is not None and subprocess.run(hide, capture_output=True, check=False).returncode == 0
    )


class Cluster:
    """A head that lends nothing, and what is added to it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: sockets lie in it
        self.nodes: dict[str, subprocess.Popen] = {}
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"{_own_address()}:{self.port}"

    def head(self, *, cpus: int = 0, dashboard: bool = False, words: Sequence[str] = (), **environment: str) -> None:
        words = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", f"--num-cpus={cpus}", *words]
        words += [f"--ray-client-server-port={free_port()}", "--num-gpus=0", f"--include-dashboard={dashboard}"]
        words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"]
        self._start("head", words, **environment)

    def add(self, name: str, *, cpus: int, gpus: int = 0, hidden: Sequence[Path] = ()) -> None:
        """A worker; it sees empty folders in the place of those that are hidden."""
        words = [f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
        self._start(name, words, hidden=hidden)

    def _start(self, name: str, words: Sequence[str], *, hidden: Sequence[Path] = (), **environment: str) -> None:
        words = [RAY, "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000", *words]
        # Of several nodes on one machine no two may take the same ports.
        words += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        if hidden:
            mounts = " && ".join(f"mount -t tmpfs none '{folder}'" for folder in hidden)
            words = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *words]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as where this is activated
        log = open(self.folder / f"{name}.log", "w")  # noqa: SIM115  # the process keeps it
        with log:
            self.nodes[name] = subprocess.Popen(
                words,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": path, **SOON, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait(lambda: "Ray runtime started" in self.log(name), name)

    def _wait(self, condition: Callable[[], bool], name: str) -> None:
        end = time.monotonic() + START
        while not condition():
            if self.nodes[name].poll() is not None or time.monotonic() > end:
                pytest.fail(f"node {name} did not start:\n{self.log(name)}")
            time.sleep(0.1)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        """End a node at once, with all of its processes, as when a machine is switched off."""
        process = self.nodes.pop(name)
        for number in _family(process.pid):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    def close(self) -> None:
        for name in reversed(list(self.nodes)):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, source: str, *words: object, **environment: str) -> "Driver":
        """A driver: Python text in a process of its own, with the folder of tests in its path."""
        paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
        place = self.folder / f"driver-{len(list(self.folder.glob('driver-*')))}"
        with open(place, "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", "-c", source, self.address, *map(str, words)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
                stdout=log,
                stderr=log,
                # A background job's children ignore it otherwise.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        return Driver(process, place)


# A model and a score that note on which node they work, and whether it sees the driver's files.
NOTING = """
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import perturbray as pr
from perturbray.metrics import score


def note(folder, what):
    import ray
    import ray._private.state

    context = ray.get_runtime_context()
    title = Path("/proc/self/cmdline").read_text().strip("\\0")
    seen = [path for path in SECRET if Path(path).exists()]
    record = {"what": what, "node": context.get_node_id(), "sees": seen, "title": title}
    record["class"] = ray._private.state.actors(context.get_actor_id())["ActorClassName"]
    with open(Path(folder) / "notes.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")


FOLDER, SECRET, SECONDS = %r, %r, %r


@pr.MODELS.register("noting")
@dataclass(frozen=True, kw_only=True)
class Noting(pr.LatentAdditive):
    def build(self, vocabulary):
        note(FOLDER, "trial")
        time.sleep(SECONDS)
        while Path(FOLDER, "hold").exists():
            time.sleep(0.1)
        return super().build(vocabulary)


@score("noting", best=0.0, higher_is_better=False)
def noting(predicted, observed):
    note(FOLDER, "scorer")
    return np.abs(predicted - observed).mean(axis=-1)
"""

DRIVER = """
import sys
from pathlib import Path

address, screen, folder, plugin, gpus, *seeds = sys.argv[1:]
import nodes
import small
from perturbray.engine import run_sweep
from perturbray.errors import InputError
from perturbray.plan import Plan
from perturbray.plugin import Plugin

plugins = (Plugin.read(plugin),)
plugins[0].install()
events = small.Record()
events.line = lambda text: print(text, flush=True)
events.connected = lambda cluster, placement, folder: print(f"{cluster}: {placement}")
plan = Plan.of(nodes.noted(screen, *map(int, seeds)), Path(folder))
try:
    run_sweep(plan, address=address, gpus=float(gpus), plugins=plugins, events=events)
except InputError as error:
    print(f"error: {error}")
"""


def noting(folder: Path, *, secret: Sequence[Path] = (), seconds: float = 0.0) -> str:
    """A plugin that notes in a folder what works where, and which secret files are seen there; its trials take time, and as
    long as the folder has a file named ``hold``."""
    return NOTING % (str(folder), [str(path) for path in secret], seconds)


def notes(folder: Path) -> list[dict]:
    place = folder / "notes.jsonl"
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def noted(screen: Path, seeds: int = 2) -> pr.Sweep:
    """The sweep of such a plugin, which is installed."""
    models = (pr.MeanShift(), pr.MODELS["noting"](width=8, latent_dim=4))
    return small.sweep(screen, models, seeds=seeds, metrics=(*small.METRICS, Metric("noting")))


def alone(screen: Path, folder: Path, seeds: int = 2) -> pd.DataFrame:
    """The table of the same sweep on this process's own Ray. One text of the plugin serves all tests of a process."""
    here = tempfile.gettempdir() + "/perturbray-notes"
    Path(here).mkdir(exist_ok=True)
    mine = small.plugin(noting(Path(here)), "noting")
    small.run(noted(screen, seeds), folder, plugins=[mine])
    return small.stable(folder)


@dataclass
class Driver:
    process: subprocess.Popen
    place: Path

    def said(self) -> list[str]:
        return self.place.read_text().splitlines()

    def until(self, condition: Callable[[], bool], seconds: float = 280) -> None:
        """Wait for something to happen while it runs."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                self.process.wait()
                pytest.fail("waited in vain:\n" + "\n".join(self.said()))
            time.sleep(0.1)

    def finish(self, seconds: float = 280) -> list[str]:
        """What it said."""
        try:
            code = self.process.wait(timeout=seconds)
        finally:
            self.process.kill()
            self.process.wait()
        assert code == 0, "\n".join(self.said())
        return self.said()


@contextmanager
def cluster(**head) -> Iterator[Cluster]:
    """A cluster that ends with the test, of a head as ``Cluster.head`` takes it."""
    found = Cluster()
    try:
        found.head(**head)
        yield found
    finally:
        found.close()


def _own_address() -> str:
    import ray

    return ray.util.get_node_ip_address()


def _family(process: int) -> list[int]:
    """A process and its descendants, also those with sessions of their own; children first come last."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = [process], [process]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found
