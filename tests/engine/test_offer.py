"""What an autoscaler could bring, from a cluster.yaml as the head has it and the nodes that are there."""

import pytest

from perturbray.nodes import Offer, _offer
from perturbray.placement import Node, place

HEAD = Node(name="head", cpus=0, id="h")
GPU = {"resources": {"CPU": 4, "GPU": 1, "memory": 15 * 2**30}, "max_workers": 8}
CPU = {"resources": {"CPU": 16}, "max_workers": 2}


def offered(present=(HEAD,), *, limit=1000, **config) -> Offer:
    types = {"head": {"resources": {"CPU": 0}, "max_workers": 0}, **config.pop("types")}
    return _offer({"head_node_type": "head", "available_node_types": types, **config}, present, limit=limit)


def names(found: Offer) -> list[str]:
    return sorted(node.name for node in found.nodes)


def there(kind: dict, number: int) -> Node:
    lends = kind["resources"]
    return Node(name="there", cpus=lends["CPU"], gpus=lends.get("GPU", 0), id=f"n{number}")


def test_it_is_what_the_limits_of_kinds_and_of_the_cluster_leave():
    types = {"gpu": GPU, "cpu": CPU}
    assert names(offered(types=types, max_workers=20)) == ["cpu"] * 2 + ["gpu"] * 8
    assert len(offered(types=types, max_workers=4).nodes) == 4
    some = (HEAD, there(GPU, 1), there(GPU, 2), there(CPU, 3))
    assert names(offered(some, types=types, max_workers=20)) == ["cpu"] + ["gpu"] * 6
    assert len(offered(some, types=types, max_workers=4).nodes) == 1
    full = (HEAD, *[there(GPU, i) for i in range(8)])
    assert names(offered(full, types=types, max_workers=8)) == []


def test_the_limit_of_a_cluster_is_not_spent_on_one_kind_alone():
    assert names(offered(types={"gpu": GPU, "cpu": CPU}, max_workers=8)) == ["cpu"] + ["gpu"] * 7
    assert set(names(offered(types={"cpu": CPU, "gpu": GPU}, max_workers=2))) == {"cpu", "gpu"}


def test_a_kind_without_a_limit_is_planned_with_up_to_one():
    assert len(offered(types={"gpu": {**GPU, "max_workers": -1}}, max_workers=-1, limit=30).nodes) == 30


def test_the_head_is_not_offered_again():
    assert _offer(
        {"head_node_type": "gpu", "available_node_types": {"gpu": GPU}, "max_workers": 2}, (HEAD,), limit=9
    ) == Offer(nodes=())


def test_nodes_whose_size_is_not_said_are_counted():
    assert offered(types={"own": {"resources": {}, "max_workers": 3}}, max_workers=3) == Offer(unsized=3)
    two = (HEAD, there(CPU, 1), there(CPU, 2))
    assert offered(two, types={"own": {"resources": {}, "max_workers": 3}}, max_workers=3) == Offer(unsized=1)


@pytest.mark.parametrize("limit", [1, 8])
def test_what_is_offered_is_planned_with(limit):
    offer = offered(types={"gpu": GPU, "cpu": CPU}, max_workers=limit + 1)
    found = place([HEAD, *offer.nodes], trials=96)
    assert (found.at_once, found.trial_gpus) == (names(offer).count("gpu"), 1.0)
