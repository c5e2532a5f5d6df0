"""Ranks: is a prediction nearer to its own observation than others are? A new tie rule is one entry in ``TIES``.

0 is best, 0.5 is chance and 1 is worst. ``direction="obs"`` asks of an observation which prediction is the nearest
(PerturBench); ``direction="pred"`` asks of a prediction which observation is the nearest (perturbation discrimination).
"""

from collections.abc import Callable

import numpy as np

from perturbray.errors import InputError
from perturbray.registry import Registry

DIRECTIONS = ("obs", "pred")
DENOMINATORS = ("n-1", "n")

TIES: Registry[Callable[..., np.ndarray]] = Registry("tie rule")


@TIES.register("half")
def half(tied: np.ndarray, own: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """Every tied candidate counts ½: the expectation over random orders, and chance for a constant prediction."""
    return tied.sum(axis=1) / 2


@TIES.register("strict")
def strict(tied: np.ndarray, own: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """Tied candidates do not count. Rewards a model that predicts one vector for all conditions."""
    return np.zeros(len(tied))


@TIES.register("inclusive")
def inclusive(tied: np.ndarray, own: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """Tied candidates count as nearer (equation 2 of arXiv 2408.10609)."""
    return tied.sum(axis=1).astype(float)


@TIES.register("random")
def random(tied: np.ndarray, own: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """A random order of the tied candidates (the PerturBench code), from one uniform draw a query."""
    if draws is None:
        raise ValueError("random ties need draws: one uniform number in [0, 1) a query")
    return np.floor(draws * (tied.sum(axis=1) + 1))


@TIES.register("position")
def position(tied: np.ndarray, own: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """Tied candidates of smaller index count as nearer (cell-eval)."""
    return (tied & (np.arange(tied.shape[1]) < own[:, None])).sum(axis=1).astype(float)


def ranks(
    distance: np.ndarray,
    own: np.ndarray | None = None,
    *,
    direction: str = "obs",
    ties: str = "half",
    exact: bool = False,
    denominator: str = "n-1",
    draws: np.ndarray | None = None,
) -> np.ndarray:
    """Share of candidates nearer than the right one, in [0, 1].

    ``distance`` is (predictions, observations), smaller is nearer. By default prediction i belongs to observation i;
    with ``own`` the queries (observations for ``obs``, predictions for ``pred``) are fewer than the candidates, and
    query k belongs to candidate ``own[k]``. Two distances tie when they differ by at most 1e-12 + 1e-9 of the larger,
    or only when equal with ``exact``. A candidate at distance NaN is never nearer; a query at distance NaN of its own
    candidate, or with a single candidate, has rank NaN. Returns (queries,) float64.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"a rank has direction {' or '.join(map(repr, DIRECTIONS))}, not {direction!r}")
    if denominator not in DENOMINATORS:
        raise InputError(f"a rank is divided by {' or '.join(map(repr, DENOMINATORS))}, not by {denominator!r}")
    by_query = np.asarray(distance, dtype=float)
    by_query = by_query.T if direction == "obs" else by_query
    queries, candidates = by_query.shape
    own = np.arange(queries) if own is None else np.asarray(own)
    if candidates < 2:
        return np.full(queries, np.nan)
    right = by_query[np.arange(queries), own][:, None]
    by_query, undefined = np.where(np.isnan(by_query), np.inf, by_query), np.isnan(right[:, 0])
    right = np.where(np.isnan(right), 0.0, right)
    if exact:
        tied = by_query == right
    else:
        finite = np.isfinite(by_query) & np.isfinite(right)
        other, mine = np.where(finite, by_query, 0.0), np.where(finite, right, 0.0)
        near = np.abs(other - mine) <= 1e-12 + 1e-9 * np.maximum(np.abs(other), np.abs(mine))
        tied = np.where(finite, near, by_query == right)
    closer = (by_query < right) & ~tied
    tied[np.arange(queries), own] = False
    rank = closer.sum(axis=1) + TIES[ties](tied, own, draws)
    rank = rank / (candidates - 1 if denominator == "n-1" else candidates)
    return np.where(undefined, np.nan, rank)


def chance_error(candidates: int) -> float:
    """Standard error of the mean rank over the n ``candidates`` of one context under chance, where the mean is 0.5."""
    n = candidates
    return float(np.sqrt((n + 1) / (12 * (n - 1) * n))) if n > 1 else float("nan")
