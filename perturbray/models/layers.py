"""Layers that two or more models share."""

from torch import Tensor, nn
from torch.nn import functional


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


def squared_error(predicted: Tensor, observed: Tensor) -> Tensor:
    """Mean squared error over cells and genes."""
    return functional.mse_loss(predicted, observed)
