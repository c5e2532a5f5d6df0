"""Perturbations that training never shows, in any context."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.data.splits.base import COMMON, SPLITS, TEST, TRAIN, VAL, Apart, Drawn, Split, check_fields
from perturbray.data.splits.repeated import draw_units, folds_of
from perturbray.errors import InputError
from perturbray.randomness import generator


@SPLITS.register("unseen_perturbation")
@dataclass(frozen=True, kw_only=True)
class UnseenPerturbation(Drawn):
    """Hold out single perturbations in every context, and every combination that contains one.

    Only models that know perturbations by more than their name can predict them. Combinations form a stratum of their
    own: those of a held-out and a seen perturbation are an easier task than the held-out ones alone.
    """

    apart: ClassVar[Apart] = "single"

    fraction: float = 0.2  # of the perturbations measured alone, half for validation, half for test
    turn: int | None = None  # None: drawn by the seed alone; of round(1 / fraction) parts, each tested by halves

    def __post_init__(self) -> None:
        check_fields(self, of="the perturbations")

    def turns(self, conditions: Conditions) -> int:
        """In how many turns every perturbation is tested once."""
        return 2 * folds_of(self.fraction)

    def draw(self, conditions: Conditions) -> Split:
        names = sorted({singles[0] for singles in conditions.singles if len(singles) == 1})
        number = min(max(1, round(self.fraction * len(names))), len(names) - 1)
        if number < 1:
            raise InputError(f"{len(names)} perturbation(s) measured alone: two are needed to hold one out")
        rng = generator(self.seed, "unseen_perturbation")
        drawn = draw_units(names, number=number, folds=folds_of(self.fraction), turn=self.turn, rng=rng)
        validation, test = map(set, drawn)
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        stratum = np.full(len(conditions), COMMON, dtype="U11")
        for row, singles in enumerate(conditions.singles):
            if test & set(singles):
                subset[row] = TEST
            elif validation & set(singles):
                subset[row] = VAL
            if len(singles) > 1:
                stratum[row] = "combination"
        return self.finish(conditions, subset, stratum=stratum)
