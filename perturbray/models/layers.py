"""Layers, losses and draws that two or more models share."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbray.data.batches import Batch
from perturbray.data.vocabulary import Vocabulary


class MLP(nn.Sequential):
    """``layers`` x [Linear, LayerNorm without affine, ReLU, Dropout], then Linear to ``out`` (PerturBench 2024's form)."""

    def __init__(self, inputs: int, out: int, *, width: int, layers: int, dropout: float = 0.0) -> None:
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [
                nn.Linear(width if i else inputs, width),
                nn.LayerNorm(width, elementwise_affine=False),
                nn.ReLU(),
            ]
            if dropout:
                parts.append(nn.Dropout(dropout))
        super().__init__(*parts, nn.Linear(width if layers else inputs, out))


class GaussianMLP(MLP):
    """An MLP whose output is the mean and the log variance of a normal distribution, (rows, out) each."""

    def __init__(self, inputs: int, out: int, *, width: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__(inputs, 2 * out, width=width, layers=layers, dropout=dropout)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = super().forward(inputs).chunk(2, dim=1)
        return mean, log_variance


def squared_error(predicted: Tensor, observed: Tensor) -> Tensor:
    """Mean squared error over cells and genes."""
    return functional.mse_loss(predicted, observed)


def sum_of_squares(predicted: Tensor, observed: Tensor) -> Tensor:
    """The mean over cells of the sum over genes of squared errors."""
    return (predicted - observed).square().sum(dim=1).mean()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), summed over the last axis: (rows,)."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def drawn(mean: Tensor, log_variance: Tensor, *, training: bool, batch: Batch) -> Tensor:
    """A draw of N(mean, exp(log_variance)): from torch's own generator while training, else from the batch's, and the
    mean where it has none."""
    if not training and batch.generator is None:
        return mean
    generator = None if training else batch.generator
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + (0.5 * log_variance).exp() * noise


def levels_of(vocabulary: Vocabulary) -> list[slice]:
    """The columns of each covariate in the concatenated one-hots; of those alone that have more than one level."""
    found, start = [], 0
    for levels in vocabulary.covariates.values():
        if len(levels) > 1:
            found.append(slice(start, start + len(levels)))
        start += len(levels)
    return found
