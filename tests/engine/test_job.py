"""`ray job submit`: a sweep handed over to a cluster by its job API runs there, and its results stay."""

import os
import subprocess
from pathlib import Path

import pytest
from nodes import RAY, cluster

from perturbray.results import table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head():
    with cluster(cpus=2, dashboard=True) as found:
        yield found


def submit(head, *words: object) -> subprocess.CompletedProcess:
    """From a checkout, as one does through a tunnel: only the dashboard's port is used."""
    return subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", "python", "sweeps/imbalance.py", *map(str, words)],
        env={**os.environ, "RAY_ADDRESS": f"http://127.0.0.1:{head.dashboard}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_a_submitted_sweep_runs_on_the_cluster_and_its_results_stay(head, tmp_path):
    words = "--smoke", "--model", "decoder", "--grid", "ablation.level=0", "--results", tmp_path / "results"
    ended = submit(head, *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"this job runs on the cluster that it was submitted to ({head.address})" in ended.stdout
    assert "Ray: 1 node, 2 CPUs, 0 GPUs: 2 trials at once" in ended.stdout
    (folder,) = (tmp_path / "results").iterdir()
    plan = table.read_plan(folder)
    assert plan["status"]["state"] == "done"
    assert {trial["key"] for trial in plan["trials"]} == table.finished(folder)
    assert (folder / "report.html").exists()


def test_results_in_the_copy_of_the_folder_that_ray_deletes_are_refused(head):
    ended = submit(head, "--smoke")
    assert ended.returncode != 0
    assert "error: --results results: a job runs in a copy of its working directory, which Ray deletes" in ended.stdout
