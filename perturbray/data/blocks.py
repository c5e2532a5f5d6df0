"""Blocks: how a trial comes by a screen's cells. Where its node sees the store it maps it; elsewhere rows come through Ray.

A node that joins a running sweep may be the first that does not see the folder, so rows are put into the object store
when somebody asks for them, once, and stay there for all trials of all such nodes.
"""

import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from perturbray.data.batches import Cells
from perturbray.data.store import Store
from perturbray.errors import InputError
from perturbray.nodes import ask, here, there
from perturbray.placement import homes


@dataclass(frozen=True)
class Blocks:
    """A screen for trials. Pickles small, so that every one may hold it."""

    store: Store
    keeper: "ray.actor.ActorHandle | None"  # who has the rows for nodes without the folder; None: there are none

    def cells(self) -> Cells:
        """The rows, without a copy: mapped from the store, or from this node's object store."""
        if self.store.visible:
            return self.store.cells()
        if self.keeper is None:
            raise InputError(f"this process does not see the store {self.store.folder}, which the sweep began with")
        check_room(self.store, [ray.get_runtime_context().get_node_id()])
        shards, embeddings = ray.get(self.keeper.references.remote())
        matrices = dict(zip(embeddings, ray.get(list(embeddings.values())), strict=True))
        return Cells(ray.get(shards), matrices, checked=True)


@ray.remote(num_cpus=0)
class Keeper:
    """Sees the store, and puts its rows into the object store when they are first asked for."""

    def __init__(self, store: Store) -> None:
        self.shards = [store.shard(number) for number in range(len(store.rows))]
        self.embeddings = {key: store.embedding(key) for key, _ in store.embeddings}
        self.found: tuple[list[ray.ObjectRef], dict[str, ray.ObjectRef]] | None = None

    def references(self) -> tuple[list[ray.ObjectRef], dict[str, ray.ObjectRef]]:
        """Rows of each shard in order, and the embeddings by key."""
        if self.found is None:
            embeddings = {key: ray.put(np.asarray(matrix)) for key, matrix in self.embeddings.items()}
            self.found = [ray.put(rows) for rows in self.shards], embeddings
        return self.found


def share(store: Store, *, nodes: bool) -> Blocks:
    """A store for trials of this cluster; ``nodes`` says whether it has others than this one, or may get some.

    Raises InputError in numbers where a node neither sees the folder nor has room for the rows.
    """
    if not nodes:
        return Blocks(store=store, keeper=None)
    blind = [node for node, sees in seeing(store).items() if not sees]
    if blind:
        check_room(store, blind)
    pinned = NodeAffinitySchedulingStrategy(here(), soft=False)
    return Blocks(store=store, keeper=Keeper.options(scheduling_strategy=pinned, name=_named(store)).remote(store))


def check_room(store: Store, nodes: list[str]) -> None:
    """Raise InputError where the object store of a node is smaller than the rows."""
    for node in ray.nodes():
        room = int(node["Resources"].get("object_store_memory", 0))
        if node["NodeID"] in nodes and store.nbytes > room:
            raise InputError(
                f"node {node['NodeManagerHostname']} does not see {store.folder}, and its rows, {store.nbytes / 1e6:,.0f} MB, "
                f"do not fit into its object store of {room / 1e6:,.0f} MB: set PERTURBRAY_CACHE to a folder that every "
                "node sees, or start Ray there with a larger --object-store-memory"
            )


def _named(store: Store) -> str:
    """For the dashboard; apart from each other, since sweeps of one cluster may share a screen."""
    return f"rows of {Path(store.folder).name} {uuid.uuid4().hex[:8]}"


def seeing(store: Store) -> dict[str, bool]:
    """Whether each node sees the store's folder; one that does not answer counts as blind."""
    return {node: answer is True for node, answer in ask(_sees, store, nodes=[node.id for node in there()]).items()}


def readers(store: Store) -> tuple[str, ...]:
    """The nodes that read windows for trials: of those that see the store, the ones without a GPU where there are any;
    this one, where no other that works does."""
    sees = seeing(store)
    return tuple(node.id for node in homes([node for node in there() if sees.get(node.id)])) or (here(),)


@ray.remote(num_cpus=0, max_retries=0)
def _sees(store: Store) -> bool:
    return store.visible
