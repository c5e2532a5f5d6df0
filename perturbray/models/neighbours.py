"""Nearest neighbours: an effect from those of the training perturbations whose vectors are most alike."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from perturbray.data.batches import Batch
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError
from perturbray.models.base import MODELS
from perturbray.models.label_vectors import LabelVectors, LabelVectorsNet


@MODELS.register("knn_embedding")
@dataclass(frozen=True, kw_only=True)
class KnnEmbedding(LabelVectors):
    """Control plus a weighted mean of the effects of the nearest training singles of the context, by their vectors.

    Weights are softmax(cosine / temperature) over the nearest; the effect of a combination is the sum over its singles.
    A context without training singles takes their mean effects in other contexts.
    """

    neighbours: int = 10
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1:
            raise InputError(f"model.neighbours={self.neighbours}: at least 1")
        if not self.temperature > 0:
            raise InputError(f"model.temperature={self.temperature}: above 0")

    def build(self, vocabulary: Vocabulary) -> "KnnEmbeddingNet":
        return KnnEmbeddingNet(self, vocabulary)


class KnnEmbeddingNet(LabelVectorsNet):
    spec: KnnEmbedding

    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        shift = torch.zeros_like(effects)
        somewhere = (self.alone >= 0).any(0)
        described = self.found[self.trained]
        if not (somewhere & described).any():
            raise InputError("knn_embedding: no training perturbation with a vector stands alone in any context")
        for context, (values, measured) in enumerate(self.of_singles(effects)):
            vectors = functional.normalize(self.label_vectors(self.loadings(means, self.trained_in(context))), dim=1)
            near = measured & described
            near = near if near.any() else somewhere & described
            likeness = vectors @ vectors[self.trained[near]].T  # (names, candidates)
            best, which = likeness.topk(min(self.spec.neighbours, likeness.shape[1]), dim=1)
            weight = torch.zeros_like(likeness).scatter(1, which, torch.softmax(best / self.spec.temperature, dim=1))
            here = self.context == context
            shift[here] = self.member[here] @ (weight @ values[near])
        return shift

    def predict(self, batch: Batch) -> Tensor:
        return batch.control + self.profile[batch.condition]
