"""Scaling: training on nested parts of a screen along one axis; a new axis is an entry of `AXES` and a case of `_kept`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from perturbray.data.ablations.base import ABLATIONS, AblationSpec, recorded
from perturbray.data.dataset import Conditions
from perturbray.data.splits import TEST, TRAIN, UNUSED, VAL, Split, SplitSpec
from perturbray.errors import InputError, nearest
from perturbray.randomness import generator

AXES = {  # what a level counts, and the levels of a sweep unless it is told: four, which a power law needs
    "contexts": (0.4, 0.6, 0.8, 1.0),  # 6, 9, 12 and 15 of McFaline-Figueroa 2023, published without 12
    "perturbations": (0.125, 0.25, 0.5, 1.0),  # 66, 132, 264 and 528 of it, published without 66
    "cells": (0.125, 0.25, 0.5, 1.0),
}


def levels(text: str, axis: str) -> tuple[float, ...]:
    """Levels as typed, from small to large: shares up to 1, or numbers above; the axis's own for no text.

    >>> levels("15,6,9", "contexts")
    (6.0, 9.0, 15.0)
    """
    _check_axis(axis)
    try:
        found = sorted({float(part) for part in text.split(",")}) if text.strip() else list(AXES[axis])
    except ValueError:
        raise InputError(f"levels {text!r}: numbers by comma, e.g. 0.25,0.5,1 or 6,9,15") from None
    if found[0] <= 1 < found[-1]:
        raise InputError(f"levels {text!r}: either shares, up to 1, or numbers of {axis}, above 1, and not both")
    return tuple(found)


@ABLATIONS.register("scaling")
@dataclass(frozen=True, kw_only=True)
class DataScaling(AblationSpec):
    """Training on a part of the contexts, of the perturbations, or of each condition's cells, judged on the same conditions.

    A level keeps a prefix of one seeded order, so that levels are nested. Contexts and perturbations that conditions are
    held out of come first in it, and only those held-out conditions are judged, at every level, that the ``smallest``
    level has what it takes to learn: their context, and training conditions of their perturbation. A context that is left
    out goes with its control cells; along the other axes all control cells stay.
    """

    axis: str = "contexts"  # contexts | perturbations | cells
    level: float = 1.0  # up to 1 a share; above, how many contexts, perturbations, or cells of a condition
    smallest: float = 0.0  # the lowest level of the sweep: decides what is judged at all of them; 0: the level itself
    order: tuple[
        str, ...
    ] = ()  # contexts (values joined by ",") or perturbations that come first; the rest by the seed

    def __post_init__(self) -> None:
        _check_axis(self.axis)
        for name, value in (("level", self.level), ("smallest", self.smallest or self.level)):
            if not value > 0 or (value > 1 and value != int(value)):
                raise InputError(f"ablation.{name}={value:g}: a share up to 1, or a whole number of {self.axis}")
        if self.order and self.axis == "cells":
            raise InputError("ablation.order: contexts or perturbations have an order, cells are drawn")

    @property
    def shown(self) -> str:
        return f"{self.axis} {self.level:g}"

    def apply(self, conditions: Conditions, task: SplitSpec, *, seed: int) -> Split:
        split = task.split(conditions)
        train = (split.condition == TRAIN) & ~conditions.is_control
        context, row, cell = self._kept(conditions, split, self.level, "level", seed)
        context_first, row_first, _ = self._kept(conditions, split, self.smallest or self.level, "smallest", seed)
        if (context_first & ~context).any() or (row_first & ~row).any():
            raise InputError(f"ablation.level={self.level:g} keeps less than ablation.smallest={self.smallest:g}")

        held = np.isin(split.condition, [VAL, TEST])
        judged = held & context_first[conditions.context] & _learnable(conditions, train, row_first)
        if not (judged & (split.condition == TEST)).any():
            raise InputError(self._nothing_left(conditions, context_first, row_first))
        condition = np.where((train & ~row) | (held & ~judged), UNUSED, split.condition).astype(np.int8)

        code, kept = conditions.cell_condition, cell & (condition[conditions.cell_condition] != UNUSED)
        control = conditions.is_control[code]
        own = conditions.context[code]
        kept[control] = np.where(split.cell == TRAIN, context[own], context_first[own])[control]
        cells = np.where(kept, split.cell, UNUSED).astype(np.int8)
        record = recorded(conditions, split, condition, cells, np.flatnonzero(context))
        return replace(split, condition=condition, cell=cells, record=record)

    def _kept(
        self, conditions: Conditions, split: Split, level: float, name: str, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a level keeps: (contexts,), (conditions,) and (cells,) bool; of conditions those of training count."""
        train, held = (split.condition == TRAIN) & ~conditions.is_control, np.isin(split.condition, [VAL, TEST])
        contexts = np.ones(len(conditions.contexts), dtype=bool)
        rows, cells = np.ones(len(conditions), dtype=bool), np.ones(len(conditions.cell_condition), dtype=bool)
        if self.axis == "cells":
            trained = train[conditions.cell_condition] & (split.cell == TRAIN)
            most = int(np.bincount(conditions.cell_condition[trained]).max())
            cells = _first_cells(conditions, trained, self._check(level, name, most), seed)
        elif self.axis == "contexts":
            names = [",".join(values) for values in conditions.contexts]
            early = np.isin(np.arange(len(names)), conditions.context[held])
            contexts = np.isin(names, self._first(names, early, level, name, seed))
            rows = contexts[conditions.context]
        else:
            names = sorted(set(conditions.perturbation[train].tolist()))
            asked = {
                s for row in np.flatnonzero(held) for s in (*conditions.singles[row], conditions.perturbation[row])
            }
            early = np.array([label in asked for label in names])
            rows = np.isin(conditions.perturbation, self._first(names, early, level, name, seed))
        return contexts, rows, cells

    def _first(self, names: Sequence[str], early: np.ndarray, level: float, name: str, seed: int) -> list[str]:
        """The names that a level keeps: those of ``order``, then those that come early, then the rest, each by the seed."""
        for one in self.order:
            if one not in names:
                raise InputError(
                    f"ablation.order: {one!r} is none of the {self.axis} of training; {nearest(one, names)}"
                )
        drawn = generator(seed, "scaling", self.axis).permutation(len(names))
        drawn = drawn[np.argsort(~early[drawn], kind="stable")]
        order = [*dict.fromkeys(self.order), *(names[i] for i in drawn if names[i] not in self.order)]
        level = self._check(level, name, len(names))
        number = round(level * len(names)) if level <= 1 else int(level)
        if not number:
            raise InputError(f"ablation.{name}={level:g}: that is none of {len(names)} {self.axis}")
        return order[:number]

    def _check(self, level: float, name: str, most: int) -> float:
        if level > max(most, 1):
            kind = "cells in the largest condition" if self.axis == "cells" else self.axis
            raise InputError(f"ablation.{name}={level:g}: training has {most} {kind}")
        return level

    def _nothing_left(self, conditions: Conditions, contexts: np.ndarray, rows: np.ndarray) -> str:
        """What to do where the smallest level leaves nothing to judge."""
        names = [conditions.context_name(c) for c in np.flatnonzero(contexts)]
        labels = len(set(conditions.perturbation[rows & ~conditions.is_control].tolist()))
        of = f"{len(names)} of {len(contexts)} contexts ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        return (
            f"ablation.smallest={self.smallest or self.level:g} keeps {of} and {labels} perturbations, and from these no test "
            f"condition can be learnt, which takes its context and its perturbation elsewhere; keep more {self.axis}"
        )


def _check_axis(axis: str) -> None:
    if axis not in AXES:
        raise InputError(f"no axis of scaling is named {axis!r}: {nearest(axis, AXES)}")


def _learnable(conditions: Conditions, train: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(conditions,) whether the kept training conditions show every single perturbation that all of them show."""
    whole, part = (
        {single for row in np.flatnonzero(rows) for single in conditions.singles[row]} for rows in (train, train & kept)
    )
    gone = whole - part
    return np.array([not gone.intersection(singles) for singles in conditions.singles], dtype=bool)


def _first_cells(conditions: Conditions, trained: np.ndarray, level: float, seed: int) -> np.ndarray:
    """(cells,) bool: all but what a level takes from the ``trained``, of which each condition keeps at least one."""
    rows = np.flatnonzero(trained)
    rows = rows[np.argsort(conditions.cell_names[rows], kind="stable")]  # the draw does not know the order of the file
    code = conditions.cell_condition[rows]
    draw = generator(seed, "scaling", "cells").random(len(rows))
    by_draw = np.lexsort([draw, code])
    place = np.empty(len(rows), dtype=int)
    place[by_draw] = np.arange(len(rows)) - np.searchsorted(code[by_draw], code[by_draw])
    size = np.bincount(code)[code]
    number = np.maximum(1, np.round(level * size)) if level <= 1 else np.full(len(rows), level)
    kept = np.ones(len(trained), dtype=bool)
    kept[rows[place >= number]] = False
    return kept
