"""What a split is, what every task must say, and what holds of every split whatever task drew it."""

import csv
import dataclasses
import gzip
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.errors import InputError
from perturbray.randomness import generator
from perturbray.registry import Registry

UNUSED, TRAIN, VAL, TEST = range(4)
SUBSETS = ("unused", "train", "val", "test")
COMMON = "common"

SPLITS: Registry = Registry("split")

# What a task keeps out of two sets: a condition; a label, whatever the context; a single perturbation, alone or in a
# combination; a whole context.
Apart = Literal["condition", "perturbation", "single", "context"]


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

    def save(self, path: str | Path, conditions: Conditions) -> None:
        """Write cell and subset as CSV (compressed where the path ends in .gz), as the task ``saved`` reads them."""
        opened = gzip.open if str(path).endswith(".gz") else open
        with opened(path, "wt", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["cell", "subset"])
            table.writerows((n, SUBSETS[code]) for n, code in zip(conditions.cell_names, self.cell, strict=True))


class SplitSpec(ABC):
    """A task. ``draw`` is a function of the conditions and of the fields alone, whatever the order of the rows."""

    apart: ClassVar[Apart] = "condition"

    @abstractmethod
    def draw(self, conditions: Conditions) -> Split:
        """Raises InputError where the screen does not admit the task."""

    def split(self, conditions: Conditions) -> Split:
        """What the task draws, checked for leaks, with the record of how it came about."""
        split = self.draw(conditions)
        name = next((name for name, spec in SPLITS.items() if spec is type(self)), type(self).__name__)
        record = {
            "algorithm": name,
            "version": 1,
            "parameters": {f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "conditions": _digest(conditions),
        }
        split = replace(split, record={**split.record, **record})
        return checked(conditions, split, apart=self.apart, name=name)

    def content(self) -> dict[str, str]:
        """For a field that names a file the digest of what it holds, which goes into a trial's key in its place."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Drawn(SplitSpec):
    """A task whose conditions or control cells are drawn: what all of these have."""

    controls: tuple[float, float, float] = (0.5, 0.25, 0.25)  # train, validation, test share of a context's controls
    min_controls: int = 2  # control cells that every subset of a context must have
    seed: int = 42

    def finish(
        self,
        conditions: Conditions,
        subset: np.ndarray,
        *,
        stratum: np.ndarray | None = None,
        notes: Sequence[str] = (),
    ) -> Split:
        """The split of conditions with control cells cut. ``notes``: sentences for a person about what came out."""
        cell = subset[conditions.cell_condition]
        cut_controls(cell, conditions, shares=self.controls, least=self.min_controls, seed=self.seed)
        stratum = np.full(len(conditions), COMMON) if stratum is None else stratum
        return Split(condition=subset, cell=cell, stratum=stratum, record={"notes": list(notes)})


def check_fields(spec: Drawn, *, of: str = "", whole: bool = False) -> None:
    """Raise InputError for a field that means nothing. ``of``: what is held out; ``whole``: all of it may be."""
    if of and not (0 < spec.fraction < 1 or (whole and spec.fraction == 1)):
        raise InputError(f"split.fraction={spec.fraction}: a share between 0 and 1 of {of}")
    for name, least in (("min_controls", 1), ("max_contexts", 1), ("min_train_contexts", 0), ("turn", 0)):
        value = getattr(spec, name, None)
        if value is not None and value < least:
            raise InputError(f"split.{name}={value}: at least {least}")
    if len(spec.controls) != 3 or min(spec.controls) < 0 or abs(sum(spec.controls) - 1) > 1e-9:
        raise InputError(f"split.controls={spec.controls}: three shares (train, validation, test) that sum to 1")


def halve(held: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Validation and test. A lone one goes to test; the odd one of several falls to either side by a coin."""
    held = rng.permutation(held)
    validation = len(held) // 2 + (len(held) % 2 and len(held) > 1 and int(rng.integers(2)))
    return held[:validation], held[validation:]


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


def _strata(conditions: Conditions, split: Split) -> dict[str, list[int]]:
    """Per stratum the conditions of every subset."""
    perturbed = ~conditions.is_control
    return {
        str(name): [int((perturbed & (split.stratum == name) & (split.condition == code)).sum()) for code in range(4)]
        for name in np.unique(split.stratum[perturbed])
    }


def checked(conditions: Conditions, split: Split, *, apart: Apart, name: str) -> Split:
    """The split itself, with what came out in its record. Raises InputError where it leaks, as ``check`` says."""
    check(conditions, split, apart=apart, name=name)
    out = {"counts": count(conditions, split.condition, split.cell), "strata": _strata(conditions, split)}
    return replace(split, record={**split.record, **out})


def check(conditions: Conditions, split: Split, *, apart: Apart = "condition", name: str = "split") -> None:
    """Raise InputError where a split leaks, or where a set lacks what it needs; every split goes through here.

    No cell stands in a set that its condition does not stand in, every set has control cells of its own in each context
    that it uses, and what the task keeps ``apart`` stands in one set.
    """
    _check_codes(conditions, split, name)
    control = conditions.is_control
    if len(wrong := np.flatnonzero(control & np.isin(split.condition, [VAL, TEST]))):
        raise InputError(
            f"{name}: the control condition of {conditions.context_name(conditions.context[wrong[0]])} is held out as "
            f"{SUBSETS[split.condition[wrong[0]]]}; control cells are cut one by one, and their condition is train"
        )
    expected = split.condition[conditions.cell_condition]
    leaks = (split.cell != UNUSED) & (split.cell != expected) & ~control[conditions.cell_condition]
    if leaks.any():
        row = int(np.flatnonzero(leaks)[0])
        raise InputError(
            f"{name}: {leaks.sum()} cells leak: {conditions.cell_names[row]} stands in {SUBSETS[split.cell[row]]}, but its "
            f"condition ({_place(conditions, conditions.cell_condition[row])}) in {SUBSETS[expected[row]]}; a condition's "
            "cells stand in one set"
        )
    cells = np.bincount(conditions.cell_condition[split.cell != UNUSED], minlength=len(conditions))
    if len(empty := np.flatnonzero(np.isin(split.condition, [VAL, TEST]) & (cells == 0))):
        raise InputError(
            f"{name}: {_place(conditions, empty[0])} is {SUBSETS[split.condition[empty[0]]]} without a cell"
        )
    _check_controls(conditions, split, name)
    _check_apart(conditions, split, apart, name)


def _check_codes(conditions: Conditions, split: Split, name: str) -> None:
    sizes = {"condition": len(conditions), "cell": len(conditions.cell_condition), "stratum": len(conditions)}
    for part, size in sizes.items():
        if getattr(split, part).shape != (size,):
            raise InputError(f"{name}: split.{part} is {getattr(split, part).shape}; the screen needs ({size},)")
    for part in ("condition", "cell"):
        if len(odd := np.setdiff1d(getattr(split, part), range(len(SUBSETS)))):
            raise InputError(f"{name}: split.{part} holds {odd[0]}, which is no set; sets are 0 to {len(SUBSETS) - 1}")


def _check_controls(conditions: Conditions, split: Split, name: str) -> None:
    """Every set that has conditions of a context has controls of it; and training has some wherever there are any."""
    used = np.zeros((len(SUBSETS), len(conditions.contexts)), dtype=bool)
    perturbed = ~conditions.is_control
    used[split.condition[perturbed], conditions.context[perturbed]] = True
    used[TRAIN] = used[TRAIN] | used[VAL] | used[TEST]  # models take every context in use as known
    there = np.zeros_like(used)
    control = conditions.is_control[conditions.cell_condition]
    there[split.cell[control], conditions.context[conditions.cell_condition[control]]] = True
    for number in (TRAIN, VAL, TEST):
        if len(bare := np.flatnonzero(used[number] & ~there[number])):
            raise InputError(
                f"{name}: context {conditions.context_name(bare[0])} has conditions but no control cell in "
                f"{SUBSETS[number]}"
            )


def _check_apart(conditions: Conditions, split: Split, apart: Apart, name: str) -> None:
    perturbed = ~conditions.is_control & (split.condition != UNUSED)
    if apart == "single":
        alone = {
            conditions.singles[row][0]: row
            for row in np.flatnonzero(perturbed & np.isin(split.condition, [VAL, TEST]))
            if len(conditions.singles[row]) == 1
        }
        for row in np.flatnonzero(perturbed & (split.condition == TRAIN)):
            for single in sorted(alone.keys() & set(conditions.singles[row])):
                raise InputError(f"{name}: {single} leaks: {_both(conditions, split, alone[single], row)}")
    if apart in ("perturbation", "single"):
        unit, kind = np.unique(conditions.perturbation, return_inverse=True)[1], "perturbation"
    elif apart == "context":
        unit, kind = conditions.context, "context"
    else:
        return
    first: dict[int, int] = {}
    for row in np.flatnonzero(perturbed):
        other = first.setdefault(int(unit[row]), row)
        if split.condition[other] != split.condition[row]:
            raise InputError(f"{name}: a {kind} leaks: {_both(conditions, split, other, row)}")


def _both(conditions: Conditions, split: Split, one: int, other: int) -> str:
    first, second = ((_place(conditions, row), SUBSETS[split.condition[row]]) for row in (one, other))
    return f"({first[0]}) stands in {first[1]} and ({second[0]}) in {second[1]}; put them into one set"


def _place(conditions: Conditions, row: int) -> str:
    return f"{conditions.context_name(conditions.context[row])}, {conditions.perturbation[row]}"


def _digest(conditions: Conditions) -> str:
    """The identity of the conditions that a split was drawn from."""
    table = [conditions.covariates, conditions.control, list(conditions), conditions.cells.tolist()]
    return hashlib.blake2b(json.dumps(table).encode(), digest_size=8).hexdigest()
