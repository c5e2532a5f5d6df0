"""The local variant for real: `ray up` over SSH, a job through a tunnel, a worker lost in mid-sweep, closed ports, `ray down`.

One cluster for the module, and its tests in the order of its life.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import launched
import pytest
from pandas.testing import assert_frame_equal

from perturbray.results import table

pytestmark = pytest.mark.slow

SWEEP = [
    *("--set", "ablation.highest=0.2", "--grid", "ablation.level=0,0.2"),
    *("--grid", "seed=0,1", "--set", "training.epochs=40"),
]
TRIALS = 32
HANG = 600  # seconds


def stable(folder: Path):
    """The table of a sweep without the columns that no two runs share."""
    found = table.read(folder)
    return found.drop(columns=[name for name in table.VOLATILE if name in found])


def ran_on(folder: Path) -> dict[str, str]:
    """The host of every finished trial, by key."""
    finished = table.finished(folder)
    if not finished:
        return {}
    return table.read(folder, keys=finished).groupby("key")["host"].first().to_dict()


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
        before = {path: path.stat().st_mtime_ns for path in results.glob("*.parquet")}
        assert len(before) < TRIALS / 2, "the worker is to be lost in mid-sweep"
        assert cluster.hosts.b.kill("raylet") == 1
        assert job.wait(HANG) == 0, log.read_text()
    said = log.read_text()
    print(said)
    assert "2 nodes, 4 CPUs" in said
    assert len(table.finished(results)) == TRIALS, said
    assert not table.failed(results)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items(), "a finished trial ran again"
    print(sorted(ran_on(results).values()))
    assert set(ran_on(results).values()) == {host.hostname for host in cluster.hosts}
    assert_frame_equal(stable(results), stable(one_machine), check_exact=True)


def test_a_worker_that_was_lost_comes_back(cluster, dashboard):
    with cluster.timed("until the worker is back"):
        cluster.wait_for_both(dashboard)
