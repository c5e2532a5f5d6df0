"""From no nodes at all: an autoscaler is asked for what a sweep needs, waiting is shown, and what cannot come is refused."""

import json
import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import small
from nodes import DRIVER, Cluster, alone, noting
from pandas.testing import assert_frame_equal
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from perturbray.results import table

pytestmark = pytest.mark.slow

PROVIDER = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"
HEAD = "f" * 51 + "00000"  # the id that Ray's provider for tests gives the head
KINDS = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "gpu": {"resources": {"CPU": 2, "GPU": 1, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2},
    "cpu": {"resources": {"CPU": 3, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 1},
}


COUNT = """
import sys, time
from perturbray import nodes
from perturbray.cluster import connect

with connect(sys.argv[1]):
    end = time.monotonic() + 100
    while len(found := nodes.there()) > 1 and time.monotonic() < end:
        time.sleep(0.5)
    print(len(found))
"""


class Broken(FakeMultiNodeProvider):
    """A cloud that has no machine left."""

    def create_node_with_resources_and_labels(self, *_, **__):
        raise RuntimeError("no capacity in any zone")


def configuration(address: str, *, kinds: dict = KINDS, module: str = PROVIDER) -> str:
    """A cluster.yaml of Ray's provider for tests, whose nodes are processes of this machine."""
    # As an external one: Ray's package lacks a file that its own name for it needs.
    provider = {"type": "external", "module": module, "use_node_id_as_ip": True, "disable_node_updaters": True}
    provider |= {"disable_launch_config_check": True, "launch_multiple": True, "head_node_id": HEAD}
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return json.dumps(
        {
            "cluster_name": "test",
            "provider": {**provider, "gcs_address": address},
            "available_node_types": kinds,
            "head_node_type": "ray.head.default",
            "max_workers": 3,
            "upscaling_speed": 100.0,
            "idle_timeout_minutes": 0.1,
            **{f"{name}_commands": [] for name in empty},
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
            "file_mounts_sync_continuously": False,
        }
    )


@contextmanager
def scaling(folder: Path, *, version: int = 2, **changes):
    """A cluster that is a head without CPUs and an autoscaler."""
    found = Cluster()
    (folder / "cluster.json").write_text(configuration(found.address, **changes))
    environment = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_CLOUD_INSTANCE_ID": HEAD}
    environment |= {"RAY_enable_autoscaler_v2": str(version - 1), "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    environment["RAY_NODE_TYPE_NAME"] = "ray.head.default"
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]  # where Broken is found
    try:
        found.head(
            words=[f"--autoscaling-config={folder / 'cluster.json'}"],
            PYTHONPATH=os.pathsep.join(paths),
            **environment,
        )
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def one_machine(ray_session, small_screen, tmp_path_factory):
    return alone(small_screen, tmp_path_factory.mktemp("alone") / "out")


@pytest.mark.parametrize("version", [2, 1])
def test_a_sweep_begins_on_a_cluster_of_no_nodes_and_leaves_none(one_machine, small_screen, tmp_path, version):
    (tmp_path / "noting.py").write_text(noting(tmp_path))
    with scaling(tmp_path, version=version) as found:
        lines = found.start(DRIVER, small_screen, tmp_path / "out", tmp_path / "noting.py", 1).finish()
        assert found.start(COUNT).finish()[-1] == "1", "the head alone is left: nothing goes on asking for nodes"
    waited = [line for line in lines if line.startswith("waiting for nodes: 0 of 2 GPUs there, ")]
    assert waited, lines
    assert any(re.match(r"nodes are there after \d+ s: ", line) for line in lines)
    (placed,) = [line for line in lines if "at once" in line]
    assert "2 trials at once (1 CPU, 1 GPU each), 1 scorer (0.2 CPU each, on nodes without a GPU)" in placed

    assert_frame_equal(small.stable(tmp_path / "out"), one_machine, check_exact=True)


def test_nodes_that_cannot_be_launched_are_said_while_they_are_waited_for(small_screen, tmp_path):
    (tmp_path / "noting.py").write_text(noting(tmp_path))
    with scaling(tmp_path, module="test_autoscaling.Broken") as found:
        driver = found.start(DRIVER, small_screen, tmp_path / "out", tmp_path / "noting.py", 1)
        driver.until(lambda: any("launches of gpu failed" in line for line in driver.said()), 120)
        driver.process.send_signal(signal.SIGINT)
        driver.process.wait(60)
        said = [line for line in driver.said() if line.startswith("waiting for nodes: 0 of 2 GPUs there, ")]
    assert re.search(r"; \d+ launches of gpu failed \(", said[-1]), said
    assert table.read_plan(tmp_path / "out")["status"]["state"] == "interrupted"


def test_nodes_whose_size_nobody_says_are_waited_for(small_screen, tmp_path):
    """As with `provider: local`, whose workers join by themselves."""
    own = {"ray.head.default": KINDS["ray.head.default"], "own": {"resources": {}, "node_config": {}, "max_workers": 1}}
    (tmp_path / "noting.py").write_text(noting(tmp_path))
    with scaling(tmp_path, version=1, kinds=own) as found:
        driver = found.start(DRIVER, small_screen, tmp_path / "out", tmp_path / "noting.py", 1)
        driver.until(lambda: any("0 there, 1 or more could come" in line for line in driver.said()), 120)
        found.add("own", cpus=2)
        lines = driver.finish()
    assert "2 nodes, 2 CPUs, 0 GPUs: 2 trials at once (0.9 CPU each), 1 scorer (0.2 CPU each)" in lines
    assert len(table.finished(tmp_path / "out")) == 4
