"""What a running sweep records of itself: without Ray what is written when; with it, that the counts hold at all times."""

import itertools
import json
import threading
import time

import pytest
import small

import perturbray as pr
from perturbray.events import Events
from perturbray.recorder import Recorder, recording
from perturbray.results import live, table
from perturbray.watch import state as states
from perturbray.watch.state import Folder

PLUGIN = """
import time
from dataclasses import dataclass

import perturbray as pr
from perturbray.models.latent_additive import LatentAdditiveNet


@pr.MODELS.register("slow")
@dataclass(frozen=True, kw_only=True)
class Slow(pr.LatentAdditive):
    breaks: bool = False

    def build(self, vocabulary):
        return SlowNet(self, vocabulary)


class SlowNet(LatentAdditiveNet):
    began = 0

    def step(self, batch, moment):
        if moment.epoch == 1 and self.spec.breaks:
            raise RuntimeError("no luck in the 2nd epoch")
        if moment.epoch >= self.began:
            self.began = moment.epoch + 1
            time.sleep(1.0)
        return super().step(batch, moment)
"""


def test_a_small_sweep_with_a_failing_trial_is_told_as_it_happened(ray_session, small_screen, tmp_path):
    plugin = small.plugin(PLUGIN, "slow")
    slow = pr.MODELS["slow"]
    models = (pr.MeanShift(), slow(width=8, latent_dim=4), slow(width=8, latent_dim=4, breaks=True))
    folder, seen, ended = tmp_path / "out", [], threading.Event()

    def watch():
        looked = Folder(folder)
        while not ended.wait(0.1):
            seen.append(looked.look())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(ExceptionGroup):
        small.run(small.sweep(small_screen, models), folder, plugins=[plugin])
    ended.set()
    watcher.join()
    begun = [state for state in seen if state.asked]
    assert {state.kind for state in begun} <= {states.RUNNING, states.DONE}
    for state in begun:
        assert state.asked == 3 == state.queued + state.running + state.done + state.failed
        assert min(state.queued, state.running, state.done, state.failed) >= 0
    for earlier, later in itertools.pairwise(begun):
        assert later.done >= earlier.done
        assert later.failed >= earlier.failed
    active = {one.name: one for state in begun for one in state.active}
    run = next(one.run for name, one in active.items() if "slow" in name and one.run.points)
    assert run.host
    assert run.cells > 100
    assert run.epoch_seconds >= 1
    assert 20 < run.memory_mb < 4000
    last = Folder(folder).look()
    assert (last.kind, last.done, last.failed, last.queued) == (states.DONE, 2, 1, 0)
    (failure,) = last.failures
    assert failure.error == "RuntimeError: no luck in the 2nd epoch"
    assert [epoch for epoch, _, _ in failure.points] == [1], "what it had learnt is kept with the reason"
    said = live.read(folder)
    assert (said.state, said.at_once) == (live.DONE, 2)
    (curve,) = table.read(folder)["curve"].astype(str).loc[lambda texts: texts.str.len() > 2].unique()
    assert len(json.loads(curve)) == 2


def test_a_recorder_writes_about_once_a_second_whatever_it_is_told(tmp_path):
    (tmp_path / table.PLAN).write_text("{}")
    recorder = Recorder(tmp_path, Events(), seconds=0.2)
    recorder.start()
    end, told = time.monotonic() + 1.0, 0
    recorder.started("a")
    while time.monotonic() < end:
        told += 1
        recorder.reported("a", {"epoch": told, "train_loss": 1.0, "val_loss": float("nan")})
    recorder.stop(live.DONE)
    said = live.read(tmp_path)
    assert told > 1000
    assert 2 <= said.beat <= 7
    assert said.runs["a"].points[-1] == (told, 1.0, None)


def test_what_the_engine_tells_reaches_the_display_too(tmp_path):
    record = small.Record()
    with recording(tmp_path, record) as events:
        events.line("hello")
        events.started("a")
        events.stopped("a")
    assert (record.lines, record.began, record.ended) == (["hello"], ["a"], ["a"])
    assert not (tmp_path / live.FILE).exists(), "nothing is left where nothing else came into the folder"


@pytest.mark.parametrize(
    ("raised", "state", "reason"),
    [
        (None, live.DONE, ""),
        (KeyboardInterrupt(), live.INTERRUPTED, ""),
        (ValueError("no room"), live.BROKEN, "ValueError: no room"),
    ],
)
def test_how_a_session_ended_is_said(tmp_path, raised, state, reason):
    (tmp_path / table.PLAN).write_text("{}")
    caught = None
    try:
        with recording(tmp_path, Events()):
            if raised:
                raise raised
    except (KeyboardInterrupt, ValueError) as error:
        caught = error
    assert caught is raised
    assert (live.read(tmp_path).state, live.read(tmp_path).reason) == (state, reason)


def test_a_record_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path):
    record = small.Record()
    recorder = Recorder(tmp_path / "gone", record, seconds=0.05)
    recorder.start()
    time.sleep(0.4)
    recorder.stop(live.DONE)
    assert len(record.lines) == 1
    assert "the trials go on" in record.lines[0]


def test_curves_of_failed_trials_are_kept_and_those_of_stored_ones_forgotten(tmp_path):
    (tmp_path / table.PLAN).write_text("{}")
    recorder = Recorder(tmp_path, Events())
    for number in range(60):
        recorder.started(f"{number}")
        recorder.stopped(f"{number}")
        ending = ".parquet" if number < 10 else table.FAILED if number < 50 else ""
        if ending:
            (tmp_path / f"{number}{ending}").touch()
    recorder._write()
    kept = set(live.read(tmp_path).runs)
    assert kept == {str(number) for number in (*range(30, 60),)}
    recorder.lost("55")
    recorder._write()
    assert set(live.read(tmp_path).runs) == kept - {"55"}
