"""Ablations: what is taken away from training, and how much of it. A new one is an AblationSpec with a name."""

from perturbray.data.ablations.base import ABLATIONS, AblationSpec
from perturbray.data.ablations.imbalance import Imbalance, PublishedImbalance
from perturbray.data.ablations.scaling import DataScaling

__all__ = ["ABLATIONS", "AblationSpec", "DataScaling", "Imbalance", "PublishedImbalance"]
