"""Prediction: a fitted model and a stream become what the model predicts for a truth, from its control cells alone.

Memory is bounded: control cells are taken in chunks, and predicted cells leave in parts of a few conditions.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from perturbray.data.batches import Batch, BatchStream
from perturbray.data.splits import TRAIN
from perturbray.data.truth import CELLS_SEED
from perturbray.models.base import Model
from perturbray.prediction import Here, LazyCells, Predicted, Pseudobulk, Slice, Truth
from perturbray.randomness import derive, generator

CHUNK = 512  # control cells from which a model predicts at once
PART_BYTES = 32 << 20  # of predicted cells that are kept together

Keep = Callable[[np.ndarray], Callable[[], np.ndarray]]


@torch.no_grad()
def predict(
    model: Model,
    stream: BatchStream,
    truth: Truth,
    *,
    sample: int = 0,
    keep: Keep = Here,
    training_mean: np.ndarray | None = None,
) -> Predicted:
    """Predict the conditions of a truth that the model knows how to predict; the others are left out.

    A context's control cells serve all its conditions, and are the control that a metric subtracts. A model predicts cell
    by cell, so the mean over half of the cells is its prediction from that half. ``sample``: predicted cells that are
    kept of each condition for metrics of distributions, never more than it has observed ones; 0 keeps none. They are
    handed to ``keep`` in parts of some conditions, which answers with a function that gives a part back.
    ``training_mean``: that of an earlier prediction from the same stream, which need not be read again.
    """
    model.eval()
    positions = np.flatnonzero(model.predictable[truth.rows])
    genes, contexts, linear = len(truth.genes), len(truth.contexts), truth.linear_halves is not None
    halvings = len(truth.control_halves)
    profiles, controls = (_Profiles(n, halvings, genes, linear=linear) for n in (len(positions), contexts))
    count = np.zeros(len(positions), dtype=np.int64)
    kept: list[Callable[[], np.ndarray]] = [Here(np.empty((0, genes), dtype=np.float32))] * len(positions)
    for context, rows in enumerate(truth.control_rows):
        here = np.flatnonzero(truth.context[positions] == context)
        count[here] = len(rows)
        for number, part in enumerate(_parts(here, size=sample * genes * 4)):
            asked = [_Asked(truth, int(positions[i]), stream, controls=len(rows), sample=sample) for i in part]
            for start, batch, weights in _chunks(stream, rows, truth.control_weights[context]):
                if number == 0:
                    controls.add(context, batch.control, weights)
                for i, one in zip(part, asked, strict=True):
                    cells = model.predict(one.batch(batch))
                    profiles.add(i, cells, weights)
                    one.take(cells, start)
            if sample:
                cells, stops = (
                    keep(np.concatenate([one.held for one in asked])),
                    np.cumsum([len(o.held) for o in asked]),
                )
                for i, one, stop in zip(part, asked, stops, strict=True):
                    kept[i] = Slice(cells, int(stop) - len(one.held), int(stop))
            del asked  # before the next part is made
    sizes = np.array([len(rows) for rows in truth.control_rows])
    return Predicted(
        rows=positions,
        mean=np.maximum(profiles.whole, 0),  # a profile of log1p values cannot be negative
        cells=count,
        control=Pseudobulk(mean=controls.whole, cells=sizes, linear=controls.linear_whole),
        halves=np.maximum(profiles.halves, 0, out=profiles.halves),
        control_halves=controls.halves,
        training_mean=_training_mean(stream) if training_mean is None else training_mean,
        linear=profiles.linear_whole,
        linear_halves=profiles.linear_halves,
        control_linear_halves=controls.linear_halves,
        sample=LazyCells(tuple(kept)) if sample else (),
    )


class _Profiles:
    """Means over cells, and over halves of them, in float64, as chunks of cells come in.

    One arithmetic for controls and predictions, and the same chunks, so that equal cells have bitwise equal means.
    """

    def __init__(self, conditions: int, halvings: int, genes: int, *, linear: bool) -> None:
        self.whole, self.halves = np.zeros((conditions, genes)), np.zeros((halvings, 2, conditions, genes))
        self.linear_whole = np.zeros_like(self.whole) if linear else None
        self.linear_halves = np.zeros_like(self.halves) if linear else None

    def add(self, row: int, cells: Tensor, weights: Tensor) -> None:
        """``weights``: (1 + 2 * halvings, cells), of the mean over all cells and of those over halves."""
        double = cells.double().cpu()
        self._add(self.whole, self.halves, row, weights @ double)
        if self.linear_whole is not None:
            self._add(self.linear_whole, self.linear_halves, row, weights @ torch.expm1(double.clamp(min=0)))

    @staticmethod
    def _add(whole: np.ndarray, halves: np.ndarray, row: int, means: Tensor) -> None:
        whole[row] += means[0].numpy()
        halves[:, :, row] += means[1:].numpy().reshape(-1, 2, whole.shape[1])


class _Asked:
    """One condition to predict, and the predicted cells that are kept of it: as many as it has observed ones."""

    def __init__(self, truth: Truth, position: int, stream: BatchStream, *, controls: int, sample: int) -> None:
        label = *truth.contexts[truth.context[position]], str(truth.perturbation[position])
        self.row = int(truth.rows[position])
        # A generator of its own, so that no other condition changes the cells that a sampling model draws.
        self.noise = torch.Generator(device=stream.device)
        self.noise.manual_seed(derive(stream.seed, "predict", *label))
        size = min(sample, int(truth.observed.cells[position]), controls)
        self.chosen = np.sort(generator(CELLS_SEED, "sample", *label).permutation(controls)[:size])
        self.held = np.empty((size, len(truth.genes)), dtype=np.float32)

    def batch(self, controls: Batch) -> Batch:
        return replace(controls, condition=torch.full_like(controls.condition, self.row), generator=self.noise)

    def take(self, cells: Tensor, start: int) -> None:
        """Keep the chosen ones among the cells from number ``start`` on."""
        inside = np.flatnonzero((self.chosen >= start) & (self.chosen < start + len(cells)))
        if len(inside):
            chosen = torch.from_numpy(self.chosen[inside] - start).to(cells.device)
            self.held[inside] = cells[chosen].clamp(min=0).float().cpu().numpy()


def _parts(conditions: np.ndarray, *, size: int) -> Iterator[np.ndarray]:
    """Conditions whose predicted cells go together: all where none are kept, else as many as fit in a part."""
    step = max(1, PART_BYTES // size if size else len(conditions))
    return (conditions[start : start + step] for start in range(0, len(conditions), step))


def _chunks(stream: BatchStream, rows: np.ndarray, weights: np.ndarray) -> Iterator[tuple[int, Batch, Tensor]]:
    """Control cells to predict from, a chunk at a time: number of the first, the cells, and the weights of their means."""
    weights = np.concatenate([np.full((1, len(rows)), 1 / len(rows)), weights])
    for start in range(0, len(rows), CHUNK):
        batch = stream.batch(rows[start : start + CHUNK], None)
        moved = {"control": batch.expression, "control_embedding": batch.embedding}
        batch = replace(batch, expression=None, embedding=None, cell=None, **moved)
        yield start, batch, torch.tensor(weights[:, start : start + CHUNK])


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
