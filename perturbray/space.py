"""Search spaces as frozen data: what a hyperparameter may be. The engine translates them for the search algorithm.

A space is a flat dictionary from the dotted paths that ``Trial.override`` takes to one of the kinds below. A new kind is a
frozen dataclass with ``sample`` and ``__contains__``, and a line in the engine's translation.
"""

import math
from dataclasses import dataclass

import numpy as np

from perturbray.errors import InputError

Value = str | int | float | bool


@dataclass(frozen=True, init=False)
class Choice:
    """One of some values: ``Choice(64, 128, 256)``."""

    values: tuple[Value, ...]

    def __init__(self, *values: Value) -> None:
        if not values or len(set(values)) != len(values):
            raise InputError(f"Choice{values}: values that differ, at least one")
        object.__setattr__(self, "values", values)

    def sample(self, rng: np.random.Generator) -> Value:
        """One of the values, each with the same chance."""
        return self.values[int(rng.integers(len(self.values)))]

    def __contains__(self, value: object) -> bool:
        return value in self.values


@dataclass(frozen=True)
class Uniform:
    """A number between two, uniformly."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"{self}: low must be below high")

    def sample(self, rng: np.random.Generator) -> Value:
        """A number in [low, high)."""
        return float(rng.uniform(self.low, self.high))

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


@dataclass(frozen=True)
class LogUniform(Uniform):
    """A number between two that are above 0, its logarithm uniformly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise InputError(f"{self}: low must be above 0")

    def sample(self, rng: np.random.Generator) -> Value:
        """A number in [low, high]."""
        return float(np.clip(np.exp(rng.uniform(math.log(self.low), math.log(self.high))), self.low, self.high))


@dataclass(frozen=True)
class QUniform(Uniform):
    """A multiple of ``q``, counted from ``low``, up to ``high`` and with it; whole where low and q are."""

    q: float

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = (self.high - self.low) / self.q if self.q > 0 else math.nan
        if not math.isfinite(steps) or abs(steps - round(steps)) > 1e-9:
            raise InputError(f"{self}: q must be above 0 and fit between low and high a whole number of times")

    @property
    def values(self) -> tuple[Value, ...]:
        """All of them, ascending."""
        number = round((self.high - self.low) / self.q) + 1
        whole = float(self.low).is_integer() and float(self.q).is_integer()
        return tuple(
            int(self.low + i * self.q) if whole else float(round(self.low + i * self.q, 12)) for i in range(number)
        )

    def sample(self, rng: np.random.Generator) -> Value:
        """One of the values, each with the same chance."""
        return self.values[int(rng.integers(len(self.values)))]

    def __contains__(self, value: object) -> bool:
        return any(value == known for known in self.values)


@dataclass(frozen=True)
class IntLogUniform(LogUniform):
    """A whole number between two that are above 0, its logarithm uniformly."""

    def sample(self, rng: np.random.Generator) -> Value:
        """A whole number in [low, high]."""
        return int(np.clip(round(float(super().sample(rng))), self.low, self.high))

    def __contains__(self, value: object) -> bool:
        return super().__contains__(value) and float(value).is_integer()  # type: ignore[arg-type]


Distribution = Choice | Uniform  # every kind but Choice is a Uniform
Space = dict[str, Distribution]
