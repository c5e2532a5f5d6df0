"""Splits as PerturBench drew them (release 2025), defects included, for comparison with published numbers.

Each differs from the task without the prefix as its docstring says. PerturBench deals held-out conditions to validation
and test in the order of Python sets, which changes with the hash seed when a context has two covariates or more; that
draw is made by seed here, so a published split itself is had from its file (``saved``).
"""

import random
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.data.splits.base import COMMON, SPLITS, TEST, TRAIN, UNUSED, VAL, Split, SplitSpec, halve
from perturbray.data.splits.combinations import combinations
from perturbray.errors import InputError
from perturbray.randomness import generator

MOST = 200  # conditions of a context that are held out


@dataclass(frozen=True, kw_only=True)
class Published(SplitSpec):
    """What the published tasks share: how held-out conditions and control cells are dealt."""

    fraction: float = 0.3  # of a context's labels, half for validation, half for test
    train_controls: float = 0.5  # share of all control cells; the rest is halved
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"split.fraction={self.fraction}: a share between 0 and 1 of each context's labels")
        if not 0 < self.train_controls < 1:
            raise InputError(
                f"split.train_controls={self.train_controls}: a share between 0 and 1 of the control cells"
            )

    def draw(self, conditions: Conditions) -> Split:
        held = self.hold_out(conditions)
        if not held.any():
            raise InputError(f"split.fraction={self.fraction} of the labels of each context holds none out")
        rng = generator(self.seed, "published")
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        notes = []
        for context in range(len(conditions.contexts)):
            rows = np.flatnonzero(held & (conditions.context == context))
            validation, test = halve(rows, rng)
            subset[validation], subset[test] = VAL, TEST
            if len(rows) == 1:
                subset[rows] = UNUSED
                notes.append(f"{conditions.context_name(context)}: the only condition held out is not used at all")
        if not (subset == TEST).any():
            raise InputError("the only held-out condition of a context is dropped by this task, and there is no other")
        cell = subset[conditions.cell_condition]
        # Over all contexts at once: a small one may be left without.
        rows = np.flatnonzero(conditions.is_control[conditions.cell_condition])
        rows = rng.permutation(rows[np.argsort(conditions.cell_names[rows], kind="stable")])
        cuts = (np.array([self.train_controls, (1 + self.train_controls) / 2]) * len(rows)).astype(int)
        for code, part in zip((TRAIN, VAL, TEST), np.split(rows, cuts), strict=True):
            cell[part] = code
        return Split(condition=subset, cell=cell, stratum=np.full(len(conditions), COMMON), record={"notes": notes})

    @abstractmethod
    def hold_out(self, conditions: Conditions) -> np.ndarray:
        """(conditions,) bool: those that are not trained on."""

    def number(self, labels: int) -> int:
        """How many of a context's labels are held out."""
        return min(int(self.fraction * labels), MOST)


@SPLITS.register("transfer_published")
@dataclass(frozen=True, kw_only=True)
class PublishedTransfer(Published):
    """PerturBench's transfer: in alphabetical order each is held out somewhere until the contexts have their share.

    So the last ones in the alphabet never are (of sci-Plex 3's 188 drugs 17). With max_contexts above 1 a perturbation may
    be held out in all of its contexts, whatever min_train_contexts says. Controls are cut over all contexts at once,
    and a condition that is the only one held out in its context is dropped.
    """

    max_contexts: int = 1
    min_train_contexts: int = 1
    file_order: bool = False  # take a label's contexts as the file first shows them, as published; rows then matter

    def hold_out(self, conditions: Conditions) -> np.ndarray:
        labels_of = np.bincount(conditions.context, minlength=len(conditions.contexts))  # the control label counts
        if not 1 <= self.max_contexts <= len(labels_of):
            raise InputError(
                f"split.max_contexts={self.max_contexts}: 1 to {len(labels_of)}, the contexts of the screen"
            )
        most = np.minimum(self.fraction * labels_of, MOST)
        held, times = np.zeros(len(conditions), dtype=bool), np.zeros(len(labels_of), dtype=int)
        rows_of = {label: np.flatnonzero(conditions.perturbation == label) for label in conditions.perturbations}
        if self.file_order:
            codes, first = np.unique(conditions.cell_condition, return_index=True)
            at = dict(zip(codes.tolist(), first.tolist(), strict=True))
            rows_of = {label: np.array(sorted(rows.tolist(), key=at.get)) for label, rows in rows_of.items()}
        seeds = np.random.RandomState(self.seed)  # the generator of the published draws
        for rows in sorted(rows_of.values(), key=len, reverse=True):
            draw = random.Random(int(seeds.randint(100000)))
            contexts = conditions.context[rows]
            if len(rows) <= self.min_train_contexts or not (pool := rows[times[contexts] < most[contexts]]).size:
                continue
            at_most = max(len(pool) - len(labels_of) + self.max_contexts, 1)
            chosen = draw.sample(pool.tolist(), draw.randint(1, at_most))
            held[chosen] = True
            times[conditions.context[chosen]] += 1
        return held


@SPLITS.register("combination_published")
@dataclass(frozen=True, kw_only=True)
class PublishedCombination(Published):
    """PerturBench's combinations: drawn in each context by itself, so one held out here may be trained on there.

    Whether their singles are measured is not asked. Controls and lone conditions are dealt as in transfer_published.
    """

    fraction: float = 0.7  # of a context's combinations, half for validation, half for test

    def hold_out(self, conditions: Conditions) -> np.ndarray:
        combined = combinations(conditions)
        held = np.zeros(len(conditions), dtype=bool)
        for context in range(len(conditions.contexts)):
            rows = np.flatnonzero(combined & (conditions.context == context))
            held[random.Random(self.seed).sample(rows.tolist(), self.number(len(rows)))] = True
        return held


@SPLITS.register("inverse_combination_published")
@dataclass(frozen=True, kw_only=True)
class PublishedInverseCombination(Published):
    """PerturBench's inverse: singles drawn in each context by itself, whether part of a combination or not.

    So some are unseen perturbations, which no combination explains. Of two that share a combination one is held out.
    Controls and lone conditions are dealt as in transfer_published.
    """

    def hold_out(self, conditions: Conditions) -> np.ndarray:
        combined = combinations(conditions)
        held = np.zeros(len(conditions), dtype=bool)
        for context in range(len(conditions.contexts)):
            here = conditions.context == context
            partners: dict[str, set[str]] = {}
            for row in np.flatnonzero(here & combined):
                for single in conditions.singles[row]:
                    partners.setdefault(single, set()).update(conditions.singles[row])
            rows = np.flatnonzero(here & ~combined)  # the control label is one of them
            most, taken, blocked = self.number(len(rows)), 0, set()
            for row in random.Random(self.seed).sample(rows.tolist(), len(rows)):
                label = str(conditions.perturbation[row])
                if taken < most and label not in blocked:
                    held[row] = not conditions.is_control[row]
                    taken += 1
                    blocked |= partners.get(label, set())
        return held
