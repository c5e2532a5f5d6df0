"""The local variant for real: `ray up` over SSH, a job through a tunnel, a worker lost in mid-sweep, closed ports, `ray down`.

One cluster for the module, and its tests in the order of its life.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import launched
import pytest
from pandas.testing import assert_frame_equal

from perturbray.results import table

pytestmark = pytest.mark.slow

SWEEP = [
    *("--set", "ablation.highest=0.2", "--grid", "ablation.level=0,0.2", "--grid", "seed=0"),
    *("--set", "training.epochs=400", "--set", "training.patience=400"),  # some seconds: a worker has time to come in
]
TRIALS = 16
HANG = 600  # seconds
SCAN, PROBE = (Path(__file__).with_name(name) for name in ("scan.py", "probe.py"))
WEB = {6383, 6385}  # HTTP on the head
STATUS = """
import urllib.error, urllib.request
for headers in ({{}}, {{"Authorization": "Bearer {token}"}}):
    try:
        print(urllib.request.urlopen(urllib.request.Request("{url}", headers=headers)).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""
METHODS = {  # of the gRPC servers on the head, by port
    6379: "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    6380: "/ray.rpc.NodeManagerService/GetNodeStats",
    6381: "/ray.rpc.ObjectManagerService/Pull",
    6384: "/ray.rpc.ReporterService/HealthCheck",
    10001: "/ray.rpc.RayletDriver/ClusterInfo",
}
RAY = ("raylet", "gcs_server")
NOTICES = 240  # seconds; Ray's own are 60
WORKERS = "/ray.rpc.CoreWorkerService/GetCoreWorkerStats"


def stable(folder: Path):
    """The table of a sweep without the columns that no two runs share, and without where the screen lay."""
    found = table.read(folder)
    return found.drop(columns=["dataset.path", *(name for name in table.VOLATILE if name in found)])


def ran_on(folder: Path) -> dict[str, str]:
    """The host of every finished trial, by key."""
    finished = table.finished(folder)
    if not finished:
        return {}
    found = table.read(folder, keys=finished).drop_duplicates("key")
    return dict(zip(found["key"].astype(str), found["host"].astype(str), strict=True))


@dataclass(frozen=True)
class Row:
    """A port or a range of SECURITY.md's table."""

    first: int
    last: int
    worker: bool  # it listens on workers too
    loopback: bool
    token: bool  # and nobody gets anything without it

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last


def security() -> list[Row]:
    """What SECURITY.md says of ports: a row each, all of the head."""
    lines = (launched.ROOT / "SECURITY.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| *\d", line)]
    rows = []
    for port, what, address, _, guard in cells:
        first, _, last = port.partition("-")
        rows.append(
            Row(
                first=int(first),
                last=int(last or first),
                worker="worker too" in what,
                loopback=address == "loopback",
                token=guard.startswith("token"),
            )
        )
    return rows


@pytest.fixture(scope="module")
def one_machine(small_screen, tmp_path_factory):
    """The folder of the same sweep on this machine alone."""
    place = tmp_path_factory.mktemp("one")
    words = [sys.executable, str(launched.ROOT / "sweeps" / "imbalance.py"), "--data", str(small_screen)]
    done = subprocess.run(
        [*words, "--results", str(place), *SWEEP],
        env={**os.environ, "PYTHONPATH": str(launched.ROOT), "PERTURBRAY_CACHE": str(place / "cache")},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "imbalance-small"


def test_cluster_check_has_nothing_against_the_file_filled_in(cluster):
    words = [sys.executable, "-m", "perturbray", "cluster", "check", str(cluster.config)]
    environment = {**os.environ, "PYTHONPATH": str(launched.ROOT)}
    done = subprocess.run(words, cwd=launched.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def test_a_sweep_that_loses_a_worker_ends_with_the_table_of_one_machine(
    one_machine, cluster, dashboard, shared, small_screen, tmp_path
):
    # The screen, and the store that is read from it, lie on the head alone: rows reach the worker through Ray.
    shutil.copy(small_screen, cluster.hosts.a.folder / "root" / "small.h5ad")
    results, log = shared / "results" / "imbalance-small", tmp_path / "job.log"
    command = (
        "cd ~/perturbray && PERTURBRAY_CACHE=$HOME/cache python sweeps/imbalance.py --address auto --data ~/small.h5ad "
        f"--results $PERTURBRAY_SHARED/results {' '.join(SWEEP)}"
    )
    with cluster.timed("the job"), cluster.submit(dashboard, command, log) as job:
        with cluster.timed("until the worker has a trial done"):
            found = cluster.hosts.b.hostname
            launched.wait(lambda: found in ran_on(results).values() or job.poll() is not None, HANG, "a trial on b")
        before = {path: path.stat().st_mtime_ns for path in results.glob("*.parquet") if path.stem != "reference"}
        assert len(before) < TRIALS - 2, log.read_text()  # it is lost in mid-sweep
        assert cluster.hosts.b.kill("raylet") == 1
        assert job.wait(HANG) == 0, log.read_text()
    said = log.read_text()
    assert "2 nodes, 4 CPUs" in said
    assert len(table.finished(results)) == TRIALS, said
    assert not table.failed(results)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items(), "a finished trial ran again"
    print(f"  {len(before)} of {TRIALS} trials were done when it was lost")
    assert set(ran_on(results).values()) == {host.hostname for host in cluster.hosts}
    assert_frame_equal(stable(results), stable(one_machine), check_exact=True)


def test_a_worker_that_was_lost_comes_back(cluster, dashboard):
    ports = [row.first for row in security() if row.worker and row.first == row.last]
    with cluster.timed("until the worker is back"):
        cluster.wait_for_both(dashboard)
        for port in ports:  # its agents come after it
            launched.wait(lambda port=port: launched.listens(cluster.hosts.b.address, port), HANG, f"port {port} of b")
    assert ports
    assert all(launched.listens(cluster.hosts.b.address, port) for port in ports)


def test_who_has_no_token_gets_nothing_from_the_dashboard_and_the_job_api(cluster, dashboard):
    job = {"entrypoint": "touch ~/ran"}
    for path, method, body in (
        ("/api/jobs/", "GET", None),
        ("/api/jobs/", "POST", job),
        ("/nodes?view=summary", "GET", None),
    ):
        ask = {"url": f"{dashboard}{path}", "method": method, "body": body}
        assert launched.ask(**ask)[0] == 401
        assert launched.ask(**ask, token=secrets.token_hex(32))[0] == 403
    status, jobs = launched.ask(f"{dashboard}/api/jobs/", token=cluster.token)
    assert status == 200
    assert [job["entrypoint"] for job in json.loads(jobs) if "touch" in job["entrypoint"]] == []
    assert [job["status"] for job in json.loads(jobs)] == ["SUCCEEDED"], "the sweep of before"


def test_a_host_opens_to_another_only_what_SECURITY_md_names(cluster, dashboard):
    one, other = cluster.hosts
    rows = security()
    assert [row for row in rows if launched.DASHBOARD in row and row.loopback]
    for seen, by, wanted in ((one, other, rows), (other, one, [row for row in rows if row.worker])):
        with cluster.timed(f"65,535 ports of {seen.hostname}"):
            found = json.loads(by.run([sys.executable, "-", seen.address], stdin=SCAN.read_text(), timeout=HANG))
        print(f"  {seen.hostname}: {found}")
        named = [row for row in wanted if not row.loopback]
        assert not [port for port in found if not any(port in row for row in named)]
        assert {row.first for row in named if row.first == row.last} <= set(found), "the table names what is not there"
        assert launched.DASHBOARD not in found


def test_no_port_answers_without_the_token_where_SECURITY_md_says_so(cluster, dashboard):
    one, other = cluster.hosts
    found = json.loads(other.run([sys.executable, "-", one.address], stdin=SCAN.read_text(), timeout=HANG))
    guarded = [row for row in security() if row.token and not row.loopback]
    methods = {port: METHODS.get(port, WORKERS) for row in guarded for port in found if port in row}
    assert set(METHODS) | WEB <= set(methods)
    for port in WEB:
        code = STATUS.format(url=f"http://{one.address}:{port}/", token=secrets.token_hex(32))
        assert other.run([sys.executable, "-c", code]).split() == ["401", "403"], port
    asked = [(f"{one.address}:{port}", method) for port, method in methods.items() if port not in WEB]
    asked += [(f"{one.address}:6379", METHODS[6379], cluster.token)]  # so that the others say something
    said = json.loads(other.run([sys.executable, "-", json.dumps(asked)], stdin=PROBE.read_text()))
    assert said.pop() == "OK"
    assert set(said) == {"UNAUTHENTICATED"}, dict(zip(asked, said, strict=False))
    others = [(*words, secrets.token_hex(32)) for words in asked[:-1]]
    said = json.loads(other.run([sys.executable, "-", json.dumps(others)], stdin=PROBE.read_text()))
    assert set(said) == {"UNAUTHENTICATED"}, dict(zip(asked, said, strict=False))


def test_ray_down_leaves_no_process_of_ray(cluster, dashboard):
    cluster.down()
    assert not any(cluster.hosts.a.processes(name) for name in RAY)
    with cluster.timed(
        "until the worker has noticed"
    ):  # `ray down` stops the head alone; a worker gives up a lost head
        launched.wait(lambda: not any(cluster.hosts.b.processes(name) for name in RAY), NOTICES, "a worker that ends")
