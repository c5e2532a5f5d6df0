"""CPA: a cell as the sum of what an adversary can tell nothing from, its perturbation and its covariates."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbray.data.batches import Batch, Mode
from perturbray.data.vocabulary import Vocabulary
from perturbray.models.base import MODELS, Descent, GradientModel, ModelSpec, Moment, adam, cell_width
from perturbray.models.layers import MLP, GaussianMLP, divergence, drawn, levels_of, sum_of_squares


@MODELS.register("cpa")
@dataclass(frozen=True, kw_only=True)
class CPA(ModelSpec):
    """Dec(z + PertEnc(p) + sum of CovEnc(v)), z ~ Enc(x) such that classifiers find neither p nor v in it (Lotfollahi et
    al., Mol. Syst. Biol. 2023; as benchmarked by Wu et al., arXiv 2408.10609).

    Encoder and classifiers take turns, each with an optimiser of its own: of ``adversary_steps`` batches one moves the
    encoder against the classifiers, the others move the classifiers. (PerturBench of 2024 had one optimiser for both and
    added the classifiers' loss, which trains the encoder to help them: its best values are not for this model.) The
    reconstruction is a sum over genes, so that the adversary's weight is small beside it.
    """

    mode: ClassVar[Mode] = "all"
    samples: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    width: int = 128
    layers: int = 1  # hidden layers of encoder, after its first, and of decoder
    latent_dim: int = 32
    perturbation_layers: int = 1
    covariate_layers: int = 1
    dropout: float = 0.0
    softplus: bool = False
    variational: bool = True  # z is drawn; if not, it is the encoder's mean, and there is no divergence
    kl_weight: float = 1.0
    kl_warmup_epochs: int = 0  # over which the divergence's weight rises from 0
    warmup_epochs: int = 3  # without the adversary
    adversary_width: int = 64
    adversary_layers: int = 2
    adversary_steps: int = 5  # one of so many batches moves the encoder, the others the classifiers
    adversary_weight: float = 3.0
    adversary_cap: bool = False  # no reward for classifiers that are worse than chance
    penalty_weight: float = 0.1  # of the classifiers' squared gradient by z
    embedding: str = ""  # encode this obsm row of a cell instead of its expression

    def build(self, vocabulary: Vocabulary) -> "CPANet":
        return CPANet(self, vocabulary)


@MODELS.register("cpa_noadv")
@dataclass(frozen=True, kw_only=True)
class CPANoAdversary(CPA):
    """CPA without its adversary: what the divergence alone keeps out of z."""

    adversarial: ClassVar[bool] = False


class CPANet(GradientModel):
    def __init__(self, spec: CPA, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.spec = spec
        self.warmup_epochs = spec.warmup_epochs if spec.adversarial else 0
        self.columns = levels_of(vocabulary)
        levels = [columns.stop - columns.start for columns in self.columns]
        perturbations, latent = len(vocabulary.perturbations), spec.latent_dim
        shape = {"width": spec.width, "dropout": spec.dropout}
        self.encoder = GaussianMLP(cell_width(spec, vocabulary), latent, layers=spec.layers + 1, **shape)
        self.perturbation_encoder = MLP(perturbations, latent, layers=spec.perturbation_layers, **shape)
        self.covariate_encoders = nn.ModuleList(
            MLP(width, latent, layers=spec.covariate_layers, **shape) for width in levels
        )
        self.decoder = MLP(latent, len(vocabulary.genes), layers=spec.layers, **shape)
        # Last, so that what goes before starts from the same weights with and without them.
        self.classifiers = nn.ModuleList(
            MLP(latent, classes, width=spec.adversary_width, layers=spec.adversary_layers)
            for classes in [perturbations + 1, *levels] * spec.adversarial
        )
        self.adversarial = spec.adversarial and spec.adversary_weight > 0

    def predict(self, batch: Batch) -> Tensor:
        z = self.encode(batch.control_embedding if self.spec.embedding else batch.control, batch)[0]
        return self.decode(z, batch)

    def encode(self, cells: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The basal state z of cells, (cells, latent), and the divergence of its distribution, (cells,)."""
        mean, log_variance = self.encoder(cells)
        if not self.spec.variational:
            return mean, torch.zeros_like(mean[:, 0])
        return drawn(mean, log_variance, training=self.training, batch=batch), divergence(mean, log_variance)

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """(cells, genes) from a basal state and the codes of a batch."""
        covariates = self.covariates(batch)
        latent = z + self.perturbation_encoder(self.perturbation(batch))
        for columns, encoder in zip(self.columns, self.covariate_encoders, strict=True):
            latent = latent + encoder(covariates[:, columns])
        out = self.decoder(latent)
        return functional.softplus(out) if self.spec.softplus else out

    def loss(self, batch: Batch) -> Tensor:
        return self.terms(batch)["loss"]

    def terms(self, batch: Batch, *, kl_share: float = 1.0) -> dict[str, Tensor]:
        """The loss and its parts, and the basal states that they are of."""
        z, kl = self.encode(self.observed(batch), batch)
        recon, kl = sum_of_squares(self.decode(z, batch), batch.expression), kl.mean()
        return {"loss": recon + kl_share * self.spec.kl_weight * kl, "recon": recon, "kl": kl, "z": z}

    def observed(self, batch: Batch) -> Tensor:
        """What the encoder sees of the cells themselves."""
        return batch.embedding if self.spec.embedding else batch.expression

    def watched(self, batch: Batch) -> dict[str, Tensor]:
        terms = self.terms(batch)
        z = terms.pop("z")
        return terms | ({"adversary": self.entropy(z, batch)} if self.adversarial else {})

    def entropy(self, z: Tensor, batch: Batch, *, cap: bool = False) -> Tensor:
        """The classifiers' cross-entropies, summed: of the singles of a cell, control among them, and each covariate."""
        total = torch.zeros((), device=z.device)
        for classifier, target in zip(self.classifiers, self.targets(batch), strict=True):
            entropy = functional.cross_entropy(classifier(z), target)
            total = total + (entropy.clamp(max=math.log(target.shape[1])) if cap else entropy)
        return total

    def targets(self, batch: Batch) -> list[Tensor]:
        """What each classifier is to say, (cells, classes) with rows that sum to 1."""
        perturbation, covariates = self.perturbation(batch), self.covariates(batch)
        control = (perturbation.sum(dim=1, keepdim=True) == 0).to(perturbation.dtype)
        singles = torch.cat([control, perturbation], dim=1)
        return [singles / singles.sum(dim=1, keepdim=True), *(covariates[:, columns] for columns in self.columns)]

    def penalty(self, z: Tensor) -> Tensor:
        """The mean over cells and latent dimensions of the squared gradient of a classifier's summed logits by ``z``,
        summed over classifiers; ``z`` must require a gradient."""
        total = torch.zeros((), device=z.device)
        for classifier in self.classifiers:
            (gradient,) = torch.autograd.grad(classifier(z).sum(), z, create_graph=True)
            total = total + gradient.square().mean()
        return total

    def optimisers(self, training: Descent) -> dict[str, torch.optim.Optimizer]:
        ours = [p for name, p in self.named_parameters() if not name.startswith("classifiers.")]
        adversary = {"adversary": adam(self.classifiers.parameters(), training)} if self.adversarial else {}
        return {"model": adam(ours, training), **adversary}

    def step(self, batch: Batch, at: Moment) -> tuple[str, Tensor]:
        spec = self.spec
        if self.adversarial and at.epoch >= spec.warmup_epochs and at.step % spec.adversary_steps:
            with torch.no_grad():
                z, _ = self.encode(self.observed(batch), batch)
            z.requires_grad_()
            return "adversary", (spec.adversary_weight * self.entropy(z, batch) + spec.penalty_weight * self.penalty(z))
        share = min(1.0, at.epoch / spec.kl_warmup_epochs) if spec.kl_warmup_epochs else 1.0
        terms = self.terms(batch, kl_share=share)
        if not self.adversarial or at.epoch < spec.warmup_epochs:
            return "model", terms["loss"]
        reward = self.entropy(terms["z"], batch, cap=spec.adversary_cap)
        return "model", terms["loss"] - spec.adversary_weight * reward

    def compilable(self) -> Iterable[nn.Module]:
        return self.encoder, self.perturbation_encoder, *self.covariate_encoders, self.decoder
