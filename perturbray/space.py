"""Search spaces as frozen data: what a hyperparameter may be. `proposals` translates them for the search algorithm.

A space is a flat dictionary from the dotted paths that ``Trial.override`` takes to one of the kinds below. A new kind is a
frozen dataclass with ``sample``, ``__contains__`` and ``widened``, and a line in the translation.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from perturbray.errors import InputError

Value = str | int | float | bool
Side = Literal["low", "high"]
BORDER = 0.05  # of a range, counted from an end: a value within it lies on the border
WIDER = 0.25  # of a range by which it grows on a side


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

    @property
    def ordered(self) -> bool:
        """Whether the values are rising numbers, so that neighbours are alike."""
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)
        return numbers and len(self.values) > 1 and all(a < b for a, b in itertools.pairwise(self.values))

    def border(self, value: Value) -> "Side | None":
        """The end at which a value lies; None for one between, or where there is nothing beyond it."""
        if not self.ordered:
            return None
        side = "low" if value == self.values[0] else "high" if value == self.values[-1] else None
        return side if side and self.widened(side) != self else None

    def widened(self, side: Side) -> "Choice":
        """One value more on a side, a step of the same kind away; as it is where that would not stay above 0."""
        near, next_ = (self.values[0], self.values[1]) if side == "low" else (self.values[-1], self.values[-2])
        ratios = {b / a for a, b in itertools.pairwise(self.values)} if self.values[0] > 0 else set()
        new = near * near / next_ if len(ratios) == 1 and len(self.values) > 2 else 2 * near - next_
        new = int(new) if all(isinstance(value, int) for value in self.values) else float(new)
        if new <= 0 or new in self.values:
            return self
        return Choice(new, *self.values) if side == "low" else Choice(*self.values, new)


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

    def share(self, value: float) -> float:
        """Where a value lies between low, 0, and high, 1, on the scale of the distribution."""
        return (value - self.low) / (self.high - self.low)

    def border(self, value: Value) -> "Side | None":
        """The end near which a value lies; None for one between, or where the range cannot be widened there."""
        share = self.share(float(value))
        side = "low" if share <= BORDER else "high" if share >= 1 - BORDER else None
        return side if side and self.widened(side) != self else None

    def widened(self, side: Side) -> "Uniform":
        """A quarter longer on a side; what is not below 0 stays so, and what lies between 0 and 1 stays there."""
        more = WIDER * (self.high - self.low)
        return self._moved(side, self.low - more if side == "low" else self.high + more)

    def _moved(self, side: Side, end: float) -> "Uniform":
        if side == "low":
            return replace(self, low=max(end, 0.0) if self.low >= 0 else end)
        return replace(self, high=min(end, 1.0) if self.low >= 0 and self.high <= 1 else end)


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

    def share(self, value: float) -> float:
        """As of Uniform, of logarithms."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    def widened(self, side: Side) -> "LogUniform":
        """A quarter longer on a side, counted in logarithms: a rate may become smaller without end."""
        factor = (self.high / self.low) ** WIDER
        return replace(self, low=self.low / factor) if side == "low" else replace(self, high=self.high * factor)


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

    def border(self, value: Value) -> "Side | None":
        """The end at which a value lies; None for one between, or where there is no room beyond it."""
        side = "low" if value == self.values[0] else "high" if value == self.values[-1] else None
        return side if side and self.widened(side) != self else None

    def widened(self, side: Side) -> "QUniform":
        """A quarter longer on a side, at least one step; within the bounds of Uniform, 1 left out."""
        more = max(1, round(WIDER * (len(self.values) - 1))) * self.q
        while more > 0:
            low = self.low - more if side == "low" else self.low
            high = self.high + more if side == "high" else self.high
            shares = self.low >= 0 and self.high < 1  # such as of dropout
            if (low >= 0 or self.low < 0) and (high < 1 - 1e-9 or not shares):
                return replace(self, low=round(low, 12), high=round(high, 12))
            more = round(more - self.q, 12)
        return self


@dataclass(frozen=True)
class IntLogUniform(LogUniform):
    """A whole number between two that are above 0, its logarithm uniformly."""

    def sample(self, rng: np.random.Generator) -> Value:
        """A whole number in [low, high]."""
        return int(np.clip(round(float(super().sample(rng))), self.low, self.high))

    def __contains__(self, value: object) -> bool:
        return super().__contains__(value) and float(value).is_integer()  # type: ignore[arg-type]

    def widened(self, side: Side) -> "LogUniform":
        """As of LogUniform, by whole numbers of at least 1."""
        factor = (self.high / self.low) ** WIDER
        if side == "low":
            return replace(self, low=max(1, math.floor(self.low / factor)))
        return replace(self, high=math.ceil(self.high * factor))


Distribution = Choice | Uniform  # every kind but Choice is a Uniform


@dataclass(frozen=True)
class When:
    """What counts only where another hyperparameter, a Choice, has a value:
    ``{"model.variational": Choice(True, False), "model.kl_weight": When("model.variational", True, LogUniform(0.1, 20))}``."""

    path: str
    value: Value
    then: Distribution


Space = dict[str, Distribution | When]
Values = dict[str, Value]  # by path; what does not count is not there


def distribution(space: Mapping[str, Distribution | When], path: str) -> Distribution:
    """The values that a hyperparameter may have where it counts."""
    found = space[path]
    return found.then if isinstance(found, When) else found


def check(space: Mapping[str, Distribution | When]) -> None:
    """Raise InputError where a condition asks for what is no Choice of the space, for a value that it does not have, or
    for itself."""
    if not space:
        raise InputError("a search space needs at least one hyperparameter")
    for path, part in space.items():
        seen = {path}
        while isinstance(part, When):
            if part.path in seen:
                raise InputError(f"{path}: its condition leads back to itself")
            parent = distribution(space, part.path) if part.path in space else None
            if not isinstance(parent, Choice) or part.value not in parent:
                raise InputError(
                    f"{path}: it counts when {part.path} is {part.value!r}, which is no choice of the space"
                )
            seen.add(part.path)
            part = space[part.path]


def roots_first(space: Mapping[str, Distribution | When]) -> list[str]:
    """The paths, each after the one that decides whether it counts."""

    def depth(path: str) -> int:
        part = space[path]
        return 1 + depth(part.path) if isinstance(part, When) else 0

    return sorted(space, key=depth)


def counts(space: Mapping[str, Distribution | When], path: str, values: Mapping[str, Value]) -> bool:
    """Whether a hyperparameter counts beside these values of those that come before it."""
    part = space[path]
    return not isinstance(part, When) or (part.path in values and values[part.path] == part.value)


def draw(space: Mapping[str, Distribution | When], rng: np.random.Generator) -> Values:
    """A value for every hyperparameter that counts."""
    values: Values = {}
    for path in roots_first(space):
        if counts(space, path, values):
            values[path] = distribution(space, path).sample(rng)
    return {path: values[path] for path in space if path in values}


def holds(space: Mapping[str, Distribution | When], values: Mapping[str, Value]) -> bool:
    """Whether these are values that the space allows, all that count and no others."""
    wanted = [path for path in roots_first(space) if counts(space, path, values)]
    return set(wanted) == set(values) and all(values[path] in distribution(space, path) for path in wanted)


def points(space: Mapping[str, Distribution | When]) -> Iterator[Values]:
    """Every combination of values. Raises InputError where a range has no steps."""

    def extend(paths: list[str], values: Values) -> Iterator[Values]:
        if not paths:
            yield {path: values[path] for path in space if path in values}
            return
        first, *rest = paths
        steps = getattr(distribution(space, first), "values", None)
        if steps is None:
            raise InputError(
                f"{first}: {distribution(space, first)} has no steps to make a grid of; use Choice or QUniform"
            )
        if not counts(space, first, values):
            yield from extend(rest, values)
            return
        for value in steps:
            yield from extend(rest, {**values, first: value})

    yield from extend(roots_first(space), {})


def borders(space: Mapping[str, Distribution | When], values: Mapping[str, Value]) -> dict[str, Side]:
    """The hyperparameters whose value lies at an end of their range beyond which it could be widened."""
    found = {path: distribution(space, path).border(value) for path, value in values.items() if path in space}
    return {path: side for path, side in found.items() if side}


def widen(space: Mapping[str, Distribution | When], sides: Mapping[str, Side]) -> Space:
    """The space with these ranges longer on a side."""
    wider = dict(space)
    for path, side in sides.items():
        new = distribution(space, path).widened(side)
        part = wider[path]
        wider[path] = replace(part, then=new) if isinstance(part, When) else new
    return wider
