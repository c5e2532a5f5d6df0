"""The pool of scorers: it holds a fast trial back, keeps what fails, and outlives the death of a process."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from perturbray.metrics.pool import WAITING, NoScorerError, Pool
from perturbray.prediction import LostCellsError


def start(actors: int) -> Pool:
    """A pool whose work is to call the item."""
    return Pool.start(lambda item: item(), actors=actors, cpus=0.2)


@pytest.fixture(scope="module")
def pool(ray_session):
    """Two scorers that live through the tests of this file, as they live through a sweep."""
    pool = start(2)
    yield pool
    pool.stop()


def item(source: str, **values):
    """A function from its source, so that a worker need not import this file."""

    def run():
        exec(source, values)

    return run


NOTE_PROCESS = "import os; path.write_text(str(os.getpid()))"
WAIT = "import time\nwhile not path.exists(): time.sleep(0.02)"
FAIL = "raise ValueError(text)"
UNPICKLABLE = """
class Odd(Exception):
    pass

error = Odd("text")
error.run = (x for x in ())
raise error
"""


def kill(actor) -> None:
    """Killed for good, and seen to be: Ray answers before the actor is gone, which may still take an item with it."""
    ray.kill(actor)
    for _ in range(600):
        try:
            ray.get(actor.drain.remote())
        except ray.exceptions.RayActorError:
            return
        time.sleep(0.1)
    pytest.fail("a killed scorer still answers after a minute")


def processes(pool: Pool, folder: Path) -> list[int]:
    """The process of each scorer."""
    for i in range(len(pool.actors)):
        pool.submit("process", item(NOTE_PROCESS, path=folder / f"process-{i}"), turn=i)
    pool.drain()
    return [int((folder / f"process-{i}").read_text()) for i in range(len(pool.actors))]


def test_items_are_worked_on_by_the_scorer_of_their_turn(pool, tmp_path):
    for i in range(6):
        pool.submit(f"trial {i}", item(NOTE_PROCESS, path=tmp_path / str(i)), turn=i)
    assert pool.drain() == ([], 0)
    by = [(tmp_path / str(i)).read_text() for i in range(6)]
    assert by == [by[0], by[1]] * 3
    assert by[0] != by[1]


def test_submit_waits_while_the_queue_is_full(pool, tmp_path):
    go, ready = tmp_path / "go", threading.Event()
    for i in range(WAITING + 1):  # the first is being worked on
        pool.submit(f"trial {i}", item(WAIT, path=go), turn=0)
    late = threading.Thread(target=lambda: (pool.submit("late", item("pass"), turn=0), ready.set()), daemon=True)
    late.start()
    assert not ready.wait(1.0)
    pool.submit("elsewhere", item("pass"), turn=1)  # the other scorer takes its own
    go.touch()
    assert ready.wait(60)
    assert pool.drain() == ([], 0)


def test_failures_are_kept_with_name_and_traceback_and_the_scorer_goes_on(pool, tmp_path):
    pool.submit("trial 1", item(FAIL, text="one"), turn=0)
    pool.submit("trial 2", item(NOTE_PROCESS, path=tmp_path / "done"), turn=0)
    pool.submit("trial 3", item(FAIL, text="three"), turn=0)
    failed, dead = pool.drain()
    assert (tmp_path / "done").exists()
    assert dead == 0
    assert [(f.name, str(f.error)) for f in failed] == [("trial 1", "one"), ("trial 3", "three")]
    assert all(isinstance(f.error, ValueError) and "Traceback" in f.text for f in failed)
    assert pool.drain() == ([], 0), "what was told once is not told again"


def test_an_error_that_does_not_pickle_comes_back_as_text(pool):
    pool.submit("trial", item(UNPICKLABLE, __name__="elsewhere"), turn=0)
    (failed,), dead = pool.drain()
    assert (dead, failed.name, str(failed.error)) == (0, "trial", "Odd: text")


def test_a_pool_travels_to_trials(pool, tmp_path):
    @ray.remote(num_cpus=0)
    def trial(pool, run):
        pool.submit("trial", run, turn=1)

    ray.get(trial.remote(pool, item(NOTE_PROCESS, path=tmp_path / "done")))
    assert pool.drain() == ([], 0)
    assert (tmp_path / "done").exists()


def test_a_scorer_whose_process_died_comes_back(pool, tmp_path):
    before = processes(pool, tmp_path)
    os.kill(before[0], signal.SIGKILL)
    pool.submit("trial", item(NOTE_PROCESS, path=tmp_path / "done"), turn=0)
    assert pool.drain() == ([], 0)
    assert (tmp_path / "done").read_text() not in map(str, before)


def test_what_a_scorer_keeps_outlives_its_sender_and_comes_back(pool):
    @ray.remote(num_cpus=0)
    def trial(pool):
        return [pool.keep("trial", np.full((3, 4), number), turn=number) for number in range(3)]

    for number, kept in enumerate(ray.get(trial.remote(pool))):
        np.testing.assert_array_equal(kept(), np.full((3, 4), number))


def test_what_a_dead_scorer_kept_is_told_to_be_lost(pool, tmp_path):
    here = processes(pool, tmp_path)
    kept = [pool.keep("trial", np.ones(300_000), turn=turn) for turn in range(2)]
    os.kill(here[0], signal.SIGKILL)
    for _ in range(600):
        if processes(pool, tmp_path)[0] != here[0]:
            break
        time.sleep(0.1)
    assert kept[1]().sum() == 300_000
    with pytest.raises(LostCellsError, match="scorer"):
        kept[0]()


def test_a_scorer_killed_for_good_is_counted_and_replaced_and_others_take_its_turn(ray_session, tmp_path):
    pool = start(2)
    try:
        pool.submit("kept", item(FAIL, text="kept"), turn=1)
        kill(pool.actors[0])
        pool.submit("other", item(FAIL, text="other"), turn=0)
        failed, dead = pool.drain()
        assert dead == 1
        assert [f.name for f in failed] == ["kept", "other"]
        pool.revive()
        assert len(set(processes(pool, tmp_path))) == 2
        assert pool.drain() == ([], 0)
        for actor in pool.actors:
            kill(actor)
        with pytest.raises(NoScorerError, match="trial 7"):
            pool.submit("trial 7", item("pass"), turn=0)
    finally:
        pool.stop()
