"""From no nodes at all: an autoscaler is asked for what a sweep needs, waiting is shown, and what cannot come is refused."""

import json
import re

import pytest
import small
from nodes import DRIVER, Cluster, noted, noting
from pandas.testing import assert_frame_equal

pytestmark = pytest.mark.slow

HEAD = "f" * 51 + "00000"  # the id that Ray's provider for tests gives the head
KINDS = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "gpu": {"resources": {"CPU": 2, "GPU": 1, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2},
    "cpu": {"resources": {"CPU": 3, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 1},
}


def configuration(address: str) -> str:
    """A cluster.yaml of Ray's provider for tests, whose nodes are processes of this machine."""
    # As an external one: Ray's package lacks a file that its own name for it needs.
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "use_node_id_as_ip": True, "disable_node_updaters": True}
    provider |= {"disable_launch_config_check": True, "launch_multiple": True, "head_node_id": HEAD}
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return json.dumps(
        {
            "cluster_name": "test",
            "provider": {**provider, "gcs_address": address},
            "available_node_types": KINDS,
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


@pytest.fixture(params=[1, 0], ids=["v2", "v1"])
def scaling(request, tmp_path):
    """A cluster that is a head without CPUs and an autoscaler."""
    found = Cluster()
    path = tmp_path / "cluster.json"
    path.write_text(configuration(found.address))
    environment = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment |= {"RAY_enable_autoscaler_v2": str(request.param), "RAY_CLOUD_INSTANCE_ID": HEAD}
    try:
        words = [f"--autoscaling-config={path}"]
        found.head(words=words, RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD, **environment)
        yield found
    finally:
        found.close()


def test_a_sweep_begins_on_a_cluster_of_no_nodes(ray_session, scaling, small_screen, tmp_path):
    (tmp_path / "noting.py").write_text(noting(tmp_path))
    lines = scaling.start(DRIVER, small_screen, tmp_path / "out", tmp_path / "noting.py", 1).finish()
    waited = [line for line in lines if line.startswith("waiting for nodes: 0 of 2 GPUs there, ")]
    assert waited, lines
    assert any(re.match(r"nodes are there after \d+ s: ", line) for line in lines)
    (placed,) = [line for line in lines if "at once" in line]
    assert "2 trials at once (1 CPU, 1 GPU each), 1 scorer (0.2 CPU each, on nodes without a GPU)" in placed

    mine = small.plugin(noting(tmp_path), "noting")
    small.run(noted(small_screen), tmp_path / "alone", plugins=[mine])
    assert_frame_equal(small.stable(tmp_path / "out"), small.stable(tmp_path / "alone"), check_exact=True)
