"""What every ablation is: a spec that takes from training and leaves what is judged; and the register of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.data.splits import TRAIN, Split, SplitSpec, count
from perturbray.registry import Registry

ABLATIONS: Registry = Registry("ablation")


class AblationSpec(ABC):
    """Less to learn from. The draw depends on the trial's seed; the test conditions do not depend on the level."""

    @abstractmethod
    def apply(self, conditions: Conditions, task: SplitSpec, *, seed: int) -> Split:
        """The task's split with part of the training conditions UNUSED."""

    @property
    def shown(self) -> str:
        """What a trial's name says of it."""
        return str(getattr(self, "level", ""))


def recorded(
    conditions: Conditions, split: Split, condition: np.ndarray, cell: np.ndarray, contexts: Iterable[int]
) -> dict:
    """The record of a split from which something was taken; training perturbations by context, in the order given."""
    train = (condition == TRAIN) & ~conditions.is_control
    number = np.bincount(conditions.context[train], minlength=len(conditions.contexts))
    return {
        **split.record,
        "counts": count(conditions, condition, cell),
        "training_perturbations": {conditions.context_name(c): int(number[c]) for c in contexts},
    }
