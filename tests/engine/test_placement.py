"""Placement: trials and scorers fit on the nodes there are or could be, said in numbers before anything waits for ever."""

import pytest

from perturbray.errors import InputError
from perturbray.placement import SCORER_CPUS, Node, Placement, homes, place

GB = 2**30
HEAD = Node(name="head", cpus=0)


def node(cpus: float, gpus: float = 0, memory: float = 64 * GB) -> Node:
    return Node(name=f"c{cpus}-g{gpus}", cpus=cpus, gpus=gpus, memory=memory)


@pytest.mark.parametrize(
    ("cpus", "gpus", "trials", "at_once", "trial_cpus", "trial_gpus", "scorers"),
    [
        (1, 0, 96, 1, 1.0, 0.0, 0),
        (2, 0, 96, 2, 0.9, 0.0, 1),
        (2, 0, 1, 1, 1.0, 0.0, 1),
        (4, 0, 96, 4, 0.95, 0.0, 1),
        (16, 0, 96, 16, 0.97, 0.0, 2),
        (16, 4, 96, 4, 1.0, 1.0, 2),
        (2, 1, 96, 1, 1.0, 1.0, 1),
        (64, 8, 1000, 8, 1.0, 1.0, 8),
    ],
)
def test_a_machine_is_divided_between_trials_and_scorers(cpus, gpus, trials, at_once, trial_cpus, trial_gpus, scorers):
    found = place([node(cpus, gpus)], trials=trials)
    assert (found.at_once, found.trial_cpus, found.trial_gpus, found.scorers) == (
        at_once,
        trial_cpus,
        trial_gpus,
        scorers,
    )


def packed(found: Placement, nodes: list[Node]) -> int:
    """Trials that Ray can put on nodes one by one, whole GPUs and parts of one alike, beside the scorers: by counting."""
    rooms = [[n.cpus, [1.0] * int(n.gpus), n.memory] for n in nodes if n.cpus > 0]
    own = [room for room in rooms if found.apart and not room[1]] or rooms
    for _ in range(found.scorers):
        max(own, key=lambda room: room[0])[0] -= SCORER_CPUS
    count = 0
    for cpus, cards, memory in rooms:
        while cpus >= found.trial_cpus - 1e-9 and memory >= found.trial_memory:
            if found.trial_gpus:
                free = [i for i, left in enumerate(cards) if left >= found.trial_gpus - 1e-9]
                if not free:
                    break
                cards[free[0]] -= found.trial_gpus
            cpus, memory, count = cpus - found.trial_cpus, memory - found.trial_memory, count + 1
    return count


CLUSTERS = [
    [node(0.5)],
    [node(1)],
    [node(1), node(1)],
    [node(1.5), node(3)],
    [HEAD, node(4), node(4)],
    [node(16), node(2), node(2)],
    [HEAD, node(4, 1), node(4, 1), node(4, 1)],
    [HEAD, node(4, 1), node(32)],
    [node(8), node(8, 4), node(64, 8)],
    [node(2, 8)],
    [HEAD, *[node(4, 1)] * 8, *[node(16)] * 2],
    [node(4, 0.5)],
]


@pytest.mark.parametrize("memory", [0, 12 * GB])
@pytest.mark.parametrize("gpus", [1, 0.5, 0.4, 0.3, 0.25, 0.1])
@pytest.mark.parametrize("trials", [1, 2, 5, 1000])
@pytest.mark.parametrize("nodes", CLUSTERS, ids=str)
def test_all_trials_of_a_placement_have_room_at_once_beside_the_scorers(nodes, trials, gpus, memory):
    found = place(nodes, trials=trials, gpus=gpus, memory=memory)
    assert 1 <= found.at_once <= trials
    assert found.trial_cpus > 0
    assert packed(found, nodes) >= found.at_once
    assert found.begins(nodes)
    assert bool(found.trial_gpus) == any(n.gpus >= 1 for n in nodes)
    assert found.on_a_node <= found.at_once


@pytest.mark.parametrize(("gpus", "at_once"), [(1, 2), (0.5, 4), (0.4, 4), (0.34, 4), (0.3, 6), (0.25, 8), (0.1, 20)])
def test_a_fraction_is_one_of_a_single_gpu(gpus, at_once):
    assert place([node(32, 2)], trials=96, gpus=gpus).at_once == at_once


def test_a_trial_fits_on_one_node_whatever_the_sum_of_the_cluster():
    found = place([HEAD, *[node(2, 4)] * 4, node(64)], trials=96)
    assert (found.at_once, found.trial_cpus, found.on_a_node) == (16, 0.5, 4)
    with pytest.raises(InputError, match=r"may take 20 GB, and the largest node with a GPU lends 16.0 GB"):
        place([node(4, 1, 16 * GB), node(64, 0, 512 * GB)], trials=1, memory=20 * GB)


def test_memory_limits_trials_node_by_node():
    assert place([node(8, 0, 10 * GB)] * 3, trials=96, memory=6 * GB).at_once == 3
    assert place([node(8, 0, 30 * GB)], trials=96, memory=6 * GB).at_once == 5


def test_scorers_and_readers_belong_on_nodes_without_a_gpu_and_nothing_on_a_head_without_cpus():
    cpu, gpu = node(16), node(4, 1)
    assert homes([HEAD, gpu, cpu]) == [cpu]
    assert homes([HEAD, gpu]) == [gpu]
    apart = place([HEAD, gpu, cpu], trials=96)
    assert apart.apart
    assert apart.trial_cpus == 1.0
    assert not place([HEAD, gpu], trials=96).apart
    assert not apart.begins([HEAD, gpu]), "the scorers' node is to come"
    assert not apart.begins([HEAD, cpu])
    assert not apart.begins([HEAD])


def test_a_single_core_scores_inline():
    assert place([node(1)], trials=5).scorers == 0
    assert str(place([node(1)], trials=5)) == "1 trial at once (1 CPU each), scoring inline"


def test_a_placement_says_itself_in_numbers():
    assert str(place([node(16, 4)], trials=96)) == "4 trials at once (1 CPU, 1 GPU each), 2 scorers (0.2 CPU each)"
    apart = place([HEAD, node(4, 1), node(16)], trials=96, gpus=0.25, memory=3 * GB)
    assert str(apart) == (
        "4 trials at once (1 CPU, 0.25 GPU, 3 GB each), 2 scorers (0.2 CPU each, on nodes without a GPU)"
    )


def test_a_cluster_without_cpus_is_refused_in_numbers():
    with pytest.raises(InputError, match=r"0 CPUs.*--num-cpus"):
        place([node(0, 4)], trials=1)
    with pytest.raises(InputError, match=r"0 CPUs"):
        place([], trials=1)


@pytest.mark.parametrize("gpus", [0, -1, 1.5, 2, float("nan")])
def test_a_trial_takes_one_gpu_or_a_part_of_it(gpus):
    with pytest.raises(InputError, match="above 0, at most 1"):
        place([node(4, 4)], trials=1, gpus=gpus)
