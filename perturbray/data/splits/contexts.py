"""Whole contexts that training shows unperturbed only."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.data.splits.base import SPLITS, TEST, TRAIN, UNUSED, VAL, Apart, Drawn, Split, check_fields
from perturbray.data.splits.names import contexts_named
from perturbray.data.splits.repeated import check_turn
from perturbray.errors import InputError, nearest
from perturbray.randomness import generator

UNSEEN = ("error", "unused", "allow")


@SPLITS.register("held_out_contexts")
@dataclass(frozen=True, kw_only=True)
class HeldOutContexts(Drawn):
    """Hold out every perturbation of whole contexts; of these training shows control cells alone.

    The contexts are named, or drawn: ``number`` for test and as many for validation, if that leaves some for training;
    in each ``turn`` others, so that every context is tested once. ``by`` draws all contexts with the same value of a
    covariate together, as a cell line under every treatment.
    """

    apart: ClassVar[Apart] = "context"

    test: tuple[str, ...] = ()  # values joined by ",", or covariate=value for every context that has it; (): drawn
    val: tuple[str, ...] = ()
    number: int = 1  # of contexts, or of values of ``by``, that are drawn for test
    by: str = ""  # a covariate; "": every context by itself
    turn: int = 0
    unseen: str = "error"  # what becomes of a perturbation that no training context has: error | unused | allow

    def __post_init__(self) -> None:
        check_fields(self)
        if self.unseen not in UNSEEN:
            raise InputError(f"split.unseen={self.unseen!r}: {nearest(self.unseen, UNSEEN)}")
        if self.number < 1:
            raise InputError(f"split.number={self.number}: at least 1")
        if self.val and not self.test:
            raise InputError(f"split.val={self.val}: name the contexts of split.test too")
        if self.test and (self.turn or self.by):
            raise InputError(f"split.test={self.test} names the contexts, so split.turn and split.by draw none")

    def turns(self, conditions: Conditions) -> int:
        """In how many turns every context is tested once."""
        return 1 if self.test else len(self._blocks(conditions))

    def draw(self, conditions: Conditions) -> Split:
        test, validation = self._named(conditions) if self.test else self._drawn(conditions)
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        perturbed = ~conditions.is_control
        subset[perturbed & test[conditions.context]] = TEST
        subset[perturbed & validation[conditions.context]] = VAL
        if not (subset == TEST).any():
            raise InputError(
                f"{self._list(conditions, test)}: no perturbation is measured there, so nothing would be judged"
            )
        if not ((subset == TRAIN) & perturbed).any():
            raise InputError("no perturbation is left to train on; hold out fewer contexts")
        names = {what: self._list(conditions, chosen) for what, chosen in (("test", test), ("val", validation))}
        notes = [
            f"held out: {names['test']} for test, {names['val'] or 'none'} for validation",
            *_new(conditions, subset),
        ]
        if unseen := self._unseen(conditions, subset):
            labels = sorted({str(conditions.perturbation[row]) for row in unseen})
            shown = f"{', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}"
            if self.unseen == "error":
                raise InputError(
                    f"{len(labels)} perturbation(s) of held-out contexts are in no training context: {shown}; "
                    "split.unseen=unused leaves them out, allow holds them out all the same"
                )
            notes.append(f"{len(unseen)} held-out condition(s) are of perturbations in no training context ({shown})")
            if self.unseen == "unused":
                subset[unseen] = UNUSED
                notes[-1] += " and not used"
                if not (subset == TEST).any():
                    raise InputError(
                        f"{names['test']}: no perturbation is measured in a training context too; {notes[-1]}"
                    )
        return self.finish(conditions, subset, notes=notes)

    def _named(self, conditions: Conditions) -> tuple[np.ndarray, np.ndarray]:
        test, validation = (
            contexts_named(conditions, getattr(self, name), field=f"split.{name}") for name in ("test", "val")
        )
        if (test & validation).any():
            raise InputError(f"{self._list(conditions, test & validation)} is named in split.test and in split.val")
        return test, validation

    def _drawn(self, conditions: Conditions) -> tuple[np.ndarray, np.ndarray]:
        blocks = self._blocks(conditions)
        if len(blocks) < 2:
            units = f"value(s) of {self.by}" if self.by else "context(s)"
            raise InputError(
                f"split.number={self.number}: the screen has {sum(map(len, blocks))} {units} with perturbations, and one must "
                "be left to train on"
            )
        check_turn(self.turn, len(blocks), what=f"this screen with split.number={self.number}")
        units = self._units(conditions)
        test = np.isin(units, blocks[self.turn])
        # With two blocks all conditions of one are tested, and training decides by itself when to stop.
        validation = np.isin(units, blocks[(self.turn + 1) % len(blocks)]) & (len(blocks) > 2)
        return test, validation

    def _units(self, conditions: Conditions) -> np.ndarray:
        """(contexts,) what is held out together."""
        if not self.by:
            return np.arange(len(conditions.contexts))
        if self.by not in conditions.covariates:
            raise InputError(f"split.by={self.by!r} is no covariate; {nearest(self.by, conditions.covariates)}")
        return np.array([values[conditions.covariates.index(self.by)] for values in conditions.contexts])

    def _blocks(self, conditions: Conditions) -> list[np.ndarray]:
        """What each turn tests, in the order of the turns; contexts without a perturbation are nobody's turn."""
        units = np.unique(self._units(conditions)[np.unique(conditions.context[~conditions.is_control])])
        order = generator(self.seed, "held_out_contexts").permutation(units)
        return np.array_split(order, max(1, len(units) // self.number))

    def _unseen(self, conditions: Conditions, subset: np.ndarray) -> list[int]:
        """Held-out conditions with a single perturbation that no training condition has."""
        shown = {s for row in np.flatnonzero(subset == TRAIN) for s in conditions.singles[row]}
        return [row for row in np.flatnonzero(subset != TRAIN) if set(conditions.singles[row]) - shown]

    def _list(self, conditions: Conditions, chosen: np.ndarray) -> str:
        codes = np.flatnonzero(chosen)
        shown = ", ".join(conditions.context_name(code) for code in codes[:5])
        return shown + (f", ... ({len(codes)} contexts)" if len(codes) > 5 else "")


def _new(conditions: Conditions, subset: np.ndarray) -> list[str]:
    """A sentence about values of covariates that training shows in control cells alone."""
    levels: dict[bool, set[str]] = {True: set(), False: set()}
    for row in np.flatnonzero(~conditions.is_control):
        values = conditions.contexts[conditions.context[row]]
        levels[subset[row] == TRAIN] |= {f"{c}={v}" for c, v in zip(conditions.covariates, values, strict=True)}
    if not (new := sorted(levels[False] - levels[True])):
        return []
    shown = f"{', '.join(new[:5])}{', ...' if len(new) > 5 else ''}"
    return [
        f"training has no perturbed cell of {shown}: what a model learns of such a value it learns from control cells"
    ]
