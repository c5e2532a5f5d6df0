"""Baselines: what a model must beat. Means of training conditions, each condition with equal weight, and no gradient."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perturbray.data.batches import Batch, Mode
from perturbray.data.vocabulary import Vocabulary
from perturbray.models.base import MODELS, Learning, Model, ModelSpec, Need, StreamingModel, Unseen

EVERYTHING: tuple[Unseen, ...] = ("combination", "perturbation", "context")


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

    def update(self, batch: Batch) -> None:
        self.sums.index_add_(0, batch.condition, batch.expression.double())
        self.cells.index_add_(0, batch.condition, torch.ones_like(batch.condition, dtype=torch.float64))

    def finish(self) -> None:
        means = self.sums / self.cells.clamp(min=1).unsqueeze(1)
        control = means.new_zeros(self.contexts, means.shape[1])
        control[self.context[self.is_control]] = means[self.is_control]
        self.profile.copy_(self.profiles(means, means - control[self.context], control))

    @abstractmethod
    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        """(conditions, genes) from means (conditions, genes), effects (mean minus its context's control mean; only
        rows of training conditions mean anything) and control means (contexts, genes)."""


class NoChangeNet(Model):
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
    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        _, label = torch.unique(self.multi_hot, dim=0, return_inverse=True)
        self.register_buffer("label", label, persistent=False)

    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        labels = int(self.label.max()) + 1
        total = means.new_zeros(labels, means.shape[1])
        total.index_add_(0, self.label[self.is_train], effects[self.is_train])
        times = torch.bincount(self.label[self.is_train], minlength=labels)
        shift = total / times.clamp(min=1).unsqueeze(1)
        shift[times == 0] = effects[self.is_train].mean(0)  # a label without training: the mean effect
        shift = shift[self.label]
        shift[self.is_control] = 0
        return shift

    def predict(self, batch: Batch) -> Tensor:
        return batch.control + self.profile[batch.condition]


@MODELS.register("mean_shift")
@dataclass(frozen=True, kw_only=True)
class MeanShift(ModelSpec):
    """Control plus the perturbation's mean effect in the contexts where it was trained on (contexts weigh equally)."""

    mode: ClassVar[Mode] = "all"
    learning: ClassVar[Learning] = "one pass"
    unseen: ClassVar[tuple[Unseen, ...]] = ("context",)

    def build(self, vocabulary: Vocabulary) -> MeanShiftNet:
        return MeanShiftNet(vocabulary)
