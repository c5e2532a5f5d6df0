"""The linear model of PerturBench: a control cell plus one vector a perturbation and a covariate level."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbray.data.batches import Batch
from perturbray.data.vocabulary import Vocabulary
from perturbray.models.base import MODELS, GradientModel, ModelSpec
from perturbray.models.layers import squared_error


@MODELS.register("linear_additive")
@dataclass(frozen=True, kw_only=True)
class LinearAdditive(ModelSpec):
    """softplus(c + W [p; v] + b), as published (Wu et al., arXiv 2408.10609).

    softplus(0) = 0.69, so "no effect" on a gene that is rarely expressed cannot be said: scores stay behind the
    plain linear form on sparse data, and the benchmark's comparisons with it should be read so.
    """

    covariates: bool = True  # a vector for each covariate level beside those of the perturbations

    def build(self, vocabulary: Vocabulary) -> "LinearAdditiveNet":
        return LinearAdditiveNet(self, vocabulary)


class LinearAdditiveNet(GradientModel):
    def __init__(self, spec: LinearAdditive, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.inject = spec.covariates
        inputs = len(vocabulary.perturbations) + (vocabulary.one_hot.shape[1] if self.inject else 0)
        self.effect = nn.Linear(inputs, len(vocabulary.genes))

    def predict(self, batch: Batch) -> Tensor:
        inputs = [self.perturbation(batch)] + ([self.covariates(batch)] if self.inject else [])
        return functional.softplus(batch.control + self.effect(torch.cat(inputs, dim=1)))

    def loss(self, batch: Batch) -> Tensor:
        return squared_error(self.predict(batch), batch.expression)
