"""Nodes of a real Ray cluster on this machine, each a process of its own that may be blind to folders, and may be killed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

RAY = str(Path(sys.executable).parent / "ray")
START = 120  # seconds that a node may take on a busy machine


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
        log = open(self.folder / f"{name}.log", "w")  # noqa: SIM115  # the process keeps it
        with log:
            self.nodes[name] = subprocess.Popen(
                words,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait(lambda: "Ray runtime started" in self.log(name), name)

    def _wait(self, condition, name: str) -> None:
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

    def run(self, source: str, *words: object, timeout: float = 280, **environment: str) -> subprocess.CompletedProcess:
        """A driver: Python text in a process of its own, with the folder of tests in its path."""
        paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
        return subprocess.run(
            [sys.executable, "-c", source, self.address, *map(str, words)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


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
