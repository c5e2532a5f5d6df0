"""Trials of models that read cells as rows of obsm: from a file to a prediction, by way of the store and of a model's file."""

from itertools import combinations

import anndata as ad
import numpy as np
import pytest

import perturbray as pr
from perturbray.counterfactual.cells import effects
from perturbray.counterfactual.controls import Controls
from perturbray.data import store
from perturbray.process import keep as store_model
from perturbray.training.fitted import Fitted
from perturbray.trial import run


@pytest.fixture(scope="module")
def screen(small_screen, tmp_path_factory):
    """A log-normalised screen whose obsm holds the cells themselves, and the same rows in another order."""
    table = ad.read_h5ad(small_screen)
    counts = table.X.toarray()
    X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * np.median(counts.sum(axis=1))).astype(np.float32)
    table.X = X
    table.obsm = {"X_self": X, "X_other": np.random.default_rng(0).permutation(X)}
    path = tmp_path_factory.mktemp("embedded") / "screen.h5ad"
    table.write_h5ad(path)
    return pr.DatasetSpec(path=str(path))


def predicted(dataset, embedding):
    conditions = store.conditions(dataset)
    cells = store.ingest(dataset, conditions).cells()
    model = pr.LatentAdditive(width=16, latent_dim=4, dropout=0.0, embedding=embedding)
    trial = pr.Trial(dataset=dataset, model=model, training=pr.Training(epochs=2, batch_size=128))
    return run(trial, cells, conditions).predicted.mean


def test_a_trial_that_reads_the_cells_from_obsm_predicts_as_one_that_reads_the_cells(screen):
    np.testing.assert_array_equal(predicted(screen, "X_self"), predicted(screen, ""))


def test_a_trial_that_reads_rows_of_other_cells_does_not(screen):
    assert np.abs(predicted(screen, "X_other") - predicted(screen, "")).max() > 1e-3


def test_a_trial_without_the_matrix_that_it_needs_ends_before_training(screen):
    with pytest.raises(pr.InputError, match=r"no obsm matrix 'X_pca'"):
        predicted(screen, "X_pca")


def ranked(dataset, embedding, folder):
    """Effects of every pair of two perturbations, from the file of a model that a trial fitted."""
    conditions = store.conditions(dataset)
    found = store.ingest(dataset, conditions)
    model = pr.LatentAdditive(width=16, latent_dim=4, dropout=0.0, embedding=embedding)
    trial = pr.Trial(dataset=dataset, model=model, training=pr.Training(epochs=2, batch_size=128))
    path = folder / f"{embedding or 'genes'}.pt"
    store_model(run(trial, found.cells(), conditions), trial, conditions, None, path)
    fitted = Fitted.load(str(path))
    controls = Controls.read(dataset.path, fitted, most=20)
    singles = sorted({single for pair in conditions.singles for single in pair})[:4]
    asked = [(context, pair) for context in range(len(controls.contexts)) for pair in combinations(singles, 2)]
    return np.stack(list(effects(fitted, controls, asked)))


def test_a_model_of_obsm_predicts_new_pairs_from_the_controls_own_rows(screen, tmp_path):
    np.testing.assert_array_equal(ranked(screen, "X_self", tmp_path), ranked(screen, "", tmp_path))
    assert np.abs(ranked(screen, "X_other", tmp_path) - ranked(screen, "", tmp_path)).max() > 1e-3
