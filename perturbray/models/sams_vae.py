"""SAMS-VAE: a cell's latent state is its own plus a sparse global offset for each of its perturbations."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbray.data.batches import Batch, Mode
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError, nearest
from perturbray.models.base import MODELS, GradientModel, ModelSpec
from perturbray.models.layers import MLP, GaussianMLP, divergence, drawn, sum_of_squares

BASAL = ("control", "prior")


@MODELS.register("sams_vae")
@dataclass(frozen=True, kw_only=True)
class SAMSVAE(ModelSpec):
    """Dec(z + sum over singles of m * e), with masks m in {0, 1} that are mostly 0 (Bereket and Karaletsos, arXiv
    2311.02794).

    Masks m and offsets e are global, one row a perturbation. The evidence bound counts their divergences once over the
    training cells: a cell carries 1/N of that of its perturbation, N the training cells with it.
    """

    mode: ClassVar[Mode] = "all"
    samples: ClassVar[bool] = True
    sparse: ClassVar[bool] = True

    width: int = 128
    layers: int = 1  # hidden layers of the encoder of cells
    perturbation_layers: int = 1  # of the encoder of offsets
    decoder_layers: int = 1
    latent_dim: int = 32
    dropout: float = 0.0  # of the decoder
    softplus: bool = True
    encoder_covariates: bool = True
    decoder_covariates: bool = True
    mean_field: bool = False  # z does not look at the offset of the cell's perturbation, nor the offset at its mask
    mask_prior: float = 0.1  # probability that a dimension is active
    mask_start: float = 1.0  # the logit at which all masks start; below 0 an offset is hardly seen, and learned late
    temperature: float = 0.5  # of the relaxed masks whose gradient is used; at 2 a support is found in fewer epochs
    basal: str = "control"  # predict from the state of a control cell, or from the prior: then cells are drawn anew

    def __post_init__(self) -> None:
        if self.basal not in BASAL:
            raise InputError(f"model.basal={self.basal!r}: {nearest(self.basal, BASAL)}")
        if not 0 < self.mask_prior < 1:
            raise InputError(f"model.mask_prior={self.mask_prior}: a probability between 0 and 1")

    def build(self, vocabulary: Vocabulary) -> "SAMSVAENet":
        return SAMSVAENet(self, vocabulary)


@MODELS.register("sams_vae_s")
@dataclass(frozen=True, kw_only=True)
class SAMSVAEDense(SAMSVAE):
    """SAMS-VAE (S): no masks, offsets without a distribution, and cells predicted from the prior (Wu et al., arXiv
    2408.10609)."""

    sparse: ClassVar[bool] = False

    basal: str = "prior"


class SAMSVAENet(GradientModel):
    def __init__(self, spec: SAMSVAE, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.spec = spec
        genes, perturbations, latent = len(vocabulary.genes), len(vocabulary.perturbations), spec.latent_dim
        levels = vocabulary.one_hot.shape[1]
        correlated = latent * (not spec.mean_field)
        inputs = genes + correlated + levels * spec.encoder_covariates
        self.encoder = GaussianMLP(inputs, latent, width=spec.width, layers=spec.layers)
        inputs = perturbations + correlated * spec.sparse
        self.offset_encoder = GaussianMLP(inputs, latent, width=spec.width, layers=spec.perturbation_layers)
        self.decoder = MLP(
            latent + levels * spec.decoder_covariates,
            genes,
            width=spec.width,
            layers=spec.decoder_layers,
            dropout=spec.dropout,
        )
        if spec.sparse:
            self.mask_logits = nn.Parameter(torch.full((perturbations, latent), float(spec.mask_start)))
        # (perturbations,) training cells that carry each; at least 1, since each was trained on.
        carriers = np.maximum(vocabulary.train_cells @ vocabulary.multi_hot, 1).astype(np.float32)
        self.register_buffer("carriers", torch.from_numpy(carriers), persistent=False)

    def predict(self, batch: Batch) -> Tensor:
        spec = self.spec
        offsets, _ = self.offsets(batch)
        if spec.basal == "prior":
            nothing = torch.zeros(len(batch), spec.latent_dim, device=self.multi_hot.device)
            z = drawn(nothing, nothing, training=False, batch=batch)
        else:  # a control cell as it was: without an offset
            z = drawn(*self.encode(batch.control, torch.zeros_like(offsets[:1]), batch), training=False, batch=batch)
        return self.decode(z + self.perturbation(batch) @ offsets, batch)

    def offsets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """m * e, (perturbations, latent), and the divergence of each row, (perturbations,).

        While training one draw for the batch, whatever cells are in it; else the more probable masks and the mean.
        """
        spec, rows = self.spec, torch.eye(self.multi_hot.shape[1], device=self.multi_hot.device)
        if not spec.sparse:
            return self.offset_encoder(rows)[0], torch.zeros_like(self.carriers)
        mask = self.masks()
        inputs = rows if spec.mean_field else torch.cat([mask, rows], dim=1)
        mean, log_variance = self.offset_encoder(inputs)
        # Of the batch's generator nothing is drawn: an offset is the same for all cells, not a property of one.
        offset = drawn(mean, log_variance, training=True, batch=batch) if self.training else mean
        return mask * offset, divergence(mean, log_variance) + bernoulli_divergence(self.mask_logits, spec.mask_prior)

    def masks(self) -> Tensor:
        """(perturbations, latent), exactly 0 or 1: draws while training, with the gradient of relaxed ones."""
        logits = self.mask_logits
        if not self.training:
            return (logits > 0).to(logits.dtype)
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        relaxed = torch.sigmoid((logits + uniform.logit()) / self.spec.temperature)
        # In these brackets: (hard + relaxed) - relaxed would be rounded.
        return (relaxed > 0.5).to(logits.dtype) + (relaxed - relaxed.detach())

    def encode(self, cells: Tensor, offset: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and log variance of z, (cells, latent), of cells that carry an offset, (cells or 1, latent)."""
        inputs = [cells]
        if not self.spec.mean_field:
            inputs.append(offset.expand(len(cells), -1))
        if self.spec.encoder_covariates:
            inputs.append(self.covariates(batch))
        return self.encoder(torch.cat(inputs, dim=1))

    def decode(self, latent: Tensor, batch: Batch) -> Tensor:
        """(cells, genes) from z and the offset together."""
        inputs = [latent] + ([self.covariates(batch)] if self.spec.decoder_covariates else [])
        out = self.decoder(torch.cat(inputs, dim=1))
        return functional.softplus(out) if self.spec.softplus else out

    def loss(self, batch: Batch) -> Tensor:
        return self.watched(batch)["loss"]

    def watched(self, batch: Batch) -> dict[str, Tensor]:
        """The negative evidence bound of a normal likelihood of variance 1/2, as a mean over cells, and its parts."""
        perturbation = self.perturbation(batch)
        offsets, global_kl = self.offsets(batch)
        offset = perturbation @ offsets
        mean, log_variance = self.encode(batch.expression, offset, batch)
        z = drawn(mean, log_variance, training=self.training, batch=batch)
        recon = sum_of_squares(self.decode(z + offset, batch), batch.expression)
        kl, global_kl = divergence(mean, log_variance).mean(), (perturbation @ (global_kl / self.carriers)).mean()
        return {"loss": recon + kl + global_kl, "recon": recon, "kl": kl, "global_kl": global_kl}


def bernoulli_divergence(logits: Tensor, prior: float) -> Tensor:
    """KL(Bernoulli(sigmoid(logits)) || Bernoulli(prior)), summed over the last axis: (rows,)."""
    on, log_on, log_off = torch.sigmoid(logits), functional.logsigmoid(logits), functional.logsigmoid(-logits)
    log_prior, log_rest = np.log(prior), np.log1p(-prior)
    return (on * (log_on - log_prior) + (1 - on) * (log_off - log_rest)).sum(dim=1)
