"""The live page's markup: what it says of a state, and that names from data never become markup."""

import html
import re
import time

import pytest
from fake_sweep import fake_sweep
from said import say

from perturbray.results import live, table
from perturbray.results.reader import Reader
from perturbray.watch import page
from perturbray.watch.drawing import Drawing, draw
from perturbray.watch.state import Folder

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"


def text(markup):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", markup)).split())


def parts(folder, drawing=None):
    return page.fragments(Folder(folder).look(), drawing or Drawing(), str(folder))


def test_the_page_says_what_runs_where_how_far_and_how_fast(half):
    folder, keys = half
    run = live.Run(since=time.time() - 75, host="node-7", epoch_seconds=2.0, cells=5000, memory_mb=1536)
    for epoch in range(1, 5):
        run.add(epoch, 1.0 / epoch, 0.5 / epoch)
    say(folder, runs={keys[12]: run}, at_once=1)
    found = {name: text(part) for name, part in parts(folder).items()}
    assert "4 / 40" not in found["running"], "nobody knows how many epochs this plan's trials may take"
    for said in ("0.1250", "1 min 15 s", "2,500", "1.5 GB", "node-7"):
        assert said in found["running"]
    for said in ("done 10 of 16", "running 1", "queued 3", "failed 2", "2,500 cells/s", "1.5 GB"):
        assert said in found["counts"]
    assert "loss is NaN in epoch 3" in found["failures"]
    assert "Traceback" in found["failures"]


def test_names_from_data_never_become_markup(tmp_path):
    plan = fake_sweep(
        tmp_path, trials=1, failing=1, models=["decoder"], levels=(0.0,), seeds=3, name=EVIL, question=EVIL
    )
    plan["trials"] = [{**trial, "name": EVIL} for trial in plan["trials"]]
    plan |= {"command": EVIL, "dataset": {"name": EVIL}, "status": {"state": "running"}}
    table.write_plan(tmp_path, plan)
    last, failed = plan["trials"][2]["key"], plan["trials"][1]["key"]
    table.write_failure(tmp_path, failed, name=EVIL, error=EVIL)
    say(tmp_path, runs={last: live.Run(since=0.0, host=EVIL)}, host=EVIL, cluster=EVIL, said=[EVIL])
    state = Folder(tmp_path).look()
    whole = page.shell(state, Drawing(problem=EVIL), EVIL)
    assert whole.count("<script>") == 1, "the page's own"
    assert "<img" not in whole
    assert whole.count("&lt;script&gt;alert(1)") >= 9
    fragments = "".join(page.fragments(state, draw(Reader(tmp_path), state), EVIL).values())
    assert "<script" not in fragments
    assert "<img" not in fragments


def test_the_leaderboard_and_the_figures_are_those_of_the_report(half):
    folder, _ = half
    state = Folder(folder).look()
    drawing = draw(Reader(folder), state)
    found = page.fragments(state, drawing, str(folder))
    assert drawing.trials == 10
    assert "so far, 10 of 16 trials" in text(found["board"])
    assert found["board"].count("<table") == 4, "scores and ranks at either end"
    for model in ("no_change", "linear_additive", "latent_additive"):
        assert model in found["board"]
    assert "<svg" in found["figure"]
    assert "<svg" in found["curves"]


def test_so_far_is_said_of_a_sweep_that_goes_on_alone(tmp_path):
    fake_sweep(tmp_path, failing=2, levels=(0.0,), seeds=1)
    state = Folder(tmp_path).look()
    title = text(page.fragments(state, draw(Reader(tmp_path), state), "")["board"])
    assert title.startswith("Leaderboard, 6 of 8 trials")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "Running"),
        ({"state": live.INTERRUPTED}, "Interrupted"),
        ({"state": live.BROKEN, "reason": "InputError: no room"}, "InputError: no room"),
    ],
)
def test_the_head_says_how_it_stands(half, fields, said):
    folder, _ = half
    say(folder, **fields)
    assert said in text(parts(folder)["head"])


def test_silence_is_said_in_seconds(half, monkeypatch):
    folder, keys = half
    say(folder, runs=keys[12:14])
    looked, now = Folder(folder), time.monotonic()
    looked.look()
    monkeypatch.setattr("perturbray.watch.state.time.monotonic", lambda: now + 40)
    found = text(page.fragments(looked.look(), Drawing(), "")["head"])
    assert "No sign of life since 40 s" in found
    assert "2 trials under way then" in found


def test_a_page_of_very_many_trials_stays_short(tmp_path):
    plan = fake_sweep(tmp_path, trials=0, failing=30, models=["decoder"], levels=(0.0,), seeds=1030)
    say(tmp_path, runs=[trial["key"] for trial in plan["trials"][30:]])
    found = parts(tmp_path)
    assert found["running"].count("<tr>") == page.SHOWN + 1
    assert "The first 40 of 1000" in text(found["running"])
    assert found["failures"].count("<details") == page.FAILURES
    assert "And 20 more" in text(found["failures"])


def test_a_long_learning_curve_is_thinned_and_keeps_its_ends():
    run = live.Run(since=0.0)
    for epoch in range(1, 2001):
        run.add(epoch, 1.0, 1.0 / epoch)
    assert len(run.points) <= live.MOST
    assert (run.points[0][0], run.points[-1][0]) == (1, 2000)
    assert [point[0] for point in run.points] == sorted({point[0] for point in run.points})
    run.add(1500, 1.0, 0.5)
    assert run.points[-1] == (1500, 1.0, 0.5), "a trial that was started again says its epochs anew"


def test_a_small_curve_goes_from_left_to_right_and_down_where_the_loss_falls():
    drawn = page.spark([(1, 9.0, 0.4), (2, 0.5, 0.3), (3, 0.3, 0.2)])
    path = re.search(r'class="watched" d="M([^"]+)"', drawn)[1]
    places = [tuple(map(float, place.split())) for place in path.split(" L")]
    assert [x for x, _ in places] == [0, page.WIDTH / 2, page.WIDTH]
    assert [y for _, y in places] == sorted(y for _, y in places)
    assert places[-1][1] == page.HEIGHT
    assert page.spark([(1, 0.4, 0.3)]) == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(59.4, "59 s"), (61, "1 min 01 s"), (7260, "2 h 01 min"), (200_000, "2 d 07 h")]
)
def test_times_are_said_as_a_person_says_them(seconds, said):
    assert page.clock(seconds) == said
