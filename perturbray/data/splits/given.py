"""Splits that a user states: by names of conditions, or by a file of cells."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbray.data.dataset import Conditions
from perturbray.data.splits.base import SPLITS, SUBSETS, TEST, TRAIN, UNUSED, VAL, Drawn, Split, SplitSpec, check_fields
from perturbray.data.splits.names import conditions_named
from perturbray.errors import InputError


@SPLITS.register("manual")
@dataclass(frozen=True, kw_only=True)
class Manual(Drawn):
    """Conditions by name; those that no field names are trained on. Only control cells are drawn.

    A name is a perturbation's label (held out in every context), a context (with all its perturbations), ``context:
    label`` (one condition), ``covariate=value`` or ``perturbation=label``; a context is its values joined by ",".
    """

    test: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

    def draw(self, conditions: Conditions) -> Split:
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        for code, name in ((TEST, "test"), (VAL, "val"), (UNUSED, "unused")):
            named = conditions_named(conditions, getattr(self, name), field=f"split.{name}")
            if (twice := np.flatnonzero(named & (subset != TRAIN))).size:
                place = f"{conditions.context_name(conditions.context[twice[0]])}: {conditions.perturbation[twice[0]]}"
                raise InputError(
                    f"{place} is named in split.{SUBSETS[subset[twice[0]]]} and in split.{name} ({len(twice)} such "
                    "conditions); name single conditions, as context: label"
                )
            subset[named] = code
        if not (subset == TEST).any():
            raise InputError(
                "split.test names no condition, so nothing would be judged; name perturbations, contexts, or conditions as "
                "context: label"
            )
        if not ((subset == TRAIN) & ~conditions.is_control).any():
            raise InputError("split.test, split.val and split.unused name every condition: none is left to train on")
        return self.finish(conditions, subset)


@SPLITS.register("saved")
@dataclass(frozen=True, kw_only=True)
class Saved(SplitSpec):
    """A split from a CSV file of two columns, cell and subset, with a header or none (the form of PerturBench).

    The subsets are train, val and test; cells of any other value, and cells that the file does not name, are not used.
    A condition stands in one subset; control cells may stand in all of them.
    """

    path: str = ""

    def content(self) -> dict[str, str]:
        """The file's digest."""
        return {"path": hashlib.blake2b(self._read().to_csv().encode(), digest_size=8).hexdigest()}

    def draw(self, conditions: Conditions) -> Split:
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
        excluded, missing = int((cell == UNUSED).sum()), int(values.isna().sum())
        notes = [f"{excluded} cells are not used, of which {missing} are not in the file"] if excluded else []
        record = {"excluded": excluded, "not_named": missing, "notes": notes}
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
