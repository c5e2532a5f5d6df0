"""Bilinear ridge: effects as the product of gene loadings, a small matrix, and vectors of perturbations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from perturbray.data.batches import Batch
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError
from perturbray.models.base import MODELS
from perturbray.models.label_vectors import LabelVectors, LabelVectorsNet


@MODELS.register("bilinear_ridge")
@dataclass(frozen=True, kw_only=True)
class BilinearRidge(LabelVectors):
    """Effect = A W b_p + the mean effect, A the genes' loadings, b_p the perturbation's vector (Ahlmann-Eltze et al., 2025).

    One fit for each context. The vector of a combination is the sum of its singles'.
    """

    missing: str = "mean"  # which is the mean effect
    ridge: float = 0.1
    compress: bool = True  # genes by their loadings; False: every gene on its own
    centre: bool = True  # vectors less their training mean; the published form (False) is wrong where that is not zero

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge > 0:
            raise InputError(f"model.ridge={self.ridge}: above 0")

    def build(self, vocabulary: Vocabulary) -> "BilinearRidgeNet":
        return BilinearRidgeNet(self, vocabulary)


def bilinear(effects: Tensor, genes: Tensor | None, labels: Tensor, *, ridge: float) -> Tensor:
    """(genes, width) A W of W = (A'A + r I)^-1 A' E B' (B B' + r I)^-1, from effects E (genes, labels), loadings A
    (genes, components; None: the identity) and vectors B (width, labels)."""
    if genes is None:
        left = effects / (1 + ridge)
    else:
        left = genes @ torch.linalg.solve(genes.T @ genes + ridge * _eye(genes), genes.T @ effects)
    return torch.linalg.solve(labels @ labels.T + ridge * _eye(labels.T), labels @ left.T).T


def _eye(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)


class BilinearRidgeNet(LabelVectorsNet):
    spec: BilinearRidge

    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        shift = torch.zeros_like(effects)
        for context in range(self.contexts):
            here = (self.context == context) & ~self.is_control
            rows = self.trained_in(context)
            loadings = self.loadings(means, rows)
            vectors = self.member @ self.label_vectors(loadings)  # (conditions, width)
            mean = effects[rows].mean(0)
            fitted = rows[~self.absent[rows]] if self.spec.missing in ("drop", "mean") else rows
            if not len(fitted):
                shift[here] = mean
                continue
            centre = vectors[fitted].mean(0) if self.spec.centre else torch.zeros_like(vectors[0])
            weight = bilinear(
                (effects[fitted] - effects[fitted].mean(0)).T,
                loadings if self.spec.compress else None,
                (vectors[fitted] - centre).T,
                ridge=self.spec.ridge,
            )
            shift[here] = (vectors[here] - centre) @ weight.T + effects[fitted].mean(0)
            if self.spec.missing == "mean":
                shift[here & self.absent] = mean
        return shift

    def predict(self, batch: Batch) -> Tensor:
        return batch.control + self.profile[batch.condition]
