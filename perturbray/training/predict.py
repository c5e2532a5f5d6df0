"""Prediction: a fitted model and a stream become a Prediction, from control cells of the evaluated subset alone."""

from dataclasses import replace

import numpy as np
import torch

from perturbray.data.batches import Batch, BatchStream
from perturbray.data.splits import SUBSETS, TEST
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError
from perturbray.models.base import Model
from perturbray.prediction import Prediction, Pseudobulk


@torch.no_grad()
def predict(
    model: Model, stream: BatchStream, vocabulary: Vocabulary, *, subset: int = TEST
) -> tuple[Prediction, np.ndarray, np.ndarray]:
    """Predict every condition of a subset; beside it the row numbers in ``Conditions`` of its rows, and of the conditions
    that are left out, since training never showed their perturbation.

    For each context one sample of its control cells of the subset serves all conditions, and is the control that a
    metric subtracts: an effect of exactly zero stays exactly zero.
    """
    model.eval()
    conditions = stream.conditions
    asked = np.flatnonzero((stream.split.condition == subset) & ~conditions.is_control)
    unseen = asked[~vocabulary.known[asked]]
    rows = asked[vocabulary.known[asked]]
    genes = len(conditions.genes)
    predicted, n_predicted = np.zeros((len(rows), genes)), np.zeros(len(rows), dtype=np.int64)
    control, n_control = np.zeros((len(conditions.contexts), genes)), np.zeros(len(conditions.contexts), dtype=np.int64)
    for context in range(len(conditions.contexts)):
        chosen = stream.controls(context, subset)
        if not len(chosen):
            if (conditions.context[rows] == context).any():
                name = conditions.context_name(context)
                raise InputError(f"context {name} has no control cells in {SUBSETS[subset]} to predict from")
            continue
        batch = stream.batch(chosen, None)
        batch = replace(batch, control=batch.expression, expression=None)
        control[context], n_control[context] = _mean(batch.control), len(chosen)
        for i in np.flatnonzero(conditions.context[rows] == context):
            cells = model.predict(_as_condition(batch, int(rows[i])))
            predicted[i] = np.maximum(_mean(cells), 0)  # a profile of log1p values cannot be negative
            n_predicted[i] = len(chosen)
    observed_cells = stream.split.cells(subset, conditions=conditions, controls=False)
    sums = stream.cells.group_sums(observed_cells, conditions.cell_condition[observed_cells], groups=len(conditions))
    count = np.bincount(conditions.cell_condition[observed_cells], minlength=len(conditions))
    prediction = Prediction(
        genes=conditions.genes,
        covariates=conditions.covariates,
        contexts=conditions.contexts,
        context=conditions.context[rows],
        perturbation=conditions.perturbation[rows],
        stratum=stream.split.stratum[rows],
        predicted=Pseudobulk(mean=predicted, cells=n_predicted),
        observed=Pseudobulk(mean=sums[rows] / count[rows, None], cells=count[rows]),
        control=Pseudobulk(mean=control, cells=n_control),
    )
    return prediction, rows, unseen


def _as_condition(batch: Batch, condition: int) -> Batch:
    return replace(batch, condition=torch.full_like(batch.condition, condition))


def _mean(cells: torch.Tensor) -> np.ndarray:
    """(genes,) float64 mean over cells. One function for both sides, so that equal cells have bitwise equal means."""
    return cells.double().mean(0).cpu().numpy()
