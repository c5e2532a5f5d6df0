"""Batches: cells of a subset, each paired with a control of its context, as dense tensors on the model's device."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbray.data import gather, sampling
from perturbray.data.dataset import Conditions
from perturbray.data.device import Densifier
from perturbray.data.rows import Rows
from perturbray.data.sampling import Mode, Plan, Pools, Sampling, Unit
from perturbray.data.splits import SUBSETS, TRAIN, Split
from perturbray.errors import InputError, nearest
from perturbray.randomness import generator

__all__ = ["Batch", "BatchStream", "Cells", "Mode", "Sampling", "Unit"]
COMPILED = 1_000_000  # stored values from which on compiled loops are worth the 0.4 s of loading them


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Cells as tensors. Codes count as in ``Conditions``; a model looks up one-hots in tables of its own.

    Its tensors are not written again as long as anybody holds them, so that batches may be kept in a list.
    """

    expression: Tensor | None  # (cells, genes) float32, log1p; None when predicting
    control: Tensor | None  # (cells, genes) a control cell of the same context; None for models that want none
    condition: Tensor  # (cells,) int64
    context: Tensor  # (cells,) int64
    cell: Tensor | None = None  # (cells,) int64, row numbers of the cells in the dataset; None when predicting
    embedding: Tensor | None = None  # (cells, width) float32, rows of an obsm matrix of the cells, where asked
    control_embedding: Tensor | None = None  # (cells, width) float32, rows of the same matrix of the control cells
    generator: torch.Generator | None = None  # what a model that samples draws from; None: it predicts its mean

    def __len__(self) -> int:
        return len(self.condition)


class Cells:
    """The rows of a screen in blocks of CSR rows, gathered and densified by row number.

    ``embeddings`` are obsm matrices by name, (cells, width) each. Indices are checked against the number of genes, since
    nothing below checks them again, unless ``checked`` says that this is done: a store does it once, when it is made.
    """

    def __init__(
        self,
        blocks: Sequence[Rows | sparse.csr_matrix],
        embeddings: Mapping[str, np.ndarray] | None = None,
        *,
        checked: bool = False,
        compiled: bool | None = None,
    ) -> None:
        self.blocks = [block if isinstance(block, Rows) else Rows.of(block) for block in blocks]
        self.starts = np.cumsum([0] + [len(block) for block in self.blocks])
        self.genes = self.blocks[0].genes
        self.embeddings = dict(embeddings or {})
        stored = sum(len(block.values) for block in self.blocks)
        self.compiled = stored >= COMPILED if compiled is None else compiled
        if not checked:
            self._check()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def dense(self, rows: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
        """(len(rows), genes) float32, in the order of ``rows``; ``out`` is written and returned, where given."""
        rows = self._numbers(rows)
        out = np.empty((len(rows), self.genes), dtype=np.float32) if out is None else out
        gather.densify(self.blocks, self.starts, rows, out, compiled=self.compiled)
        return out

    def collect(self, rows: np.ndarray, *, allocate: Callable = np.empty) -> Rows:
        """A copy of rows as CSR, in their order, in memory that ``allocate(size, dtype)`` gives."""
        rows = self._numbers(rows)
        return gather.collect(self.blocks, self.starts, rows, compiled=self.compiled, allocate=allocate)

    def select(self, rows: np.ndarray) -> sparse.csr_matrix:
        """(len(rows), genes) CSR float32, in the order of ``rows``."""
        return self.collect(rows).csr()

    def group_sums(self, rows: np.ndarray, code: np.ndarray, *, groups: int, power: int = 1) -> np.ndarray:
        """(groups, genes) float64 sums over rows by code, of the values or of a power of them, without densifying."""
        sums, rows = np.zeros((groups, self.genes)), self._numbers(rows)
        gather.add(self.blocks, self.starts, rows, np.asarray(code), sums, power=power, compiled=self.compiled)
        return sums

    def embedding_width(self, name: str) -> int:
        """Columns of an obsm matrix; 0 for no name. Raises InputError where there is none of that name."""
        return self.embedding(name, np.empty(0, dtype=np.int64)).shape[1] if name else 0

    def embedding(self, name: str, rows: np.ndarray) -> np.ndarray:
        """(len(rows), width) float32 rows of an obsm matrix. Raises InputError for one that is not there."""
        if name not in self.embeddings:
            raise InputError(f"no obsm matrix {name!r}: {nearest(name, self.embeddings)}")
        return np.asarray(self.embeddings[name][rows], dtype=np.float32)

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"row {rows[(rows < 0) | (rows >= len(self))][0]} of {len(self)}")
        return rows

    def _check(self) -> None:
        for number, block in enumerate(self.blocks):
            stored = min(len(block.indices), len(block.values))
            if block.genes != self.genes:
                raise InputError(f"block {number} has {block.genes} genes, and the first has {self.genes}")
            if block.indptr[0] != 0 or (np.diff(block.indptr) < 0).any() or block.indptr[-1] > stored:
                raise InputError(f"block {number}: row ends must ascend from 0 to at most {stored}, its stored values")
            if len(block.indices) and not 0 <= block.indices.min() <= block.indices.max() < self.genes:
                wrong = block.indices[(block.indices < 0) | (block.indices >= self.genes)][0]
                raise InputError(f"block {number} names gene number {wrong}, but there are {self.genes}")
        for name, matrix in self.embeddings.items():
            if matrix.ndim != 2 or len(matrix) != len(self):
                raise InputError(f"obsm matrix {name!r} is {matrix.shape}, and there are {len(self)} cells")


class BatchStream:
    """The cells of one trial: a split over the blocks, drawn with its seed. Reused by training, validation, prediction.

    An epoch visits every selected cell once, in an order that depends on the seed and the epoch alone. ``mode`` says
    which: ``paired``, the perturbed cells, each with one control cell of the same context and the same subset;
    ``perturbed``, the same cells alone; ``all``, controls as well. ``sampling`` says how they are drawn and what a batch
    is made of; ``embedding`` names an obsm matrix whose rows travel beside the expression. With ``windows`` the rows of an
    epoch come through Ray's object store, read by other processes, instead of from ``cells``; the batches are the same.
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
        sampling: Sampling | None = None,
        embedding: str | None = None,
        windows: "Windows | None" = None,  # noqa: F821  # imports ray
    ) -> None:
        self.cells, self.conditions, self.split = cells, conditions, split
        self.batch_size, self.seed, self.mode, self.device = batch_size, seed, mode, torch.device(device)
        self.sampling, self.embedding, self.windows = sampling or Sampling(), embedding or None, windows
        if embedding:
            cells.embedding(embedding, np.empty(0, dtype=np.int64))  # raises before anything is trained
        if self.sampling.set_size > batch_size:
            raise InputError(
                f"a set of {self.sampling.set_size} cells is larger than a batch of {batch_size}: raise the batch size"
            )
        self._context_of_cell = conditions.context[conditions.cell_condition]
        self._densifier = Densifier(self.device)
        self._pools: dict[int, Pools] = {}
        self._held: dict[int, tuple[Cells, np.ndarray]] = {}
        self._means: dict[int, dict[str, Tensor]] = {}

    def rows(self, subset: int) -> np.ndarray:
        """Row numbers of the cells that an epoch over a subset visits, ascending."""
        if self.mode == "all":
            return np.flatnonzero(self.split.cell == subset)
        return self.split.cells(subset, conditions=self.conditions, controls=False)

    def plan(self, subset: int = TRAIN, *, number: int = 0, shuffle: bool = True, fixed: bool = False) -> Plan:
        """The order, pairs and batches of an epoch, before anything is read.

        Without ``shuffle`` cells come in the order of the file, or by condition, and contexts are not balanced. ``fixed``
        pairs every cell with the same control in every epoch (validation).
        """
        how, rows, name = self.sampling, self.rows(subset), SUBSETS[subset]
        rng = generator(self.seed, "order", name, number)
        if shuffle and how.balance and len(rows):
            rows = sampling.balanced(rows, self._context_of_cell[rows], generator(self.seed, "balance", name, number))
        if shuffle:
            rows = sampling.shuffled(rows, rng, chunk=how.chunk if how.unit == "cell" else 1)
        cuts = sampling.even(len(rows), self.batch_size)
        if how.unit == "condition":
            order, cuts = sampling.by_condition(self.conditions.cell_condition[rows], self.batch_size)
            rows = rows[order]
        elif how.unit == "set":
            rows = rows[sampling.in_sets(self.conditions.cell_condition[rows], how.set_size).ravel()]
            cuts = sampling.even(len(rows), self.batch_size // how.set_size * how.set_size)
        controls = None
        if self.mode == "paired" and how.controls != "mean":
            controls = self._partners(rows, subset, 0 if fixed or how.controls == "fixed" else number)
        if shuffle and how.unit != "cell":
            whole = cuts if how.unit == "condition" else sampling.even(len(rows), how.set_size)
            order, moved = sampling.permuted_batches(whole, rng)
            rows, controls = rows[order], None if controls is None else controls[order]
            cuts = moved if how.unit == "condition" else cuts
        return Plan(rows=rows, controls=controls, cuts=cuts)

    def epoch(
        self, subset: int = TRAIN, *, number: int = 0, shuffle: bool = True, fixed: bool = False
    ) -> Iterator[Batch]:
        """Batches of a subset, by ``plan``."""
        plan = self.plan(subset, number=number, shuffle=shuffle, fixed=fixed)
        paired = self._pairing(subset, plan)
        for first, last, cells, numbers in self._delivered(plan):
            start = plan.cuts[first]
            for cut in range(first, last):
                part = slice(plan.cuts[cut], plan.cuts[cut + 1])
                here = numbers[part.start - start : part.stop - start]
                # Yielded at once: a name here would hold the batch while the next one looks for memory.
                yield self._batch(plan.rows[part], self._densifier.dense(cells, here), paired(part))

    def every_cell(self, subset: int = TRAIN) -> Iterator[Batch]:
        """Each cell of a subset once, controls too and unpaired, in the order of the file, whatever an epoch visits: for
        statistics of a screen."""
        whole = copy.copy(self)
        whole.mode, whole.sampling = "all", Sampling()
        return whole.epoch(subset, shuffle=False)

    def batch(self, rows: np.ndarray, controls: np.ndarray | None) -> Batch:
        """The batch of given cells, and of the control cells that they are paired with."""
        paired = {} if controls is None else self._controls(self.cells, controls, controls)
        return self._batch(rows, self._densifier.dense(self.cells, rows), paired)

    def _batch(self, rows: np.ndarray, expression: Tensor, paired: dict[str, Tensor]) -> Batch:
        condition = self.conditions.cell_condition[rows].astype(np.int64)
        embedding = None if self.embedding is None else self._tensor(self.cells.embedding(self.embedding, rows))
        return Batch(
            expression=expression,
            **{"control": None, **paired},
            condition=self._tensor(condition),
            context=self._tensor(self.conditions.context[condition]),
            cell=self._tensor(rows.astype(np.int64)),
            embedding=embedding,
        )

    def _delivered(self, plan: Plan) -> Iterator[tuple[int, int, Cells, np.ndarray]]:
        """Batches from one number to another, the cells that hold theirs, and the numbers of their rows there."""
        if self.windows is None or not len(plan.rows):
            yield 0, len(plan.cuts) - 1, self.cells, plan.rows
            return
        for first, last, rows in self.windows.read(plan.rows, plan.cuts):
            cells = Cells([rows], checked=True, compiled=self.cells.compiled)
            yield first, last, cells, np.arange(len(cells))

    def _pairing(self, subset: int, plan: Plan) -> Callable[[slice], dict[str, Tensor]]:
        """What a part of a plan is paired with."""
        if self.mode != "paired":
            return lambda part: {}
        if plan.controls is None:
            tables = self._mean_controls(subset)
            context = self._context_of_cell[plan.rows]
            return lambda part: {name: table[self._tensor(context[part])] for name, table in tables.items()}
        cells, held = self._held_controls(subset)
        numbers = plan.controls if held is None else np.searchsorted(held, plan.controls)
        return lambda part: self._controls(cells, numbers[part], plan.controls[part])

    def _controls(self, cells: Cells, numbers: np.ndarray, rows: np.ndarray) -> dict[str, Tensor]:
        found = {"control": self._densifier.dense(cells, numbers)}
        if self.embedding is not None:
            found["control_embedding"] = self._tensor(self.cells.embedding(self.embedding, rows))
        return found

    def _held_controls(self, subset: int) -> tuple[Cells, np.ndarray | None]:
        """The cells that controls are taken from; in streaming a copy of the pools, and which rows it holds, ascending."""
        if self.windows is None:
            return self.cells, None
        if subset not in self._held:
            rows = np.sort(self._pool(subset).rows)
            copy = self.windows.fetch(rows)
            self._held[subset] = Cells(copy, checked=True, compiled=self.cells.compiled), rows
        return self._held[subset]

    def _mean_controls(self, subset: int) -> dict[str, Tensor]:
        """(contexts, ...) means over all control cells of a context and subset."""
        if subset not in self._means:
            rows = self.split.cells(subset, conditions=self.conditions, controls=True)
            context, contexts = self._context_of_cell[rows], len(self.conditions.contexts)
            self._check_controls(np.bincount(context, minlength=contexts), subset)
            count = np.maximum(np.bincount(context, minlength=contexts), 1)[:, None]
            tables = {"control": self.cells.group_sums(rows, context, groups=contexts) / count}
            if self.embedding is not None:
                own = self.cells.embedding(self.embedding, rows).astype(np.float64)
                sums = np.zeros((contexts, own.shape[1]))
                np.add.at(sums, context, own)
                tables["control_embedding"] = sums / count
            self._means[subset] = {name: self._tensor(table.astype(np.float32)) for name, table in tables.items()}
        return self._means[subset]

    def _partners(self, rows: np.ndarray, subset: int, number: int) -> np.ndarray:
        """One control of each cell's context and subset, in one draw for the epoch."""
        pool, context = self._pool(subset), self._context_of_cell[rows]
        rng = generator(self.seed, "controls", SUBSETS[subset], number)
        return pool.for_sets(context, rng) if self.sampling.unit == "set" else pool.for_cells(rows, context, rng)

    def _pool(self, subset: int) -> Pools:
        if subset not in self._pools:
            controls = self.split.cells(subset, conditions=self.conditions, controls=True)
            rng = generator(self.seed, "pool", SUBSETS[subset])
            contexts = len(self.conditions.contexts)
            pool = Pools.of(controls, self._context_of_cell[controls], contexts=contexts, rng=rng)
            self._check_controls(pool.size, subset)
            self._pools[subset] = pool
        return self._pools[subset]

    def _check_controls(self, size: np.ndarray, subset: int) -> None:
        """Raise InputError for a context that has cells and no control: another's would be taken in its place."""
        bare = np.intersect1d(self._context_of_cell[self.rows(subset)], np.flatnonzero(size == 0))
        if len(bare):
            name = self.conditions.context_name(bare[0])
            raise InputError(f"context {name} has no control cells in {SUBSETS[subset]} to pair its cells with")

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
