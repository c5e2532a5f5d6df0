"""The table of ports in SECURITY.md against a head that is started with the shipped command, and asked without its token."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_cluster_yaml
import yaml

ROOT = Path(__file__).parents[1]
ADDRESS = "10.99.0.1"
INSIDE = f"""
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mount -t proc proc /proc
ip link set lo up
ip link add v0 type veth peer name v1
ip addr add {ADDRESS}/24 dev v0
ip link set v0 up
ip link set v1 up
ip route add default via 10.99.0.2
exec "$@"
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root"),
    pytest.mark.skipif(not all(map(shutil.which, ("unshare", "ip"))), reason="no unshare or ip: util-linux, iproute2"),
]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """What listens on a head of sweeps/clusters/local.yaml, and what it answers to those without the token."""
    home = tmp_path_factory.mktemp("head")
    (home / ".ray").mkdir(mode=0o700)
    (home / ".ray" / "auth_token").write_text("5e" * 32)
    (home / ".ray" / "auth_token").chmod(0o600)
    config = yaml.safe_load((ROOT / "sweeps" / "clusters" / "local.yaml").read_text())
    command = test_cluster_yaml.start(config, "head").replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    command += " --num-cpus=1 --object-store-memory=100000000 --temp-dir=$HOME/ray --disable-usage-stats"
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_AUTH_MODE": "token",
        "AUTOSCALER_METRIC_PORT": "6386",
        "DASHBOARD_METRIC_PORT": "6387",
    }
    inner = [sys.executable, str(ROOT / "tests" / "ports_of_a_head.py"), ADDRESS, command]
    outer = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "bash", "-c", INSIDE, "bash"]
    ended = subprocess.run([*outer, *inner], env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def table():
    """Rows of SECURITY.md by port; the range of workers under its text."""
    return {row["port"]: row for row in test_cluster_yaml.rows_of_ports()}


def row_of(port: int, table: dict) -> str:
    (name,) = [name for name in table if int(name.split("-")[0]) <= port <= int(name.split("-")[-1])]
    return name


def test_what_listens_is_what_the_table_says_and_where(head, table):
    found = {}
    for port, address in head["listening"]:
        found.setdefault(row_of(port, table), set()).add(address)
    assert set(found) == set(table) - {"22"}, "sshd is not Ray's"
    wide = {
        name: "all" if "all" in places else "node" if "node" in places else "loopback" for name, places in found.items()
    }
    assert wide == {name: row["address"] for name, row in table.items() if name != "22"}


def test_what_the_table_says_is_guarded_by_the_token_answers_nobody_without_it(head, table):
    assert head["workers"]
    answers = {row_of(int(port), table): answer for port, answer in head["answers"].items()}
    assert set(answers) == set(table) - {"22"}
    guarded = {name for name, row in table.items() if row["what guards it"].startswith("token")}
    assert {name for name, answer in answers.items() if answer in (401, "UNAUTHENTICATED")} == guarded
    assert {answers[name] for name in set(answers) - guarded} == {200}, "metrics are for reading"
