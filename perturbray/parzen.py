"""A density over a search space: kernels on known configurations, each over all hyperparameters at once, so that what goes
well together is proposed together. What `proposals` builds its tree of Parzen estimators from.

Bergstra et al., NeurIPS 2011; kernels over all hyperparameters: Falkner et al., ICML 2018.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import logsumexp, ndtr, ndtri

from perturbray.space import (
    Choice,
    Distribution,
    IntLogUniform,
    LogUniform,
    QUniform,
    Space,
    Value,
    Values,
    counts,
    distribution,
    roots_first,
)

WIDTH = 0.3  # of a range: the standard deviation of a kernel that is alone; n of them are narrower by n^(-1/(d+4))
LEAST_WIDTH = 0.02
LEAST_STEPS = 1.0  # the least standard deviation in steps between values of which neighbours are alike
OTHERS = 2.0  # the weight of all values together, where none is like another, beside the 1 of a kernel's own


class Line:
    """A range: places from 0 to 1, kernels that are normal between the ends."""

    def __init__(self, kind: Distribution, width: float) -> None:
        self.kind, self.width = kind, max(width, LEAST_WIDTH)

    def place(self, value: Value) -> float:
        return self.kind.share(float(value))

    def value(self, place: float) -> Value:
        low, high = self.kind.low, self.kind.high
        value = low * (high / low) ** place if isinstance(self.kind, LogUniform) else low + place * (high - low)
        value = float(np.clip(value, low, high))
        return round(value) if isinstance(self.kind, IntLogUniform) else value

    def draw(self, centre: float | None, rng: np.random.Generator) -> float:
        if centre is None:
            return rng.uniform()
        below, above = ndtr(-centre / self.width), ndtr((1 - centre) / self.width)
        return float(np.clip(centre + self.width * ndtri(rng.uniform(below, above)), 0.0, 1.0))

    def log(self, places: np.ndarray, centres: np.ndarray) -> np.ndarray:
        """(places, centres): the logarithm of the density."""
        mass = ndtr((1 - centres) / self.width) - ndtr(-centres / self.width)
        scale = np.log(self.width * np.sqrt(2 * np.pi) * mass)
        return -0.5 * ((places[:, None] - centres) / self.width) ** 2 - scale

    @property
    def log_uniform(self) -> float:
        return 0.0


class Steps:
    """Some values: places 0, 1, 2, ...; kernels that reach to all of them, to neighbours more where these are alike."""

    def __init__(self, kind: Choice | QUniform, width: float) -> None:
        self.values, number = kind.values, len(kind.values)
        if number > 2 and (isinstance(kind, QUniform) or kind.ordered):
            apart = np.subtract.outer(np.arange(number), np.arange(number))
            table = np.exp(-0.5 * (apart / max(width * (number - 1), LEAST_STEPS)) ** 2)
        else:
            table = np.eye(number) + OTHERS / number
        self.table = table / table.sum(axis=1, keepdims=True)

    def place(self, value: Value) -> int:
        return self.values.index(value)

    def value(self, place: int) -> Value:
        return self.values[place]

    def draw(self, centre: int | None, rng: np.random.Generator) -> int:
        return int(rng.choice(len(self.values), p=None if centre is None else self.table[int(centre)]))

    def log(self, places: np.ndarray, centres: np.ndarray) -> np.ndarray:
        """(places, centres): the logarithm of the probability."""
        return np.log(self.table)[np.ix_(centres.astype(int), places.astype(int))].T

    @property
    def log_uniform(self) -> float:
        return -float(np.log(len(self.values)))


class Parzen:
    """Kernels on known configurations, and a uniform one beside them that weighs as much as one of theirs."""

    def __init__(self, space: Space, known: Sequence[Values]) -> None:
        self.space, self.known, self.order = space, list(known), roots_first(space)
        width = WIDTH * max(len(known), 1) ** (-1 / (len(space) + 4))
        kinds = {path: distribution(space, path) for path in space}
        self.axes = {
            path: (Steps if isinstance(kind, Choice | QUniform) else Line)(kind, width) for path, kind in kinds.items()
        }

    def draw(self, rng: np.random.Generator) -> Values:
        """A configuration. What counts in it and not in the one that its kernel lies on is drawn uniformly."""
        kernel = int(rng.integers(len(self.known) + 1))
        centre: Mapping[str, Value] = self.known[kernel] if kernel < len(self.known) else {}
        values: Values = {}
        for path in self.order:
            if counts(self.space, path, values):
                axis = self.axes[path]
                near = axis.place(centre[path]) if path in centre else None
                values[path] = axis.value(axis.draw(near, rng))
        return {path: values[path] for path in self.space if path in values}

    def log(self, several: Sequence[Values]) -> np.ndarray:
        """The logarithm of the density at each of several configurations."""
        density = np.zeros((len(several), len(self.known) + 1))
        for path, axis in self.axes.items():
            here = np.array([path in values for values in several])
            there = np.array([path in values for values in self.known], dtype=bool)
            density[here] += axis.log_uniform
            if here.any() and there.any():
                places = np.array([axis.place(values[path]) for values in several if path in values])
                centres = np.array([axis.place(values[path]) for values in self.known if path in values])
                density[np.ix_(here, np.append(there, False))] += axis.log(places, centres) - axis.log_uniform
        return logsumexp(density, axis=1) - np.log(len(self.known) + 1)
