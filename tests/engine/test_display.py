"""What a running sweep shows: counts, failures, the first rows, and a page that says how it ended. All without Ray."""

import io

import numpy as np
import pytest
import small
from rich.console import Console

from perturbray import display, scoring
from perturbray.data import matrix
from perturbray.data.batches import Cells
from perturbray.data.dataset import open_h5ad
from perturbray.plan import Plan
from perturbray.results import table
from perturbray.trial import run


@pytest.fixture(scope="module")
def outcomes(small_screen):
    """A plan, and what each of its trials predicts."""
    plan = Plan.of(small.sweep(small_screen), small_screen.parent / "out")
    plan.scan()
    (spec,) = plan.conditions
    with open_h5ad(spec.path) as file:
        rows = matrix.read_rows(file, spec, 0, len(plan.conditions[spec].cell_names))
    totals = np.asarray(rows.sum(1, dtype=np.float64)).ravel()
    rows.data = plan.normalisation(spec).apply(rows.data, np.diff(rows.indptr), totals)
    return plan, {key: run(trial, Cells([rows]), plan.conditions[spec]) for key, trial in plan.trials.items()}


def score(key, trial, outcome, **where):
    """What a scorer does with a finished trial."""
    scorable = scoring.Scorable(
        key=key,
        name=trial.name,
        columns={**trial.columns(), **outcome.columns, "started": scoring.now(), "host": "here"},
        truth="only",
        predicted=outcome.predicted,
        stratum=outcome.stratum,
    )
    scoring.score(scorable, {"only": outcome.truth}, **where)


@pytest.fixture
def half_done(outcomes, tmp_path):
    """Two of three trials are scored, the third failed."""
    plan, found = outcomes
    plan = Plan.of(plan.sweep, tmp_path)
    table.write_plan(tmp_path, plan.describe(command="", state="running"))
    *good, bad = plan.trials
    for key in good:
        score(key, plan.trials[key], found[key], folder=tmp_path, metrics=plan.sweep.metrics)
    table.write_failure(tmp_path, bad, name=plan.trials[bad].name, error=ValueError("no luck"))
    return plan


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_a_sweep_is_followed_in_its_folder_alone(half_done, terminal):
    out = io.StringIO()
    shown = display.Terminal(Console(file=out, force_terminal=terminal, width=120))
    with shown.watching(half_done):
        key = next(iter(half_done.trials))
        shown.started(key)
        watcher = next(t for t in display.threading.enumerate() if t.name == "watcher")
        while not out.getvalue().count("no_change"):
            watcher.join(0.05)
            assert watcher.is_alive(), out.getvalue()
        shown.stopped(key)
    assert "2 of 3 trials done, 1 running, 1 failed" in out.getvalue()
    assert "rmse/average ↓" in out.getvalue()
    page = (half_done.folder / "report.html").read_text()
    assert "no luck" in page
    assert table.read_plan(half_done.folder)["status"]["state"] == "done"


def test_a_sweep_that_is_left_early_is_stored_as_interrupted(half_done):
    shown = display.Terminal(Console(file=io.StringIO()))
    with pytest.raises(KeyboardInterrupt), shown.watching(half_done):
        raise KeyboardInterrupt
    assert table.read_plan(half_done.folder)["status"]["state"] == "interrupted"
    assert "interrupted" in (half_done.folder / "report.html").read_text()


def test_the_results_name_their_files(half_done):
    out = io.StringIO()
    with display.Terminal(Console(file=io.StringIO())).watching(half_done):
        pass
    display.show_results(half_done.folder, Console(file=out, width=500))
    for name in ("report.html", "figure.png", "summary.csv"):
        assert str(half_done.folder / name) in out.getvalue()


def test_a_failing_score_is_recorded_with_the_trials_name_and_raised(outcomes, tmp_path):
    plan, found = outcomes
    key, trial = next(iter(plan.trials.items()))
    with pytest.raises(AttributeError) as caught:
        score(key, trial, found[key], folder=tmp_path, metrics=("not a metric",))
    assert caught.value.__notes__ == [f"while scoring trial {key} ({trial.name})"]
    assert table.failed(tmp_path)[key]["name"] == trial.name
    assert table.finished(tmp_path) == set()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_times_are_said_as_a_person_says_them(seconds, said):
    assert display.clock(seconds) == said
