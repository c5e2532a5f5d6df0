"""ModelSpec, the hyperparameters that a user writes, and Model, the network that it builds: the contract of every model."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from perturbray.data.batches import Batch, Mode, Unit
from perturbray.data.vocabulary import Vocabulary
from perturbray.registry import Registry

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


class Model(nn.Module, ABC):
    """Predicts the cells of a condition from control cells of its context."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.register_buffer("multi_hot", torch.from_numpy(vocabulary.multi_hot), persistent=False)
        self.register_buffer("one_hot", torch.from_numpy(vocabulary.one_hot), persistent=False)

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """(cells, genes): each ``batch.control`` cell as if it had been under ``batch.condition``.

        Must not read ``batch.expression``. Values below 0 are allowed; what they are averaged or handed to clips them.
        """

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
