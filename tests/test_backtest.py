"""The ranking of pairs held against pairs that training never saw: are the truly non-additive ones at its top?"""

import json
from pathlib import Path

import numpy as np
import pytest
import screens
from scipy.stats import spearmanr
from test_counterfactual import fitted

from perturbray import synthetic
from perturbray.counterfactual.controls import Controls
from perturbray.counterfactual.ranking import enrichment, rank
from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import TEST, Combination
from perturbray.models.latent_additive import LatentAdditive
from perturbray.models.linear_plain import LinearPlain

# 24 perturbations in three pathways; all 276 pairs are measured, 40 % of them held out, half of these for the test.
SCREEN = {"contexts": 1, "perturbations": 300, "combinations": 276, "genes": 200, "cells": 30, "controls": 400}
BUFFERED = {"pathways": 3, "buffering": 0.7}


def ranked(spec, lab, dataset, *, seeds, epochs=60):
    """The ranking of all pairs, in the order of the test pairs."""
    fits = [fitted(spec, lab, dataset, seed=seed, epochs=epochs, batch_size=256) for seed in range(seeds)]
    table = rank(fits, Controls.read(dataset.path, fits[0], most=200)).set_index("condition")
    held = [lab.conditions.perturbation[row] for row in np.flatnonzero(lab.split.condition == TEST)]
    assert not table.loc[held, "trained"].any()
    return table.loc[held]


@pytest.mark.slow
def test_truly_non_additive_pairs_are_enriched_at_the_top_of_the_predicted_ranking(tmp_path):
    path = synthetic.write(tmp_path / "screen.h5ad", synthetic.Screen(**SCREEN, **BUFFERED))
    spec, truth = DatasetSpec(path=str(path)), synthetic.Truth.read(path)
    lab = screens.lab_of(spec, task=Combination(fraction=0.4))
    context = truth.contexts[0]
    table = ranked(LatentAdditive(), lab, spec, seeds=3)
    true = np.array([np.sqrt(np.mean(truth.non_additivity((context, label)) ** 2)) for label in table.index])
    assert len(true) >= 50
    found = {"latent_additive": enrichment(table["deviation"].to_numpy(), true)}
    found["its effect sizes alone"] = enrichment(table["effect"].to_numpy(), true)
    plain = ranked(LinearPlain(), lab, spec, seeds=1)
    found["linear_plain"] = enrichment(plain["deviation"].to_numpy(), true)
    print()
    for name, (value, low, high) in found.items():
        print(f"  {name}: enrichment at the top fifth {value:.2f} (95 % {low:.2f} to {high:.2f}; at most 5)")
    print(f"  Spearman of deviations: {spearmanr(table['deviation'], true)[0]:.2f}, {len(true)} pairs")
    value, low, _ = found["latent_additive"]
    assert low > 1
    assert value > 2.5
    # What is strong is not what is non-additive, and a model without interactions cannot know.
    assert found["its effect sizes alone"][1] < 1
    assert found["linear_plain"][1] < 1


@pytest.mark.slow
def test_the_ranking_of_the_doubles_of_k562_is_made_and_its_enrichment_told(shared_data, tmp_path):
    """Five doubles have their singles measured: far too few to show anything. What comes out is printed, and lies in the
    range of what can."""
    whole = DatasetSpec(path=str(shared_data / "perturbench_devel.h5ad"))
    path = _only(whole.path, tmp_path / "k562.h5ad")
    spec = DatasetSpec(path=str(path))
    predicted: dict[str, list[float]] = {}
    true: dict[str, float] = {}
    for seed in range(20):
        if len(true) == 5:
            break
        lab = screens.lab_of(spec, task=Combination(fraction=0.4, missing_single="to_train", seed=seed))
        if true.keys() >= {lab.conditions.perturbation[row] for row in np.flatnonzero(lab.split.condition == TEST)}:
            continue
        table = ranked(LatentAdditive(), lab, spec, seeds=2, epochs=20)
        for label, row in table.iterrows():
            predicted.setdefault(label, []).append(float(row["deviation"]))
            true[label] = _observed(lab, label)
    labels = sorted(true)
    assert len(labels) == 5
    scores = np.array([np.mean(predicted[label]) for label in labels])
    truth = np.array([true[label] for label in labels])
    value, low, high = enrichment(scores, truth, share=0.4)
    print(
        "\n"
        + json.dumps({label: (round(s, 4), round(t, 4)) for label, s, t in zip(labels, scores, truth, strict=True)})
    )
    print(f"  enrichment at the top two of {len(labels)}: {value:.2f} (95 % {low:.2f} to {high:.2f})")
    assert np.isfinite(scores).all()
    assert 0 <= low <= value <= high <= 2.5 + 1e-9


def _only(path: str, place: Path) -> Path:
    import anndata as ad

    cells = ad.read_h5ad(path)
    cells[cells.obs["cell_type"] == "k562"].copy().write_h5ad(place)
    return place


def _observed(lab, label: str) -> float:
    """Root mean square of what the observed effect has beyond the sum of its singles'."""
    conditions = lab.conditions

    def mean(row) -> np.ndarray:
        return lab.cells.dense(np.flatnonzero(conditions.cell_condition == row)).astype(float).mean(axis=0)

    control = mean(np.flatnonzero(conditions.is_control)[0])
    row_of = {name: row for row, name in enumerate(conditions.perturbation)}
    parts = sum(mean(row_of[single]) - control for single in label.split("+"))
    return float(np.sqrt(np.mean((mean(row_of[label]) - control - parts) ** 2)))
