"""Splits: which conditions a model trains on, is stopped by, and is judged on. A new task is one SplitSpec with a name."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from perturbray.data.dataset import Conditions
from perturbray.errors import InputError, nearest
from perturbray.randomness import generator
from perturbray.registry import Registry

UNUSED, TRAIN, VAL, TEST = range(4)
SUBSETS = ("unused", "train", "val", "test")

MISSING_SINGLES = ("error", "to_train", "allow")

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

    def content(self) -> dict[str, str]:
        """For a field that names a file the digest of what it holds, which goes into a trial's key in its place."""
        return {}


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
        _check(self, of="each context's perturbations")
        if self.max_contexts < 1:
            raise InputError(f"split.max_contexts={self.max_contexts}: at least 1")

    def split(self, conditions: Conditions) -> Split:
        rng = generator(self.seed, "transfer")
        held = self._hold_out(conditions, rng)
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        for context in range(len(conditions.contexts)):
            rows = np.flatnonzero(held & (conditions.context == context))
            validation, test = _halve(rows, rng)
            subset[validation], subset[test] = VAL, TEST
        return _split_of(self, conditions, subset, algorithm="transfer")

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


@SPLITS.register("combination")
@dataclass(frozen=True, kw_only=True)
class Combination(SplitSpec):
    """Hold out combinations, in every context that has them; all single perturbations stay in training.

    ``missing_single`` says what becomes of a combination with a single that is not measured alone in each of its
    contexts: an ``error``; it stays in training (``to_train``); or it may be held out all the same (``allow``).
    """

    fraction: float = 0.7  # of the combinations that may be held out, half for validation, half for test
    missing_single: str = "error"  # error | to_train | allow
    controls: tuple[float, float, float] = (0.5, 0.25, 0.25)  # train, validation, test share of a context's controls
    min_controls: int = 2  # control cells that every subset of a context must have
    seed: int = 42

    def __post_init__(self) -> None:
        _check(self, of="the combinations", whole=True)
        if self.missing_single not in MISSING_SINGLES:
            raise InputError(
                f"split.missing_single={self.missing_single!r}: {nearest(self.missing_single, MISSING_SINGLES)}"
            )

    def split(self, conditions: Conditions) -> Split:
        labels = self._eligible(conditions)
        rng = generator(self.seed, "combination")
        number = max(1, round(self.fraction * len(labels)))
        validation, test = _halve(rng.choice(labels, number, replace=False), rng)
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        subset[np.isin(conditions.perturbation, validation)] = VAL
        subset[np.isin(conditions.perturbation, test)] = TEST
        return _split_of(self, conditions, subset, algorithm="combination")

    def _eligible(self, conditions: Conditions) -> list[str]:
        """Labels of combinations that may be held out, sorted."""
        combined = np.array([len(singles) > 1 for singles in conditions.singles])
        if not combined.any():
            raise InputError(
                "no label of this screen is a combination, so none can be held out; labels are split at the dataset's "
                f"delimiter, e.g. {conditions.perturbations[0]!r} is taken as one perturbation"
            )
        alone = {
            (context, singles[0])
            for context, singles in zip(conditions.context, conditions.singles, strict=True)
            if len(singles) == 1
        }
        lacking: dict[str, str] = {}
        for row in np.flatnonzero(combined):
            for single in conditions.singles[row]:
                if (conditions.context[row], single) not in alone:
                    place = conditions.context_name(conditions.context[row])
                    lacking.setdefault(str(conditions.perturbation[row]), f"{single} in {place}")
        labels = sorted(set(conditions.perturbation[combined].tolist()))
        if lacking and self.missing_single == "error":
            shown = "; ".join(f"{label} ({single})" for label, single in list(lacking.items())[:5])
            raise InputError(
                f"{len(lacking)} of {len(labels)} combinations have a single that is not measured alone: {shown}"
                f"{'; ...' if len(lacking) > 5 else ''}; split.missing_single=to_train keeps them in training, allow holds "
                "them out all the same"
            )
        if self.missing_single == "to_train":
            labels = [label for label in labels if label not in lacking]
            if not labels:
                raise InputError(
                    f"none of the {len(lacking)} combinations has all its singles measured alone, so none can be held out"
                )
        return labels


@SPLITS.register("unseen_perturbation")
@dataclass(frozen=True, kw_only=True)
class UnseenPerturbation(SplitSpec):
    """Hold out single perturbations in every context, and every combination that contains one.

    Only models that know perturbations by more than their name can predict them. Combinations form a stratum of their
    own: those of a held-out and a seen perturbation are an easier task than the held-out ones alone.
    """

    fraction: float = 0.2  # of the perturbations measured alone, half for validation, half for test
    controls: tuple[float, float, float] = (0.5, 0.25, 0.25)  # train, validation, test share of a context's controls
    min_controls: int = 2  # control cells that every subset of a context must have
    seed: int = 42

    def __post_init__(self) -> None:
        _check(self, of="the perturbations")

    def split(self, conditions: Conditions) -> Split:
        names = sorted({singles[0] for singles in conditions.singles if len(singles) == 1})
        number = min(max(1, round(self.fraction * len(names))), len(names) - 1)
        if number < 1:
            raise InputError(f"{len(names)} perturbation(s) measured alone: two are needed to hold one out")
        rng = generator(self.seed, "unseen_perturbation")
        validation, test = map(set, _halve(rng.choice(names, number, replace=False), rng))
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        stratum = np.full(len(conditions), "common", dtype="U11")
        for row, singles in enumerate(conditions.singles):
            if test & set(singles):
                subset[row] = TEST
            elif validation & set(singles):
                subset[row] = VAL
            if len(singles) > 1:
                stratum[row] = "combination"
        return _split_of(self, conditions, subset, algorithm="unseen_perturbation", stratum=stratum)


@SPLITS.register("saved")
@dataclass(frozen=True, kw_only=True)
class Saved(SplitSpec):
    """A split from a CSV file of two columns, cell and subset, with a header or none (the form of PerturBench).

    The subsets are train, val and test; cells of any other value, and cells that the file does not name, are not used.
    A condition stands in one subset; control cells may stand in all of them.
    """

    path: str

    def content(self) -> dict[str, str]:
        """The file's digest."""
        return {"path": hashlib.blake2b(self._read().to_csv().encode(), digest_size=8).hexdigest()}

    def split(self, conditions: Conditions) -> Split:
        table = self._read()
        if table.index[0] not in set(conditions.cell_names) and table.iloc[0] not in SUBSETS[1:]:
            table = table.iloc[1:]  # a header
        self._check(table, conditions)
        code = {name: number for number, name in enumerate(SUBSETS) if number != UNUSED}
        values = table.reindex(conditions.cell_names)
        cell = values.map(code).fillna(UNUSED).to_numpy(np.int8)
        subset = np.full(len(conditions), UNUSED, dtype=np.int8)
        subset[conditions.is_control] = TRAIN
        for row in np.flatnonzero(~conditions.is_control):
            found = np.setdiff1d(cell[conditions.cell_condition == row], [UNUSED])
            if len(found) > 1:
                names = " and ".join(SUBSETS[number] for number in found)
                place = f"{conditions.context_name(conditions.context[row])}, {conditions.perturbation[row]}"
                raise InputError(f"{self.path}: cells of one condition ({place}) stand in {names}; put them into one")
            subset[row] = found[0] if len(found) else UNUSED
        self._check_controls(conditions, subset, cell)
        record = {
            "algorithm": "saved",
            "version": 1,
            "counts": count(conditions, subset, cell),
            "excluded": int((cell == UNUSED).sum()),
            "not_named": int(values.isna().sum()),
        }
        return Split(condition=subset, cell=cell, stratum=np.full(len(conditions), "common"), record=record)

    def _read(self) -> pd.Series:
        try:
            table = pd.read_csv(self.path, header=None, dtype=str, keep_default_na=False)
        except FileNotFoundError:
            raise InputError(f"split.path={self.path}: there is no such file") from None
        except (OSError, ValueError, EOFError) as error:  # pandas' own errors are ValueErrors
            raise InputError(f"{self.path}: this cannot be read as CSV ({error})") from None
        if table.shape[1] != 2:
            raise InputError(f"{self.path}: two columns are needed, cell and subset; it has {table.shape[1]}")
        return table.set_index(0)[1]

    def _check(self, table: pd.Series, conditions: Conditions) -> None:
        twice = table.index[table.index.duplicated()]
        if len(twice):
            raise InputError(f"{self.path}: cell {twice[0]!r} stands in it twice ({len(twice)} such cells)")
        if not pd.Index(conditions.cell_names).is_unique:
            raise InputError(
                f"{self.path}: the cells of this screen have names that occur twice, so none can be looked up"
            )
        unknown = table.index.difference(conditions.cell_names, sort=False)
        if len(unknown):
            some = conditions.cell_names[0]
            raise InputError(
                f"{self.path}: {len(unknown)} of {len(table)} cells are not in the screen; the first is {unknown[0]!r}, "
                f"and cells of the screen are called as {some!r}"
            )

    def _check_controls(self, conditions: Conditions, subset: np.ndarray, cell: np.ndarray) -> None:
        is_control = conditions.is_control[conditions.cell_condition]
        for number in (TRAIN, VAL, TEST):
            used = np.unique(conditions.context[(subset == number) & ~conditions.is_control])
            rows = np.flatnonzero(is_control & (cell == number))
            bare = np.setdiff1d(used, conditions.context[conditions.cell_condition[rows]])
            if len(bare):
                raise InputError(
                    f"{self.path}: context {conditions.context_name(bare[0])} has conditions but no control cell in "
                    f"{SUBSETS[number]}"
                )


def _check(spec: CovariateTransfer | Combination | UnseenPerturbation, *, of: str, whole: bool = False) -> None:
    """Raise InputError for a field that means nothing. ``whole``: all may be held out."""
    if not (0 < spec.fraction < 1 or (whole and spec.fraction == 1)):
        raise InputError(f"split.fraction={spec.fraction}: a share between 0 and 1 of {of}")
    if spec.min_controls < 1:
        raise InputError(f"split.min_controls={spec.min_controls}: at least 1")
    if len(spec.controls) != 3 or min(spec.controls) < 0 or abs(sum(spec.controls) - 1) > 1e-9:
        raise InputError(f"split.controls={spec.controls}: three shares (train, validation, test) that sum to 1")


def _halve(held: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Validation and test. A lone one goes to test; the odd one of several falls to either side by a coin."""
    held = rng.permutation(held)
    validation = len(held) // 2 + (len(held) % 2 and len(held) > 1 and int(rng.integers(2)))
    return held[:validation], held[validation:]


def _split_of(
    spec: CovariateTransfer | Combination | UnseenPerturbation,
    conditions: Conditions,
    subset: np.ndarray,
    *,
    algorithm: str,
    stratum: np.ndarray | None = None,
) -> Split:
    """The split of conditions with control cells cut and everything counted."""
    cell = subset[conditions.cell_condition]
    cut_controls(cell, conditions, shares=spec.controls, least=spec.min_controls, seed=spec.seed)
    record = {"algorithm": algorithm, "version": 1, "counts": count(conditions, subset, cell)}
    stratum = np.full(len(conditions), "common") if stratum is None else stratum
    return Split(condition=subset, cell=cell, stratum=stratum, record=record)


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
