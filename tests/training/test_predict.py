"""Prediction in bounded memory: chunks and parts change nothing, and a sampling model's cells are its condition's own."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import screens
import torch

from perturbray.data.truth import observe
from perturbray.models.base import Model
from perturbray.training import predict as module
from perturbray.training.predict import predict

CELLS, CONTROLS, GENES = 6, 30, 20


class Shifting(Model):
    """Control cells moved by a number of the condition; values below 0 occur."""

    def predict(self, batch):
        assert batch.expression is None
        return batch.control + (batch.condition[:, None].float() - 12) / 8


class Sampling(Model):
    """Noise around the control cells, drawn from the batch's generator."""

    def predict(self, batch):
        noise = torch.randn(batch.control.shape, generator=batch.generator)
        return batch.control + noise


@pytest.fixture(scope="module")
def lab():
    return screens.noise_free(contexts=3, perturbations=8, genes=GENES, cells=CELLS, controls=CONTROLS)[0]


def truth_of(lab, **options):
    return observe(lab.cells, lab.conditions, lab.split, **{"sample": 4, "linear": True, **options})


def predicted(lab, kind=Shifting, *, truth=None, sample=4, **options):
    model = kind(lab.vocabulary)
    return predict(model, lab.stream(), truth or truth_of(lab), sample=sample, **options)


def test_means_are_those_of_all_predicted_cells(lab):
    truth, found = truth_of(lab), predicted(lab)
    for row, context, mean, linear in zip(
        truth.rows[found.rows], truth.context[found.rows], found.mean, found.linear, strict=True
    ):
        cells = lab.cells.dense(truth.control_rows[context]).astype(float) + (row - 12) / 8
        np.testing.assert_allclose(mean, np.maximum(cells.mean(axis=0), 0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(linear, np.expm1(np.maximum(cells, 0)).mean(axis=0), rtol=1e-5, atol=1e-6)


def test_chunks_of_control_cells_change_nothing_but_rounding(lab, monkeypatch):
    whole = predicted(lab)
    monkeypatch.setattr(module, "CHUNK", 7)
    chunked = predicted(lab)
    for name in ("mean", "linear", "halves", "linear_halves", "control_halves", "control_linear_halves"):
        np.testing.assert_allclose(getattr(chunked, name), getattr(whole, name), rtol=1e-12, atol=1e-14)
    for one, other in zip(whole.sample, chunked.sample, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("chunk", [7, 512])
def test_equal_cells_have_bitwise_equal_means(lab, monkeypatch, chunk):
    class Still(Model):
        def predict(self, batch):
            return batch.control.clone()

    monkeypatch.setattr(module, "CHUNK", chunk)
    truth = truth_of(lab)
    found = predicted(lab, Still, truth=truth)
    context = truth.context[found.rows]
    np.testing.assert_array_equal(found.mean, found.control.mean[context])
    np.testing.assert_array_equal(found.halves, found.control_halves[:, :, context])
    np.testing.assert_array_equal(found.linear, found.control.linear[context])
    np.testing.assert_array_equal(found.linear_halves, found.control_linear_halves[:, :, context])


def test_no_more_cells_are_kept_than_were_observed(lab):
    truth = truth_of(lab, sample=400)
    found = predicted(lab, truth=truth, sample=400)
    assert (
        [len(cells) for cells in found.sample] == truth.observed.cells[found.rows].tolist() == [CELLS] * len(found.rows)
    )
    assert len(predicted(lab, sample=0).sample) == 0


def test_kept_cells_are_predicted_ones_and_never_negative(lab):
    truth, found = truth_of(lab), predicted(lab)
    for row, context, cells in zip(truth.rows[found.rows], truth.context[found.rows], found.sample, strict=True):
        every = np.maximum(lab.cells.dense(truth.control_rows[context]) + np.float32((row - 12) / 8), 0)
        assert (np.abs(cells[:, None] - every[None]).max(axis=2).min(axis=1) < 1e-6).all()


def test_the_trial_holds_one_part_of_the_predicted_cells_at_a_time(lab, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 2 * 4 * GENES * 4)  # two conditions of four cells
    given, alive = [], []

    def keep(cells):
        gc.collect()
        alive.append(sum(reference() is not None for reference in given))
        given.append(weakref.ref(cells))
        copy = cells.tolist()
        return lambda: np.array(copy, dtype=np.float32)

    found = predicted(lab, keep=keep)
    assert len(given) == 3
    assert max(alive) == 0, "a part that was handed over is still in memory"
    for here, there in zip(predicted(lab).sample, found.sample, strict=True):
        np.testing.assert_array_equal(here, there)


def test_the_draws_of_a_sampling_model_do_not_depend_on_other_conditions(lab, monkeypatch):
    truth = truth_of(lab)
    whole = predicted(lab, Sampling, truth=truth)
    again = predicted(lab, Sampling, truth=truth)
    np.testing.assert_array_equal(whole.mean, again.mean)
    assert (whole.mean[0] != whole.mean[1]).any()
    monkeypatch.setattr(module, "PART_BYTES", 1)  # a part a condition
    parted = predicted(lab, Sampling, truth=truth)
    np.testing.assert_array_equal(whole.mean, parted.mean)
    for one, other in zip(whole.sample, parted.sample, strict=True):
        np.testing.assert_array_equal(one, other)
    kept = np.arange(len(truth)) % 2 == 1
    names = ("rows", "context", "perturbation")
    fewer = replace(truth, observed=truth.observed.rows(kept), **{name: getattr(truth, name)[kept] for name in names})
    alone = predicted(lab, Sampling, truth=fewer)
    np.testing.assert_array_equal(alone.mean, whole.mean[np.isin(truth.rows[whole.rows], fewer.rows)])
