"""A power law of the error in the amount of training data, fitted to every bootstrap sample at once, where data bear one."""

from dataclasses import dataclass

import numpy as np

from perturbray.results import intervals

EXPONENTS = np.geomspace(0.02, 6.0, 400)
FEWEST = 4  # amounts: with three, an exponent and a floor fit anything
PINNED = 0.025  # share of the samples that may want an exponent beyond the grid


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """error = floor + scale · amount^(−exponent), with the interval of the exponent; or why there is none."""

    exponent: float = np.nan
    low: float = np.nan
    high: float = np.nan
    floor: float = np.nan
    lacks: str = ""  # "" where the data bear one


def exponents(amount: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exponent and floor of each curve by least squares, amounts (levels,), errors (..., levels) -> (...), (...).

    For a given exponent the fit is linear, so the exponent is searched on a grid, with a parabola around its best point; at
    an end of ``EXPONENTS`` where the best lies beyond. NaN where an error is not finite.
    """
    shape, error = error.shape[:-1], np.reshape(error, (-1, error.shape[-1]))
    whole = np.isfinite(error).all(axis=1)
    error = np.where(whole[:, None], error, 0.0)
    falling = (amount / amount.max())[None, :] ** -EXPONENTS[:, None]  # (grid, levels)
    middle = falling - falling.mean(axis=1, keepdims=True)
    apart = error - error.mean(axis=1, keepdims=True)
    slope = np.maximum(apart @ middle.T, 0.0) / (middle**2).sum(axis=1)  # (curves, grid); an error that rises has none
    left = (apart**2).sum(axis=1, keepdims=True) - slope**2 * (middle**2).sum(axis=1)
    best = left.argmin(axis=1)
    inside = np.clip(best, 1, len(EXPONENTS) - 2)
    rows = np.arange(len(error))
    before, at, after = (left[rows, inside + step] for step in (-1, 0, 1))
    bend = before - 2 * at + after
    step = np.where((bend > 0) & (best == inside), 0.5 * (before - after) / np.where(bend > 0, bend, 1.0), 0.0)
    grid = np.log(EXPONENTS)
    exponent = np.exp(grid[best] + np.clip(step, -1, 1) * (grid[1] - grid[0]))
    floor = error.mean(axis=1) - slope[rows, best] * falling.mean(axis=1)[best]
    return (
        np.where(whole, exponent, np.nan).reshape(shape),
        np.where(whole, floor, np.nan).reshape(shape),
    )


def fit(amount: np.ndarray, value: np.ndarray, inside: np.ndarray, between: np.ndarray, *, seeds: int) -> PowerLaw:
    """From mean errors at each amount, (levels,), and their draws over conditions and deviations over seeds, (resamples,
    levels). The data bear one where the error surely falls and the exponent lies within the grid in nearly all samples."""
    if len(np.unique(amount)) < FEWEST:
        return PowerLaw(lacks=f"it takes {FEWEST} amounts, and there are {len(np.unique(amount))}")
    spread = intervals.nested(inside, between, np.full(len(amount), seeds))
    low, _ = intervals.interval(spread[:, np.argmin(amount)] - spread[:, np.argmax(amount)])
    if not low > 0:
        return PowerLaw(lacks="the error does not surely fall")
    exponent, floor = exponents(amount, value)
    drawn = exponents(amount, inside + between)[0]
    beyond = (drawn <= EXPONENTS[0]) | (drawn >= EXPONENTS[-1])
    if not np.isfinite(drawn).all() or beyond.mean() > PINNED:
        return PowerLaw(lacks="they do not pin an exponent")
    # In logarithms, where exponents are spread more evenly.
    logs = [np.log(exponents(amount, part)[0]) for part in (inside, value + between)]
    draws = intervals.nested(logs[0], logs[1] - np.log(exponent), np.asarray(seeds))
    low, high = np.exp(intervals.interval(draws))
    return PowerLaw(exponent=float(exponent), low=float(low), high=float(high), floor=float(floor))
