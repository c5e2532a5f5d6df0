"""Nodes that vanish while a sweep runs, and nodes that join and see nothing: the table is the one of one machine."""

import fault_table
import pytest
import small
from nodes import DRIVER, alone, can_hide, cluster, notes, noting
from pandas.testing import assert_frame_equal

from perturbray.results import table

pytestmark = pytest.mark.slow

SEEDS = 5


@pytest.fixture(scope="module")
def one_machine(ray_session, small_screen, tmp_path_factory):
    return alone(small_screen, tmp_path_factory.mktemp("alone") / "out", SEEDS)


@pytest.fixture
def begin(small_screen, tmp_path):
    """Starts the sweep on a cluster."""

    def start(found, *, seconds: float = 0.0):
        (tmp_path / "noting.py").write_text(noting(tmp_path, seconds=seconds))
        return found.start(DRIVER, small_screen, tmp_path / "out", tmp_path / "noting.py", 1, SEEDS)

    return start


def test_a_sweep_outlives_the_nodes_of_its_scorers_and_of_its_trials(begin, one_machine, tmp_path):
    def done() -> int:
        return len(table.finished(tmp_path / "out"))

    with cluster() as found:
        found.add("scorers", cpus=2)
        found.add("first", cpus=2, gpus=1)
        driver = begin(found, seconds=4.0)
        driver.until(lambda: done() >= 1)
        found.kill("scorers")
        found.add("second", cpus=2, gpus=1)
        before = done()
        driver.until(lambda: done() > before)
        found.kill("first")
        driver.finish()
    homes = {what: {note["node"] for note in notes(tmp_path) if note["what"] == what} for what in ("trial", "scorer")}
    assert len(homes["trial"]) == 2
    assert len(homes["scorer"]) >= 2, "the scorer never moved, and nothing was tested"
    assert not table.failed(tmp_path / "out")
    assert_frame_equal(small.stable(tmp_path / "out"), one_machine, check_exact=True)
    fault_table.record(
        fault_table.Row(
            fault="a spot node that vanishes",
            happens="its trials are run again on the nodes that are left or join, and the table is the one of one machine",
            lost="the work of the trials that ran there since their last checkpoint",
            goes_on="by itself",
        )
    )
    fault_table.record(
        fault_table.Row(
            fault="a scorer's node that vanishes",
            happens="the scorer is started on another node, trials that it held are run again, with the same table",
            lost="predictions that waited there",
            goes_on="by itself",
        )
    )


def test_trials_avoid_a_node_that_joined_and_does_not_see_the_results(begin, one_machine, tmp_path):
    if not can_hide():
        pytest.skip("this user may not mount: nodes cannot be made blind")
    (tmp_path / "out").mkdir()
    (tmp_path / "hold").touch()
    with cluster() as found:
        found.add("seeing", cpus=3, gpus=1)
        driver = begin(found)
        driver.until(lambda: any(note["what"] == "trial" for note in notes(tmp_path)))
        found.add("blind", cpus=2, gpus=1, hidden=[tmp_path / "out"])
        said = f"joined and does not see {tmp_path / 'out'}: mount it there"
        driver.until(lambda: any(said in line for line in driver.said()))
        (tmp_path / "hold").unlink()
        driver.finish()
    assert not table.failed(tmp_path / "out")
    assert_frame_equal(small.stable(tmp_path / "out"), one_machine, check_exact=True)
