"""Ablations: what is taken away from training, and how much of it. A new one is an AblationSpec with a name."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.data.splits import TEST, TRAIN, UNUSED, VAL, Split, SplitSpec, count
from perturbray.errors import InputError, nearest
from perturbray.randomness import generator
from perturbray.registry import Registry

ABLATIONS: Registry = Registry("ablation")


class AblationSpec(ABC):
    """Less to learn from. The draw depends on the trial's seed; the test conditions do not depend on the level."""

    @abstractmethod
    def apply(self, conditions: Conditions, task: SplitSpec, *, seed: int) -> Split:
        """The task's split with part of the training conditions UNUSED."""


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


@ABLATIONS.register("imbalance")
@dataclass(frozen=True, kw_only=True)
class Imbalance(AblationSpec):
    """Training perturbations spread ever more unequally over the contexts, on test conditions that stay the same.

    Level 0 has ``base`` training perturbations in every context (default: as many as the smallest context has). At a
    level the counts are geometric in the stated order of contexts, with the ratio solved for, and each context keeps
    a prefix of one seeded order, so that the levels are nested. In that order a perturbation which another context
    holds out comes early, so that it stays in training somewhere; test and validation conditions that lose their
    perturbation at the ``highest`` level form the stratum ``lost`` and are scored apart where they can be.
    """

    level: float = 0.0
    highest: float = 0.3  # the highest level of the sweep: decides which test conditions are common to all levels
    minimum: int = 2  # training perturbations that a context keeps
    base: int = 0  # training perturbations of a context at level 0; 0: as many as the smallest context has
    order: tuple[str, ...] = ()  # contexts from large to small, values joined by ","; default: by cells, then name
    tolerance: float = 0.02  # by which the measured imbalance may miss the level

    def apply(self, conditions: Conditions, task: SplitSpec, *, seed: int) -> Split:
        split = task.split(conditions)
        train = (split.condition == TRAIN) & ~conditions.is_control
        order = self._order(conditions)
        available = np.bincount(conditions.context[train], minlength=len(order))
        base = self.base or int(available.min())
        if base > available.min():
            small = conditions.context_name(int(np.argmin(available)))
            raise InputError(f"ablation.base={base}: context {small} has only {available.min()} training perturbations")
        counts = self.solve(self.level, base=base, contexts=len(order))
        fewest = counts
        if self.highest > self.level:
            fewest = self.solve(self.highest, base=base, contexts=len(order), name="highest")
        kept, lost = self._keep(conditions, split, order, counts, np.minimum(counts, fewest), seed)

        condition = split.condition.copy()
        condition[train & ~kept] = UNUSED
        stratum = split.stratum.copy().astype(object)
        held = np.isin(condition, [VAL, TEST]) & lost
        stratum[held] = "lost"
        condition[held & (condition == VAL)] = UNUSED  # early stopping looks at the same conditions at every level
        cell = split.cell.copy()
        perturbed = ~conditions.is_control[conditions.cell_condition]
        cell[perturbed] = condition[conditions.cell_condition[perturbed]]
        names = [conditions.context_name(c) for c in order]
        record = {
            **split.record,
            "counts": count(conditions, condition, cell),
            "imbalance": imbalance(counts),
            "training_perturbations": dict(zip(names, counts.tolist(), strict=True)),
        }
        return replace(split, condition=condition, cell=cell, stratum=stratum.astype(str), record=record)

    def solve(self, level: float, *, base: int, contexts: int, name: str = "level") -> np.ndarray:
        """The geometric counts whose measured imbalance is nearest to a level. Raises InputError if none is near."""
        if contexts < 2:
            raise InputError("imbalance needs at least two contexts; give --covariate-keys a column with two values")
        ratios = np.unique(
            np.concatenate([np.linspace(0, 1, 2001), (np.arange(base + 1) + 0.5) / max(base, 1)]).clip(0, 1)
        )
        options = np.unique(
            [geometric_counts(base, r, contexts=contexts, minimum=min(self.minimum, base)) for r in ratios], axis=0
        )
        measured = np.array([imbalance(option) for option in options])
        # Of equally near ones the one with more data; rounding makes the steps of a small screen coarse.
        best = np.lexsort((-options.sum(axis=1), np.round(np.abs(measured - level), 12)))[0]
        if abs(measured[best] - level) > self.tolerance:
            around = np.sort(measured)
            near = ", ".join(f"{m:.3f}" for m in around[np.argsort(np.abs(around - level))[:3]])
            raise InputError(
                f"ablation.{name}={level}: this screen reaches imbalance {measured.min():.3f} to {measured.max():.3f} "
                f"({contexts} contexts, {base} training perturbations each, at least {self.minimum} kept); nearest: {near}"
            )
        return options[best]

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

    counts: tuple[int, ...] = (188, 188, 188)  # perturbations kept in each context, in the order of ``order``
    order: tuple[str, ...] = ()  # contexts from large to small; default: by cells, then name

    LEVELS = ((188, 188, 188), (188, 117, 50), (188, 81, 30), (188, 30, 30))

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
            **split.record,
            "counts": count(conditions, condition, cell),
            "imbalance": imbalance(np.array(self.counts)),
            "training_perturbations": {
                conditions.context_name(c): int(
                    ((condition == TRAIN) & ~conditions.is_control & (conditions.context == c)).sum()
                )
                for c in order
            },
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
