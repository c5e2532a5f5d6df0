"""Laws of a sweep: grids have every combination once, and a change reaches the trials that it fits."""

from dataclasses import replace

import pytest

from perturbray.data.ablations import Imbalance, PublishedImbalance
from perturbray.data.dataset import DatasetSpec
from perturbray.errors import InputError
from perturbray.models.baselines import MeanShift, NoChange
from perturbray.models.latent_additive import LatentAdditive
from perturbray.sweep import SMOKE_EPOCHS, Sweep, grid
from perturbray.training.fit import Training
from perturbray.trial import Trial

DATASET = DatasetSpec(path="screen.h5ad")
LATENT, SHIFT = (Trial(dataset=DATASET, model=model, ablation=Imbalance()) for model in (LatentAdditive(), MeanShift()))
LEVELS = (0.0, 0.1, 0.3)


@pytest.fixture
def sweep() -> Sweep:
    return Sweep(name="imbalance", trials=grid([LATENT, SHIFT], {"ablation.level": LEVELS, "seed": range(3)}))


def test_a_grid_has_every_combination_once(sweep):
    assert len(sweep.trials) == len(set(sweep.trials)) == 2 * 3 * 3
    found = {(type(t.model), t.ablation.level, t.seed) for t in sweep.trials}
    assert found == {(m, level, seed) for m in (LatentAdditive, MeanShift) for level in LEVELS for seed in range(3)}
    assert len({t.key("content") for t in sweep.trials}) == 18


def test_a_grid_over_one_trial_and_over_nothing():
    assert grid(LATENT, {"seed": [4]}) == (replace(LATENT, seed=4),)
    assert grid([LATENT, SHIFT], {}) == (LATENT, SHIFT)


def test_a_grid_over_a_path_that_a_base_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"unknown path 'model\.width'"):
        grid([LATENT, SHIFT], {"model.width": [64]})


def test_an_override_changes_only_trials_that_have_the_path(sweep):
    changed = sweep.override({"model.width": "7"})
    assert len(changed.trials) == len(sweep.trials)
    for before, after in zip(sweep.trials, changed.trials, strict=True):
        if isinstance(before.model, MeanShift):
            assert after == before
        else:
            assert after == replace(before, model=replace(before.model, width=7))


def test_an_override_that_makes_trials_equal_keeps_one_of_each(sweep):
    changed = sweep.override({"seed": "5"})
    assert len(changed.trials) == 2 * 3
    assert {trial.seed for trial in changed.trials} == {5}


def test_a_path_that_no_trial_has_is_refused_with_the_nearest(sweep):
    for change in (lambda: sweep.override({"model.widht": 3}), lambda: sweep.grid({"model.widht": [3]})):
        with pytest.raises(InputError, match=r"unknown path 'model\.widht': did you mean 'model\.width'"):
            change()


def test_a_grid_over_a_sweep_multiplies_only_trials_that_have_the_path(sweep):
    wider = sweep.grid({"model.width": ["7", "9"], "training.lr": [0.1]})
    assert len(wider.trials) == 2 * 9 + 9
    assert {t.model.width for t in wider.trials if isinstance(t.model, LatentAdditive)} == {7, 9}
    assert {t.training.lr for t in wider.trials} == {0.1}


@pytest.mark.parametrize("levels", [LEVELS, LEVELS[::-1], (0.1, 0.3, 0.0)])
def test_a_smoke_run_is_one_seed_few_epochs_and_the_extreme_levels(levels):
    trials = grid([LATENT, SHIFT], {"ablation.level": levels, "seed": [3, 1, 2], "training.epochs": [60]})
    sweep = Sweep(name="imbalance", trials=trials, question="Why?")
    smoke = sweep.smoke()
    assert smoke.name == "imbalance-smoke"
    assert smoke.question == "Why?"
    assert {(type(t.model), t.ablation.level) for t in smoke.trials} == {
        (model, level) for model in (LatentAdditive, MeanShift) for level in (0.0, 0.3)
    }
    assert len(smoke.trials) == 4
    assert {(t.seed, t.training.epochs) for t in smoke.trials} == {(1, SMOKE_EPOCHS)}


def test_a_smoke_run_lengthens_nothing_and_works_without_levels():
    short = Training(epochs=1)
    trials = grid(Trial(dataset=DATASET, model=NoChange(), training=short), {"seed": range(2)})
    (trial,) = Sweep(name="x", trials=trials).smoke().trials
    assert trial.training == short
    published = [
        Trial(dataset=DATASET, model=NoChange(), ablation=PublishedImbalance(counts=c))
        for c in PublishedImbalance.LEVELS
    ]
    smoke = Sweep(name="x", trials=tuple(published)).smoke()
    assert [t.ablation.counts for t in smoke.trials] == [(188, 188, 188), (188, 30, 30)]


def test_a_sweep_without_trials_is_refused_by_name():
    with pytest.raises(InputError, match="sweep 'empty' has no trials"):
        Sweep(name="empty", trials=())


def test_trials_may_come_from_a_generator():
    sweep = Sweep(name="x", trials=(replace(LATENT, seed=seed) for seed in range(2)))
    assert [trial.seed for trial in sweep.trials] == [0, 1]
