"""Batches: cells of a subset, each paired with a control of its context, as dense tensors on the model's device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbray.data.dataset import Conditions
from perturbray.data.splits import SUBSETS, TRAIN, Split
from perturbray.errors import InputError
from perturbray.randomness import generator

Mode = Literal["paired", "perturbed", "all"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Cells as tensors. Codes count as in ``Conditions``; a model looks up one-hots in tables of its own."""

    expression: Tensor | None  # (cells, genes) float32, log1p; None when predicting
    control: Tensor | None  # (cells, genes) a control cell of the same context; None for models that want none
    condition: Tensor  # (cells,) int64
    context: Tensor  # (cells,) int64
    cell: Tensor | None = None  # (cells,) int64, row numbers of the cells in the dataset; None when predicting
    embedding: Tensor | None = (
        None  # (cells, width) float32, rows of an obsm matrix of the cells themselves, where asked
    )
    control_embedding: Tensor | None = None  # (cells, width) float32, rows of the same matrix of the control cells
    generator: torch.Generator | None = None  # what a model that samples draws from; None: it predicts its mean

    def __len__(self) -> int:
        return len(self.condition)


class Cells:
    """The rows of a screen in blocks of CSR rows, gathered and densified by row number."""

    def __init__(self, blocks: list[sparse.csr_matrix]) -> None:
        self.blocks = blocks
        self.starts = np.cumsum([0] + [block.shape[0] for block in blocks])
        self.genes = blocks[0].shape[1]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), genes) float32, in the order of ``rows``."""
        if len(self.blocks) == 1:
            return self.blocks[0][rows].toarray()
        out = np.empty((len(rows), self.genes), dtype=np.float32)
        block = np.searchsorted(self.starts, rows, side="right") - 1
        for b in np.unique(block):
            here = np.flatnonzero(block == b)
            out[here] = self.blocks[b][rows[here] - self.starts[b]].toarray()
        return out

    def select(self, rows: np.ndarray) -> sparse.csr_matrix:
        """(len(rows), genes) CSR float32, in the order of ``rows``."""
        if len(self.blocks) == 1:
            return self.blocks[0][rows]
        block = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(block, kind="stable")
        parts = [self.blocks[b][rows[order[block[order] == b]] - self.starts[b]] for b in np.unique(block)]
        stacked = sparse.vstack(parts, format="csr") if parts else self.blocks[0][:0]
        return stacked[np.argsort(order, kind="stable")]

    def group_sums(self, rows: np.ndarray, code: np.ndarray, *, groups: int, power: int = 1) -> np.ndarray:
        """(groups, genes) float64 sums over rows by code, of the values or of a power of them, without densifying."""
        sums = np.zeros((groups, self.genes))
        block = np.searchsorted(self.starts, rows, side="right") - 1
        for b in np.unique(block):
            here = np.flatnonzero(block == b)
            chosen = self.blocks[b][rows[here] - self.starts[b]].astype(np.float64)
            if power != 1:
                chosen.data **= power
            member = sparse.csr_matrix(
                (np.ones(len(here)), (code[here], np.arange(len(here)))), shape=(groups, len(here))
            )
            sums += (member @ chosen).toarray()
        return sums


class BatchStream:
    """The cells of one trial: a split over the blocks, drawn with its seed. Reused by training, validation, prediction.

    An epoch visits every selected cell once, in an order that depends on the seed and the epoch alone. ``mode`` says
    which: ``paired``, the perturbed cells, each with one control cell of the same context and the same subset;
    ``perturbed``, the same cells alone; ``all``, controls as well.
    """

    def __init__(
        self,
        cells: Cells,
        conditions: Conditions,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        mode: Mode,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cells, self.conditions, self.split = cells, conditions, split
        self.batch_size, self.seed, self.mode, self.device = batch_size, seed, mode, torch.device(device)
        self._context_of_cell = conditions.context[conditions.cell_condition]

    def rows(self, subset: int) -> np.ndarray:
        """Row numbers of the cells that an epoch over a subset visits, ascending."""
        perturbed = self.split.cells(subset, conditions=self.conditions, controls=False)
        if self.mode != "all":
            return perturbed
        return np.union1d(perturbed, self.split.cells(subset, conditions=self.conditions, controls=True))

    def epoch(
        self, subset: int = TRAIN, *, number: int = 0, shuffle: bool = True, fixed: bool = False
    ) -> Iterator[Batch]:
        """Batches of a subset. ``fixed`` pairs every cell with the same control in every epoch (validation)."""
        rows = self.rows(subset)
        if shuffle:
            rows = generator(self.seed, "order", SUBSETS[subset], number).permutation(rows)
        controls = self._partners(rows, subset, 0 if fixed else number) if self.mode == "paired" else None
        for start in range(0, len(rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.batch(rows[part], None if controls is None else controls[part])

    def batch(self, rows: np.ndarray, controls: np.ndarray | None) -> Batch:
        """The batch of given cells, and of the control cells that they are paired with."""
        condition = self.conditions.cell_condition[rows].astype(np.int64)
        return Batch(
            expression=self._tensor(self.cells.dense(rows)),
            control=None if controls is None else self._tensor(self.cells.dense(controls)),
            condition=self._tensor(condition),
            context=self._tensor(self.conditions.context[condition]),
            cell=self._tensor(rows.astype(np.int64)),
        )

    def _partners(self, rows: np.ndarray, subset: int, number: int) -> np.ndarray:
        """One control of each cell's context and subset, uniformly with replacement: one draw for the epoch."""
        controls = self.split.cells(subset, conditions=self.conditions, controls=True)
        controls = controls[np.argsort(self._context_of_cell[controls], kind="stable")]
        contexts = len(self.conditions.contexts)
        size = np.bincount(self._context_of_cell[controls], minlength=contexts)
        first = np.concatenate([[0], np.cumsum(size)[:-1]])
        # Drawn by cell in file order and then shuffled along, so that the pairing does not depend on batches.
        draw = generator(self.seed, "controls", SUBSETS[subset], number).random(len(rows))
        order = np.argsort(np.argsort(rows, kind="stable"), kind="stable")
        context = self._context_of_cell[rows]
        bare = np.flatnonzero(size[context] == 0)
        if len(bare):  # the arithmetic below would take a control of another context
            name = self.conditions.context_name(context[bare[0]])
            raise InputError(f"context {name} has no control cells in {SUBSETS[subset]} to pair its cells with")
        return controls[first[context] + (draw[order] * size[context]).astype(np.int64)]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
