"""Nodes: which a cluster has, which its autoscaler could bring, waiting for them, and whether each sees a folder."""

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from perturbray.errors import InputError
from perturbray.placement import Node, Placement, amounts, homes, working

ANSWER_SECONDS = 60.0  # that a node may take to start a process and answer
SETTLE_SECONDS = 5.0  # in which a network file system shows to one node what another has written
LINE_SECONDS = 10.0  # between two lines about waiting
HOMES_SECONDS = 120.0  # that trials which could begin wait for nodes of the scorers' own
HEAD = "node:__internal_head__"
NO_MONITOR = "none"  # no autoscaler of Ray's runs on the head
ID = "ray.io/node-id"  # the label that every node has


def there() -> list[Node]:
    """The nodes that are alive, by name."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            lends = node["Resources"]
            found.append(
                Node(
                    name=node["NodeManagerHostname"],
                    cpus=float(lends.get("CPU", 0)),
                    gpus=float(lends.get("GPU", 0)),
                    memory=float(lends.get("memory", 0)),
                    id=node["NodeID"],
                    address=node["NodeManagerAddress"],
                )
            )
    return sorted(found, key=lambda node: (node.name, node.id))


def here() -> str:
    """The id of this process's own node."""
    return ray.get_runtime_context().get_node_id()


def only(nodes: Iterable[str]) -> dict[str, str]:
    """A label selector: nothing but these nodes, by id."""
    return {ID: f"in({','.join(nodes)})"}


def but(nodes: Iterable[str]) -> dict[str, str]:
    """A label selector: any nodes but these, by id; also such as join later."""
    return {ID: f"!in({','.join(nodes) or 'none'})"}


def home(number: int) -> dict:
    """Where the scorer of a number belongs, as options of Ray's: on its node, on another without a GPU where that is gone,
    and in need on any that works. In turn, since Ray puts what asks for no CPU wherever it likes."""
    present = there()
    belongs = [node.id for node in homes(present)]
    idle = [node.id for node in present if node not in working(present)]
    others = [{"label_selector": only(belongs)}, {"label_selector": but(idle)}]
    return {"label_selector": only([belongs[number % len(belongs)]]), "fallback_strategy": others}


def anywhere(placement: Placement, *, avoid: Iterable[str]) -> bool:
    """Whether a node is there that has room for a trial, beside those to avoid."""
    return any(placement.runs_on(node) for node in there() if node.id not in set(avoid))


def ask(function: Any, *arguments: Any, nodes: Iterable[str], seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
    """What a remote function that takes no CPU answers on each node, by id; the error where a node gave none."""
    tasks = {
        node: function.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
        for node in nodes
    }
    end, found = time.monotonic() + seconds, {}
    for node, answer in tasks.items():
        try:
            found[node] = ray.get(answer, timeout=max(0.1, end - time.monotonic()))
        except (ray.exceptions.RayError, TimeoutError) as error:
            found[node] = error
    return found


def blind(folder: Path, nodes: Sequence[Node]) -> dict[str, str]:
    """Why a node cannot use a folder, by its id: one answer for each that cannot. The folder is there, and is absolute."""
    marker = folder / f".{uuid.uuid4().hex}.tmp"
    marker.write_text(marker.name, encoding="utf-8")
    try:
        answers = ask(_probe, str(marker), nodes=[node.id for node in nodes])
        alive = {node.id for node in there()}
        return {
            node: f"does not answer ({type(answer).__name__})" if isinstance(answer, Exception) else answer
            for node, answer in answers.items()
            if answer and node in alive
        }
    finally:
        for place in folder.glob(f"{marker.name}*"):
            place.unlink(missing_ok=True)


@ray.remote(num_cpus=0, max_retries=0)
def _probe(marker: str) -> str:
    """What hinders this node from using the marker's folder; "" where nothing does."""
    place, end = Path(marker), time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            if place.read_text(encoding="utf-8") == place.name:
                break
        except OSError:
            pass
        if time.monotonic() > end:
            return "does not see"
        with suppress(OSError):
            os.listdir(place.parent)  # a network file system then looks again
        time.sleep(0.2)
    try:
        (place.parent / f"{place.name}.{ray.get_runtime_context().get_node_id()}").touch()
    except OSError as error:
        return f"cannot write to ({error.strerror})"
    return ""


def check_sight(folder: Path, nodes: Sequence[Node]) -> None:
    """Raise InputError, naming every node that cannot use the results folder and what would be right."""
    able = [node for node in working(nodes) if node.id and node.id != here()]
    if not able or not (found := blind(folder, able)):
        return
    named = {node.id: node.shown for node in able}
    why = "; ".join(f"node {named[node]} {reason} {folder}" for node, reason in found.items())
    raise InputError(
        f"{why}: results are written by the node that scores them; give --results a folder that every node sees under "
        "the same path, as a mounted network file system (NFS, EFS)"
    )


@dataclass(frozen=True)
class Offer:
    """What an autoscaler could bring beside the nodes that are there."""

    nodes: tuple[Node, ...] = ()
    unsized: int = 0  # nodes whose size it does not say

    @property
    def some(self) -> bool:
        return bool(self.nodes or self.unsized)


def offer(present: Sequence[Node], *, limit: int) -> Offer:
    """What this cluster's autoscaler could bring, up to ``limit`` nodes: by what it told Ray, or by its configuration on
    the head. One that runs elsewhere (KubeRay's) and tells nothing could bring a node of unknown size."""
    told = _told()
    if told is not None:
        return _offer(told, present, limit=limit)
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]]
    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    found = ask(_configuration, port, nodes=heads[:1]).get(heads[0]) if heads else None
    if not isinstance(found, str):
        return Offer()
    if found == NO_MONITOR:
        return Offer(unsized=1)
    config = yaml.safe_load(found) if found else None
    return _offer(config, present, limit=limit) if isinstance(config, dict) else Offer()


@ray.remote(num_cpus=0, max_retries=0)
def _configuration(port: str) -> str:
    """The configuration of the autoscaler of the head with this port, as text; "" where it has none, and brings nothing."""
    if not Path("/proc/self/cmdline").exists():
        return ""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = place.read_bytes().decode(errors="replace").split("\0")
            ours = any(word.startswith("--gcs-address=") and word.endswith(f":{port}") for word in words)
            if ours and any(word.endswith("monitor.py") and "autoscaler" in word for word in words):
                paths = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
                return Path(paths[0]).expanduser().read_text(encoding="utf-8") if paths else ""
    return NO_MONITOR


def _told() -> dict | None:
    """What an autoscaler told Ray of its node types, in the form of a cluster.yaml; None: nothing."""
    import ray._private.state

    config = ray._private.state.state.get_cluster_config()
    if not config or not config.node_group_configs:
        return None
    types = {
        group.name: {"resources": dict(group.resources), "max_workers": group.max_count}
        for group in config.node_group_configs
    }
    return {"available_node_types": types}


def _offer(config: dict, present: Sequence[Node], *, limit: int) -> Offer:
    """From a cluster.yaml, as the head has it: with the sizes that the launcher has filled in."""
    head, types = config.get("head_node_type"), config.get("available_node_types") or {}
    workers = list(working(node for node in present if node.id))
    total = config.get("max_workers", limit)
    left = max(0, (limit if total < 0 else total) - len(workers))
    groups, unsized = [], 0
    for name, kind in types.items():
        lends, most = kind.get("resources") or {}, kind.get("max_workers", 0 if name == head else left)
        most = limit if most < 0 else most
        if name == head or not most:
            continue
        if not lends:
            unsized += most
            continue
        node = Node(
            name=name,
            cpus=float(lends.get("CPU", 0)),
            gpus=float(lends.get("GPU", 0)),
            memory=float(lends.get("memory", Node.memory)),
        )
        alike = [other for other in workers if (other.cpus, other.gpus) == (node.cpus, node.gpus)][:most]
        workers = [other for other in workers if other not in alike]
        groups.append([node] * min(left, most - len(alike)))
    unsized = min(left, max(0, unsized - len(workers)))
    # One of each kind first, or the limit of the cluster might be spent on one kind alone.
    found = [group.pop() for group in groups if group] + [node for group in groups for node in group]
    return Offer(nodes=tuple(found[: min(left, limit)]), unsized=unsized)


def wait(
    placement: Placement, present: Sequence[Node], could: Sequence[Node], *, say: Callable[[str], None]
) -> list[Node]:
    """Ask the autoscaler for what a placement needs and return once a trial can begin; the nodes that are there then.

    Asked for by placement groups: they go with this process, also where it is killed, so that no cluster goes on paying
    for nodes that nobody waits for. What has not come by then is asked for by the trials that wait.
    """
    asked = [placement.resources] * placement.at_once
    if placement.apart:
        own = max((node for node in homes([*present, *could])), key=lambda node: node.cpus)
        asked.append({"CPU": own.cpus})  # a whole one: less would fit beside the trials
    wanted = placement.at_once * (placement.trial_gpus or placement.trial_cpus)
    kind = "GPUs" if placement.trial_gpus else "CPUs"

    def has(nodes: Sequence[Node]) -> str:
        there = sum(node.gpus if placement.trial_gpus else node.cpus for node in nodes)
        return f"{there:g} of {wanted:g} {kind} there"

    def enough(nodes: Sequence[Node], seconds: float) -> bool:
        trial = any(placement.runs_on(node) for node in nodes)
        return placement.begins(nodes) or (trial and seconds > HOMES_SECONDS)

    return _wait(asked, enough, has, say=say)


def wait_for_any(unsized: int, *, say: Callable[[str], None]) -> list[Node]:
    """As ``wait``, for any node that works, where the autoscaler does not say what it brings."""
    return _wait(
        [{"CPU": 1.0}],
        lambda nodes, _: bool(working(nodes)),
        lambda nodes: f"{len(working(nodes))} there, {unsized} or more could come",
        say=say,
    )


def _wait(
    asked: Sequence[dict[str, float]],
    enough: Callable[[Sequence[Node], float], bool],
    has: Callable[[Sequence[Node]], str],
    *,
    say: Callable[[str], None],
) -> list[Node]:
    started, last = time.monotonic(), -LINE_SECONDS
    groups = [ray.util.placement_group([bundle]) for bundle in asked]
    try:
        while True:
            present, seconds = there(), time.monotonic() - started
            if enough(present, seconds):
                say(f"nodes are there after {seconds:.0f} s: {len(present)} nodes, {amounts(present)}")
                return present
            if seconds - last >= LINE_SECONDS:
                last = seconds
                say(f"waiting for nodes: {has(present)}, {seconds:.0f} s{_trouble()}")
            time.sleep(1)
    finally:
        for group in groups:
            ray.util.remove_placement_group(group)


def _trouble() -> str:
    """That nodes could not be launched, where the autoscaler says so, and why where it says that."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        failed = get_cluster_status(ray.get_runtime_context().gcs_address).failed_launches
    except (ray.exceptions.RayError, RuntimeError, OSError):  # it is busy, and is asked again for the next line
        return ""
    found = ""
    for kind, count in Counter(launch.ray_node_type_name for launch in failed).items():
        whys = [launch.details for launch in failed if launch.ray_node_type_name == kind and launch.details]
        why = whys[-1] if whys else "monitor.log on the head says why"
        found += f"; {count} launches of {kind} failed ({why})"
    return found
