"""The plain linear model: a control cell plus one vector a perturbation and a covariate level, by least squares."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perturbray.data.batches import Batch, Mode
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError
from perturbray.models.base import MODELS, Learning, ModelSpec
from perturbray.models.baselines import ConditionMeans


@MODELS.register("linear_plain")
@dataclass(frozen=True, kw_only=True)
class LinearPlain(ModelSpec):
    """c + W [p; v] + b by least squares over the training cells, without the softplus of the published form.

    The design is categorical, so that the solution follows from the means and numbers of cells of the conditions: it
    is where gradient descent with random controls would end. The ridge is on the sum over cells and spares b.
    """

    mode: ClassVar[Mode] = "all"
    learning: ClassVar[Learning] = "one pass"

    ridge: float = 1e-3
    covariates: bool = True  # a vector for each covariate level beside those of the perturbations

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise InputError(f"model.ridge={self.ridge}: above 0; 1e-9 is as good as none")

    def build(self, vocabulary: Vocabulary) -> "LinearPlainNet":
        return LinearPlainNet(self, vocabulary)


class LinearPlainNet(ConditionMeans):
    def __init__(self, spec: LinearPlain, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.spec = spec

    def profiles(self, means: Tensor, effects: Tensor, control: Tensor) -> Tensor:
        inputs = [self.multi_hot, self.one_hot[self.context]] if self.spec.covariates else [self.multi_hot]
        ones = self.multi_hot.new_ones(len(self.multi_hot), 1)
        design = torch.cat([*inputs, ones], dim=1).to(means.dtype)
        # Rows weigh as the root of their cells; the ridge is a row for each column but the intercept's. The condition of
        # this system is the root of that of the normal equations.
        root = self.cells[self.is_train].sqrt().unsqueeze(1)
        ridge = self.spec.ridge**0.5 * torch.eye(design.shape[1], dtype=means.dtype, device=means.device)[:-1]
        left = torch.cat([root * design[self.is_train], ridge])
        right = torch.cat([root * effects[self.is_train], effects.new_zeros(len(ridge), effects.shape[1])])
        return design @ torch.linalg.lstsq(left, right).solution

    def predict(self, batch: Batch) -> Tensor:
        return batch.control + self.profile[batch.condition]
