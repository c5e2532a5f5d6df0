"""Pretend hosts: two machines on this one, each with its own network, processes, /tmp, /root and sshd, for a real `ray up`.

The process namespace matters: `ray stop`, which a launcher's start commands call, ends processes by name. A host sees this
machine's file system but for /root, /tmp, /run and /dev/shm, which are its own; folders there that it must see, as a
virtual environment, are named. One pair of hosts at a time: a second session waits for the first.
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = ("ip", "rsync", "setpriv", "ssh", "ssh-keygen", "taskset", "unshare", "/usr/sbin/sshd")
BRIDGE = "prayhosts"
NETWORK = "10.77.32"
NAMES = ("a", "b")
TURN = 900  # seconds that a session waits for another one's hosts to go


@dataclass(frozen=True)
class Host:
    """A pretend machine."""

    name: str  # also its host name, with "pretend-" in front
    address: str
    folder: Path  # holds its /tmp and /root as tmp and root
    key: Path  # of root over SSH
    number: int  # of the process outside; when it ends, all of the host do

    @property
    def hostname(self) -> str:
        return f"pretend-{self.name}"

    def ssh(self, *options: str) -> list[str]:
        """The words that run a command there, which is to follow as one word."""
        quiet = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=5")
        words = ["ssh", "-i", str(self.key), *(word for option in quiet for word in ("-o", option))]
        return [*words, *options, f"root@{self.address}"]

    def run(self, command: str | Sequence[str], *, timeout: float = 120, stdin: str | None = None) -> str:
        """What a command says there; AssertionError with all that it said where it fails."""
        text = command if isinstance(command, str) else shlex.join(command)
        stream = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        words = [*self.ssh(), text]
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, **stream)
        assert done.returncode == 0, f"{self.hostname}: {text}: code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def processes(self, name: str) -> list[int]:
        """Numbers, as the host counts them, of the processes of that name (the first 15 letters of the program's)."""
        look = (
            f'for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" = {name} ] && echo "${{p#/proc/}}"; done; true'
        )
        return [int(number) for number in self.run(look).split()]

    def kill(self, name: str) -> int:
        """SIGKILL to the processes of that name; how many there were."""
        found = self.processes(name)
        if found:
            self.run(f"kill -9 {' '.join(map(str, found))}")
        return len(found)


@dataclass(frozen=True)
class Hosts:
    """Two machines that reach each other."""

    a: Host
    b: Host
    folder: Path  # theirs; nobody else's

    @property
    def key(self) -> Path:
        return self.a.key

    def __iter__(self) -> Iterator[Host]:
        return iter((self.a, self.b))


def impossible() -> str:
    """Why there can be no pretend hosts here; empty where there can."""
    if not sys.platform.startswith("linux"):
        return "pretend hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "pretend hosts need root, to make network namespaces"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"pretend hosts need {', '.join(missing)} (Debian: iproute2, openssh-server, rsync, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "mount", "-t", "proc", "proc", "/proc"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode == 0:
        tried = subprocess.run(
            ["ip", "link", "add", "praytry", "type", "bridge"], capture_output=True, text=True, check=False
        )
        subprocess.run(["ip", "link", "delete", "praytry"], capture_output=True, check=False)
    return (
        f"pretend hosts need namespaces, which are not allowed here ({tried.stderr.strip()})"
        if tried.returncode
        else ""
    )


def environment() -> list[Path]:
    """Folders that a host must see to run this Python with its packages."""
    places = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
    return [Path(place) for place in sorted(places)]


@contextmanager
def hosts(folder: Path, *, visible: Iterable[Path] = (), pinned: bool = False) -> Iterator[Hosts]:
    """Two hosts, gone at the end whatever happened. ``visible``: folders that keep their path on both. ``pinned``: each
    has one of this machine's cores to itself.

    Their processes end with this one also where it is killed.
    """
    folder = folder.resolve()
    seen = [str(place) for place in dict.fromkeys([*environment(), *(Path(place).resolve() for place in visible)])]
    folder.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen] = []
    with _turn():
        try:
            _keys(folder)
            _remove_bridge()  # of a session that was killed
            _ip("link", "add", BRIDGE, "type", "bridge")
            _ip("address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
            _ip("link", "set", BRIDGE, "up")
            cores = sorted(os.sched_getaffinity(0))
            own = [str(cores[i % len(cores)]) if pinned else ",".join(map(str, cores)) for i in range(len(NAMES))]
            made = [_start(folder, i, seen, own[i], processes) for i in range(len(NAMES))]
            for host in made:
                _wait_for(host)
            yield Hosts(*made, folder=folder)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            _remove_bridge()


@contextmanager
def _turn() -> Iterator[None]:
    """Only one session at a time has hosts: a socket's abstract name, which goes with its process."""
    with socket.socket(socket.AF_UNIX) as turn:
        end = time.monotonic() + TURN
        while True:
            try:
                turn.bind(f"\0perturbray-{BRIDGE}")
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise TimeoutError(f"another session has had its pretend hosts for {TURN} s") from error
                time.sleep(0.5)
        yield


def _keys(folder: Path) -> None:
    for name in ("id", "hostkey"):
        if not (folder / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "id.pub", folder / "authorized_keys")


def _start(folder: Path, number: int, visible: list[str], cores: str, processes: list[subprocess.Popen]) -> Host:
    name, address = NAMES[number], f"{NETWORK}.{11 + number}"
    host_folder = folder / name
    host_folder.mkdir(exist_ok=True)
    own = ("--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child")
    first = ("bash", HERE / "host.sh", host_folder, f"pretend-{name}", address, f"{NETWORK}.1", *visible)
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            # SIGKILL for unshare where this process ends, and with that for the host's first process, and so for all.
            ["taskset", "--cpu-list", cores, "setpriv", "--pdeathsig", "KILL", "unshare", *own, *map(str, first)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    processes.append(process)
    host = Host(name=name, address=address, folder=host_folder, key=folder / "id", number=process.pid)
    _poll(lambda: _apart(process.pid), host, process)
    link = f"pray{name}"
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
    _ip("link", "set", link, "master", BRIDGE, "up")
    return host


def _apart(number: int) -> bool:
    """Whether a process has a network of its own."""
    try:
        return os.readlink(f"/proc/{number}/ns/net") != os.readlink("/proc/self/ns/net")
    except OSError:  # it ended
        return False


def _wait_for(host: Host) -> None:
    def answers() -> bool:
        return subprocess.run([*host.ssh(), "true"], capture_output=True, timeout=10, check=False).returncode == 0

    _poll(answers, host)


def _poll(done, host: Host, process: subprocess.Popen | None = None, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        log = host.folder.with_suffix(".log").read_text()
        assert process is None or process.poll() is None, f"{host.hostname} ended: {log}"
        assert time.monotonic() < end, f"{host.hostname} does not answer: {log}"
        time.sleep(0.1)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"


def _remove_bridge() -> None:
    """And the ends of its cables, which go by themselves a moment after their hosts."""
    for link in (*(f"pray{name}" for name in NAMES), BRIDGE):
        subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)
