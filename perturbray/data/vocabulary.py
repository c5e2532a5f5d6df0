"""Vocabulary: what a model may know before it sees a cell. Made from the conditions and the split, never from X."""

from dataclasses import dataclass

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.data.splits import TRAIN, Split


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Genes, single perturbations and covariate levels of training, and tables that turn codes into one-hots."""

    genes: tuple[str, ...]
    perturbations: tuple[str, ...]  # single perturbations seen in training, sorted
    covariates: dict[str, tuple[str, ...]]  # levels of each covariate seen in training, sorted
    multi_hot: np.ndarray  # (conditions, perturbations) float32; control: zeros
    one_hot: np.ndarray  # (contexts, levels of all covariates) float32
    context: np.ndarray  # (conditions,) int64
    is_control: np.ndarray  # (conditions,) bool
    is_train: np.ndarray  # (conditions,) bool, perturbed conditions that are trained on
    known: np.ndarray  # (conditions,) bool: every single perturbation and every covariate level is in training
    train_cells: np.ndarray  # (conditions,) int64, cells that are trained on
    embedding_width: int = 0  # columns of the obsm matrix that a model reads cells from; 0: it reads expression
    singles: tuple[tuple[str, ...], ...] = ()  # (conditions,) names, those that training never shows among them

    @classmethod
    def of(cls, conditions: Conditions, split: Split, *, embedding_width: int = 0) -> "Vocabulary":
        """What training shows of the screen; of the cells themselves only how wide the matrix is that a model reads."""
        train = (split.condition == TRAIN) & ~conditions.is_control
        singles = sorted({single for row in np.flatnonzero(train) for single in conditions.singles[row]})
        # Controls of every context are trained on, so a context's levels are known even where no perturbation is.
        levels = {
            name: tuple(sorted({context[i] for context in conditions.contexts}))
            for i, name in enumerate(conditions.covariates)
        }
        number = {single: i for i, single in enumerate(singles)}
        multi_hot = np.zeros((len(conditions), len(singles)), dtype=np.float32)
        known = np.ones(len(conditions), dtype=bool)
        for row, parts in enumerate(conditions.singles):
            known[row] = all(part in number for part in parts)
            multi_hot[row, [number[part] for part in parts if part in number]] = 1
        one_hot = np.concatenate(
            [
                np.array([[context[i] == level for level in levels[name]] for context in conditions.contexts])
                for i, name in enumerate(conditions.covariates)
            ],
            axis=1,
        ).astype(np.float32)
        return cls(
            genes=conditions.genes,
            perturbations=tuple(singles),
            covariates=levels,
            multi_hot=multi_hot,
            one_hot=one_hot,
            context=conditions.context,
            is_control=conditions.is_control,
            is_train=train,
            known=known,
            train_cells=np.bincount(conditions.cell_condition[split.cell == TRAIN], minlength=len(conditions)),
            embedding_width=embedding_width,
            singles=conditions.singles,
        )
