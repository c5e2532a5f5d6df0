"""Combinations from the single perturbations, and single perturbations from the combinations."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.data.splits.base import SPLITS, TEST, TRAIN, VAL, Apart, Drawn, Split, check_fields, halve
from perturbray.data.splits.repeated import draw_units, folds_of
from perturbray.errors import InputError, nearest
from perturbray.randomness import generator

MISSING_SINGLES = ("error", "to_train", "allow")


@SPLITS.register("combination")
@dataclass(frozen=True, kw_only=True)
class Combination(Drawn):
    """Hold out combinations, in every context that has them; all single perturbations stay in training.

    ``missing_single`` says what becomes of a combination with a single that is not measured alone in each of its
    contexts: an ``error``; it stays in training (``to_train``); or it may be held out all the same (``allow``).
    """

    apart: ClassVar[Apart] = "perturbation"

    fraction: float = 0.7  # of the combinations that may be held out, half for validation, half for test
    missing_single: str = "error"  # error | to_train | allow
    turn: int | None = None  # None: drawn by the seed alone; of round(1 / fraction) parts, each tested by halves

    def __post_init__(self) -> None:
        check_fields(self, of="the combinations", whole=True)
        if self.missing_single not in MISSING_SINGLES:
            raise InputError(
                f"split.missing_single={self.missing_single!r}: {nearest(self.missing_single, MISSING_SINGLES)}"
            )

    def turns(self, conditions: Conditions) -> int:
        """In how many turns every combination is tested once."""
        return 2 * folds_of(self.fraction, least=1)

    def draw(self, conditions: Conditions) -> Split:
        labels, all_of_them = self._eligible(conditions)
        validation, test = draw_units(
            labels,
            number=max(1, round(self.fraction * len(labels))),
            folds=folds_of(self.fraction, least=1),
            turn=self.turn,
            rng=generator(self.seed, "combination"),
        )
        notes = []
        if len(labels) < all_of_them:
            notes.append(
                f"{all_of_them - len(labels)} of {all_of_them} combinations lack a single and stay in training"
            )
        return self.finish(conditions, of_labels(conditions, validation, test), notes=notes)

    def _eligible(self, conditions: Conditions) -> tuple[list[str], int]:
        """Labels of combinations that may be held out, sorted, and the number of all."""
        combined = combinations(conditions)
        alone = measured_alone(conditions)
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
        if self.missing_single != "to_train":
            return labels, len(labels)
        kept = [label for label in labels if label not in lacking]
        if not kept:
            raise InputError(
                f"none of the {len(lacking)} combinations has all its singles measured alone, so none can be held out"
            )
        return kept, len(labels)


@SPLITS.register("inverse_combination")
@dataclass(frozen=True, kw_only=True)
class InverseCombination(Drawn):
    """Hold out single perturbations, in every context; training shows each in combinations with others that it shows alone.

    A single is eligible where each of its contexts has such a combination. Of two singles that share a combination one
    at most is held out, so that what is asked can be learnt. They are taken in a random order, passing over partners of
    those before, so that singles with as many partners have the same chance, and one with many of them less.
    """

    apart: ClassVar[Apart] = "perturbation"

    fraction: float = 0.3  # of the singles that may be held out, as far as partners allow; half validation, half test

    def __post_init__(self) -> None:
        check_fields(self, of="the single perturbations of combinations")

    def draw(self, conditions: Conditions) -> Split:
        partners = self._partners(conditions)
        rng = generator(self.seed, "inverse_combination")
        number, held, blocked = max(1, round(self.fraction * len(partners))), [], set()
        for single in rng.permutation(sorted(partners)).tolist():
            if single not in blocked and len(held) < number:
                held.append(single)
                blocked |= partners[single]
        notes = []
        if len(held) < number:
            notes.append(
                f"{len(held)} of the {number} singles asked for are held out: every other one shares a combination with one"
            )
        return self.finish(conditions, of_labels(conditions, *halve(np.array(held), rng)), notes=notes)

    def _partners(self, conditions: Conditions) -> dict[str, set[str]]:
        """Eligible singles, each with all those that it shares a combination with."""
        alone, partners = measured_alone(conditions), {}
        shown: set[tuple[int, str]] = set()  # contexts and singles that a combination with known others contains
        for row in np.flatnonzero(combinations(conditions)):
            context, singles = int(conditions.context[row]), set(conditions.singles[row])
            for single in singles:
                partners.setdefault(single, set()).update(singles - {single})
                if all((context, other) in alone for other in singles - {single}):
                    shown.add((context, single))
        found = {
            single: others
            for single, others in partners.items()
            if (places := {place for place in alone if place[1] == single}) and places <= shown
        }
        if not found:
            raise InputError(
                "no single perturbation can be held out: none is measured alone and, in each of its contexts, in a "
                "combination whose other singles are measured alone there"
            )
        return found


def combinations(conditions: Conditions) -> np.ndarray:
    """(conditions,) bool: those of two perturbations or more. Raises InputError where there are none."""
    combined = np.array([len(singles) > 1 for singles in conditions.singles])
    if not combined.any():
        raise InputError(
            "no label of this screen is a combination, so none can be held out; labels are split at the dataset's "
            f"delimiter, e.g. {conditions.perturbations[0]!r} is taken as one perturbation"
        )
    return combined


def measured_alone(conditions: Conditions) -> set[tuple[int, str]]:
    """Contexts, by code, and the single perturbations that they show alone."""
    return {
        (int(context), singles[0])
        for context, singles in zip(conditions.context, conditions.singles, strict=True)
        if len(singles) == 1
    }


def of_labels(conditions: Conditions, validation: Iterable[str], test: Iterable[str]) -> np.ndarray:
    """(conditions,) int8: labels held out wherever they are, the rest for training."""
    subset = np.full(len(conditions), TRAIN, dtype=np.int8)
    subset[np.isin(conditions.perturbation, list(validation))] = VAL
    subset[np.isin(conditions.perturbation, list(test))] = TEST
    return subset
