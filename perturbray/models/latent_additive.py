"""LatentAdditive: controls and perturbations meet as a sum in a latent space."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from perturbray.data.batches import Batch
from perturbray.data.vocabulary import Vocabulary
from perturbray.models.base import MODELS, GradientModel, ModelSpec, cell_width
from perturbray.models.layers import MLP, squared_error


@MODELS.register("latent_additive")
@dataclass(frozen=True, kw_only=True)
class LatentAdditive(ModelSpec):
    """softplus(Dec(Enc(c, v) + PertEnc(p), v)): a shift in a latent space (Wu et al., arXiv 2408.10609)."""

    width: int = 128
    latent_dim: int = 32
    layers: int = 1  # hidden layers of each of the three networks
    dropout: float = 0.1
    covariates: bool = True  # condition encoder and decoder on the covariates
    softplus: bool = True
    embedding: str = ""  # encode this obsm row of the control cell instead of its expression

    def build(self, vocabulary: Vocabulary) -> "LatentAdditiveNet":
        return LatentAdditiveNet(self, vocabulary)


class LatentAdditiveNet(GradientModel):
    def __init__(self, spec: LatentAdditive, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.spec = spec
        genes, levels = len(vocabulary.genes), vocabulary.one_hot.shape[1] if spec.covariates else 0
        shape = {"width": spec.width, "layers": spec.layers, "dropout": spec.dropout}
        self.encoder = MLP(cell_width(spec, vocabulary) + levels, spec.latent_dim, **shape)
        self.perturbation_encoder = MLP(len(vocabulary.perturbations), spec.latent_dim, **shape)
        self.decoder = MLP(spec.latent_dim + levels, genes, **shape)

    def predict(self, batch: Batch) -> Tensor:
        covariates = [self.covariates(batch)] if self.spec.covariates else []
        cells = batch.control_embedding if self.spec.embedding else batch.control
        control = self.encoder(torch.cat([cells, *covariates], dim=1))
        latent = control + self.perturbation_encoder(self.perturbation(batch))
        out = self.decoder(torch.cat([latent, *covariates], dim=1))
        return functional.softplus(out) if self.spec.softplus else out

    def loss(self, batch: Batch) -> Tensor:
        return squared_error(self.predict(batch), batch.expression)
