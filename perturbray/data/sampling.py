"""Sampling: which cells an epoch visits, in which order, in which batches, and which control each is paired with.

Numbers of rows alone, from a seed and an epoch: neither where cells lie nor how they are delivered changes a draw.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from perturbray.errors import InputError, nearest

Mode = Literal["paired", "perturbed", "all"]
Unit = Literal["cell", "condition", "set"]
CONTROLS = ("random", "fixed", "mean")
UNITS = ("cell", "condition", "set")
POOL = 8192  # control cells of a context and subset that pairs are drawn from: what streaming has to hold
CHUNK = 64  # rows that stay together in the shuffle of a large screen
WINDOW = 32768  # cells that chunks are mixed within
LARGE = 2**22  # cells from which on an epoch is shuffled by chunks unless told


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an epoch is drawn."""

    controls: str = "random"  # random: anew each epoch | fixed: one for good | mean: the mean of a context's controls
    balance: bool = False  # contexts equally often in an epoch of the same length
    unit: Unit = "cell"  # what a batch is made of: cells | cells of one condition | sets of cells of one condition
    set_size: int = 0  # cells of a set, where the unit is a set
    chunk: int = 0  # neighbouring rows that stay together until they are mixed in windows; 1: a full permutation;
    # 0: a full permutation up to 4 million cells, and 64 beyond

    def __post_init__(self) -> None:
        if self.controls not in CONTROLS:
            raise InputError(f"controls={self.controls!r}: {nearest(self.controls, CONTROLS)}")
        if self.unit not in UNITS:
            raise InputError(f"unit={self.unit!r}: {nearest(self.unit, UNITS)}")
        if self.chunk < 0:
            raise InputError(f"chunk={self.chunk}: 0 or more")
        if (self.unit == "set") != (self.set_size > 0):
            raise InputError(f"set_size={self.set_size}: above 0 where the unit is a set, and 0 elsewhere")


@dataclass(frozen=True)
class Plan:
    """An epoch before anything is read."""

    rows: np.ndarray  # (cells,) in the order of the epoch
    controls: np.ndarray | None  # (cells,) the control of each
    cuts: np.ndarray  # (batches + 1,) where batches end


def shuffled(rows: np.ndarray, rng: np.random.Generator, *, chunk: int) -> np.ndarray:
    """Rows in a random order: a full permutation, or runs of ``chunk`` permuted and then mixed within windows.

    By chunks of c, a window of W cells holds W / c random places of the file, and a batch of B is a random part of a window:
    in a file that is sorted by condition, a condition's share of a batch has 1 + (B - 1)(c - 1) / (W - 1) times the
    variance of a full permutation (1.5 times at B = 256 and c = 64), and no condition is left out of an epoch.
    """
    chunk = chunk or (CHUNK if len(rows) > LARGE else 1)
    if chunk == 1:
        return rng.permutation(rows)
    first = rng.permutation(-(-len(rows) // chunk)) * chunk
    place = (first[:, None] + np.arange(chunk)).ravel()
    order = rows[place[place < len(rows)]]
    for start in range(0, len(order), WINDOW):
        rng.shuffle(order[start : start + WINDOW])
    return order


def balanced(rows: np.ndarray, context: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many rows, ascending, in which each context has its equal share.

    A context with fewer cells than its share shows each of them equally often, give or take one; of a context with more a
    part is drawn, anew each epoch.
    """
    present = np.unique(context)
    share = np.full(len(present), len(rows) // len(present))
    share[rng.permutation(len(present))[: len(rows) % len(present)]] += 1
    found = []
    for code, count in zip(present, share, strict=True):
        own = rows[context == code]
        found += [np.repeat(own, count // len(own)), rng.choice(own, count % len(own), replace=False)]
    return np.sort(np.concatenate(found))


def even(cells: int, size: int) -> np.ndarray:
    """Cuts after every ``size`` cells; the last batch is what remains."""
    return np.append(np.arange(0, cells, size), cells)


def by_condition(condition: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(order, cuts): batches of at most ``size`` cells that share a condition, conditions ascending."""
    order = np.argsort(condition, kind="stable")
    count = np.bincount(condition)
    batches = -(-count // size)
    length = np.full(batches.sum(), size)
    last = np.cumsum(batches)[count > 0] - 1
    length[last] = (count - (batches - 1) * size)[count > 0]
    return order, np.concatenate([[0], np.cumsum(length)])


def in_sets(condition: np.ndarray, size: int) -> np.ndarray:
    """(sets, size) places in ``condition``: every cell is in a set of its condition, and the last set of a condition is
    filled with cells of its first; a condition of fewer cells than ``size`` repeats them in turn."""
    order = np.argsort(condition, kind="stable")
    count = np.bincount(condition)
    slots = -(-count // size) * size
    group = np.repeat(np.arange(len(count)), slots)
    within = np.arange(len(group)) - np.repeat(np.cumsum(slots) - slots, slots)
    first = np.cumsum(count) - count
    return order[first[group] + within % np.maximum(count, 1)[group]].reshape(-1, size)


def permuted_batches(cuts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(order, cuts): the batches between cuts in a random order."""
    batch = rng.permutation(len(cuts) - 1)
    length = np.diff(cuts)[batch]
    cuts_after = np.concatenate([[0], np.cumsum(length)])
    order = np.repeat(cuts[batch] - cuts_after[:-1], length) + np.arange(cuts[-1])
    return order, cuts_after


@dataclass(frozen=True)
class Pools:
    """The control cells that pairs are drawn from, by context."""

    rows: np.ndarray  # (cells,) sorted by context, within one ascending
    first: np.ndarray  # (contexts,) where each begins
    size: np.ndarray  # (contexts,)

    @classmethod
    def of(cls, controls: np.ndarray, context: np.ndarray, *, contexts: int, rng: np.random.Generator) -> "Pools":
        """At most POOL of each context's control cells, a seeded draw where there are more."""
        order = np.argsort(context, kind="stable")
        controls, context = controls[order], context[order]
        if len(controls) and np.bincount(context).max() > POOL:
            draw = rng.random(len(controls))
            by_draw = np.lexsort([draw, context])
            rank = np.arange(len(controls)) - np.searchsorted(context, context)  # context[by_draw] is context
            kept = np.sort(by_draw[rank < POOL])
            controls, context = controls[kept], context[kept]
        size = np.bincount(context, minlength=contexts)
        return cls(rows=controls, first=np.cumsum(size) - size, size=size)

    def for_cells(self, rows: np.ndarray, context: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One control of each cell's context, uniformly with replacement: one draw for the epoch."""
        # Drawn by cell in file order and then handed out, so that pairs do not depend on batches.
        draw = rng.random(len(rows))
        order = np.argsort(np.argsort(rows, kind="stable"), kind="stable")
        return self.rows[self.first[context] + (draw[order] * self.size[context]).astype(np.int64)]

    def for_sets(self, context: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One control of each cell's context, all of a context before one comes again: a set holds no cell twice where
        there are enough."""
        found = np.empty(len(context), dtype=np.int64)
        for code in np.unique(context):
            here = np.flatnonzero(context == code)
            rounds = rng.random((-(-len(here) // self.size[code]), self.size[code])).argsort(axis=1)
            found[here] = self.rows[self.first[code] + rounds.ravel()[: len(here)]]
        return found
