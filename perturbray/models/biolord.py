"""BioLord: a cell as what its attributes do not say, beside one part for each attribute."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbray.data.batches import Batch, Mode
from perturbray.data.vocabulary import Vocabulary
from perturbray.models.base import MODELS, GradientModel, ModelSpec, StreamingModel
from perturbray.models.layers import MLP, sum_of_squares


@MODELS.register("biolord_star")
@dataclass(frozen=True, kw_only=True)
class BioLordStar(ModelSpec):
    """softplus(Dec([Enc(x) + noise; PertEnc(p); one vector a covariate level])), as benchmarked by Wu et al. (arXiv
    2408.10609) after Piran et al. (Nat. Biotechnol. 2024).

    Noise and a penalty keep out of the unknown part, Enc(x), whatever the attributes say. ``as_published`` is the benchmark's
    form: its penalty is a sum over the batch of the covariates' vectors instead, in no unit, and its noise stays on in
    predictions that are given a generator.
    """

    mode: ClassVar[Mode] = "all"

    width: int = 128
    layers: int = 1  # hidden layers of each network
    latent_dim: int = 16  # of each part
    dropout: float = 0.0
    noise: float = 0.1  # standard deviation of what is added to the unknown part
    # Of the unknown part's squares, a mean over cells, in units of the variance of training cells summed over genes: what
    # is gained by keeping a state grows with that. One that explains less of it than penalty_weight * noise**2 is not kept.
    penalty_weight: float = 0.5
    softplus: bool = True
    as_published: bool = False

    def build(self, vocabulary: Vocabulary) -> "BioLordStarNet":
        return BioLordStarNet(self, vocabulary)


class BioLordStarNet(GradientModel, StreamingModel):
    """The pass before the first epoch measures the variance that the penalty is in units of."""

    def __init__(self, spec: BioLordStar, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.spec = spec
        genes, latent = len(vocabulary.genes), spec.latent_dim
        shape = {"width": spec.width, "layers": spec.layers, "dropout": spec.dropout}
        self.encoder = MLP(genes, latent, **shape)
        self.perturbation_encoder = MLP(len(vocabulary.perturbations), latent, **shape)
        self.attributes = nn.ModuleList(nn.Embedding(len(levels), latent) for levels in vocabulary.covariates.values())
        self.decoder = MLP(latent * (2 + len(self.attributes)), genes, **shape)
        ends = np.cumsum([len(levels) for levels in vocabulary.covariates.values()])[:-1]
        level = np.stack([columns.argmax(axis=1) for columns in np.split(vocabulary.one_hot, ends, axis=1)], axis=1)
        self.register_buffer("level", torch.from_numpy(level), persistent=False)  # (contexts, covariates) int64
        # (3, genes): the number of training cells, their sum, and the sum of their squares
        self.register_buffer("moments", torch.zeros(3, genes, dtype=torch.float64), persistent=False)
        self.register_buffer("variance", torch.ones(()))  # of a training cell, summed over genes

    def update(self, batch: Batch) -> None:
        cells = batch.expression.double()
        self.moments += torch.stack([torch.ones_like(cells).sum(dim=0), cells.sum(dim=0), cells.square().sum(dim=0)])

    def finish(self) -> None:
        cells, total, squares = self.moments
        self.variance.copy_((squares / cells - (total / cells).square()).sum())

    def predict(self, batch: Batch) -> Tensor:
        unknown = self.encoder(batch.control)
        if self.spec.as_published and batch.generator is not None:
            noise = torch.randn(unknown.shape, generator=batch.generator, device=unknown.device)
            unknown = unknown + self.spec.noise * noise
        return self.decode(unknown, batch)

    def known_parts(self, batch: Batch) -> list[Tensor]:
        """The vectors of a cell's covariates, (cells, latent) each."""
        level = self.level[batch.context]
        return [embedding(level[:, i]) for i, embedding in enumerate(self.attributes)]

    def decode(self, unknown: Tensor, batch: Batch) -> Tensor:
        """(cells, genes) from an unknown part and the codes of a batch."""
        parts = [unknown, self.perturbation_encoder(self.perturbation(batch)), *self.known_parts(batch)]
        out = self.decoder(torch.cat(parts, dim=1))
        return functional.softplus(out) if self.spec.softplus else out

    def loss(self, batch: Batch) -> Tensor:
        return self.watched(batch)["loss"]

    def watched(self, batch: Batch) -> dict[str, Tensor]:
        """The loss and its parts, as means over cells (but for the published penalty)."""
        spec, unknown = self.spec, self.encoder(batch.expression)
        noisy = unknown + spec.noise * torch.randn_like(unknown) if self.training else unknown
        recon = sum_of_squares(self.decode(noisy, batch), batch.expression)
        if spec.as_published:
            penalty = sum(part.square().sum() for part in self.known_parts(batch))
        else:
            penalty = self.variance * unknown.square().sum(dim=1).mean()
        return {"loss": recon + spec.penalty_weight * penalty, "recon": recon, "penalty": penalty}
