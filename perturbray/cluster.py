"""The cluster: connect to Ray, and settle in numbers that trials and scorers fit, waiting for nodes that are to come."""

import os
import secrets
import signal
import socket
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from perturbray.errors import InputError
from perturbray.placement import Node, Placement, amounts
from perturbray.results import table

FREED_OFTEN = "RAY_free_objects_period_milliseconds", "100"  # Ray's own second holds windows that are done with
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in a process that was started by `ray job submit`
MOST_NODES = 1000  # of an autoscaler without a limit that are planned with


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What Ray offers, and where it is watched."""

    there: tuple[Node, ...]
    could: tuple[Node, ...] = ()  # nodes that its autoscaler could bring
    shared: bool = False  # it is not this process's own: it has, or may get, other nodes
    dashboard: str = ""  # http address, "" without one
    token: str = ""  # where the dashboard's token stands

    @property
    def nodes(self) -> int:
        return len(self.there)

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.there)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.there)

    def __str__(self) -> str:
        text = f"{self.nodes} node{'s' * (self.nodes > 1)}, {amounts(self.there)}"
        return text + (f"; {len(self.could)} more could come, {amounts(self.could)}" if self.could else "")


def settle(
    cluster: Cluster, plan: Callable[[Sequence[Node]], Placement], *, say: Callable[[str], None] = lambda _: None
) -> tuple[Cluster, Placement]:
    """The placement that ``plan`` makes of nodes, on those that are there and could come; waits for what it needs first.

    Raises InputError at once, in numbers, where what it asks for can never come.
    """
    from perturbray import nodes

    offer = nodes.offer(cluster.there, limit=MOST_NODES) if cluster.shared else nodes.Offer()
    cluster = replace(cluster, could=offer.nodes)
    try:
        placement = plan([*cluster.there, *cluster.could])
    except InputError as error:
        if not offer.unsized:
            raise InputError(f"{error} (there: {cluster}; {_nothing(cluster)})") from None
        cluster = replace(cluster, there=tuple(nodes.wait_for_any(offer.unsized, say=say)))
        placement = plan(cluster.there)
    if not placement.begins(cluster.there):
        cluster = replace(cluster, there=tuple(nodes.wait(placement, cluster.there, cluster.could, say=say)))
        offer = nodes.offer(cluster.there, limit=MOST_NODES)
        cluster = replace(cluster, could=offer.nodes)
    return cluster, placement


def _nothing(cluster: Cluster) -> str:
    if cluster.could:
        return "an autoscaler brings no others"
    return "no autoscaler could bring any" if cluster.shared else "it is this machine alone"


@contextmanager
def connect(address: str | None = None, *, say: Callable[[str], None] = lambda _: None) -> Iterator[Cluster]:
    """A Ray of our own on this machine, or the cluster at ``address``. Token authentication is on."""
    address, note = chosen(address)
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
        yield _describe("", token, shared=address is not None)
        return
    if note:
        say(note)
    if early:
        ray._raylet.Config.initialize("")  # read it again, or this process and Ray's disagree about the token
    if address is not None:
        _check_address(address)
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        check_temporary()
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
        yield _describe(context.dashboard_url or "", token, shared=address is not None)
    finally:
        ray.shutdown()


def check_temporary() -> None:
    """Raise InputError where Ray's temporary folder on this machine is full: its processes need it, and so does Tune."""
    import ray

    node = ray._private.worker._global_node
    place = Path(node.get_session_dir_path() if node else os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    try:
        table.probe(place)
    except OSError as error:
        if error.errno in table.FULL:
            raise InputError(
                f"{place}: Ray's temporary folder is full ({error.strerror}); {table.ROOM}, or name another folder with "
                "RAY_TMPDIR: finished trials are kept"
            ) from None


def _check_address(address: str) -> None:
    """Raise InputError where nothing listens at host:port; Ray itself tries for minutes. Other forms are left to it."""
    host, separator, port = address.rpartition(":")
    if not separator or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers there ({error})") from None


def chosen(address: str | None) -> tuple[str | None, str]:
    """The address to connect to, None for a Ray of our own, and a line where the environment decided it.

    A job uses the cluster that it was submitted to. Raises InputError for an address at which no sweep can run.
    """
    variable = os.environ.get("RAY_ADDRESS", "")
    if address is None and in_job():
        used = f" ({variable})" if variable else ""
        return variable or "auto", f"this job runs on the cluster that it was submitted to{used}"
    if address is None and variable:
        if "://" in variable:
            return None, (
                f"RAY_ADDRESS={variable} is where `ray job submit` hands a job over; this sweep runs on this machine alone"
            )
        return variable, f"RAY_ADDRESS={variable} names the cluster; --address local would be this machine alone"
    if address is None or address == "local":
        return None, ""
    if "://" in address:
        raise InputError(
            f"--address {address}: a sweep is run by a machine of the cluster, not through a tunnel; from elsewhere submit "
            "it: RAY_ADDRESS=http://127.0.0.1:8265 ray job submit --working-dir . -- python sweeps/... --address auto"
        )
    return address, ""


def in_job() -> bool:
    """Whether `ray job submit` started this process: then it runs in a copy of a folder, which Ray deletes."""
    return JOB in os.environ


def _describe(dashboard: str, token: str, *, shared: bool) -> Cluster:
    from perturbray.nodes import there

    found = tuple(there())
    return Cluster(
        there=found,
        shared=shared or len(found) > 1,
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
