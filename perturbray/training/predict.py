"""Prediction: a fitted model and a stream become what the model predicts for a truth, from its control cells alone."""

from dataclasses import replace

import numpy as np
import torch

from perturbray.data.batches import Batch, BatchStream
from perturbray.data.splits import TRAIN
from perturbray.data.vocabulary import Vocabulary
from perturbray.models.base import Model
from perturbray.prediction import Predicted, Pseudobulk, Truth
from perturbray.randomness import generator


@torch.no_grad()
def predict(model: Model, stream: BatchStream, vocabulary: Vocabulary, truth: Truth, *, sample: int = 0) -> Predicted:
    """Predict the conditions of a truth that the model knows how to predict; the others are left out.

    A context's control cells serve all its conditions, and are the control that a metric subtracts. A model predicts cell
    by cell, so the mean over half of the cells is its prediction from that half. ``sample``: predicted cells that are
    kept of each condition, for metrics of distributions; 0 keeps none.
    """
    model.eval()
    positions = np.flatnonzero(model.predictable[truth.rows])
    genes, contexts = len(truth.genes), len(truth.contexts)
    shape = truth.control_halves.shape[:2]
    mean, halves = np.zeros((len(positions), genes)), np.zeros((*shape, len(positions), genes))
    control, control_halves = np.zeros((contexts, genes)), np.zeros((*shape, contexts, genes))
    count = np.zeros(len(positions), dtype=np.int64)
    kept: list[np.ndarray] = [np.empty((0, genes), dtype=np.float32)] * len(positions)
    for context, rows in enumerate(truth.control_rows):
        here = np.flatnonzero(truth.context[positions] == context)
        if not len(here):
            continue
        weights = torch.tensor(truth.control_weights[context])  # a copy: arrays of the object store are read-only
        batch = stream.batch(rows, None)
        batch = replace(batch, control=batch.expression, expression=None)
        control[context], control_halves[:, :, context] = _means(batch.control, weights)
        for i in here:
            row = int(truth.rows[positions[i]])
            cells = model.predict(_as_condition(batch, row))
            whole, parts = _means(cells, weights)
            # A profile of log1p values cannot be negative.
            mean[i], halves[:, :, i] = np.maximum(whole, 0), np.maximum(parts, 0)
            count[i] = len(rows)
            if sample:
                rng = generator(stream.seed, "sample", *truth.contexts[context], str(truth.perturbation[positions[i]]))
                chosen = np.sort(rng.permutation(len(rows))[:sample])
                kept[i] = np.maximum(cells[chosen].cpu().numpy(), 0)
    sizes = np.array([len(rows) for rows in truth.control_rows])
    return Predicted(
        rows=positions,
        mean=mean,
        cells=count,
        control=Pseudobulk(mean=control, cells=sizes),
        halves=halves,
        control_halves=control_halves,
        training_mean=_training_mean(stream),
        sample=tuple(kept) if sample else (),
    )


def _as_condition(batch: Batch, condition: int) -> Batch:
    return replace(batch, condition=torch.full_like(batch.condition, condition))


def _means(cells: torch.Tensor, weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(genes,) mean over cells and (halvings, 2, genes) means over halves, in float64.

    One function for controls and predictions, so that equal cells have bitwise equal means.
    """
    double = cells.double().cpu()
    return double.mean(0).numpy(), (weights @ double).numpy().reshape(-1, 2, cells.shape[1])


def _training_mean(stream: BatchStream) -> np.ndarray:
    """(contexts, genes): the mean over a context's training perturbations, each with equal weight; over those of all
    contexts where a context has none."""
    conditions, rows = stream.conditions, stream.split.cells(TRAIN, conditions=stream.conditions, controls=False)
    code = conditions.cell_condition[rows]
    trained = np.unique(code)
    means = stream.cells.group_sums(rows, np.searchsorted(trained, code), groups=len(trained))
    means /= np.bincount(np.searchsorted(trained, code))[:, None]
    context = conditions.context[trained]
    centre = np.tile(means.mean(axis=0), (len(conditions.contexts), 1))
    for number in np.unique(context):
        centre[number] = means[context == number].mean(axis=0)
    return centre
