"""Ray on pretend hosts without a launcher: a head on one and a worker on the other, each started by hand and at once."""

import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretend import Host, Hosts

ROOT = Path(__file__).parents[2]
PORT = 6379


@dataclass(frozen=True)
class Started:
    """The two hosts, of which Ray runs on those that it was started on. Both see ``shared`` and the project."""

    hosts: Hosts
    shared: Path
    variables: Mapping[str, str] = field(default_factory=dict)  # of every process, beside those of this class
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def address(self) -> str:
        return f"{self.hosts.a.address}:{PORT}"

    def head(self, *, cpus: int, store_mb: int) -> None:
        """Ray on host a."""
        self._start(self.hosts.a, ["--head", f"--port={PORT}", "--include-dashboard=false"], cpus, store_mb)

    def worker(self, *, cpus: int, store_mb: int, host: Host | None = None, words: Sequence[str] = ()) -> None:
        """Ray on host b, or another one, which joins; further words of `ray start`."""
        self._start(host or self.hosts.b, [f"--address={self.address}", *words], cpus, store_mb)

    def through(self, words: list[str]) -> list[str]:
        """The command that runs another one on host a."""
        return [*self.hosts.a.ssh(), self._line(words)]

    def _start(self, host: Host, role: list[str], cpus: int, store_mb: int) -> None:
        size = [f"--num-cpus={cpus}", f"--object-store-memory={store_mb * 10**6}"]
        ray = str(Path(sys.executable).parent / "ray")
        host.run(self._line([ray, "start", f"--node-ip-address={host.address}", *role, *size]), timeout=300)

    def _line(self, words: list[str]) -> str:
        own = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(ROOT),
            "PERTURBRAY_CACHE": str(self.shared / "cache"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_free_objects_period_milliseconds": "100",
        }
        return shlex.join(["env", *(f"{name}={value}" for name, value in {**own, **self.variables}.items()), *words])
