"""The cluster: connect to Ray, count what it has, and check in numbers that trials and scorers fit."""

import math
import os
import secrets
import signal
import socket
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perturbray.errors import InputError

SCORER_CPUS = 0.2  # scoring pseudobulks takes milliseconds a trial
CPUS_A_SCORER = 8
FREED_OFTEN = "RAY_free_objects_period_milliseconds", "100"  # Ray's own second holds windows that are done with


@dataclass(frozen=True)
class Cluster:
    """What Ray offers, and where it is watched."""

    cpus: float
    gpus: float
    nodes: int
    dashboard: str  # http address, "" without one
    token: str  # where the dashboard's token stands


@dataclass(frozen=True)
class Placement:
    """How many trials run at once and what each takes."""

    at_once: int
    trial_cpus: float
    trial_gpus: float
    scorers: int  # 0: a trial scores itself, since a single core has no room for another process

    def __str__(self) -> str:
        trial = f"{self.at_once} trial{'s' if self.at_once > 1 else ''} at once ({self.trial_cpus:g} CPU"
        trial += f", {self.trial_gpus:g} GPU each)" if self.trial_gpus else " each)"
        scorers = f"{self.scorers} scorer{'s' if self.scorers > 1 else ''} ({SCORER_CPUS:g} CPU each)"
        return f"{trial}, {scorers if self.scorers else 'scoring inline'}"


def place(cpus: float, gpus: float, *, trials: int) -> Placement:
    """Divide a cluster between trials and scorers. Raises InputError, in numbers, where a trial would wait for ever."""
    if cpus <= 0:
        raise InputError("the cluster has 0 CPUs, and a trial needs a part of one: start Ray with --num-cpus")
    scorers = 0 if cpus < 2 else max(1, min(trials, int(cpus) // CPUS_A_SCORER))
    left = cpus - scorers * SCORER_CPUS
    at_once = max(1, min(trials, int(gpus) if gpus >= 1 else int(cpus)))
    trial_cpus = min(1.0, math.floor(100 * left / at_once) / 100)
    return Placement(at_once=at_once, trial_cpus=trial_cpus, trial_gpus=1.0 if gpus >= 1 else 0.0, scorers=scorers)


@contextmanager
def connect(address: str | None = None) -> Iterator[Cluster]:
    """A Ray of our own on this machine, or the cluster at ``address``. Token authentication is on."""
    early = "ray" in sys.modules  # Ray reads its environment when it is imported
    token = _token()
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault(*FREED_OFTEN)
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    import ray

    if ray.is_initialized():  # a notebook's own, or a test session's
        yield _describe("", token)
        return
    if early:
        ray._raylet.Config.initialize("")  # read it again, or this process and Ray's disagree about the token
    if address is not None:
        _check_address(address)
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"address": "local", "include_dashboard": True}  # without "local" Ray joins whatever runs here
    else:
        options |= {"address": address}
    terminate = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Ray's notice about an environment variable of its next release
        try:
            context = ray.init(**options)
        except ConnectionError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--address {address}: no Ray cluster answers there ({reason})") from error
    if callable(terminate):
        signal.signal(signal.SIGTERM, terminate)  # Ray puts its own handler in the place of the command line's
    try:
        yield _describe(context.dashboard_url or "", token)
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise InputError where nothing listens at host:port; Ray itself tries for minutes. Other forms are left to it."""
    host, separator, port = address.rpartition(":")
    if not separator or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers there ({error})") from None


def _describe(dashboard: str, token: str) -> Cluster:
    import ray

    resources = ray.cluster_resources()
    return Cluster(
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
        nodes=len([node for node in ray.nodes() if node["Alive"]]),
        dashboard=f"http://{dashboard}" if dashboard else "",
        token=token,
    )


def _token() -> str:
    """Make sure of a token that only this user can read; where it stands."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "$RAY_AUTH_TOKEN"
    place = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if place.exists():
            if stat.S_IMODE(place.stat().st_mode) & 0o077:
                place.chmod(0o600)  # Ray itself writes it readable by all
        else:
            with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
    except OSError:  # a home that cannot be written: a token for this run alone
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        return "$RAY_AUTH_TOKEN of this process"
    return str(place)
