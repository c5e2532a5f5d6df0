"""A sweep end to end on Ray: what it leaves, that it runs once, and that its numbers depend on nothing but the trials."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import small
from opens import Opens
from pandas.testing import assert_frame_equal

import perturbray as pr
from perturbray import engine, process
from perturbray.data import store
from perturbray.data.splits import TEST
from perturbray.metrics.metric import Metric
from perturbray.placement import Placement
from perturbray.plan import Plan
from perturbray.results import live, table
from perturbray.results.summary import summarise
from perturbray.trial import run as run_here

OWN_MODEL = """
from dataclasses import dataclass

import perturbray as pr


@pr.MODELS.register("scaled_control")
@dataclass(frozen=True, kw_only=True)
class ScaledControl(pr.ModelSpec):
    factor: float = 2.0

    def build(self, vocabulary):
        return ScaledControlNet(self.factor, vocabulary)


class ScaledControlNet(pr.Model):
    def __init__(self, factor, vocabulary):
        super().__init__(vocabulary)
        self.factor = factor

    def predict(self, batch):
        return batch.control * self.factor
"""


@contextmanager
def unread(folder: Path) -> Iterator[None]:
    """As on a machine that has read no screen before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERTURBRAY_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def finished(ray_session, small_screen, tmp_path_factory):
    """Six trials, run once: (folder, plan, what was opened)."""
    folder = tmp_path_factory.mktemp("sweep") / "small"
    with unread(tmp_path_factory.mktemp("cache")):
        with Opens(small_screen) as opens:
            ran, plan = small.run(small.sweep(small_screen, seeds=2), folder)
        assert ran == 6
        yield folder, plan, opens.count


def test_a_sweep_leaves_a_file_for_each_trial_the_plan_and_the_reference(finished):
    folder, plan, _ = finished
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {f"{key}.parquet" for key in plan.trials} | {table.PLAN, table.REFERENCE, live.FILE}
    stored = table.read_plan(folder)
    assert [trial["key"] for trial in stored["trials"]] == list(plan.trials)
    assert stored["headline"] == [metric.name for metric in small.METRICS]
    assert stored["dataset"]["cells"] == len(plan.conditions[plan.sweep.trials[0].dataset].cell_names)
    reference = table.read_reference(folder)
    assert set(reference["model"]) == {"mean_shift"}
    assert np.isfinite(reference["value"]).all()


def test_every_test_condition_has_a_row_for_every_metric(finished):
    folder, plan, _ = finished
    found = table.read(folder)
    for key, trial in plan.trials.items():
        rows = found[found["key"] == key]
        split = trial.make_split(plan.conditions[trial.dataset])
        tested = np.flatnonzero(split.condition == TEST)
        for metric in small.METRICS:
            assert sorted(rows.loc[rows["metric"] == metric.name, "condition"]) == tested.tolist()


def test_a_second_run_runs_no_trial_and_reads_no_matrix(finished, monkeypatch):
    folder, plan, _ = finished
    before = small.stamps(folder)
    monkeypatch.setattr(store, "open_screen", lambda *_: pytest.fail("X was read again"))
    monkeypatch.setattr(engine, "connect", lambda *_: pytest.fail("Ray was asked for"))
    events = small.Record()
    ran, again = small.run(plan.sweep, folder, events=events)
    assert (ran, events.began) == (0, [])
    assert list(again.trials) == list(plan.trials)
    assert {name: small.stamps(folder)[name] for name in before if name != table.REFERENCE} == {
        name: stamp for name, stamp in before.items() if name != table.REFERENCE
    }


def test_a_finished_sweep_is_stored_as_done_also_when_it_is_run_again(finished):
    folder, plan, _ = finished
    assert table.read_plan(folder)["status"]["state"] == "done"
    small.run(plan.sweep, folder)
    assert table.read_plan(folder)["status"]["state"] == "done"


def test_a_sweep_gives_the_numbers_of_its_trials_run_without_ray(finished):
    folder, plan, _ = finished
    key, trial = next((k, t) for k, t in plan.trials.items() if isinstance(t.model, pr.LatentAdditive))
    conditions = plan.conditions[trial.dataset]
    cells = store.ingest(trial.dataset, conditions).cells()
    with process.one_thread():
        outcome = run_here(trial, cells, conditions)
    values, _ = small.METRICS[0].evaluate(outcome.prediction)
    found = table.read(folder, keys=[key])
    found = found[found["metric"] == small.METRICS[0].name].set_index("condition").loc[outcome.truth.rows, "value"]
    np.testing.assert_array_equal(found.to_numpy(), values)


def test_scoring_inline_gives_the_table_of_the_pool_to_the_last_digit(finished, tmp_path, monkeypatch, small_screen):
    folder, plan, _ = finished
    inline = Placement(at_once=1, trial_cpus=1.0, trial_gpus=0.0, scorers=0)
    monkeypatch.setattr(engine, "place", lambda *_, **__: inline)
    small.run(plan.sweep, tmp_path / "small")
    assert_frame_equal(small.stable(folder), small.stable(tmp_path / "small"), check_exact=True)


@pytest.fixture(scope="module")
def with_cells(ray_session, small_screen, tmp_path_factory):
    """Metrics of cells and of linear means: (sweep, folder)."""
    metrics = [Metric.parse(name) for name in ("rmse/average", "energy/pca", "cosine/logfc")]
    models = (pr.NoChange(), pr.PerturbedMean(), pr.MeanShift())
    sweep, folder = (
        small.sweep(small_screen, models, metrics=metrics, cells=30),
        tmp_path_factory.mktemp("cells") / "small",
    )
    small.run(sweep, folder, events=(events := small.Record()))
    assert any("target sum" in line for line in events.lines)
    return sweep, folder


def test_cells_and_linear_means_are_scored_inline_as_by_the_pool_to_the_last_digit(with_cells, tmp_path, monkeypatch):
    sweep, folder = with_cells
    inline = Placement(at_once=1, trial_cpus=1.0, trial_gpus=0.0, scorers=0)
    monkeypatch.setattr(engine, "place", lambda *_, **__: inline)
    small.run(sweep, tmp_path / "small")
    pooled = small.stable(folder)
    assert_frame_equal(pooled, small.stable(tmp_path / "small"), check_exact=True)
    assert_frame_equal(table.read_anchors(folder), table.read_anchors(tmp_path / "small"), check_exact=True)
    assert set(pooled["cells_cap"]) == {30}
    assert set(pooled["cells_seed"]) == {0}


def test_metrics_of_cells_are_on_the_page_with_floor_and_ceiling(with_cells):
    _, folder = with_cells
    summary = summarise(table.read(folder), table.read_plan(folder), anchors=table.read_anchors(folder))
    for metric in ("energy/pca", "cosine/logfc"):
        bounds = summary.anchors.bounds.set_index("metric").loc[metric]
        assert bounds[["no_change", "perturbed_mean", "split_half"]].notna().all()
        scaled = summary.anchors.scaled.set_index(["metric", "series"]).loc[(metric, "perturbed_mean")]
        assert scaled["half"] == scaled["baseline_half"]
    assert {"effect", "de_genes"} <= set(summary.anchors.effects["by"])


def test_two_runs_give_equal_tables_and_the_file_is_opened_as_often_for_two_trials_as_for_six(
    finished, tmp_path, small_screen
):
    folder, _, opened = finished
    two = small.sweep(small_screen, models=small.MODELS[1:])
    with unread(tmp_path / "cache"):
        with Opens(small_screen) as opens:
            ran, again = small.run(two, tmp_path / "small")
        assert ran == 2
        assert opens.count == opened > 0, "six trials opened the file more often than two"
        before = small.stable(folder, keys=again.trials)
        assert_frame_equal(before, small.stable(tmp_path / "small"), check_exact=True)
        with Opens(small_screen) as opens:
            assert small.run(two, tmp_path / "small")[0] == 0
            assert small.run(small.sweep(small_screen, models=small.MODELS[:1]), tmp_path / "more")[0] == 1
            again = Plan.of(two, tmp_path / "dry")
            again.scan()
        assert opens.count == 0, "what is known of a file needs no look into it"


def test_volatile_names_every_time_that_is_stored(finished):
    found = table.read(finished[0])
    times = [name for name in found if found[name].astype(str).str.match(r"\d{4}-\d\d-\d\dT").all()]
    assert set(times) <= set(table.VOLATILE)
    assert set(table.VOLATILE) <= set(found)


def test_trials_never_touch_the_file_and_a_users_own_model_runs_on_the_workers(ray_session, own_screen, tmp_path):
    class Away(small.Record):
        def planned(self, plan):
            own_screen.rename(own_screen.with_suffix(".away"))

    own = small.plugin(OWN_MODEL)
    spec = pr.MODELS["scaled_control"]
    sweep = small.sweep(own_screen, (spec(factor=1.0), spec(factor=3.0), pr.NoChange()))
    ran, plan = small.run(sweep, tmp_path / "out", plugins=[own], events=(events := Away()))
    assert ran == 3
    assert not own_screen.exists()
    assert sorted(events.began) == sorted(events.ended) == sorted(plan.trials)
    found = table.read(tmp_path / "out")
    mean = found[found["metric"] == "rmse/average"].groupby("key", observed=True)["value"].mean()
    one, three, none = (mean[key] for key in plan.trials)
    assert one == none < three
    assert table.read_plan(tmp_path / "out")["trials"][1]["columns"]["model.factor"] == 3.0


def test_more_trials_in_the_same_folder_run_alone(finished, tmp_path):
    folder, plan, _ = finished
    (tmp_path / "small").mkdir()
    for key in list(plan.trials)[:5]:
        (tmp_path / "small" / f"{key}.parquet").write_bytes((folder / f"{key}.parquet").read_bytes())
    before = small.stamps(tmp_path / "small")
    ran, _ = small.run(plan.sweep, tmp_path / "small", events=(events := small.Record()))
    assert (ran, events.began) == (1, list(plan.trials)[5:])
    assert before.items() <= small.stamps(tmp_path / "small").items()
    assert_frame_equal(small.stable(folder), small.stable(tmp_path / "small"), check_exact=True)


def test_a_streamed_sweep_leaves_the_table_of_a_mapped_one(finished, small_screen, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBRAY_DELIVERY", "streaming")
    monkeypatch.setenv("PERTURBRAY_STREAM_MB", "1")
    events = small.Record()
    ran, plan = small.run(small.sweep(small_screen), tmp_path / "streamed", events=events)
    assert ran == 3
    assert any(line.endswith("streaming, as asked for") for line in events.lines)
    # The same keys: how rows are delivered is no part of a trial's identity.
    mapped = small.stable(finished[0], keys=list(plan.trials))
    assert_frame_equal(small.stable(tmp_path / "streamed"), mapped, check_exact=True)
