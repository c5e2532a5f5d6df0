"""Prediction: what a model hands to a metric. Plain numpy, so that metrics know neither models nor data.

In a sweep its two sides come apart: a ``Truth`` is observed once for all trials that are judged on the same cells, and a
``Predicted`` is what one trial adds to it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Pseudobulk:
    """Mean profiles of groups of cells."""

    mean: np.ndarray  # (groups, genes) float64, mean of log1p-normalised expression
    cells: np.ndarray  # (groups,) int64, cells behind each mean
    linear: np.ndarray | None = None  # (groups, genes) float64, mean of expm1 of it; where known
    variance: np.ndarray | None = None  # (groups, genes) float64, unbiased variance over cells; where known

    def __post_init__(self) -> None:
        if self.mean.ndim != 2 or self.cells.shape != self.mean.shape[:1]:
            raise ValueError(
                f"a pseudobulk needs (groups, genes) and (groups,), not {self.mean.shape}, {self.cells.shape}"
            )
        for name in ("linear", "variance"):
            part = getattr(self, name)
            if part is not None and part.shape != self.mean.shape:
                raise ValueError(f"{name} of a pseudobulk has shape {part.shape}, expected {self.mean.shape}")

    def rows(self, rows: np.ndarray) -> "Pseudobulk":
        """The groups at these row numbers (or where this mask is true), in this order."""
        parts = (getattr(self, name) for name in ("mean", "cells", "linear", "variance"))
        mean, cells, linear, variance = (None if part is None else part[rows] for part in parts)
        return Pseudobulk(mean=mean, cells=cells, linear=linear, variance=variance)


class LostCellsError(RuntimeError):
    """Predicted cells were lost with the process that held them: no fault of the trial, which is to be run again."""


@dataclass(frozen=True)
class LazyCells(Sequence):
    """Matrices of cells, one a condition, each made or fetched when it is looked at: never all in memory at once."""

    makers: tuple[Callable[[], Any], ...]

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, row: int) -> Any:
        return self.makers[row]()


@dataclass(frozen=True)
class Here:
    """Cells that stay in this process: what predictions are kept as where nothing else is at hand."""

    cells: np.ndarray

    def __call__(self) -> np.ndarray:
        return self.cells


@dataclass(frozen=True)
class Slice:
    """Some rows of cells that are kept elsewhere."""

    cells: Callable[[], np.ndarray]
    start: int
    stop: int

    def __call__(self) -> np.ndarray:
        return self.cells()[self.start : self.stop]


def matrices(cells: Sequence[Any], rows: Sequence[int]) -> Sequence[Any]:
    """The matrices at these row numbers; lazy ones stay lazy."""
    if isinstance(cells, LazyCells):
        return LazyCells(tuple(cells.makers[row] for row in rows))
    return tuple(cells[row] for row in rows)


@dataclass(frozen=True, kw_only=True)
class CellSample:
    """Cells behind a prediction, for metrics of distributions and of differential expression.

    Matrices are (cells, genes), dense or CSR, log1p of normalised counts. A sample is random and may be capped, with a
    seed that does not depend on the model, so that all models are compared with the same observed cells.
    """

    predicted: Sequence[Any]  # a matrix a condition
    observed: Sequence[Any]  # a matrix a condition
    control: Sequence[Any]  # a matrix a context: observed control cells
    pca_mean: np.ndarray | None = None  # (genes,) of a PCA fitted once on training cells
    pca_loadings: np.ndarray | None = None  # (genes, components)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted, observed and control pseudobulks of one trial, a row a condition.

    ``context`` holds codes into ``contexts``; ``control`` has a row a context: the observed control cells from which
    the model predicted. Conditions of different context or different ``stratum`` are never compared with one another.
    """

    genes: tuple[str, ...]
    covariates: tuple[str, ...]  # names of the covariates
    contexts: tuple[tuple[str, ...], ...]  # one value a covariate each
    context: np.ndarray  # (conditions,) int64
    perturbation: np.ndarray  # (conditions,) str
    stratum: np.ndarray  # (conditions,) str
    predicted: Pseudobulk  # (conditions, genes); cells = predicted cells behind the mean
    observed: Pseudobulk  # (conditions, genes)
    control: Pseudobulk  # (contexts, genes)
    observed_control: Pseudobulk | None = None  # (contexts, genes) subtracted from the truth where not ``control``
    training_mean: np.ndarray | None = None  # (contexts, genes) unweighted mean over a context's training perturbations
    training_linear: np.ndarray | None = None  # as training_mean, of expm1; where known
    weights: np.ndarray | None = None  # (conditions, genes) gene weights >= 0, from observed cells only
    target_sum: float | None = None  # counts to which each cell was normalised
    cells: CellSample | None = None  # where a metric needs cells

    def __post_init__(self) -> None:
        conditions, genes = len(self.perturbation), len(self.genes)
        for name in ("context", "stratum"):
            if getattr(self, name).shape != (conditions,):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected ({conditions},)")
        for name, rows in (("predicted", conditions), ("observed", conditions), ("control", len(self.contexts))):
            if getattr(self, name).mean.shape != (rows, genes):
                raise ValueError(f"{name} has shape {getattr(self, name).mean.shape}, expected ({rows}, {genes})")
        if self.cells is not None:
            sizes = {"predicted": conditions, "observed": conditions, "control": len(self.contexts)}
            for name, rows in sizes.items():
                if len(getattr(self.cells, name)) != rows:
                    raise ValueError(f"cells.{name} has {len(getattr(self.cells, name))} matrices, expected {rows}")
        optional = (
            *((name, len(self.contexts)) for name in ("training_mean", "training_linear")),
            ("weights", conditions),
        )
        for name, rows in optional:
            part = getattr(self, name)
            if part is not None and part.shape != (rows, genes):
                raise ValueError(f"{name} has shape {part.shape}, expected ({rows}, {genes})")

    def __len__(self) -> int:
        return len(self.perturbation)

    def rows(self, rows: np.ndarray) -> "Prediction":
        """The conditions at these row numbers (or where this mask is true), in this order."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows, dtype=int)
        cells = self.cells
        if cells is not None:
            sides = {name: matrices(getattr(cells, name), rows) for name in ("predicted", "observed")}
            cells = replace(cells, **sides)
        parts = {name: getattr(self, name)[rows] for name in ("context", "perturbation", "stratum")}
        bulks = {name: getattr(self, name).rows(rows) for name in ("predicted", "observed")}
        weights = None if self.weights is None else self.weights[rows]
        return replace(self, **parts, **bulks, weights=weights, cells=cells)

    def groups(self) -> Iterator[np.ndarray]:
        """Row numbers of conditions that may be compared with one another: same context, same stratum."""
        codes = np.unique(np.stack([self.context.astype(str), self.stratum.astype(str)]), axis=1, return_inverse=True)[
            1
        ]
        codes = np.asarray(codes).reshape(-1)
        for code in np.unique(codes):
            yield np.flatnonzero(codes == code)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Observed pseudobulks of the evaluated conditions, of the control cells they are predicted from, and of halves.

    Cells are cut in two ``halvings`` times; the first halving serves the split control source, all serve calibration.
    """

    genes: tuple[str, ...]
    covariates: tuple[str, ...]
    contexts: tuple[tuple[str, ...], ...]
    rows: np.ndarray  # (conditions,) int64, codes of the conditions in the dataset
    context: np.ndarray  # (conditions,) int64
    perturbation: np.ndarray  # (conditions,) str
    observed: Pseudobulk  # (conditions, genes), with variances; with linear means where a metric needs them
    control: Pseudobulk  # (contexts, genes) of the control cells, with linear means and variances
    observed_halves: np.ndarray  # (halvings, 2, conditions, genes) float64; NaN where a half has no cell
    observed_variance: np.ndarray  # (halvings, conditions, genes) float64, unbiased, of the second half
    half_cells: np.ndarray  # (halvings, 2, conditions) int64
    control_halves: np.ndarray  # (halvings, 2, contexts, genes) float64
    control_variance: np.ndarray  # (halvings, contexts, genes) float64, unbiased, of the second half
    control_rows: tuple[np.ndarray, ...]  # row numbers of each context's control cells
    control_weights: tuple[np.ndarray, ...]  # (halvings * 2, controls) float64 each: a row averages a half
    target_sum: float  # counts to which each cell was normalised
    linear_halves: np.ndarray | None = None  # as observed_halves, of expm1; None unless a metric needs linear means
    control_linear_halves: np.ndarray | None = None  # as control_halves, of expm1
    observed_sample: tuple[Any, ...] = ()  # CSR, cells of each condition; empty unless a metric needs cells
    sample_half: tuple[np.ndarray, ...] = ()  # (halvings, cells) int8: the half of each sampled cell of a condition
    control_sample: tuple[Any, ...] = ()  # CSR, control cells of each context
    pca_mean: np.ndarray | None = None  # (genes,) of the PCA fitted on training cells, where a metric needs cells
    pca_loadings: np.ndarray | None = None  # (genes, components)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a trial predicts for conditions of a truth. Halves of controls are averaged by the trial itself, by the same
    arithmetic as its predictions, so that an effect of exactly zero stays exactly zero."""

    rows: np.ndarray  # (conditions,) int64, positions in the truth
    mean: np.ndarray  # (conditions, genes) float64, from all control cells
    cells: np.ndarray  # (conditions,) int64, predicted cells
    control: Pseudobulk  # (contexts, genes)
    halves: np.ndarray  # (halvings, 2, conditions, genes) float64, from each half of the control cells
    control_halves: np.ndarray  # (halvings, 2, contexts, genes) float64
    training_mean: np.ndarray  # (contexts, genes) unweighted mean over a context's training perturbations
    linear: np.ndarray | None = None  # as mean, of expm1; None unless a metric needs linear means
    linear_halves: np.ndarray | None = None  # as halves, of expm1
    control_linear_halves: np.ndarray | None = None  # as control_halves, of expm1
    sample: Sequence[np.ndarray] = ()  # (cells, genes) float32 of each condition; empty unless a metric needs cells


def assemble(truth: Truth, predicted: Predicted, stratum: np.ndarray) -> Prediction:
    """Both sides together: the `reference` control source, all control cells on both sides."""
    at = predicted.rows
    cells = None
    if len(predicted.sample) and truth.observed_sample:
        cells = CellSample(
            predicted=predicted.sample,
            observed=matrices(truth.observed_sample, at),
            control=truth.control_sample,
            pca_mean=truth.pca_mean,
            pca_loadings=truth.pca_loadings,
        )
    return Prediction(
        genes=truth.genes,
        covariates=truth.covariates,
        contexts=truth.contexts,
        context=truth.context[at],
        perturbation=truth.perturbation[at],
        stratum=stratum[at],
        predicted=Pseudobulk(mean=predicted.mean, cells=predicted.cells, linear=predicted.linear),
        observed=truth.observed.rows(at),
        control=predicted.control,
        training_mean=predicted.training_mean,
        target_sum=truth.target_sum,
        cells=cells,
    )
