"""Placement: how the nodes of a cluster are divided between trials and scorers. Arithmetic; it knows no Ray.

Trials run on nodes with a GPU where there are any, scorers and readers then on those without. A trial fits on one node:
what the cluster has in sum helps it nothing. A node that lends no CPU, as the head of `cluster.yaml`, runs nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perturbray.errors import InputError

SCORER_CPUS = 0.2  # scoring pseudobulks takes milliseconds a trial
CPUS_A_SCORER = 8
UNLIMITED = 2.0**60  # bytes of a node that says nothing of its memory


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node lends: one that is there, or one that an autoscaler could bring."""

    name: str
    cpus: float
    gpus: float = 0.0
    memory: float = UNLIMITED  # bytes
    id: str = ""  # Ray's; "": it could come
    address: str = ""

    @property
    def shown(self) -> str:
        return f"{self.name} ({self.address})" if self.address and self.address != self.name else self.name


@dataclass(frozen=True)
class Placement:
    """How many trials run at once and what each takes."""

    at_once: int
    trial_cpus: float
    trial_gpus: float
    scorers: int  # 0: a trial scores itself, since a single core has no room for another process
    trial_memory: int = 0  # bytes; 0: not accounted for
    on_a_node: int = 1  # trials that share a node, at most
    apart: bool = False  # scorers have nodes of their own, which have no GPU

    def __str__(self) -> str:
        parts = [f"{self.trial_cpus:g} CPU"]
        parts += [f"{self.trial_gpus:g} GPU"] if self.trial_gpus else []
        parts += [f"{self.trial_memory / 2**30:g} GB"] if self.trial_memory else []
        text = f"{self.at_once} trial{'s' * (self.at_once > 1)} at once ({', '.join(parts)} each), "
        if not self.scorers:
            return text + "scoring inline"
        place = ", on nodes without a GPU" if self.apart else ""
        return text + f"{self.scorers} scorer{'s' * (self.scorers > 1)} ({SCORER_CPUS:g} CPU each{place})"

    @property
    def resources(self) -> dict[str, float]:
        """What a trial asks of Ray."""
        asked = {"CPU": self.trial_cpus, "GPU": self.trial_gpus, "memory": float(self.trial_memory)}
        return {name: amount for name, amount in asked.items() if amount}

    def runs_on(self, node: Node) -> bool:
        """Whether an empty node has room for a trial."""
        enough = node.cpus >= self.trial_cpus - 1e-9 and node.memory >= self.trial_memory
        return node.cpus > 0 and enough and node.gpus >= self.trial_gpus - 1e-9

    def begins(self, there: Sequence[Node]) -> bool:
        """Whether a trial, and the scorers where they belong, have room on the nodes that are there."""
        homes = not self.scorers or not self.apart or any(not on_gpus(node) for node in working(there))
        return homes and any(self.runs_on(node) for node in there)


def working(nodes: Sequence[Node]) -> list[Node]:
    """The nodes on which anything runs."""
    return [node for node in nodes if node.cpus > 0]


def on_gpus(node: Node) -> bool:
    return int(node.gpus) >= 1


def homes(nodes: Sequence[Node]) -> list[Node]:
    """Where scorers and readers belong: nodes without a GPU; where all have one, or none, any that works."""
    found = working(nodes)
    return [node for node in found if not on_gpus(node)] or found


def place(
    nodes: Sequence[Node], *, trials: int, gpus: float = 1.0, memory: int = 0, most: int = 0, scoring: bool = True
) -> Placement:
    """Divide nodes, those that are there and those that could come, between trials and scorers.

    ``gpus`` are those of a trial where there are any, ``memory`` its bytes, ``most`` a limit of trials at once (0: none);
    ``scoring``: with scorers. Raises InputError, in numbers, where a trial would wait for ever.
    """
    if not 0 < gpus <= 1:
        raise InputError(f"a trial with {gpus:g} GPUs: above 0, at most 1; several GPUs in one trial are out of scope")
    able = working(nodes)
    if not able:
        raise InputError(f"{_count(nodes)} 0 CPUs, and a trial needs a part of one: start Ray with --num-cpus")
    runners = [node for node in able if on_gpus(node)] or able
    runners = [node for node in runners if node.cpus >= 1] or runners
    share = gpus if on_gpus(runners[0]) else 0.0
    if memory > (largest := max(node.memory for node in runners)):
        kind = "largest node with a GPU" if share else "largest node"
        raise InputError(
            f"a trial may take {memory / 2**30:g} GB, and the {kind} lends {largest / 2**30:.1f} GB: lower the memory "
            "limit of a trial"
        )
    slots = {i: _slots(node, share, memory) for i, node in enumerate(runners)}
    at_once = min(trials, sum(slots.values()), most or trials)
    cpus = sum(node.cpus for node in able)
    scorers = max(1, min(trials, int(cpus) // CPUS_A_SCORER)) if scoring and cpus >= 2 else 0
    apart = bool(share) and not on_gpus(homes(able)[0])
    left = {i: node.cpus for i, node in enumerate(runners)}
    for _ in range(0 if apart else scorers):
        left[max(left, key=left.__getitem__)] -= SCORER_CPUS
    busy = [i for i in slots if slots[i]]
    each = min(left[i] / min(slots[i], at_once) for i in busy)
    return Placement(
        at_once=at_once,
        trial_cpus=min(1.0, math.floor(100 * each + 1e-9) / 100),
        trial_gpus=share,
        scorers=scorers,
        trial_memory=memory,
        on_a_node=min(at_once, max(slots.values())),
        apart=apart and bool(scorers),
    )


def _slots(node: Node, share: float, memory: int) -> int:
    """Trials that one node has room for. A fraction of a GPU is one of a single GPU: two thirds do not make a whole."""
    found = int(node.gpus) * int(1 / share + 1e-9) if share else max(1, int(node.cpus))
    return min(found, int(node.memory // memory)) if memory else found


def amounts(nodes: Sequence[Node]) -> str:
    """What nodes lend in sum, for people."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{cpus:g} CPUs, {gpus:g} GPUs"


def _count(nodes: Sequence[Node]) -> str:
    return "the cluster has" if len(nodes) < 2 else f"the {len(nodes)} nodes of the cluster have"
