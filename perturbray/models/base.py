"""ModelSpec, the hyperparameters that a user writes, and Model, the network that it builds: the contract of every model."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from perturbray.data.batches import Batch, Mode, Unit
from perturbray.data.vocabulary import Vocabulary
from perturbray.registry import Registry
from perturbray.space import Space

MODELS: Registry = Registry("model")


@dataclass(frozen=True, kw_only=True)
class ModelSpec(ABC):
    """Hyperparameters, and which cells training shows to the model."""

    mode: ClassVar[Mode] = "paired"
    unit: ClassVar[Unit] = (
        "cell"  # what a batch is made of; of sets, ``set_size``, a field of the model, says how large
    )

    @abstractmethod
    def build(self, vocabulary: Vocabulary) -> "Model":
        """A fresh network, its weights drawn from torch's generator."""

    @classmethod
    def published(cls, dataset: str, *, release: str = "2025", variant: str = "") -> "Published":  # noqa: F821
        """The best published configuration on a dataset, e.g. ``LatentAdditive.published("srivatsan20")``."""
        from perturbray.models.published import published  # which knows the models

        return published(cls, dataset, release=release, variant=variant)

    @classmethod
    def space(cls, kind: str = "small") -> Space:
        """The search space by dotted path: ``small``, for a laptop, or ``published``."""
        from perturbray.models.published import space

        return space(cls, kind)

    def content(self) -> dict[str, str]:
        """For a field that names a file the digest of what it holds, which goes into a trial's key in its place."""
        return {}


class Model(nn.Module, ABC):
    """Predicts the cells of a condition from control cells of its context."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.register_buffer("multi_hot", torch.from_numpy(vocabulary.multi_hot), persistent=False)
        self.register_buffer("one_hot", torch.from_numpy(vocabulary.one_hot), persistent=False)
        # (conditions,) bool: those that the model can predict; of the others a table says that they are unseen.
        self.known = vocabulary.known

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """(cells, genes): each ``batch.control`` cell as if it had been under ``batch.condition``.

        Must not read ``batch.expression``. Values below 0 are allowed; what they are averaged or handed to clips them.
        """

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the state of a fitted model whose vocabulary holds the first of this one's conditions."""
        self.load_state_dict(state)

    def perturbation(self, batch: Batch) -> Tensor:
        """(cells, perturbations) multi-hot of the singles of each cell's condition."""
        return self.multi_hot[batch.condition]

    def covariates(self, batch: Batch) -> Tensor:
        """(cells, levels) one-hots of all covariates, concatenated."""
        return self.one_hot[batch.context]


class GradientModel(Model):
    """Learns by descending on ``loss``."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The mean over cells of what is minimised, and what validation watches; a scalar."""


class StreamingModel(Model):
    """Learns in one pass over the training cells, without a gradient."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take in a batch; the order of batches must not matter."""

    @abstractmethod
    def finish(self) -> None:
        """After the last batch."""
