"""Imbalance: ever more of the training conditions in ever fewer contexts, and how that is measured."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from perturbray.data.ablations.base import ABLATIONS, AblationSpec, recorded
from perturbray.data.dataset import Conditions
from perturbray.data.splits import TEST, TRAIN, UNUSED, VAL, Split, SplitSpec
from perturbray.errors import InputError, nearest
from perturbray.randomness import generator


def imbalance(counts: np.ndarray) -> float:
    """1 - H / ln k, H the entropy of the shares of k contexts: 0 for equal counts, towards 1 when one has all.

    >>> float(round(imbalance(np.array([188, 117, 50])), 3))
    0.109
    """
    counts = np.asarray(counts, dtype=float)
    if len(counts) < 2 or counts.sum() == 0:
        return 0.0
    share = counts[counts > 0] / counts.sum()
    return float(max(0.0, 1 + (share * np.log(share)).sum() / np.log(len(counts))))


def geometric_counts(base: int, ratio: float, *, contexts: int, minimum: int) -> np.ndarray:
    """n_i = max(minimum, round(base ratio^i)), never above base."""
    return np.minimum(base, np.maximum(minimum, np.round(base * ratio ** np.arange(contexts)).astype(int)))


def geometric_shares(total: int, ratios: np.ndarray, *, contexts: int, minimum: int) -> np.ndarray:
    """Whole numbers nearest to proportions ratio^i that sum to ``total``, none below ``minimum``, (ratios, contexts).

    >>> geometric_shares(180, np.array([1.0, 0.415]), contexts=3, minimum=2).tolist()
    [[60, 60, 60], [113, 47, 20]]
    """
    weight = ratios[:, None] ** np.arange(contexts)
    low = np.zeros(weight.shape, dtype=bool)
    for _ in range(contexts):  # what the minimum adds to small contexts is taken from the others in proportion
        left = total - minimum * low.sum(axis=1, keepdims=True)
        share = np.where(low, minimum, left * weight / np.where(low, 0, weight).sum(axis=1, keepdims=True))
        low |= share < minimum
    share = np.round(share, 9)
    counts = np.floor(share).astype(int)
    place = np.argsort(np.argsort(counts - share, axis=1, kind="stable"), axis=1, kind="stable")
    return counts + (place < total - counts.sum(axis=1, keepdims=True))


@lru_cache(maxsize=64)  # every trial asks
def options(base: int, *, contexts: int, minimum: int, total: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Distinct geometric counts, none above ``base``, (options, contexts), and their imbalance; of one total, where given."""
    ratios = np.unique(np.concatenate([np.linspace(0, 1, 2001), (np.arange(base + 1) + 0.5) / max(base, 1)]).clip(0, 1))
    counts = np.array([geometric_counts(base, r, contexts=contexts, minimum=minimum) for r in ratios])
    if total is not None:
        shared = geometric_shares(total, ratios, contexts=contexts, minimum=minimum)
        counts = np.concatenate([shared[shared[:, 0] <= base], counts[counts.sum(axis=1) == total]])
    counts = np.unique(counts, axis=0)
    return counts, np.array([imbalance(one) for one in counts])


def replicates(contexts: int, *, asked: int = 0, least: int = 3) -> range:
    """Seeds: as many as ``asked``, or enough for a rotated order to make each context the largest equally often.

    >>> list(replicates(2))
    [0, 1, 2, 3]
    """
    return range(asked or -(-least // contexts) * contexts)


def rotated(order: list[int], number: int) -> list[int]:
    """The order in replicate ``number``: each context is first in turn, and the others follow in every second round
    backwards, so that with three contexts six replicates are all the orders there are.

    >>> [rotated([0, 1, 2], number) for number in range(6)]
    [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [1, 0, 2], [2, 1, 0]]
    """
    turn, first = divmod(number, len(order))
    others = order[first + 1 :] + order[:first]
    return [order[first], *(others[::-1] if turn % 2 else others)]


@ABLATIONS.register("imbalance")
@dataclass(frozen=True, kw_only=True)
class Imbalance(AblationSpec):
    """Training perturbations spread ever more unequally over the contexts, on test conditions that stay the same.

    The counts are geometric in the stated order of contexts, with the ratio solved for. Where the total is ``fixed`` what
    one context gains the others lose; else level 0 has ``base`` in every context, and all but the first lose. Each context
    keeps a prefix of one seeded order, so that the levels are nested. In that order a perturbation which another context
    holds out comes early, so that it stays in training somewhere; test and validation conditions that lose their
    perturbation at a level up to the ``highest`` form the stratum ``lost`` and are scored apart where they can be.
    """

    level: float = 0.0
    highest: float = 0.3  # the highest level of the sweep: decides which test conditions are common to all levels
    minimum: int = 2  # training perturbations that a context keeps
    base: int = 0  # the most training perturbations of a context; 0: as many as the smallest context has
    fixed: bool = False  # every level has as many training conditions in all; else their number falls with the level
    total: int = 0  # of training conditions where fixed; 0: the most that the highest level admits
    order: tuple[str, ...] = ()  # contexts from large to small, values joined by ","; default: by cells, then name
    rotate: bool = False  # the seed decides which context comes first
    tolerance: float = 0.02  # by which the measured imbalance may miss the level

    def apply(self, conditions: Conditions, task: SplitSpec, *, seed: int) -> Split:
        split = task.split(conditions)
        train = (split.condition == TRAIN) & ~conditions.is_control
        order = self._order(conditions)
        order = rotated(order, seed % (2 * len(order))) if self.rotate else order
        available = np.bincount(conditions.context[train], minlength=len(order))
        base = self.base or int(available.min())
        if base > available.min():
            small = conditions.context_name(int(np.argmin(available)))
            raise InputError(f"ablation.base={base}: context {small} has only {available.min()} training perturbations")
        counts = self.solve(self.level, base=base, contexts=len(order))
        fewest = np.minimum(counts, self._fewest(base=base, contexts=len(order)))
        kept, lost = self._keep(conditions, split, order, counts, fewest, seed)

        condition = split.condition.copy()
        condition[train & ~kept] = UNUSED
        stratum = split.stratum.copy().astype(object)
        held = np.isin(condition, [VAL, TEST]) & lost
        stratum[held] = "lost"
        condition[held & (condition == VAL)] = UNUSED  # early stopping looks at the same conditions at every level
        cell = split.cell.copy()
        perturbed = ~conditions.is_control[conditions.cell_condition]
        cell[perturbed] = condition[conditions.cell_condition[perturbed]]
        record = {**recorded(conditions, split, condition, cell, order), "imbalance": imbalance(counts)}
        return replace(split, condition=condition, cell=cell, stratum=stratum.astype(str), record=record)

    def solve(self, level: float, *, base: int, contexts: int, name: str = "level") -> np.ndarray:
        """The counts whose measured imbalance is nearest to a level. Raises InputError if none is near."""
        counts, measured = self._options(base=base, contexts=contexts)
        # Of equally near ones the one with more data; rounding makes the steps of a small screen coarse.
        best = np.lexsort((-counts.sum(axis=1), np.round(np.abs(measured - level), 12)))[0]
        if abs(measured[best] - level) > self.tolerance:
            around = np.sort(measured)
            near = ", ".join(f"{m:.3f}" for m in around[np.argsort(np.abs(around - level))[:3]])
            total = f", {counts[0].sum()} in all" if self.fixed else ""
            raise InputError(
                f"ablation.{name}={level}: this screen reaches imbalance {measured.min():.3f} to {measured.max():.3f} "
                f"({contexts} contexts, {base} training perturbations each{total}, at least {self.minimum} kept); "
                f"nearest: {near}"
            )
        return counts[best]

    def _fewest(self, *, base: int, contexts: int) -> np.ndarray:
        """What each place in the order keeps at every level up to the highest, (contexts,)."""
        highest = self.solve(self.highest, base=base, contexts=contexts, name="highest")
        counts, measured = self._options(base=base, contexts=contexts)
        return counts[measured <= imbalance(highest)].min(axis=0)

    def _options(self, *, base: int, contexts: int) -> tuple[np.ndarray, np.ndarray]:
        if contexts < 2:
            raise InputError("imbalance needs at least two contexts; give --covariate-keys a column with two values")
        if self.total and not self.fixed:
            raise InputError(f"ablation.total={self.total}: without ablation.fixed=true the total falls with the level")
        total = self._total(base=base, contexts=contexts) if self.fixed else None
        return options(base, contexts=contexts, minimum=min(self.minimum, base), total=total)

    def _total(self, *, base: int, contexts: int) -> int:
        """Training conditions of every level. Raises InputError for a number that contexts cannot share."""
        if not self.total:
            free = replace(self, fixed=False)
            return int(free.solve(self.highest, base=base, contexts=contexts, name="highest").sum())
        least = contexts * min(self.minimum, base)
        if not least <= self.total <= contexts * base:
            raise InputError(
                f"ablation.total={self.total}: {contexts} contexts of {min(self.minimum, base)} to {base} training "
                f"perturbations have {least} to {contexts * base}"
            )
        return self.total

    def _order(self, conditions: Conditions) -> list[int]:
        cells = np.bincount(conditions.context[conditions.cell_condition], minlength=len(conditions.contexts))
        if not self.order:
            return sorted(range(len(cells)), key=lambda c: (-cells[c], conditions.contexts[c]))
        codes = {",".join(values): code for code, values in enumerate(conditions.contexts)}
        for name in self.order:
            if name not in codes:
                raise InputError(f"ablation.order: no context {name!r}; {nearest(name, codes)}")
        if sorted(self.order) != sorted(codes):
            raise InputError(f"ablation.order must name every context once: {', '.join(codes)}")
        return [codes[name] for name in self.order]

    def _keep(self, conditions, split, order, counts, fewest, seed) -> tuple[np.ndarray, np.ndarray]:
        """(conditions,) bool twice: kept for training, and without training at the highest level."""
        train = (split.condition == TRAIN) & ~conditions.is_control
        _, label = np.unique(conditions.perturbation, return_inverse=True)
        tested, validated = (
            np.bincount(label[split.condition == subset], minlength=label.max() + 1) > 0 for subset in (TEST, VAL)
        )
        covered = np.zeros(label.max() + 1, dtype=bool)
        kept = np.zeros(len(conditions), dtype=bool)
        for context, n, least in zip(order, counts, fewest, strict=True):
            rows = np.flatnonzero(train & (conditions.context == context))
            rows = generator(seed, "imbalance", *conditions.contexts[context]).permutation(rows)
            need = np.where(covered[label[rows]], 0, 2 * tested[label[rows]] + validated[label[rows]])
            rows = rows[np.argsort(-need, kind="stable")]
            kept[rows[:n]] = True
            covered[label[rows[:least]]] = True
        return kept, ~covered[label]


@ABLATIONS.register("imbalance_published")
@dataclass(frozen=True, kw_only=True)
class PublishedImbalance(AblationSpec):
    """The triples of PerturBench's slides, in its order: conditions are dropped first, and the rest is split.

    So the test set shrinks and changes with the level, and so does the amount of data: kept for comparison.
    """

    level: float = 0.0  # what the slides call it
    counts: tuple[int, ...] = (188, 188, 188)  # perturbations kept in each context, in the order of ``order``
    order: tuple[str, ...] = ()  # contexts from large to small; default: by cells, then name

    LEVELS = ((188, 188, 188), (188, 117, 50), (188, 81, 30), (188, 30, 30))

    @property
    def shown(self) -> str:
        return str(self.counts)

    def apply(self, conditions: Conditions, task: SplitSpec, *, seed: int) -> Split:
        order = Imbalance(order=self.order)._order(conditions)
        if len(order) != len(self.counts):
            raise InputError(
                f"ablation.counts={self.counts} is for {len(self.counts)} contexts; this screen has {len(order)}"
            )
        drop = np.zeros(len(conditions), dtype=bool)
        for context, n in zip(order, self.counts, strict=True):
            rows = np.flatnonzero((conditions.context == context) & ~conditions.is_control)
            if n > len(rows):
                name = conditions.context_name(context)
                raise InputError(
                    f"ablation.counts={self.counts}: context {name} has {len(rows)} perturbations, not {n}"
                )
            drop[generator(seed, "published", *conditions.contexts[context]).permutation(rows)[n:]] = True
        split = task.split(_without(conditions, drop))
        condition, stratum = (
            np.full(len(conditions), UNUSED, dtype=np.int8),
            np.full(len(conditions), "common", dtype=object),
        )
        condition[~drop] = split.condition
        stratum[~drop] = split.stratum
        cell = np.full(len(conditions.cell_condition), UNUSED, dtype=np.int8)
        cell[~drop[conditions.cell_condition]] = split.cell
        record = {
            **recorded(conditions, split, condition, cell, order),
            "imbalance": imbalance(np.array(self.counts)),
        }
        return Split(condition=condition, cell=cell, stratum=stratum.astype(str), record=record)


def _without(conditions: Conditions, drop: np.ndarray) -> Conditions:
    """The screen without some conditions and their cells."""
    code = np.cumsum(~drop, dtype=np.int32) - 1
    cells = ~drop[conditions.cell_condition]
    return replace(
        conditions,
        context=conditions.context[~drop],
        perturbation=conditions.perturbation[~drop],
        singles=tuple(singles for singles, gone in zip(conditions.singles, drop, strict=True) if not gone),
        cell_condition=code[conditions.cell_condition[cells]],
        cell_names=conditions.cell_names[cells],
    )
