"""Trials of models that read cells as rows of obsm: from a file to a prediction, by way of the store."""

import anndata as ad
import numpy as np
import pytest

import perturbray as pr
from perturbray.data import store
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
