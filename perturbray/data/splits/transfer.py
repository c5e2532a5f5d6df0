"""Covariate transfer: perturbations held out in some contexts and seen in others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.data.splits.base import SPLITS, TEST, TRAIN, VAL, Drawn, Split, check_fields, halve
from perturbray.data.splits.names import contexts_named
from perturbray.data.splits.repeated import check_turn, equal_folds, folds_of
from perturbray.errors import InputError
from perturbray.randomness import generator


@SPLITS.register("transfer")
@dataclass(frozen=True, kw_only=True)
class CovariateTransfer(Drawn):
    """Hold out some perturbations of every context; each is seen in other contexts.

    Every eligible perturbation has the same chance: the context furthest below its share draws next, uniformly. With a
    ``turn`` the conditions are dealt into round(1 / fraction) parts, equal in every context; a part is held out in two
    turns, and its halves are tested in one of them each.
    """

    fraction: float = 0.3  # of a context's perturbations that are held out, half for validation, half for test
    max_contexts: int = 1  # in which one perturbation may be held out
    min_train_contexts: int = 1  # in which a held-out perturbation must stay
    turn: int | None = None  # None: drawn by the seed alone

    def __post_init__(self) -> None:
        check_fields(self, of="each context's perturbations")

    def turns(self, conditions: Conditions) -> int:
        """In how many turns every condition is tested once."""
        return 2 * folds_of(self.fraction)

    def draw(self, conditions: Conditions) -> Split:
        if self.turn is None:
            rng = generator(self.seed, "transfer")
            held = self._hold_out(conditions, rng)
        else:
            check_turn(self.turn, self.turns(conditions), what=f"split.fraction={self.fraction}")
            held = self._part(conditions, generator(self.seed, "transfer", "parts"))
            rng = generator(self.seed, "transfer", "halves", self.turn // 2)
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        for context in range(len(conditions.contexts)):
            rows = np.flatnonzero(held & (conditions.context == context))
            first, second = halve(rows, rng)
            subset[first], subset[second] = (VAL, TEST) if self.turn is None or self.turn % 2 == 0 else (TEST, VAL)
        if not (subset == TEST).any():  # of every context a lone condition, and those are tested in the turn before
            raise InputError(
                f"split.turn={self.turn}: so small a part has no second half to test; raise split.fraction"
            )
        return self.finish(conditions, subset, notes=self._notes(conditions, subset))

    def _hold_out(self, conditions: Conditions, rng: np.random.Generator) -> np.ndarray:
        contexts, perturbed = conditions.context, ~conditions.is_control
        code, limit = self._limit(conditions)
        share = np.bincount(contexts[perturbed], minlength=len(conditions.contexts))
        target = np.round(self.fraction * share).astype(int)
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
            raise self._nothing(conditions)
        return held

    def _part(self, conditions: Conditions, rng: np.random.Generator) -> np.ndarray:
        """(conditions,) bool: the part that is held out in this turn."""
        code, limit = self._limit(conditions)
        perturbed = ~conditions.is_control
        folds = folds_of(self.fraction)
        rows = np.flatnonzero(perturbed & (limit > 0)[code])
        if not len(rows):
            raise self._nothing(conditions)
        often = np.ceil(np.bincount(code[rows], minlength=len(limit)) / folds)
        if (often > limit).any():
            worst = int(np.argmax(often - limit))
            raise InputError(
                f"split.turn={self.turn}: each of {folds} parts holds out {conditions.perturbation[code == worst][0]} in "
                f"{int(often[worst])} of its contexts, and {limit[worst]} are allowed; lower split.fraction or "
                "split.min_train_contexts, or raise split.max_contexts"
            )
        held = np.zeros(len(conditions), dtype=bool)
        held[rows[equal_folds(code[rows], conditions.context[rows], folds, rng) == self.turn // 2]] = True
        return held

    def _limit(self, conditions: Conditions) -> tuple[np.ndarray, np.ndarray]:
        """The code of each condition's label, and in how many contexts each label may be held out."""
        _, code = np.unique(conditions.perturbation, return_inverse=True)
        contexts = np.bincount(code[~conditions.is_control], minlength=code.max() + 1)
        return code, np.maximum(np.minimum(self.max_contexts, contexts - self.min_train_contexts), 0)

    def _nothing(self, conditions: Conditions) -> InputError:
        number = len(conditions.contexts)
        return InputError(
            f"no condition can be held out: the screen has {number} context(s) "
            f"({', '.join(map(conditions.context_name, range(min(number, 5))))}) and a perturbation must stay in "
            f"{self.min_train_contexts} other(s); covariate transfer needs perturbations measured in two contexts"
        )

    def _notes(self, conditions: Conditions, subset: np.ndarray) -> list[str]:
        code, limit = self._limit(conditions)
        labels = np.unique(code[~conditions.is_control])
        fixed = int((limit[labels] == 0).sum())
        notes = [*lone(conditions, subset)]
        if fixed:
            notes.append(
                f"{fixed} of {len(labels)} perturbations are measured in {self.min_train_contexts} context(s) or fewer, "
                "which must stay in training: they are never held out"
            )
        return notes


@SPLITS.register("transfer_into")
@dataclass(frozen=True, kw_only=True)
class TransferInto(Drawn):
    """Hold out most perturbations of named contexts; all other contexts are training.

    Each context draws by itself, so that naming a further one changes nothing in the others. A perturbation is eligible
    where enough of the contexts that are not named have it.
    """

    contexts: tuple[str, ...] = ()  # values joined by ",", or covariate=value for every context that has it
    fraction: float = 0.7  # of a named context's perturbations, half for validation, half for test
    min_train_contexts: int = 1  # contexts that are not named, in which a held-out perturbation must be measured

    def __post_init__(self) -> None:
        check_fields(self, of="each named context's perturbations", whole=True)

    def draw(self, conditions: Conditions) -> Split:
        named = contexts_named(conditions, self.contexts, field="split.contexts")
        if not named.any() or named.all():
            raise InputError(f"split.contexts={self.contexts}: name some of the {len(named)} contexts, but not all")
        perturbed = ~conditions.is_control
        _, code = np.unique(conditions.perturbation, return_inverse=True)
        elsewhere = np.bincount(code[perturbed & ~named[conditions.context]], minlength=code.max() + 1)
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        notes = []
        for context in np.flatnonzero(named):
            here = perturbed & (conditions.context == context)
            rows = np.flatnonzero(here & (elsewhere >= self.min_train_contexts)[code])
            number = min(round(self.fraction * here.sum()), len(rows))
            rng = generator(self.seed, "transfer_into", *conditions.contexts[context])
            subset[(rows := rng.permutation(rows)[:number])] = TEST
            subset[halve(rows, rng)[0]] = VAL
            if number < round(self.fraction * here.sum()):
                notes.append(
                    f"{conditions.context_name(context)}: {number} of {here.sum()} perturbations are held out; the others "
                    f"are measured in fewer than {self.min_train_contexts} context(s) beside the named ones"
                )
        if (subset == TRAIN).all():
            raise InputError(
                f"split.contexts={self.contexts}: no perturbation of these is measured in {self.min_train_contexts} other "
                "context(s)"
            )
        return self.finish(conditions, subset, notes=[*lone(conditions, subset), *notes])


def lone(conditions: Conditions, subset: np.ndarray) -> Sequence[str]:
    """A sentence about contexts of which a single condition is held out, which is tested."""
    held = np.bincount(conditions.context[np.isin(subset, [VAL, TEST])], minlength=len(conditions.contexts))
    if not (held == 1).any():
        return ()
    names = ", ".join(conditions.context_name(context) for context in np.flatnonzero(held == 1)[:5])
    return (
        f"{(held == 1).sum()} context(s) hold out a single condition ({names}{', ...' if (held == 1).sum() > 5 else ''})",
    )
