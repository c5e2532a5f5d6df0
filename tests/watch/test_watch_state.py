"""What a folder says of its sweep: each trial in one state, life told from death, time left, and little work a look."""

import json
import os
import time

import pytest
from fake_sweep import fake_plan, fake_sweep, finish
from said import say

from perturbray.results import live, table
from perturbray.watch import state as states
from perturbray.watch.state import Folder


def test_each_trial_that_was_asked_for_is_in_one_state(half):
    folder, keys = half
    say(folder, runs=[keys[3], keys[10], keys[12], keys[13], "of-another-plan"])  # the first is done, the second failed
    found = Folder(folder).look()
    assert (found.kind, found.asked, found.done, found.failed) == (states.RUNNING, 16, 10, 2)
    assert [one.key for one in found.active] == [keys[12], keys[13]]
    assert found.queued == 2


def test_a_result_counts_before_what_was_said_of_its_trial(half):
    folder, keys = half
    say(folder, runs=keys)
    looked = Folder(folder)
    assert (looked.look().running, looked.look().queued) == (4, 0)
    plan = table.read_plan(folder)
    for done, key in enumerate(keys[12:], 11):
        finish(folder, next(trial for trial in plan["trials"] if trial["key"] == key))
        found = looked.look()
        assert (found.done, found.running, found.queued) == (done, 14 - done, 0)
    assert (folder / f"{keys[10]}{table.FAILED}").exists()


def test_a_driver_that_was_killed_is_silent_and_its_trials_are_queued_again(half, monkeypatch):
    folder, keys = half
    say(folder, runs=keys[12:15])
    looked = Folder(folder)
    assert looked.look().kind == states.RUNNING
    later = time.monotonic() + 40
    monkeypatch.setattr(states.time, "monotonic", lambda: later)
    found = looked.look()
    assert (found.kind, found.running, found.lost, found.queued) == (states.SILENT, 0, 3, 4)
    assert found.silence == pytest.approx(40, abs=5)
    say(folder, runs=keys[12:15], beat=1)
    assert looked.look().kind == states.RUNNING, "a sign of life is believed at once"


def test_a_page_that_is_opened_late_sees_how_long_nobody_has_lived(half):
    folder, keys = half
    say(folder, runs=keys[12:13])
    os.utime(folder / live.FILE, (time.time() - 90,) * 2)
    found = Folder(folder).look()
    assert found.kind == states.SILENT
    assert found.silence == pytest.approx(90, abs=5)


@pytest.mark.parametrize("wrong", [-3600.0, 3600.0])
def test_a_clock_that_is_wrong_on_the_other_host_makes_nobody_dead_or_immortal(half, monkeypatch, wrong):
    folder, keys = half
    looked = Folder(folder)
    for beat in range(2):
        say(folder, runs=keys[12:13], beat=beat, time=time.time() + wrong, began=time.time() + wrong)
        os.utime(folder / live.FILE, (time.time() + wrong,) * 2)
        found = looked.look()
    assert found.kind == states.RUNNING
    later = time.monotonic() + 40
    monkeypatch.setattr(states.time, "monotonic", lambda: later)
    assert looked.look().kind == states.SILENT


@pytest.mark.parametrize(
    ("said", "kind"),
    [(live.DONE, states.INTERRUPTED), (live.INTERRUPTED, states.INTERRUPTED), (live.BROKEN, states.BROKEN)],
)
def test_a_sweep_that_ended_early_says_how(half, said, kind):
    folder, _ = half
    say(folder, state=said, reason="InputError: no room")
    assert Folder(folder).look().kind == kind


def test_a_sweep_whose_trials_are_all_accounted_for_is_done_whoever_died(tmp_path):
    fake_sweep(tmp_path, failing=2, levels=(0.0,), seeds=1)
    for runs in ({}, {"state": live.BROKEN}):
        say(tmp_path, **runs)
        os.utime(tmp_path / live.FILE, (time.time() - 90,) * 2)
        found = Folder(tmp_path).look()
        assert (found.kind, found.queued, found.failed) == (states.DONE, 0, 2)


def test_a_folder_in_which_nothing_has_begun_is_waited_for(tmp_path):
    looked = Folder(tmp_path / "not-yet")
    assert looked.look().kind == states.WAITING
    (tmp_path / "not-yet").mkdir()
    assert looked.look().kind == states.WAITING
    say(tmp_path / "not-yet")
    assert looked.look().kind == states.RUNNING


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"runs": 3}', '{"beat": "x"}', json.dumps({"runs": {"a": []}}), "\x00\xff"],
)
def test_a_file_that_is_no_sign_of_life_is_none(half, text):
    folder, _ = half
    (folder / live.FILE).write_text(text)
    assert live.read(folder) is None
    assert Folder(folder).look().done == 10


@pytest.mark.parametrize("name", [table.PLAN, "0.failed.json"])
def test_a_truncated_file_is_told_or_named_and_stops_nothing(half, name):
    folder, keys = half
    path = folder / (name if name == table.PLAN else f"{keys[10]}{table.FAILED}")
    looked = Folder(folder)
    looked.look()
    path.write_text(path.read_text()[:40])
    found = looked.look()
    assert (found.asked, found.done, found.failed) == (16, 10, 2), "what was read before still holds"
    assert table.PLAN in found.problem if name == table.PLAN else "not readable" in found.failures[0].error


def test_time_left_is_that_of_the_models_that_are_left(tmp_path):
    plan = fake_plan(levels=(0.0,), seeds=4, status={"state": "running"})
    table.write_plan(tmp_path, plan)
    trials = plan["trials"]
    slow, fast = ([one for one in trials if one["columns"]["model"] == model] for model in ("decoder", "no_change"))
    plan["trials"] = [*slow, *fast]
    table.write_plan(tmp_path, plan)
    for model, seconds in ((slow, "10:00"), (fast, "00:02")):
        finish(tmp_path, model[0])
        took = {"started": "2026-11-22T09:00:00+00:00", "trained": f"2026-11-22T09:{seconds}+00:00"}
        rewrite(tmp_path, model[0]["key"], took)
    say(tmp_path, at_once=2)
    found = Folder(tmp_path).look()
    assert found.left == pytest.approx((3 * 600 + 3 * 2) / 2)
    say(tmp_path, at_once=2, runs={slow[1]["key"]: live.Run(since=time.time() - 200)}, beat=1)
    assert Folder(tmp_path).look().left == pytest.approx((2 * 600 + 400 + 3 * 2) / 2, abs=2)


def rewrite(folder, key, columns):
    frame = table.read(folder, keys=[key])
    rows = {name: frame[name].to_numpy() for name in (*table.ROWS, "covariate.cell_type")}
    constant = {name: frame[name].iloc[0] for name in ("name", "model", "ablation.level", "seed")}
    table.write_trial(folder, key, columns={**constant, **columns}, rows=rows)


def test_a_look_at_a_large_folder_reads_what_is_new_and_not_all_of_it(tmp_path, monkeypatch):
    plan = fake_plan(models=["no_change"], levels=(0.0,), seeds=2000, status={"state": "running"})
    table.write_plan(tmp_path, plan)
    first, *others = plan["trials"]
    finish(tmp_path, first)
    for trial in others[:1999]:
        (tmp_path / f"{trial['key']}.parquet").hardlink_to(tmp_path / f"{first['key']}.parquet")
    read = []
    true = table.read
    monkeypatch.setattr(table, "read", lambda *a, keys, **k: read.append(len(keys)) or true(*a, keys=keys, **k))
    looked = Folder(tmp_path)
    began = time.process_time()
    assert looked.look().done == 2000
    assert time.process_time() - began < 5
    assert read == [states.BATCH]
    for _ in range(2000 // states.BATCH + 2):
        looked.look()
    assert sum(read) == 2000
    began = time.process_time()
    assert looked.look().done == 2000
    assert time.process_time() - began < 1
