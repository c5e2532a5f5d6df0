"""The sweeps of imbalance and of scaling vary one thing: laws of what they plan, and what a run of each leaves."""

import runpy
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import entropy
from small import METRICS

import perturbray as pr
from perturbray import synthetic
from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import TEST, TRAIN, VAL
from perturbray.data.truth import digest
from perturbray.engine import run_sweep
from perturbray.plan import Plan, task_of
from perturbray.results import table
from perturbray.results.report import write_report
from perturbray.results.summary import summarise
from perturbray.tuning import tune

SWEEPS = Path(__file__).parents[2] / "sweeps"
MODEL = pr.LatentAdditive(width=8, latent_dim=4)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> DatasetSpec:
    """3 contexts x 24 perturbations: what four levels of imbalance take."""
    screen = synthetic.Screen.small(perturbations=24, combinations=0, cells=10, controls=60)
    return DatasetSpec(path=str(synthetic.write(tmp_path_factory.mktemp("experiments") / "screen.h5ad", screen)))


def made(name: str, spec: DatasetSpec, **options) -> pr.Sweep:
    sweep = runpy.run_path(str(SWEEPS / f"{name}.py"))[name](spec, [MODEL], **options)
    return replace(sweep, metrics=METRICS)


def by_seed(sweep: pr.Sweep, spec: DatasetSpec, folder: Path) -> tuple[pr.Conditions, dict]:
    """The screen, and the splits of each seed by rising level."""
    plan = Plan.of(sweep, folder)
    found: dict[int, dict] = {}
    for trial in sorted(sweep.trials, key=lambda t: t.ablation.level):
        found.setdefault(trial.seed, {})[trial.ablation.level] = plan.splits[task_of(trial)]
    return plan.conditions[spec], found


def shared_out(conditions: pr.Conditions, split: pr.Split) -> np.ndarray:
    train = (split.condition == TRAIN) & ~conditions.is_control
    return np.bincount(conditions.context[train], minlength=len(conditions.contexts))


def test_replicates_of_the_imbalance_sweep_differ_in_imbalance_alone_and_take_turns(spec, tmp_path):
    conditions, found = by_seed(made("imbalance", spec), spec, tmp_path)
    totals, largest = set(), Counter()
    assert len(found) == 3
    for levels in found.values():
        assert list(levels) == [0.0, 0.1, 0.2, 0.3]
        counts = {level: shared_out(conditions, split) for level, split in levels.items()}
        totals |= {int(row.sum()) for row in counts.values()}
        measured = [1 - entropy(row, base=len(row)) for row in counts.values()]
        assert (np.diff(measured) > 0).all()
        np.testing.assert_allclose(measured, list(levels), atol=pr.Imbalance().tolerance)
        largest[int(counts[0.3].argmax())] += 1
        for subset in (VAL, TEST):
            assert len({digest(conditions, split, subset=subset) for split in levels.values()}) == 1
    assert len(totals) == 1
    assert largest == {0: 1, 1: 1, 2: 1}


def test_the_first_form_loses_training_conditions_and_keeps_its_largest_context(spec, tmp_path):
    conditions, found = by_seed(made("imbalance", spec, free_total=True), spec, tmp_path)
    for levels in found.values():
        counts = [shared_out(conditions, split) for split in levels.values()]
        assert all(a.sum() > b.sum() and (a >= b).all() for a, b in pairwise(counts))
    assert len({int(shared_out(conditions, levels[0.3]).argmax()) for levels in found.values()}) == 1


def test_balanced_sampling_stands_beside_each_model_that_trains_in_epochs(spec):
    plain, both = (made("imbalance", spec, balanced=balanced) for balanced in (False, True))
    added = both.trials[len(plain.trials) :]
    assert both.trials[: len(plain.trials)] == plain.trials
    assert {type(t.model) for t in added} == {pr.LatentAdditive}
    assert all(t.training.balance and t.variant == "balanced" for t in added)
    assert [replace(t, training=replace(t.training, balance=False), variant="") for t in added] == [
        t for t in plain.trials if t.model == MODEL
    ]


def test_a_search_at_every_level_starts_from_the_trials_of_that_level(spec):
    plain, sweep = (made("imbalance", spec, retune=retune, samples=7) for retune in (False, True))
    assert not plain.searches
    assert sweep.trials == plain.trials
    assert [search.base for search in sweep.searches] == [t for t in plain.trials if t.model == MODEL and t.seed == 0]
    assert {(search.samples, search.seeds) for search in sweep.searches} == {(7, 3)}
    assert [search.shown for search in sweep.searches] == [
        f"latent_additive at imbalance {level}" for level in (0.0, 0.1, 0.2, 0.3)
    ]
    assert len({search.identity("content") for search in sweep.searches}) == 4
    assert [search.base.ablation.level for search in sweep.smoke().searches] == [0.0, 0.3]


@pytest.mark.slow
def test_what_is_searched_for_anew_at_each_level_is_one_line_of_the_figure(spec, tmp_path, ray_session):
    sweep = made("imbalance", spec, retune=True).smoke().override({"training.epochs": 2})
    sweep = replace(sweep, searches=tuple(replace(search, samples=3) for search in sweep.searches))
    found = tune(sweep, tmp_path)
    tuned = [t for t in found.trials if t.variant == "tuned"]
    assert [t.ablation.level for t in tuned] == [0.0, 0.3]
    kept = sorted(path.name for path in tmp_path.glob("tuned-*.json"))
    assert kept == [f"tuned-latent_additive-at-imbalance-{level}.json" for level in (0.0, 0.3)]
    run_sweep(Plan.of(found, tmp_path))
    page = write_report(tmp_path, png=False).read_text()
    assert all(f"latent_additive at imbalance {level}: tpe, 3 trials" in page for level in (0.0, 0.3))
    summary = summarise(table.read(tmp_path), table.read_plan(tmp_path), resamples=50)
    assert set(summary.series) <= {*sweep.baselines, "latent_additive", "latent_additive (tuned)"}


@pytest.mark.parametrize(("axis", "levels"), [("contexts", "2,3"), ("perturbations", "0.5,0.75,1"), ("cells", "")])
def test_levels_of_the_scaling_sweep_are_parts_of_each_other_and_judged_alike(spec, tmp_path, axis, levels):
    sweep = made("scaling", spec, axis=axis, levels=levels)
    assert (sweep.name, sweep.x) == (f"scaling-{axis}", "train_cells" if axis == "cells" else "train_conditions")
    conditions, found = by_seed(sweep, spec, tmp_path)
    assert len(found) == 3
    for splits in found.values():
        for small, large in pairwise(splits.values()):
            assert set(np.flatnonzero(small.cell == TRAIN)) < set(np.flatnonzero(large.cell == TRAIN))
        for subset in (VAL, TEST):
            assert len({digest(conditions, split, subset=subset) for split in splits.values()}) == 1


def ran(sweep: pr.Sweep, folder: Path):
    """The summary of a sweep of one epoch and one seed, its table and its page."""
    sweep = sweep.smoke().override({"training.epochs": 1})
    run_sweep(Plan.of(sweep, folder))
    rows = table.read(folder)
    return summarise(rows, table.read_plan(folder), resamples=50), rows, write_report(folder, png=False).read_text()


def test_a_run_of_imbalance_tells_the_remedy_apart_on_its_page(spec, tmp_path, ray_session):
    summary, rows, page = ran(made("imbalance", spec, balanced=True), tmp_path)
    assert summary.series == [
        "no_change",
        "perturbed_mean",
        "mean_shift",
        "latent_additive",
        "latent_additive (balanced)",
    ]
    assert "latent_additive (balanced)" in page
    assert rows["train_conditions"].nunique() == rows["test_conditions"].nunique() == 1
    assert list(summary.levels["level"]) == [0.0, 0.3]
    values = summary.means.set_index(["metric", "level", "series"])["mean"]["rmse/average"][0.3]
    assert values["latent_additive"] != values["latent_additive (balanced)"]
    assert not summary.changes["change"].isna().any(), "every series is at both levels"


def test_a_run_of_scaling_has_the_amount_of_data_as_its_axis(spec, tmp_path, ray_session):
    summary, rows, page = ran(made("scaling", spec, levels="2,3"), tmp_path)
    sizes = rows.groupby("ablation.level")[["train_conditions", "train_cells", "test_conditions"]].agg(["min", "max"])
    assert (sizes.xs("min", axis=1, level=1) == sizes.xs("max", axis=1, level=1)).all(axis=None)
    small, large = (sizes.xs("min", axis=1, level=1).loc[level] for level in (2, 3))
    assert small["train_conditions"] < large["train_conditions"]
    assert small["train_cells"] < large["train_cells"]
    assert small["test_conditions"] == large["test_conditions"]
    assert list(summary.levels["x"]) == [small["train_conditions"], large["train_conditions"]]
    assert "Score against training conditions" in page
    assert rows[rows["metric"] == "rmse/average"]["value"].notna().all()


def test_a_variant_is_told_apart_by_fields_within_a_level_and_not_by_those_that_a_level_brings():
    def rows(level: float, width: int, variant: str, key: str) -> pd.DataFrame:
        fields = {"key": key, "name": key, "model": "net", "variant": variant or None, "model.width": width, "seed": 0}
        place = {
            "covariate.cell_type": "a",
            "perturbation": list("pqrs"),
            "stratum": "common",
            "metric": "rmse/average",
        }
        return pd.DataFrame({**place, **fields, "ablation.level": level, "value": np.arange(4.0), "status": ""})

    tuned = [rows(0.0, 64, "tuned", "a"), rows(0.3, 128, "tuned", "b")]
    assert summarise(pd.concat(tuned), {}, resamples=10).series == ["net (tuned)"]
    both = [*tuned, rows(0.3, 256, "tuned", "c")]
    assert len(summarise(pd.concat(both), {}, resamples=10).series) == 3
    plain = [rows(0.0, 64, "", "a"), rows(0.3, 128, "", "b")]
    assert summarise(pd.concat(plain), {}, resamples=10).series == ["net (width 128)", "net (width 64)"]
