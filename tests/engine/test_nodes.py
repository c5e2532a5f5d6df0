"""A cluster of several nodes: what runs where, what a node must see and what it need not, and what can never come."""

import pytest
import small
from nodes import DRIVER, alone, can_hide, cluster, notes, noting
from pandas.testing import assert_frame_equal

from perturbray.results import table

WHO_READS = """
import sys
import ray
from perturbray.cluster import connect
from perturbray.data import blocks, store
from perturbray.data.dataset import DatasetSpec
from perturbray.data.windows import Windows

found = store.find(DatasetSpec(path=sys.argv[2]))
with connect(sys.argv[1]):
    readers = Windows(found).placed().readers
    nodes = [node["Resources"] for node in ray.nodes() if node["NodeID"] in readers]
    print(sum(node.get("CPU", 0.0) for node in nodes), sum(node.get("GPU", 0.0) for node in nodes))
"""


@pytest.fixture(scope="module")
def head():
    with cluster() as found:
        yield found


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_screen):
    """What the nodes see, and what only the driver does: the data, the cache, and a folder for results."""
    folder = tmp_path_factory.mktemp("nodes")
    for name in ("open", "secret"):
        (folder / name).mkdir()
    (folder / "secret" / "small.h5ad").write_bytes(small_screen.read_bytes())
    source = noting(folder / "open", secret=[folder / "secret" / "small.h5ad"])
    (folder / "secret" / "noting.py").write_text(source)
    return folder


def drive(head, folders, results, **environment) -> list[str]:
    secret = folders / "secret"
    words = secret / "small.h5ad", results, secret / "noting.py", 0.5
    return head.start(DRIVER, *words, **{"PERTURBRAY_CACHE": str(secret / "cache"), **environment}).finish()


@pytest.fixture(scope="module")
def one_machine(ray_session, folders):
    return alone(folders / "secret" / "small.h5ad", folders / "open" / "alone")


def test_a_cluster_of_a_head_alone_that_nothing_could_join_is_refused_at_once(head, folders):
    *_, last = drive(head, folders, folders / "open" / "refused")
    assert "0 CPUs" in last
    assert "there: 1 node, 0 CPUs, 0 GPUs; no autoscaler could bring any" in last
    assert table.read_plan(folders / "open" / "refused")["status"]["state"] == "interrupted"


@pytest.fixture(scope="module")
def nodes(head, folders):
    if not can_hide():
        pytest.skip("this user may not mount: nodes cannot be made blind")
    head.add("cpu", cpus=2, hidden=[folders / "secret"])
    head.add("gpu", cpus=2, gpus=1, hidden=[folders / "secret"])
    return head


def test_nodes_that_do_not_see_the_drivers_files_give_the_numbers_of_one_machine(nodes, folders, one_machine):
    lines = drive(nodes, folders, folders / "open" / "small")
    text = "3 nodes, 4 CPUs, 1 GPUs: 2 trials at once (1 CPU, 0.5 GPU each), 1 scorer (0.2 CPU each, on nodes without a GPU)"
    assert text in lines
    found = notes(folders / "open")
    where = {what: {note["node"] for note in found if note["what"] == what} for what in ("trial", "scorer")}
    assert len(where["trial"]) == len(where["scorer"]) == 1
    assert where["trial"] != where["scorer"]
    assert not any(note["sees"] for note in found), "the nodes were not blind, and nothing was tested"
    assert {note["class"] for note in found} == {"trial small", "Scorer"}
    titles = {note["title"] for note in found if note["what"] == "trial"}
    assert len(titles) == 2, "a person tells trials apart"
    assert all(title.startswith("ray::trial small noting") for title in titles)

    assert_frame_equal(small.stable(folders / "open" / "small"), one_machine, check_exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["secret", "open"])
def test_windows_are_read_where_reading_belongs_and_by_the_driver_where_only_it_sees_the_rows(
    nodes, folders, one_machine, cache
):
    environment = {"PERTURBRAY_CACHE": str(folders / cache / "cache"), "PERTURBRAY_DELIVERY": "streaming"}
    lines = drive(nodes, folders, folders / "open" / f"streamed-{cache}", **environment)
    assert any("streaming, as asked for" in line for line in lines)
    assert_frame_equal(small.stable(folders / "open" / f"streamed-{cache}"), one_machine, check_exact=True)
    shown = nodes.start(WHO_READS, folders / "secret" / "small.h5ad", **environment).finish()
    assert shown[-1] == ("0.0 0.0" if cache == "secret" else "2.0 0.0"), "CPUs and GPUs of the nodes that read"


def test_results_that_a_node_does_not_see_are_refused_before_anything_runs(nodes, folders):
    *_, last = drive(nodes, folders, folders / "secret" / "small")
    assert last.startswith("error: node ")
    assert last.count(f"does not see {folders / 'secret' / 'small'}") == 2
    assert "give --results a folder that every node sees" in last
    assert not list((folders / "secret" / "small").rglob("*.tmp*")), "the probe cleans up"
