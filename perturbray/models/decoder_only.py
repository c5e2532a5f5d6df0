"""DecoderOnly: from the labels of a condition alone to its expression, and its two ablations."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from perturbray.data.batches import Batch, Mode
from perturbray.data.vocabulary import Vocabulary
from perturbray.models.base import MODELS, GradientModel, ModelSpec, Need, Unseen
from perturbray.models.layers import MLP, squared_error


@MODELS.register("decoder")
@dataclass(frozen=True, kw_only=True)
class DecoderOnly(ModelSpec):
    """softplus(MLP(p, v)): one profile a condition, from no cell at all (Wu et al., arXiv 2408.10609)."""

    mode: ClassVar[Mode] = "perturbed"
    needs: ClassVar[tuple[Need, ...]] = ()
    perturbations: ClassVar[bool] = True
    covariates: ClassVar[bool] = True

    width: int = 128
    layers: int = 1
    softplus: bool = True

    def build(self, vocabulary: Vocabulary) -> "DecoderOnlyNet":
        return DecoderOnlyNet(self, vocabulary)


@MODELS.register("decoder_cov")
@dataclass(frozen=True, kw_only=True)
class DecoderCovariates(DecoderOnly):
    """softplus(MLP(v)): one profile a context. Scores on effects look fair, ranks are at chance: a check of metrics."""

    unseen: ClassVar[tuple[Unseen, ...]] = ("combination", "perturbation")
    perturbations: ClassVar[bool] = False


@MODELS.register("decoder_pert")
@dataclass(frozen=True, kw_only=True)
class DecoderPerturbations(DecoderOnly):
    """softplus(MLP(p)): one profile a perturbation, whatever the context."""

    covariates: ClassVar[bool] = False


class DecoderOnlyNet(GradientModel):
    def __init__(self, spec: DecoderOnly, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.spec = spec
        inputs = len(vocabulary.perturbations) * spec.perturbations + vocabulary.one_hot.shape[1] * spec.covariates
        self.decoder = MLP(inputs, len(vocabulary.genes), width=spec.width, layers=spec.layers)

    def predict(self, batch: Batch) -> Tensor:
        inputs = [self.perturbation(batch)] * self.spec.perturbations + [self.covariates(batch)] * self.spec.covariates
        out = self.decoder(torch.cat(inputs, dim=1))
        return functional.softplus(out) if self.spec.softplus else out

    def loss(self, batch: Batch) -> Tensor:
        return squared_error(self.predict(batch), batch.expression)
