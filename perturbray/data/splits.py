"""Splits: which conditions a model trains on, is stopped by, and is judged on. A new task is one SplitSpec with a name."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.errors import InputError
from perturbray.randomness import generator
from perturbray.registry import Registry

UNUSED, TRAIN, VAL, TEST = range(4)
SUBSETS = ("unused", "train", "val", "test")

SPLITS: Registry = Registry("split")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The subset of every condition, and of every control cell.

    Perturbed cells follow their condition; control cells are cut one by one, in every context.
    """

    condition: np.ndarray  # (conditions,) int8, one of UNUSED, TRAIN, VAL, TEST; control conditions are TRAIN
    cell: np.ndarray  # (cells,) int8
    stratum: np.ndarray  # (conditions,) str; "common" is the headline, others are reported apart
    record: dict = field(default_factory=dict, compare=False)  # how it was made, and what came out, for the results

    def cells(self, subset: int, *, conditions: Conditions, controls: bool) -> np.ndarray:
        """Row numbers of a subset's control cells, or of its perturbed cells, ascending."""
        return np.flatnonzero((self.cell == subset) & (conditions.is_control[conditions.cell_condition] == controls))


class SplitSpec(ABC):
    """A task. ``split`` is a function of the conditions and of the fields alone, whatever the order of the rows."""

    @abstractmethod
    def split(self, conditions: Conditions) -> Split:
        """Raises InputError where the screen does not admit the task."""


@SPLITS.register("transfer")
@dataclass(frozen=True, kw_only=True)
class CovariateTransfer(SplitSpec):
    """Hold out some perturbations of every context; each is seen in other contexts.

    Every eligible perturbation has the same chance: the context furthest below its share draws next, uniformly.
    """

    fraction: float = 0.3  # of a context's perturbations that are held out, half for validation, half for test
    max_contexts: int = 1  # in which one perturbation may be held out
    min_train_contexts: int = 1  # in which a held-out perturbation must stay
    controls: tuple[float, float, float] = (0.5, 0.25, 0.25)  # train, validation, test share of a context's controls
    min_controls: int = 2  # control cells that every subset of a context must have
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InputError(f"split.fraction={self.fraction}: a share between 0 and 1 of each context's perturbations")
        for name in ("max_contexts", "min_controls"):
            if getattr(self, name) < 1:
                raise InputError(f"split.{name}={getattr(self, name)}: at least 1")
        if len(self.controls) != 3 or min(self.controls) < 0 or abs(sum(self.controls) - 1) > 1e-9:
            raise InputError(f"split.controls={self.controls}: three shares (train, validation, test) that sum to 1")

    def split(self, conditions: Conditions) -> Split:
        rng = generator(self.seed, "transfer")
        held = self._hold_out(conditions, rng)
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        for context in range(len(conditions.contexts)):
            rows = rng.permutation(np.flatnonzero(held & (conditions.context == context)))
            # A lone held-out condition goes to test; the odd one of several falls to either side by a coin.
            validation = len(rows) // 2 + (len(rows) % 2 and len(rows) > 1 and int(rng.integers(2)))
            subset[rows] = TEST
            subset[rows[:validation]] = VAL
        cell = subset[conditions.cell_condition]
        cut_controls(cell, conditions, shares=self.controls, least=self.min_controls, seed=self.seed)
        record = {"algorithm": "transfer", "version": 1, "counts": count(conditions, subset, cell)}
        stratum = np.full(len(conditions), "common", dtype=object).astype(str)
        return Split(condition=subset, cell=cell, stratum=stratum, record=record)

    def _hold_out(self, conditions: Conditions, rng: np.random.Generator) -> np.ndarray:
        contexts, perturbed = conditions.context, ~conditions.is_control
        _, code = np.unique(conditions.perturbation, return_inverse=True)
        share = np.bincount(contexts[perturbed], minlength=len(conditions.contexts))
        target = np.round(self.fraction * share).astype(int)
        limit = np.minimum(
            self.max_contexts, np.bincount(code[perturbed], minlength=code.max() + 1) - self.min_train_contexts
        )
        held = np.zeros(len(conditions), dtype=bool)
        times, filled = np.zeros_like(limit), np.zeros_like(target)
        while True:
            eligible = perturbed & ~held & (times < limit)[code]
            open_ = (filled < target) & (np.bincount(contexts[eligible], minlength=len(target)) > 0)
            if not open_.any():
                break
            fill = np.where(open_, filled / np.maximum(target, 1), np.inf)
            context = rng.choice(np.flatnonzero(fill == fill.min()))
            row = rng.choice(np.flatnonzero(eligible & (contexts == context)))
            held[row] = True
            times[code[row]] += 1
            filled[context] += 1
        if not held.any():
            raise InputError(
                f"no condition can be held out: the screen has {len(target)} context(s) "
                f"({', '.join(map(conditions.context_name, range(min(len(target), 5))))}) and a perturbation must stay in "
                f"{self.min_train_contexts} other(s); covariate transfer needs perturbations measured in two contexts"
            )
        return held


def cut_controls(cell: np.ndarray, conditions: Conditions, *, shares: tuple[float, ...], least: int, seed: int) -> None:
    """Cut the control cells of each context by shares, in place, by cell name: the order of rows does not matter."""
    for context, values in enumerate(conditions.contexts):
        control = np.flatnonzero(conditions.is_control & (conditions.context == context))
        rows = np.flatnonzero(np.isin(conditions.cell_condition, control))
        if len(rows) < least * len(shares):
            raise InputError(
                f"context {conditions.context_name(context)} has {len(rows)} control cells; "
                f"{least} in each of train, validation and test need {least * len(shares)}"
            )
        rows = rows[np.argsort(conditions.cell_names[rows], kind="stable")]
        rows = generator(seed, "controls", *values).permutation(rows)
        sizes = np.maximum(np.round(np.array(shares) * len(rows)).astype(int), least)
        while sizes.sum() != len(rows):  # one at a time, so that none falls below the least
            sizes[np.argmax(sizes)] += np.sign(len(rows) - sizes.sum())
        cell[rows] = np.repeat(np.array([TRAIN, VAL, TEST], dtype=np.int8), sizes)


def count(conditions: Conditions, subset: np.ndarray, cell: np.ndarray) -> dict[str, dict[str, list[int]]]:
    """Per context: [conditions, perturbed cells, control cells] of each subset, for the record."""
    controls = conditions.is_control[conditions.cell_condition]
    context_of_cell = conditions.context[conditions.cell_condition]
    table: dict[str, dict[str, list[int]]] = {}
    for context in range(len(conditions.contexts)):
        here = (conditions.context == context) & ~conditions.is_control
        cells = context_of_cell == context
        table[conditions.context_name(context)] = {
            name: [
                int((here & (subset == code)).sum()),
                int((cells & ~controls & (cell == code)).sum()),
                int((cells & controls & (cell == code)).sum()),
            ]
            for code, name in enumerate(SUBSETS)
        }
    return table
