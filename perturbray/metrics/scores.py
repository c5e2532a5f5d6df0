"""Scores: how near a predicted vector is to the observed one. Add one with ``@score(name, ...)`` on a function.

A score broadcasts over all but the last axis, so one definition serves a pair of vectors, a row against all, and, with
shapes (predictions, 1, genes) and (1, observations, genes), all pairs. It works in float64, and wherever two scores are
almost equal on direct differences: equal predictions have bitwise equal scores, so ties stay ties.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from perturbray.registry import Registry

SMALL = 1_000_000  # products of numbers in all pairs: below, a matrix product gains nothing
CONSTANT = 1e-12  # a spread below this share of the largest entry is rounding


@dataclass(frozen=True)
class Score:
    """A score of the last axis, with its direction and its behaviour where a vector holds no information.

    ``needs`` names what a vector must have to be scored: ``"norm"`` (not all zeros), ``"spread"`` (not constant) or
    nothing. ``chance`` is what an uninformed prediction of centred effects gets, None where that depends on the data.
    """

    name: str
    function: Callable[..., np.ndarray]
    best: float
    higher_is_better: bool
    worst: float
    chance: float | None = None
    needs: str | None = None
    needs_prediction: bool = True  # False: only the truth needs it
    scale_free: bool = False  # the size of the prediction does not matter: never show it alone
    weighted: bool = False  # takes gene weights as a third argument

    def __call__(self, predicted: np.ndarray, observed: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """(..., genes) x (..., genes) -> (...); NaN where the truth, 0 where the prediction has no information."""
        predicted, observed = np.asarray(predicted, dtype=float), np.asarray(observed, dtype=float)
        if self.weighted:
            weights = np.ones(observed.shape[-1]) if weights is None else np.asarray(weights, dtype=float)
            return self.function(predicted, observed, weights)
        return self.function(predicted, observed)

    def status(self, predicted: np.ndarray, observed: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Why a value is undefined or 0: ``constant_truth``, ``constant_prediction``, ``no_weight``, else ``""``."""
        predicted, observed = np.asarray(predicted, dtype=float), np.asarray(observed, dtype=float)
        shape = np.broadcast_shapes(predicted.shape[:-1], observed.shape[:-1])
        status = np.full(shape, "", dtype=object)
        if self.needs:
            weights = weights if self.weighted else None
            if self.needs_prediction:
                status[np.broadcast_to(_empty(predicted, self.needs, weights), shape)] = "constant_prediction"
            status[np.broadcast_to(_empty(observed, self.needs, weights), shape)] = "constant_truth"
        if self.weighted and weights is not None:
            status[np.broadcast_to(np.asarray(weights).sum(axis=-1) <= 0, shape)] = "no_weight"
        return status.astype(str)

    def distance(self, predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """The score as a distance for ranks: smaller is nearer; a vector without direction is at distance 1 to all."""
        value = self(predicted, observed)
        if not self.higher_is_better:
            return value
        return np.where(np.isnan(value), 1.0, 1.0 - value) if self.scale_free else 1.0 - value


SCORES: Registry[Score] = Registry("score")


def score(name: str, *, best: float, higher_is_better: bool, **traits: object) -> Callable:
    """Register a function of the last axis as a score; ``traits`` are the other fields of ``Score``."""
    worst = traits.pop("worst", -np.inf if higher_is_better else np.inf)

    def keep(function: Callable[..., np.ndarray]) -> Score:
        thing = Score(name, function, best, higher_is_better, worst, **traits)
        return SCORES.register(name)(thing)

    return keep


def _all_pairs(predicted: np.ndarray, observed: np.ndarray) -> bool:
    return predicted.ndim == observed.ndim == 3 and predicted.shape[1] == 1 and observed.shape[0] == 1


def _squares(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Σ(a−b)² over the last axis; all pairs without holding their (predictions, observations, genes) differences."""
    if _all_pairs(predicted, observed):
        return _squares_of_pairs(predicted[:, 0], observed[0])
    difference = predicted - observed
    return np.einsum("...g,...g->...", difference, difference)


def _squares_of_pairs(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """All pairs by one matrix product, and directly wherever digits matter, (predictions, observations).

    A rank compares the distance of a pair i, j with those of the right pairs i, i and j, j. Pairs nearer to one of them
    than the product is exact, and pairs so close that it cancels, are computed directly, so that ties stay ties to the
    last bit. With many such pairs, or another shape, all of them are.
    """
    if len(predicted) != len(observed) or predicted.shape[0] * predicted.size < SMALL:
        return cdist(predicted, observed, "sqeuclidean")
    a = predicted - observed
    right = np.einsum("ij,ij->i", a, a)
    centre = observed.mean(axis=0)
    a, b = np.subtract(predicted, centre, out=a), observed - centre
    norms = np.einsum("ij,ij->i", a, a)[:, None] + np.einsum("ij,ij->i", b, b)
    squares = a @ b.T
    squares *= -2
    squares += norms
    doubtful = squares < 1e-5 * norms
    for own in (right[:, None], right):
        doubtful |= np.abs(squares - own) < 1e-9 * (norms + own)
    if not doubtful.mean() < 0.05:  # NaN too
        return cdist(predicted, observed, "sqeuclidean")
    pairs = np.nonzero(doubtful)
    step = max(1, 2**22 // predicted.shape[1])
    for start in range(0, len(pairs[0]), step):
        i, j = pairs[0][start : start + step], pairs[1][start : start + step]
        difference = predicted[i] - observed[j]
        squares[i, j] = np.einsum("ij,ij->i", difference, difference)
    return squares


def _absolutes(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Σ|a−b| over the last axis, as ``_squares``."""
    if _all_pairs(predicted, observed):
        return cdist(predicted[:, 0], observed[0], "cityblock")
    return np.abs(predicted - observed).sum(axis=-1)


def _empty(vector: np.ndarray, needs: str, weights: np.ndarray | None = None) -> np.ndarray:
    """Where a vector is all zeros (``needs="norm"``) or constant up to rounding (``"spread"``)."""
    if vector.shape[-1] == 0:
        return np.ones(vector.shape[:-1], dtype=bool)
    if weights is not None:  # only weighted genes count
        first = np.take_along_axis(vector, np.argmax(np.broadcast_to(weights, vector.shape), axis=-1)[..., None], -1)
        vector = np.where(np.asarray(weights) > 0, vector, first)
    largest = np.abs(vector).max(axis=-1)
    if needs == "norm":
        return largest == 0
    return np.ptp(vector, axis=-1) <= CONSTANT * largest


def _centred(vector: np.ndarray) -> np.ndarray:
    return vector - vector.mean(axis=-1, keepdims=True) if vector.shape[-1] else vector


def _unit(vector: np.ndarray) -> np.ndarray:
    """Scaled to length 1 by its largest entry first, so that neither tiny nor huge effects under- or overflow."""
    largest = np.abs(vector).max(axis=-1, keepdims=True, initial=0)
    vector = vector / np.where(largest > 0, largest, 1)
    norm = np.sqrt(np.einsum("...g,...g->...", vector, vector))[..., None]
    return vector / np.where(norm > 0, norm, 1)


def _angle(predicted: np.ndarray, observed: np.ndarray, no_prediction: np.ndarray, no_truth: np.ndarray) -> np.ndarray:
    """a·b/(‖a‖‖b‖) as 1 − ‖a/‖a‖ − b/‖b‖‖²/2, which is exactly 1 for equal vectors and exact near it."""
    value = np.clip(1 - _squares(_unit(predicted), _unit(observed)) / 2, -1, 1)
    value = np.where(no_prediction, 0.0, value)
    return np.where(no_truth, np.nan, value)


@score("mse", best=0.0, higher_is_better=False)
def mse(predicted, observed):
    """Mean squared difference over genes, (..., genes) -> (...)."""
    return _squares(predicted, observed) / observed.shape[-1]


@score("rmse", best=0.0, higher_is_better=False)
def rmse(predicted, observed):
    """Root of the mean squared difference over genes, (..., genes) -> (...)."""
    return np.sqrt(_squares(predicted, observed) / observed.shape[-1])


@score("mae", best=0.0, higher_is_better=False)
def mae(predicted, observed):
    """Mean absolute difference over genes, (..., genes) -> (...)."""
    return _absolutes(predicted, observed) / observed.shape[-1]


@score("l1", best=0.0, higher_is_better=False)
def l1(predicted, observed):
    """Sum of absolute differences over genes, (..., genes) -> (...)."""
    return _absolutes(predicted, observed)


@score("l2", best=0.0, higher_is_better=False)
def l2(predicted, observed):
    """Euclidean distance, (..., genes) -> (...)."""
    return np.sqrt(_squares(predicted, observed))


@score("cosine", best=1.0, higher_is_better=True, worst=-1.0, chance=0.0, needs="norm", scale_free=True)
def cosine(predicted, observed):
    """Cosine of the angle between two effects, (..., genes) -> (...). Blind to the size of the prediction."""
    return _angle(predicted, observed, _empty(predicted, "norm"), _empty(observed, "norm"))


@score("pearson", best=1.0, higher_is_better=True, worst=-1.0, chance=0.0, needs="spread", scale_free=True)
def pearson(predicted, observed):
    """Correlation over genes, (..., genes) -> (...). Blind to the size and to an offset of the prediction."""
    constant = _empty(predicted, "spread"), _empty(observed, "spread")
    return _angle(_centred(predicted), _centred(observed), *constant)


@score("spearman", best=1.0, higher_is_better=True, worst=-1.0, chance=0.0, needs="spread", scale_free=True)
def spearman(predicted, observed):
    """Correlation of mid-ranks over genes, (..., genes) -> (...). Blind to any increasing change of the prediction."""
    constant = _empty(predicted, "spread"), _empty(observed, "spread")
    ranks = (_centred(rankdata(_rounded(vector), axis=-1)) for vector in (predicted, observed))
    return _angle(*ranks, *constant)


def _rounded(vector: np.ndarray) -> np.ndarray:
    """Without the last digits, so that genes of equal effect tie whatever the order in which cells were added."""
    scale = np.abs(vector).max(axis=-1, keepdims=True, initial=0)
    return np.round(vector / np.where(scale > 0, scale, 1), 12)


@score("r2", best=1.0, higher_is_better=True, chance=0.0, needs="spread", needs_prediction=False)
def r2(predicted, observed):
    """1 − Σ(b−a)²/Σ(b−b̄)² with the truth b, (..., genes) -> (...).

    The truth comes first in the usual signature of R²; with the arguments exchanged, as in PerturBench, shrinking a
    prediction lowers the score and inflating it raises it.
    """
    centred = _centred(observed)
    total = np.einsum("...g,...g->...", centred, centred)
    constant = _empty(observed, "spread")
    value = 1 - _squares(predicted, observed) / np.where(constant | (total == 0), 1, total)
    return np.where(constant, np.nan, value)


@score("wmse", best=0.0, higher_is_better=False, weighted=True)
def wmse(predicted, observed, weights):
    """Σw(a−b)²/Σw (Mejia et al., arXiv 2506.22641), (..., genes) -> (...)."""
    total = weights.sum(axis=-1)
    value = (weights * (predicted - observed) ** 2).sum(axis=-1) / np.where(total > 0, total, 1)
    return np.where(total > 0, value, np.nan)


@score("r2_w", best=1.0, higher_is_better=True, chance=0.0, needs="spread", needs_prediction=False, weighted=True)
def r2_w(predicted, observed, weights):
    """1 − Σw(b−a)²/Σw(b−b̄_w)² (Mejia et al., arXiv 2506.22641), (..., genes) -> (...)."""
    weight = weights.sum(axis=-1)
    undefined = _empty(observed, "spread", weights) | (weight <= 0)
    mean = ((weights * observed).sum(axis=-1) / np.where(weight > 0, weight, 1))[..., None]
    total = (weights * (observed - mean) ** 2).sum(axis=-1)
    value = 1 - (weights * (predicted - observed) ** 2).sum(axis=-1) / np.where(undefined | (total == 0), 1, total)
    return np.where(undefined, np.nan, value)


@score(
    "pearson_w", best=1.0, higher_is_better=True, worst=-1.0, chance=0.0, needs="spread", scale_free=True, weighted=True
)
def pearson_w(predicted, observed, weights):
    """Weighted correlation over genes, (..., genes) -> (...)."""
    weight = weights.sum(axis=-1, keepdims=True)
    share = weights / np.where(weight > 0, weight, 1)
    empty = _empty(predicted, "spread", weights), _empty(observed, "spread", weights) | (weight[..., 0] <= 0)
    scaled = [
        np.sqrt(share) * (vector - (share * vector).sum(axis=-1, keepdims=True)) for vector in (predicted, observed)
    ]
    return _angle(*scaled, *empty)
