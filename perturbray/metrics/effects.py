"""Effects: what of a condition is compared, one vector each. Add one with ``@effect(name)`` on a function of ``Side``.

Both sides, predicted and observed, go through the same function. Effects are in the unit of their input: log1p of
normalised counts (natural logarithm), or log2 for fold changes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from perturbray.errors import InputError
from perturbray.prediction import Prediction, Pseudobulk
from perturbray.registry import Registry

PSEUDOCOUNT = 0.1  # of logfc_logmean
ROUNDING = 1e-9  # a difference below this share of its operands is no effect


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison, a row a condition: its pseudobulk, its control and the prediction it is of."""

    bulk: Pseudobulk  # (conditions, genes)
    control: Pseudobulk  # (conditions, genes): the control of each condition's context
    prediction: Prediction
    target_sum: float | None  # counts to which each cell was normalised

    @property
    def centre(self) -> np.ndarray:
        """Mean over the reference perturbations, the same for both sides, (conditions, genes)."""
        return _centre(self.prediction)

    def linear(self, bulk: Pseudobulk) -> np.ndarray:
        if bulk.linear is None:
            raise InputError("effect 'logfc' needs the linear means of expm1(X); this prediction has only means of X")
        return bulk.linear


@dataclass(frozen=True)
class Effect:
    """From a side to one vector a condition, (conditions, genes)."""

    name: str
    function: Callable[[Side], np.ndarray]
    control: bool = False  # the control's noise enters both sides
    centred: bool = False  # an uninformed prediction points nowhere
    linear: bool = False  # rests on the means of expm1(X)

    def __call__(self, side: Side) -> np.ndarray:
        return self.function(side)

    def pair(self, prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and observed effects, (conditions, genes) each."""
        return tuple(self(side) for side in sides(prediction))


EFFECTS: Registry[Effect] = Registry("effect")


def effect(name: str, **traits: bool) -> Callable[[Callable[[Side], np.ndarray]], Effect]:
    """Register a function of a ``Side`` as an effect; ``traits`` are the other fields of ``Effect``."""

    def keep(function: Callable[[Side], np.ndarray]) -> Effect:
        return EFFECTS.register(name)(Effect(name, function, **traits))

    return keep


def sides(prediction: Prediction) -> tuple[Side, Side]:
    """The predicted and the observed side of a prediction."""
    control = truth_control = prediction.control.rows(prediction.context)
    if prediction.observed_control is not None:
        truth_control = prediction.observed_control.rows(prediction.context)
    shared = {"prediction": prediction, "target_sum": prediction.target_sum}
    return (
        Side(bulk=prediction.predicted, control=control, **shared),
        Side(bulk=prediction.observed, control=truth_control, **shared),
    )


def _centre(prediction: Prediction) -> np.ndarray:
    """μ̄ of each condition's context: over its training perturbations where known, else over its scored conditions."""
    if prediction.training_mean is not None:
        return prediction.training_mean[prediction.context]
    means = prediction.observed.mean
    centre = np.zeros((len(prediction.contexts), means.shape[1]))
    for code in np.unique(prediction.context):
        centre[code] = means[prediction.context == code].mean(axis=0)
    return centre[prediction.context]


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a − b, but exactly zero for a row that differs by rounding only, because an angle to noise is a lottery."""
    difference = a - b
    rounding = _largest(difference) <= ROUNDING * np.maximum(_largest(a), _largest(b))
    difference[np.broadcast_to(rounding, difference.shape[:-1])] = 0.0
    return difference


def _largest(rows: np.ndarray) -> np.ndarray:
    """Largest absolute value along the last axis; no copy of the rows."""
    return np.maximum(rows.max(axis=-1, initial=0), -rows.min(axis=-1, initial=0))


@effect("average")
def average(side: Side) -> np.ndarray:
    """Mean over cells, log1p."""
    return side.bulk.mean


@effect("delta_ctrl", control=True)
def delta_ctrl(side: Side) -> np.ndarray:
    """Mean over cells minus the mean of the context's control cells, log1p."""
    return _difference(side.bulk.mean, side.control.mean)


@effect("delta_mean", centred=True)
def delta_mean(side: Side) -> np.ndarray:
    """Mean over cells minus the unweighted mean over perturbations of the context, log1p.

    The reference set is the training perturbations where the prediction carries their means, else all scored
    conditions (Systema; Mejia et al., arXiv 2506.22641). Both sides subtract the same observed mean.
    """
    return _difference(side.bulk.mean, side.centre)


@effect("logfc_logmean", control=True)
def logfc_logmean(side: Side) -> np.ndarray:
    """log2(m + 0.1) − log2(m₀ + 0.1) of means of logs (PerturBench ``logfc``); not a biological fold change.

    Means are clamped at 0 first: PerturBench gives a gene below −0.1 an effect of 0, a reward for leaving the domain.
    """
    means = np.maximum(side.bulk.mean, 0), np.maximum(side.control.mean, 0)
    return _difference(*(np.log2(mean + PSEUDOCOUNT) for mean in means))


@effect("logfc", control=True, linear=True)
def logfc(side: Side) -> np.ndarray:
    """log2((l + ε)/(l₀ + ε)) of arithmetic means l of expm1(X), always finite; ε = 1e-6 of the target sum."""
    if side.target_sum is None:
        raise InputError("effect 'logfc' needs the target sum of the normalisation; this prediction has none")
    epsilon = 1e-6 * side.target_sum
    means = (np.maximum(side.linear(bulk), 0) for bulk in (side.bulk, side.control))
    return _difference(*(np.log2(mean + epsilon) for mean in means))


@effect("variance")
def variance(side: Side) -> np.ndarray:
    """Unbiased variance over cells, log1p²."""
    if side.bulk.variance is None:
        raise InputError("effect 'variance' needs variances over cells; this prediction has only means")
    return side.bulk.variance
