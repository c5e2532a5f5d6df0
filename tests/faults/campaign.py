"""Random kills of driver, trial process, scorer and node over sweeps of cheap trials: nothing finished is lost or run twice.

    python tests/faults/campaign.py --kills 100 --seed 0 [--where hosts] [--minutes M] [--json FILE]

The cluster is a head that lends nothing and two workers, real processes of this machine: of ``ray.cluster_utils.Cluster``,
or with ``--where hosts`` of two pretend hosts, each with a network and processes of its own, with the head and a worker on
the first and the other worker on the second. A driver that is killed leaves the cluster alive, and the same command is
started again, as a person would. The seed decides what is killed and after which wait; what that meets is up to the machine.
"""

import argparse
import json
import math
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
KINDS = ("driver", "worker", "scorer", "node")
TITLES = {"worker": "ray::trial ", "scorer": "ray::Scorer"}
PLACES = ("machine", "hosts")
STORE_MB = 100  # of a node
PASSED = ("OMP_NUM_THREADS", "RAY_AIR_NEW_OUTPUT", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")  # to processes on hosts
PAUSE = 0.3, 2.5  # seconds between two kills, beside those that it takes to come back
TRIALS = 24  # of a sweep
CALM = 0.7  # share of kills that wait until a trial has ended since the last; the others come on top of one another
SECONDS = 0.8  # that a trial takes
HANG = 400.0  # seconds in which a sweep must show anything new
GIVE_UPS = 5  # drivers in a row that may end by themselves without a trial accounted for

# A model that notes when one of its trials begins: one that begins after its result was stored was run twice.
SLEEPER = """
import os
import time
from dataclasses import dataclass
from pathlib import Path

import perturbray as pr

NOTES = %r


@pr.MODELS.register("sleeper")
@dataclass(frozen=True, kw_only=True)
class Sleeper(pr.ModelSpec):
    number: int = 0
    seconds: float = 0.0

    def build(self, vocabulary):
        with open(NOTES, "a") as file:  # one write of a short line is whole, whoever else writes
            file.write(f"{self.number} {time.time()}\\n")
        time.sleep(self.seconds)
        return SleeperNet(vocabulary)


class SleeperNet(pr.Model):
    def predict(self, batch):
        return batch.control
"""


@dataclass
class Tally:
    """What became of everything that was asked for."""

    kills: Counter = field(default_factory=Counter)
    sweeps: int = 0
    drivers: int = 0
    asked: int = 0
    finished: int = 0
    failed: int = 0
    lost: int = 0  # finished before a kill, and not there or another file after it
    twice: int = 0  # begun again after the result was stored
    begun: int = 0  # times that a trial began
    gave_up: list[str] = field(default_factory=list)  # last words of drivers that ended by themselves too early
    reasons: list[str] = field(default_factory=list)  # of failed trials
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not self.lost and not self.twice and self.asked == self.finished + self.failed

    def json(self, *, seed: int) -> str:
        return json.dumps({**vars(self), "good": self.good, "seed": seed}, indent=1) + "\n"

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {self.kills[kind]}" for kind in KINDS)
        lines = [
            f"kills: {self.kills.total()} ({kinds}) in {self.seconds:.0f} s",
            f"sweeps: {self.sweeps}, drivers started: {self.drivers}, gave up: {len(self.gave_up)}",
            f"trials: asked {self.asked} = finished {self.finished} + failed {self.failed}"
            + f", and {self.asked - self.finished - self.failed} without account",
            f"begun {self.begun} times for {self.asked} trials; finished and lost: {self.lost}; run twice: {self.twice}",
        ]
        lines += [f"  a driver gave up: {text}" for text in self.gave_up]
        lines += [f"  a trial failed: {text}" for text in self.reasons]
        return "\n".join([*lines, "good" if self.good else "BAD"])


class Nodes:
    """The cluster, and whom to kill in it."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # The head lends no CPU, as in the shipped cluster files, and is the driver's.
        head = {"num_cpus": 0, "include_dashboard": False, "dashboard_port": free_port()}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = [self._add() for _ in range(2)]

    def _add(self):
        return self.cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=STORE_MB * 2**20)

    @property
    def address(self) -> str:
        return self.cluster.address

    def drive(self, words: list[str], log: IO[str]) -> subprocess.Popen:
        """Start a driver on the head."""
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)

    def kill(self, driver: subprocess.Popen) -> None:
        driver.kill()
        driver.wait()

    def replace(self, which: int) -> None:
        """A node vanishes, and a new one joins."""
        self.cluster.remove_node(self.workers.pop(which), allow_graceful=False)
        self.workers.append(self._add())

    def processes(self, kind: str) -> list[int]:
        """The processes of a kind that belong to this cluster, and to no other Ray of this machine."""
        return [number for number in family(os.getpid()) if title(number).startswith(TITLES[kind])]

    def close(self) -> None:
        self.cluster.shutdown()


class Hosts:
    """The same on two pretend hosts, whose processes this machine sees too. Both see the folder."""

    def __init__(self, folder: Path) -> None:
        sys.path.append(str(ROOT / "tests" / "hosts"))
        import pretend
        from started import Started

        if reason := pretend.impossible():
            sys.exit(reason)
        self._open = ExitStack()
        own = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="perturbray-hosts-")))
        self.hosts = self._open.enter_context(pretend.hosts(own, visible=[folder, ROOT]))
        passed = {name: os.environ[name] for name in PASSED}
        self.ray = Started(self.hosts, folder, passed, os.environ["RAY_AUTH_TOKEN"])
        try:
            self.ray.head(cpus=0, store_mb=STORE_MB)
            # Each worker by its host and the number of its raylet: with the head's there are two on the first.
            self.workers = [self._add(host) for host in self.hosts]
        except BaseException:
            self.close()
            raise

    def _add(self, host: "Host") -> tuple["Host", int]:  # noqa: F821
        before = self._raylets(host)
        agent = ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        self.ray.worker(cpus=1, store_mb=STORE_MB, host=host, words=[*agent, "--num-gpus=0"])
        (raylet,) = self._raylets(host) - before
        return host, raylet

    def _raylets(self, host: "Host") -> set[int]:  # noqa: F821
        return {number for number in family(host.number) if Path(title(number).partition(" ")[0]).name == "raylet"}

    @property
    def address(self) -> str:
        return self.ray.address

    def drive(self, words: list[str], log: IO[str]) -> subprocess.Popen:
        words = self.ray.through(words)
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def kill(self, driver: subprocess.Popen) -> None:
        """It, and not the SSH that waits for it here."""
        there = [number for number in family(self.hosts.a.number) if title(number).startswith(f"{sys.executable} ")]
        for number in there:
            if " --drive " in title(number):
                os.kill(number, signal.SIGKILL)
        driver.kill()
        driver.wait()

    def replace(self, which: int) -> None:
        """A raylet is killed, with which Ray's other processes of that node end, and Ray is started again on its host."""
        host, raylet = self.workers.pop(which)
        os.kill(raylet, signal.SIGKILL)
        self.workers.append(self._add(host))

    def processes(self, kind: str) -> list[int]:
        there = [number for host in self.hosts for number in family(host.number)]
        return [number for number in there if title(number).startswith(TITLES[kind])]

    def close(self) -> None:
        self._open.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def family(process: int) -> list[int]:
    """The descendants of a process, in the order of their numbers."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found, new = set(), {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class Run:
    """One sweep in a folder of its own, run by as many drivers as it takes."""

    def __init__(self, folder: Path, screen: Path, nodes: Nodes | Hosts, tally: Tally) -> None:
        self.folder, self.nodes, self.tally, self.results = folder, nodes, tally, folder / "results"
        folder.mkdir(parents=True)
        self.notes = folder / "begun.txt"
        self.notes.touch()
        (folder / "sleeper.py").write_text(SLEEPER % str(self.notes))
        self.words = [sys.executable, __file__, "--drive", *map(str, (folder, screen, nodes.address))]
        self.known: dict[str, tuple[int, int]] = {}  # finished trials' files as they were first seen
        self.changed: set[str] = set()
        self.idle = 0  # drivers in a row that brought nothing
        self.moved = time.monotonic()
        tally.sweeps += 1
        self.start()

    def start(self) -> None:
        with open(self.folder / "driver.log", "a") as log:
            self.process, self.killed = self.nodes.drive(self.words, log), False
        self.tally.drivers += 1

    def kill(self) -> None:
        """Its driver, at once."""
        self.nodes.kill(self.process)
        self.killed = True

    def look(self) -> None:
        """Compare what is stored with what was; raise where nothing moves any more."""
        now = {path.stem: (s.st_ino, s.st_mtime_ns) for path in self.results.glob("*.parquet") if (s := stat(path))}
        now.pop("reference", None)
        self.changed |= {key for key, stamp in self.known.items() if now.get(key) != stamp}
        if now.keys() - self.known.keys():
            self.idle = 0
        before = len(self.known)
        self.known = {**now, **self.known}
        if len(self.known) > before or self.process.poll() is not None:
            self.moved = time.monotonic()
        if time.monotonic() - self.moved > HANG:
            raise TimeoutError(f"no trial ended in {HANG:.0f} s:\n{self.log()[-4000:]}")

    def log(self) -> str:
        return (self.folder / "driver.log").read_text()

    def over(self) -> bool:
        """Whether every trial is accounted for. A driver that ended before that is started again, as a person would."""
        self.look()
        if self.process.poll() is None:
            return False
        if self.process.returncode == 0:
            return True
        if not self.killed:
            self.idle += 1
            self.tally.gave_up.append(self.log().strip().splitlines()[-1])
            if self.idle >= GIVE_UPS:
                return True
        self.start()
        return False

    def end(self) -> None:
        """Add it up."""
        from perturbray.results import table

        self.look()
        failed = table.failed(self.results)
        finished = table.finished(self.results)
        ended = {self._number(key): self.known[key][1] / 1e9 for key in finished}  # as first seen
        begun = [(int(n), float(at)) for n, at in (line.split() for line in self.notes.read_text().splitlines())]
        self.tally.asked += TRIALS
        self.tally.finished += len(finished)
        self.tally.failed += len(failed)
        self.tally.lost += len(self.changed)
        self.tally.begun += len(begun)
        self.tally.twice += len({number for number, at in begun if number in ended and at > ended[number]})
        self.tally.reasons += [f"{record['name']}: {record['error']}" for record in failed.values()]

    def _number(self, key: str) -> int:
        """The number of a finished trial."""
        import pyarrow.parquet as pq

        return int(pq.read_table(self.results / f"{key}.parquet", columns=["model.number"])[0][0].as_py())


def stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def drive(folder: str, screen: str, address: str) -> int:
    """The driver: the sweep of a folder, at the address; 0 once all of its trials are finished or failed with a reason."""
    import perturbray as pr
    from perturbray.data.dataset import DatasetSpec
    from perturbray.engine import Events, run_sweep
    from perturbray.metrics.metric import Metric
    from perturbray.plan import Plan
    from perturbray.plugin import Plugin

    plugin = Plugin.read(f"{folder}/sleeper.py")
    plugin.install()
    spec, sleeper = DatasetSpec(path=screen), pr.MODELS["sleeper"]
    trials = [pr.Trial(dataset=spec, model=sleeper(number=i, seconds=SECONDS)) for i in range(TRIALS)]
    plan = Plan.of(
        pr.Sweep(name="campaign", trials=trials, metrics=(Metric("rmse", "average"),)), Path(folder, "results")
    )
    events = Events()
    events.line = lambda text: print(text, flush=True)
    try:
        run_sweep(plan, address=address, plugins=(plugin,), events=events)
    except* RuntimeError as group:  # failed trials: recorded, and told
        print(group)
    return 0


def campaign(
    kills: int,
    seed: int,
    folder: Path,
    *,
    where: str = PLACES[0],
    minutes: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
) -> Tally:
    """So many kills, as many of each kind as of any other, in a random order; then the last sweep ends undisturbed.

    No kill comes after so many minutes, whatever was asked for.
    """
    from perturbray import synthetic

    rng = random.Random(seed)
    order = [KINDS[i % len(KINDS)] for i in range(kills)]
    rng.shuffle(order)
    plans = [(kind, rng.uniform(*PAUSE), rng.random(), rng.random() < CALM) for kind in order]
    screen = synthetic.write(folder / "screen.h5ad", synthetic.Screen.small())
    tally, began = Tally(), time.monotonic()
    nodes, run = Hosts(folder) if where == "hosts" else Nodes(), None
    try:
        for number, (kind, pause, which, calm) in enumerate(plans):
            time.sleep(pause)
            before = len(run.known) if run is not None and calm else -1
            if time.monotonic() - began > 60 * minutes:
                say(f"after {minutes:g} minutes the last {kills - number} kills of {kills} are left out")
                break
            while True:  # until there is somebody to kill, in this sweep or the next
                if run is None or run.over():
                    if run is not None:
                        run.end()
                    run, before = Run(folder / f"sweep-{tally.sweeps}", screen, nodes, tally), calm - 1
                if len(run.known) > before and (victim := kill(kind, which, nodes, run)):
                    break
                time.sleep(0.1)
            tally.kills[kind] += 1
            tally.seconds = time.monotonic() - began
            say(f"{tally.seconds:6.0f} s  kill {number + 1}: {kind} {victim}; {len(run.known)} of {TRIALS} finished")
        while run is not None and not run.over():
            time.sleep(0.2)
        if run is not None:
            run.end()
    finally:
        if run is not None and run.process.poll() is None:
            run.kill()
        nodes.close()
    tally.seconds = time.monotonic() - began
    return tally


def kill(kind: str, which: float, nodes: Nodes | Hosts, run: Run) -> str:
    """Kill one of a kind while a sweep runs trials; what it was, empty where there is none."""
    if run.process.poll() is not None or not nodes.processes("worker"):
        return ""  # a driver that only begins has nothing to lose
    if kind == "driver":
        run.kill()
        return str(run.process.pid)
    if kind == "node":
        name = int(which * len(nodes.workers))
        nodes.replace(name)
        return str(name)
    there = nodes.processes(kind)
    if not there:
        return ""
    victim = there[int(which * len(there))]
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return ""
    return f"{victim}"


def prepare(cache: Path) -> None:
    """Ray reads how to authenticate when it is imported; its processes and the drivers inherit it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(
        OMP_NUM_THREADS="1",
        RAY_AUTH_MODE="token",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_AIR_NEW_OUTPUT="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        PERTURBRAY_CACHE=str(cache),
        PYTHONPATH=os.pathsep.join(paths),
    )
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--where", choices=PLACES, default=PLACES[0], help="hosts: two pretend ones, which need root")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no kill after so many (default: no limit)")
    parser.add_argument("--json", type=Path, help="where to store the counts")
    parser.add_argument("--keep", type=Path, help="a folder for the sweeps and their logs, which is kept")
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.drive:
        return drive(*asked.drive)
    folder = asked.keep.resolve() if asked.keep else Path(tempfile.mkdtemp(prefix="perturbray-campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder / "cache")
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="c", dir="/tmp")  # short: sockets lie in it
    try:
        say = partial(print, flush=True)
        tally = campaign(asked.kills, asked.seed, folder, where=asked.where, minutes=asked.minutes, say=say)
    finally:
        shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
        if not asked.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(tally)
    if asked.json:
        asked.json.write_text(tally.json(seed=asked.seed))
    return 0 if tally.good else 1


if __name__ == "__main__":
    sys.exit(main())
