"""ModelSpec, the hyperparameters that a user writes, and Model, the network that it builds: the contract of every model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from perturbray.data.batches import Batch, Mode, Unit
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError
from perturbray.registry import Registry
from perturbray.space import Space

MODELS: Registry = Registry("model")

Learning = Literal["gradient", "one pass", "nothing"]
Need = Literal["controls", "embedding", "perturbation vectors"]
Unseen = Literal["combination", "perturbation", "context"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec(ABC):
    """Hyperparameters, and what a model says of itself: on which cells it trains, what it needs, what it extends to."""

    mode: ClassVar[Mode] = "paired"
    unit: ClassVar[Unit] = "cell"  # what a batch is made of; models of sets have a field ``set_size``
    learning: ClassVar[Learning] = "gradient"
    needs: ClassVar[tuple[Need, ...]] = ("controls",)  # what a prediction reads beside the condition
    unseen: ClassVar[tuple[Unseen, ...]] = ("combination",)  # what it predicts that training never shows
    samples: ClassVar[bool] = False  # draws from ``batch.generator`` where there is one
    embedding: ClassVar[str] = ""  # a field of models that can read cells as rows of this obsm matrix

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
        self.predictable = vocabulary.known

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


def cell_width(spec: ModelSpec, vocabulary: Vocabulary) -> int:
    """The width of what a model reads of a cell: its genes, or its row of the obsm matrix that the spec names."""
    if spec.embedding and not vocabulary.embedding_width:
        raise InputError(f"model.embedding={spec.embedding!r}: the dataset has no such obsm matrix")
    return vocabulary.embedding_width if spec.embedding else len(vocabulary.genes)


@dataclass(frozen=True)
class Moment:
    """Where training stands, counted from 0."""

    epoch: int
    step: int  # batches since the first of the first epoch


class Descent(Protocol):
    """What an optimiser has to be made of; ``training.fit.Training`` is one."""

    lr: float
    weight_decay: float


class GradientModel(Model):
    """Learns by descending on ``loss``; or, with several optimisers, on what ``step`` says at each batch.

    While training, what is random in a model draws from torch's own generators, which a trial seeds.
    """

    warmup_epochs: int = 0  # whose weights are no candidates for the best, since they are not yet those of this model

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The mean over cells of what is minimised; a scalar. Without an adversary's part, which has no minimum."""

    def watched(self, batch: Batch) -> dict[str, Tensor]:
        """Means over cells that validation reports: ``loss`` decides on the rate, on stopping and on the best weights."""
        return {"loss": self.loss(batch)}

    def optimisers(self, training: Descent) -> dict[str, torch.optim.Optimizer]:
        """The optimisers by name; the first is that of ``loss``."""
        return {"model": adam(self.parameters(), training)}

    def step(self, batch: Batch, at: Moment) -> tuple[str, Tensor]:
        """The optimiser that moves its parameters at this batch, and what it minimises."""
        return "model", self.loss(batch)

    def compilable(self) -> Iterable[nn.Module]:
        """The parts that ``torch.compile`` may take; not those whose gradient is differentiated once more."""
        return self.children()


def adam(parameters: Iterable[nn.Parameter], training: Descent) -> torch.optim.Adam:
    """The optimiser of all models. Fused: a sixth less time an epoch for small networks on a CPU."""
    return torch.optim.Adam(parameters, lr=training.lr, weight_decay=training.weight_decay, fused=True)


class StreamingModel(Model):
    """Learns in one pass over the training cells of its mode, without a gradient.

    A ``GradientModel`` that is a ``StreamingModel`` too has the pass before its first epoch (a PCA, condition means).
    """

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take in a batch; the order of batches must not matter."""

    @abstractmethod
    def finish(self) -> None:
        """After the last batch."""
