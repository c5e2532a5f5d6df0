"""Baselines: what a model must beat. Means of training conditions, each condition with equal weight, and no gradient.

``ConditionMeans`` is what all of them share, also those of other modules: a new one says in ``profiles`` what it makes
of the means.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from perturbray.data.batches import Batch, Mode
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError, nearest
from perturbray.models.base import MODELS, Learning, Model, ModelSpec, Need, StreamingModel, Unseen

EVERYTHING: tuple[Unseen, ...] = ("combination", "perturbation", "context")
MISSING = ("transfer", "zero", "error")
WEIGHTS = ("equal", "cells", "similarity")


class ConditionMeans(StreamingModel):
    """Sums of the training cells of every condition, in float64; a baseline says what it makes of the means."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        conditions, genes, contexts = len(vocabulary.context), len(vocabulary.genes), len(vocabulary.one_hot)
        self.register_buffer("sums", torch.zeros(conditions, genes, dtype=torch.float64))
        self.register_buffer("cells", torch.zeros(conditions, dtype=torch.float64))
        self.register_buffer("profile", torch.zeros(conditions, genes))  # what predict adds or returns
        self.contexts = contexts
        for name in ("context", "is_control", "is_train"):
            self.register_buffer(name, torch.from_numpy(getattr(vocabulary, name)), persistent=False)
        # The training condition in which a single perturbation stands alone in a context, -1 where none does.
        alone = torch.full((contexts, len(vocabulary.perturbations)), -1)
        for row in (self.is_train & (self.multi_hot.sum(1) == 1)).nonzero().ravel():
            alone[self.context[row], self.multi_hot[row].argmax()] = row
        self.register_buffer("alone", alone, persistent=False)

    def update(self, batch: Batch) -> None:
        self.sums.index_add_(0, batch.condition, batch.expression.double())
        self.cells.index_add_(0, batch.condition, torch.ones_like(batch.condition, dtype=torch.float64))

    def finish(self) -> None:
        means = self.sums / self.cells.clamp(min=1).unsqueeze(1)
        control = means.new_zeros(self.contexts, means.shape[1])
        control[self.context[self.is_control]] = means[self.is_control]
        self.profile.copy_(self.profiles(means, means - control[self.context], control))

    def restore(self, state: dict[str, Tensor]) -> None:
        for name in ("sums", "cells"):
            getattr(self, name)[: len(state[name])] = state[name]
        self.finish()

    def of_singles(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each context, (singles, genes) values of the training conditions of single perturbations, and (singles,)
        whether the context has the condition; where it has not, the mean over the contexts that do stands in."""
        measured = self.alone >= 0
        total = values.new_zeros(self.alone.shape[1], values.shape[1])
        for here, rows in zip(measured, self.alone, strict=True):
            total[here] += values[rows[here]]
        elsewhere = total / measured.sum(0).clamp(min=1).unsqueeze(1)
        for here, rows in zip(measured, self.alone, strict=True):
            yield torch.where(here.unsqueeze(1), values[rows.clamp(min=0)], elsewhere), here

    def complete(self, measured: Tensor) -> Tensor:
        """(conditions,) whether all singles are known and ``measured``, (contexts, singles) or (singles,)."""
        lacking = self.multi_hot * ~(measured[self.context] if measured.ndim == 2 else measured)
        return torch.from_numpy(self.predictable).to(lacking.device) & (lacking.sum(1) == 0)

    @abstractmethod
    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        """(conditions, genes) float64 from means (conditions, genes), effects (mean minus its context's control mean; only
        rows of training conditions mean anything) and control means (contexts, genes)."""


class NoChangeNet(Model):
    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.predictable = np.ones_like(vocabulary.known)

    def predict(self, batch: Batch) -> Tensor:
        return batch.control


@MODELS.register("no_change")
@dataclass(frozen=True, kw_only=True)
class NoChange(ModelSpec):
    """The control cells themselves; nothing to fit."""

    learning: ClassVar[Learning] = "nothing"
    unseen: ClassVar[tuple[Unseen, ...]] = EVERYTHING

    def build(self, vocabulary: Vocabulary) -> NoChangeNet:
        return NoChangeNet(vocabulary)


class PerturbedMeanNet(ConditionMeans):
    def __init__(self, vocabulary: Vocabulary, *, per_context: bool) -> None:
        super().__init__(vocabulary)
        self.per_context = per_context
        self.predictable = np.ones_like(vocabulary.known)  # whatever the perturbation, the answer is the same

    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        everywhere = means[self.is_train].mean(0)
        if not self.per_context:
            return everywhere.expand_as(means)
        profile = control + effects[self.is_train].mean(0)  # for a context without training perturbations
        for context in range(self.contexts):
            here = self.is_train & (self.context == context)
            if here.any():
                profile[context] = means[here].mean(0)
        return profile[self.context]

    def predict(self, batch: Batch) -> Tensor:
        return self.profile[batch.condition]


@MODELS.register("perturbed_mean")
@dataclass(frozen=True, kw_only=True)
class PerturbedMean(ModelSpec):
    """The mean over the training perturbations of the context: one answer for every perturbation."""

    mode: ClassVar[Mode] = "all"
    learning: ClassVar[Learning] = "one pass"
    needs: ClassVar[tuple[Need, ...]] = ()
    unseen: ClassVar[tuple[Unseen, ...]] = EVERYTHING

    def build(self, vocabulary: Vocabulary) -> PerturbedMeanNet:
        return PerturbedMeanNet(vocabulary, per_context=True)


@MODELS.register("perturbed_mean_global")
@dataclass(frozen=True, kw_only=True)
class PerturbedMeanGlobal(ModelSpec):
    """The mean over all training conditions, whatever the context."""

    mode: ClassVar[Mode] = "all"
    learning: ClassVar[Learning] = "one pass"
    needs: ClassVar[tuple[Need, ...]] = ()
    unseen: ClassVar[tuple[Unseen, ...]] = EVERYTHING

    def build(self, vocabulary: Vocabulary) -> PerturbedMeanNet:
        return PerturbedMeanNet(vocabulary, per_context=False)


class MeanShiftNet(ConditionMeans):
    def __init__(self, vocabulary: Vocabulary, spec: "MeanShift | None" = None) -> None:
        super().__init__(vocabulary)
        self.spec = spec or MeanShift()
        _, label = torch.unique(self.multi_hot, dim=0, return_inverse=True)
        self.register_buffer("label", label, persistent=False)

    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        rows, shift = self.is_train.nonzero().ravel(), torch.zeros_like(effects)
        weight = self.cells[rows] if self.spec.weights == "cells" else torch.ones_like(self.cells[rows])
        shrunk = self._by_label(rows, self.cells[rows])
        shrunk = shrunk / (shrunk + self.spec.shrinkage).clamp(min=1)
        if self.spec.weights != "similarity":
            shift = self._average(rows, weight, effects)[self.label]
        else:
            alike = likeness(control)[:, self.context[rows]]
            for context in range(self.contexts):
                here = self.context == context
                shift[here] = self._average(rows, weight * alike[context], effects)[self.label[here]]
        seen = self._by_label(rows, torch.ones_like(weight)) > 0
        shift = shift * torch.where(seen, shrunk, 1.0)[self.label].unsqueeze(1)
        shift[self.is_control] = 0
        return shift

    def _by_label(self, rows: Tensor, values: Tensor) -> Tensor:
        """(labels, ...) sums over training conditions of one label, whatever their context."""
        total = values.new_zeros(int(self.label.max()) + 1, *values.shape[1:])
        return total.index_add_(0, self.label[rows], values)

    def _average(self, rows: Tensor, weight: Tensor, effects: Tensor) -> Tensor:
        """(labels, genes) weighted means of effects; of a label without training the mean effect."""
        total, share = self._by_label(rows, weight.unsqueeze(1) * effects[rows]), self._by_label(rows, weight)
        return torch.where(share.unsqueeze(1) > 0, total / share.unsqueeze(1), effects[rows].mean(0))

    def predict(self, batch: Batch) -> Tensor:
        return batch.control + self.profile[batch.condition]


def likeness(control: Tensor) -> Tensor:
    """(contexts, contexts) how alike control means are: exp(-d² / 2 mean d²) of their squared distances d²."""
    squared = (control.unsqueeze(1) - control).square().sum(-1)
    apart = squared[~torch.eye(len(control), dtype=torch.bool, device=control.device)]
    return torch.exp(-squared / (2 * apart.mean())) if apart.any() else torch.ones_like(squared)


@MODELS.register("mean_shift")
@dataclass(frozen=True, kw_only=True)
class MeanShift(ModelSpec):
    """Control plus the perturbation's mean effect in the contexts where it was trained on (contexts weigh equally)."""

    mode: ClassVar[Mode] = "all"
    learning: ClassVar[Learning] = "one pass"
    unseen: ClassVar[tuple[Unseen, ...]] = ("context",)

    weights: str = (
        "equal"  # of contexts in the mean; cells: by the condition's; similarity: by likeness of control means
    )
    shrinkage: float = 0.0  # cells k: an effect from n training cells counts n / (n + k)

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise InputError(f"model.weights={self.weights!r}: {nearest(self.weights, WEIGHTS)}")
        if not self.shrinkage >= 0:
            raise InputError(f"model.shrinkage={self.shrinkage}: a number of cells, 0 or more")

    def build(self, vocabulary: Vocabulary) -> MeanShiftNet:
        return MeanShiftNet(vocabulary, self)


class AdditiveNet(ConditionMeans):
    def __init__(self, spec: "Additive", vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.spec, self.labels = spec, vocabulary.singles
        self.register_buffer("whole", self.complete(self.alone >= 0), persistent=False)
        if spec.missing == "transfer":
            self.predictable = self.complete((self.alone >= 0).any(0)).numpy()

    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        shift = torch.zeros_like(effects)
        for context, (values, measured) in enumerate(self.of_singles(effects)):
            if self.spec.missing == "zero":
                values = values * measured.unsqueeze(1)
            here = self.context == context
            shift[here] = self.multi_hot[here].to(values.dtype) @ values
        return shift

    def predict(self, batch: Batch) -> Tensor:
        if self.spec.missing == "error" and not self.whole[batch.condition].all():
            row = int(batch.condition[~self.whole[batch.condition]][0])
            raise InputError(
                f"{'+'.join(self.labels[row])}: a single of it is not measured alone in training in its context; "
                "set model.missing to transfer or zero, or split.missing_single to to_train"
            )
        return batch.control + self.profile[batch.condition]


@MODELS.register("additive")
@dataclass(frozen=True, kw_only=True)
class Additive(ModelSpec):
    """Control plus the effects of a combination's singles, each as measured alone in the context.

    A single that is not measured in the context: its mean effect in other contexts (``transfer``; a combination with a
    single that is measured nowhere is left out), no effect (``zero``), or an ``error``.
    """

    mode: ClassVar[Mode] = "all"
    learning: ClassVar[Learning] = "one pass"
    unseen: ClassVar[tuple[Unseen, ...]] = ("combination", "context")

    missing: str = "transfer"  # transfer | zero | error

    def __post_init__(self) -> None:
        if self.missing not in MISSING:
            raise InputError(f"model.missing={self.missing!r}: {nearest(self.missing, MISSING)}")

    def build(self, vocabulary: Vocabulary) -> AdditiveNet:
        return AdditiveNet(self, vocabulary)


class MatchingMeanNet(ConditionMeans):
    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.predictable = self.complete((self.alone >= 0).any(0)).numpy()

    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        multi_hot = self.multi_hot.to(means.dtype)
        number = multi_hot.sum(1, keepdim=True)
        single = (number == 1).ravel()
        times = (self.alone >= 0).sum(0).clamp(min=1)
        profile = torch.where(single.unsqueeze(1), 0, control[self.context])
        for context, (values, measured) in enumerate(self.of_singles(means)):
            rows = (self.context == context) & (number > 1).ravel()
            profile[rows] = multi_hot[rows] @ values / number[rows]
            # A single label is matched in every context that has it; each adds its share.
            profile[single] += multi_hot[single] @ (values * (measured / times).unsqueeze(1))
        return profile

    def predict(self, batch: Batch) -> Tensor:
        return self.profile[batch.condition]


@MODELS.register("matching_mean")
@dataclass(frozen=True, kw_only=True)
class MatchingMean(ModelSpec):
    """The mean profile of the training conditions that match: of a combination its singles in the context, of a single
    perturbation the same one in other contexts (Viñas Torné et al., Systema, 2025)."""

    mode: ClassVar[Mode] = "all"
    learning: ClassVar[Learning] = "one pass"
    needs: ClassVar[tuple[Need, ...]] = ()
    unseen: ClassVar[tuple[Unseen, ...]] = ("combination", "context")

    def build(self, vocabulary: Vocabulary) -> MatchingMeanNet:
        return MatchingMeanNet(vocabulary)
