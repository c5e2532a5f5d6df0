"""A real `ray up` with the local variant, `sweeps/clusters/local.yaml`, on two pretend hosts."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pretend import Hosts

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "sweeps" / "clusters" / "local.yaml"
DASHBOARD = 8265
TRIES = 4  # of `ray up`
JOINS = 300  # seconds in which a worker comes; half a minute where the machine is idle


@dataclass
class Launched:
    """The cluster as somebody sees it who started it from this machine."""

    hosts: Hosts
    shared: Path  # the folder that both hosts see
    config: Path
    token: str
    seconds: dict[str, float] = field(default_factory=dict)  # what each phase took

    @property
    def environment(self) -> dict[str, str]:
        """Of commands on this machine; Ray's notes about the cluster stay in the hosts' folder."""
        notes = str(self.config.parent)
        names = {"TMPDIR": notes, "RAY_TMPDIR": notes, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return {**os.environ, **names, "RAY_UP_enable_autoscaler_v2": "0", "RAY_USAGE_STATS_ENABLED": "0"}

    def command(self, *words: object) -> list[str]:
        return [str(Path(sys.executable).parent / "ray"), *map(str, words)]

    def ray(self, *words: object, timeout: float = 600) -> str:
        """What a command of Ray's says; AssertionError with it where it fails."""
        done = subprocess.run(
            self.command(*words),
            cwd=ROOT,  # from which the paths in file_mounts are
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"ray {' '.join(map(str, words))}: code {done.returncode}\n{done.stdout}"
        return done.stdout

    def submit(self, url: str, command: str, log: Path) -> subprocess.Popen:
        """`ray job submit` through a tunnel; it ends with the job, and the log has what that said."""
        words = self.command("job", "submit", "--address", url, "--", "bash", "-c", command)
        with open(log, "w") as file:
            return subprocess.Popen(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    @contextmanager
    def tunnel(self) -> Iterator[str]:
        """The dashboard's address on this machine, for as long as the context lasts."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{port}:127.0.0.1:{DASHBOARD}"]
        process = subprocess.Popen(self.hosts.a.ssh(*options), stdin=subprocess.DEVNULL)
        try:
            wait(lambda: listens("127.0.0.1", port), 30, "a tunnel to the dashboard")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()

    def alive(self, url: str) -> set[str]:
        """Host names of the nodes that are there."""
        status, text = ask(f"{url}/nodes?view=summary", token=self.token)
        assert status == 200, text
        nodes = json.loads(text)["data"]["summary"]
        return {node["hostname"] for node in nodes if node["raylet"].get("state") == "ALIVE"}

    def wait_for_both(self, url: str) -> None:
        wanted = {host.hostname for host in self.hosts}
        wait(lambda: self.alive(url) == wanted, JOINS, "a worker that joins")

    def up(self) -> None:
        """`ray up`, again where this machine was too busy: a raylet gives up whose agent has no port after 15 s."""
        for left in reversed(range(TRIES)):
            try:
                self.ray("up", "-y", "--no-config-cache", self.config)
                return
            except AssertionError as error:
                if not left or "The current node timed out during startup" not in str(error):
                    raise
                print("  ray up: the node timed out during startup; once more", flush=True)

    def down(self) -> None:
        with self.timed("ray down"):
            self.ray("down", "-y", self.config)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - started
        print(f"  {phase:<40} {self.seconds[phase]:6.1f} s", flush=True)


def launch(
    hosts: Hosts,
    shared: Path,
    *,
    cpus: int = 2,
    store_mb: int = 300,
    change: Callable[[dict], None] = lambda _: None,
) -> Launched:
    """Write the configuration, filled in, and what it names; nothing runs yet. ``change`` has the last word."""
    token = secrets.token_hex(32)
    secret = hosts.folder / "auth_token"
    secret.touch(mode=0o600)
    secret.write_text(token)
    for host in hosts:
        host.run(["ln", "-sfn", sys.prefix, "/root/perturbray-env"])
    config = yaml.safe_load(fill_in(LOCAL.read_text(), hosts, shared))
    config["file_mounts"]["~/.ray/auth_token"] = str(secret)
    for role in ("head", "worker"):
        commands = config[f"{role}_start_ray_commands"]
        size = f" --num-cpus={cpus} --object-store-memory={store_mb * 10**6}"  # both hosts have all of this machine
        config[f"{role}_start_ray_commands"] = [c + size * (" ray start " in c) for c in commands]
    change(config)
    place = hosts.folder / "local.yaml"
    place.write_text(yaml.safe_dump(config, sort_keys=False, width=1000))
    return Launched(hosts=hosts, shared=shared, config=place, token=token)


def fill_in(text: str, hosts: Hosts, shared: Path) -> str:
    """The local variant with its gaps filled as a person fills them."""
    values = {
        "FILL_IN_ADDRESS_OF_THE_HEAD": hosts.a.address,
        "FILL_IN_ADDRESS_OF_A_WORKER": hosts.b.address,
        "FILL_IN_USER": "root",
        "FILL_IN_KEY": hosts.key,
        "FILL_IN_SHARED_FOLDER": shared,
    }
    for gap, value in values.items():
        assert gap in text, f"the local variant has no {gap}"
        text = text.replace(gap, str(value))
    assert "FILL_IN" not in "".join(line.partition("#")[0] for line in text.splitlines())
    return text


@contextmanager
def up(launched: Launched) -> Iterator[str]:
    """The running cluster, both hosts in it; the dashboard's address here. `ray down` at the end, whatever happened."""
    try:
        with launched.timed("ray up"):
            launched.up()
        with launched.tunnel() as url:
            with launched.timed("until the worker is there"):
                launched.wait_for_both(url)
            yield url
    finally:
        if "ray down" not in launched.seconds:
            launched.down()


def ask(url: str, *, token: str = "", method: str = "GET", body: dict | None = None) -> tuple[int, str]:
    """Status and text of an answer; ``token`` as Ray's own client sends it."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.3)


def listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0
