"""Splits: which conditions a model trains on, is stopped by, and is judged on. A new task is one SplitSpec with a name.

``base`` says what a split is and what holds of every one; a module each for the tasks, and one for their published forms.
"""

from perturbray.data.splits.base import (
    SPLITS,
    SUBSETS,
    TEST,
    TRAIN,
    UNUSED,
    VAL,
    Split,
    SplitSpec,
    check,
    checked,
    count,
    cut_controls,
)
from perturbray.data.splits.combinations import Combination, InverseCombination
from perturbray.data.splits.contexts import HeldOutContexts
from perturbray.data.splits.given import Manual, Saved
from perturbray.data.splits.published import (
    PublishedCombination,
    PublishedInverseCombination,
    PublishedTransfer,
)
from perturbray.data.splits.repeated import repeats, rotation
from perturbray.data.splits.summary import summary
from perturbray.data.splits.transfer import CovariateTransfer, TransferInto
from perturbray.data.splits.unseen import UnseenPerturbation

__all__ = [
    "SPLITS",
    "SUBSETS",
    "TEST",
    "TRAIN",
    "UNUSED",
    "VAL",
    "Combination",
    "CovariateTransfer",
    "HeldOutContexts",
    "InverseCombination",
    "Manual",
    "PublishedCombination",
    "PublishedInverseCombination",
    "PublishedTransfer",
    "Saved",
    "Split",
    "SplitSpec",
    "TransferInto",
    "UnseenPerturbation",
    "check",
    "checked",
    "count",
    "cut_controls",
    "repeats",
    "rotation",
    "summary",
]
