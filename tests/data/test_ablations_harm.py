"""What imbalance does to predictions, on screens where that is known: with contexts that differ, and with contexts alike."""

import numpy as np
import pytest
import screens

import perturbray as pr
from perturbray import synthetic
from perturbray.data.ablations.imbalance import replicates
from perturbray.trial import run


@pytest.fixture(scope="module")
def labs(tmp_path_factory) -> dict[str, tuple[pr.DatasetSpec, screens.Lab]]:
    """Two screens of the same perturbations, whose effects are the same in every context."""
    found = {}
    for name, spread in (("alike", 0.0), ("different", 0.8)):
        screen = synthetic.Screen.small(
            perturbations=60, combinations=0, cells=8, controls=40, specific=0.0, context_spread=spread
        )
        path = synthetic.write(tmp_path_factory.mktemp("harm") / f"{name}.h5ad", screen)
        spec = pr.DatasetSpec(path=str(path))
        found[name] = spec, screens.lab_of(spec)
    return found


def loss(lab: tuple[pr.DatasetSpec, screens.Lab], model: pr.ModelSpec, *, fixed: bool) -> float:
    """By what share the mean RMSE over test conditions rises from imbalance 0 to 0.3, over replicates."""
    spec, lab = lab
    found = []
    for seed in replicates(3):
        means = []
        for level in (0.0, 0.3):
            ablation = pr.Imbalance(level=level, fixed=fixed, rotate=True)
            trial = pr.Trial(dataset=spec, model=model, ablation=ablation, seed=seed)
            sides = run(trial, lab.cells, lab.conditions).prediction
            means.append(np.sqrt(np.square(sides.predicted.mean - sides.observed.mean).mean(axis=1)).mean())
        found.append(means[1] / means[0] - 1)
    return float(np.mean(found))


def test_one_mean_for_all_contexts_loses_by_imbalance_where_contexts_differ_and_not_where_they_are_alike(labs):
    """It leans to the largest context, and has as many conditions behind it at every level."""
    different, alike = (loss(labs[name], pr.PerturbedMeanGlobal(), fixed=True) for name in ("different", "alike"))
    assert different > 0.03
    assert abs(alike) < 0.015


def test_only_a_fixed_total_tells_imbalance_from_a_loss_of_data(labs):
    """Where contexts are alike it does not matter from which of them a shift is taken, but from how many conditions."""
    assert loss(labs["alike"], pr.MeanShift(), fixed=False) > 0.08
    assert loss(labs["alike"], pr.MeanShift(), fixed=True) < 0.02
