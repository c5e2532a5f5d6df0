"""Search: what hyperparameters are searched for, as data: a space, an objective, a way to propose and one to stop early.

An objective is a weighted sum of metrics on the validation conditions; what the test conditions hold never enters it.
"""

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from perturbray.errors import InputError, nearest
from perturbray.metrics.effects import EFFECTS
from perturbray.metrics.metric import Metric
from perturbray.models.base import MODELS
from perturbray.proposals import STARTUP, WAYS
from perturbray.space import Choice, Space, Values, When, check, distribution, holds, points
from perturbray.training.fit import Training
from perturbray.trial import Trial, convert

SMOKE_SAMPLES, SMOKE_EPOCHS = 4, 3


@dataclass(frozen=True)
class Objective:
    """What is minimised: the sum of metrics, each with a weight, taken negative where higher is better.

    ``scaled``: each metric instead as the share that is left of the way from a baseline to the best possible value, so
    that 1 is the baseline, 0 is perfect, and weights mean the same whatever a metric's unit is.
    """

    terms: tuple[tuple[Metric, float], ...]
    scaled: bool = False
    baseline: str = "mean_shift"  # the model whose error is 1 where scaled
    controls: str = "split"  # where effects take their control cells from, as in a sweep

    def __post_init__(self) -> None:
        if not self.terms:
            raise InputError("an objective needs at least one metric")
        for metric, weight in self.terms:
            if not isinstance(metric, Metric):
                raise InputError(f"objective: {metric.name} needs cells; an objective is of metrics of means")
            if not (weight > 0 and math.isfinite(weight)):
                raise InputError(f"objective: the weight of {metric.name} is {weight:g}; above 0 is needed")

    @classmethod
    def parse(cls, text: str, *, scaled: bool = False) -> "Objective":
        """As typed: ``rmse/average + 0.1 * rmse/average/rank``."""
        terms = []
        for part in text.split("+"):
            weight, star, name = part.rpartition("*")
            try:
                terms.append((Metric.parse(name.strip()), float(weight) if star else 1.0))
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"objective {text!r}: {weight.strip()!r} is no weight") from None
        return cls(terms=tuple(terms), scaled=scaled)

    @property
    def name(self) -> str:
        """As it is typed."""
        shown = [metric.name if weight == 1 else f"{weight:g} * {metric.name}" for metric, weight in self.terms]
        return " + ".join(shown) + (f", each scaled by {self.baseline}" if self.scaled else "")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(metric for metric, _ in self.terms)

    @property
    def needs_linear(self) -> bool:
        """Whether a metric rests on means of expm1 of expression."""
        return any(EFFECTS[metric.effect].linear for metric in self.metrics)

    def of(self, means: Mapping[str, float], reference: Mapping[str, float] | None = None) -> float:
        """The objective of means of the metrics; ``reference``: those of the baseline, where scaled. Raises InputError where
        the baseline leaves nothing to do."""
        total = 0.0
        for metric, weight in self.terms:
            value = means[metric.name]
            if self.scaled:
                way = abs(reference[metric.name] - metric.best)
                if not way > 0 or not math.isfinite(way):
                    raise InputError(
                        f"objective: {self.baseline} has {metric.name} {reference[metric.name]:g} on the validation "
                        "conditions, which is no scale; leave it out, or do not scale"
                    )
                total += weight * abs(value - metric.best) / way
            else:
                total += -weight * value if metric.higher_is_better else weight * value
        return total


PAPER = Objective(((Metric("rmse", "average"), 1.0), (Metric("rmse", "average", rank=True), 0.1)))
"""PerturBench's: its RMSE and a tenth of its rank (arXiv 2408.10609), here not rounded."""


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving (Li et al., MLSys 2020): at ``first``, ``first * factor``, ... epochs a trial goes on
    if it is not worse than the best 1/factor of those that were there before it. An early ``first`` stops for good what
    learns slowly and ends well."""

    first: int = 5
    factor: int = 3

    def __post_init__(self) -> None:
        if self.first < 1 or self.factor < 2:
            raise InputError(f"{self}: first is at least 1, factor at least 2")

    def rungs(self, epochs: int) -> tuple[int, ...]:
        """The epochs, below the last, at which it is decided."""
        found, at = [], self.first
        while at < epochs:
            found.append(at)
            at *= self.factor
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Search:
    """A model's hyperparameters searched for around a base trial. What a limit or the number of samples is does not
    change which configurations are proposed, so a search goes on where it was when they are raised."""

    base: Trial
    space: Space
    samples: int = 60
    objective: Objective = PAPER
    way: str = "tpe"  # tpe | hyperopt | random | grid
    halving: Halving | None = field(default_factory=Halving)  # None: only what training itself does stops a trial
    first: tuple[Values, ...] = ()  # configurations to try before any other, also outside of the space
    every: int = 1  # epochs between two looks at the validation conditions
    startup: int = STARTUP  # configurations drawn at random before TPE
    seed: int = 0
    seeds: int = 5  # with which the best configuration is trained and judged on the test conditions
    widen: bool = False  # search once more, where the best values lie at an end of the space, in one that goes on there
    seconds: float = 0.0  # for the search as a whole; 0: no limit
    at_once: int = 0  # trials at the same time; 0: as many as the cluster has room for
    gpus: float = 1.0  # of each trial, where there are GPUs; a fraction shares one
    trial_seconds: float = 0.0  # after which a trial ends with what it has; looked at after each epoch; 0: no limit
    trial_memory_gb: float = 0.0  # that a trial may take beside the data; 0: no limit
    max_failed: int = 10  # failed trials after which the search ends

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", tuple(dict(values) for values in self.first))
        check(self.space)
        paths = self.base.paths()
        for values in (self.space, *self.first):
            for path in values:
                if path not in paths:
                    raise InputError(f"search of {self.model}: unknown path {path!r}: {nearest(path, paths)}")
                if not path.startswith(("model.", "training.")):
                    raise InputError(f"search of {self.model}: {path} is no hyperparameter of a model or its training")
        if self.way not in WAYS:
            raise InputError(f"no way to search is named {self.way!r}: {nearest(self.way, WAYS)}")
        if self.way == "grid":
            next(points(self.space))  # raises where a range has no steps
        for name in ("samples", "every", "seeds", "max_failed"):
            if getattr(self, name) < 1:
                raise InputError(f"search: {name}={getattr(self, name)}: at least 1")
        for name in ("seconds", "at_once", "trial_seconds", "trial_memory_gb", "startup"):
            if not getattr(self, name) >= 0:
                raise InputError(f"search: {name}={getattr(self, name)}: at least 0")
        if not 0 < self.gpus <= 1:
            raise InputError(f"search: gpus={self.gpus}: above 0, at most 1")
        if self.halving is not None and self.halving.first % self.every:
            raise InputError(f"search: {self.halving} looks at epochs that every={self.every} passes over")

    @property
    def model(self) -> str:
        """The name of what is searched."""
        return MODELS.name_of(self.base.model)

    @property
    def shown(self) -> str:
        """For people: the model, and what is taken from training where it is searched anew for that."""
        return f"{self.model} at {self.base.taken}" if self.base.taken else self.model

    def identity(self, fingerprint: str) -> str:
        """A hash of all that decides which configurations are proposed and what they are worth."""
        fixed = self.base.override(_anything(self.space))
        parts = {
            "base": fixed.key(fingerprint),
            "space": {path: _described(part) for path, part in self.space.items()},
            "objective": [self.objective.name, self.objective.controls],
            "way": [self.way, self.startup, self.seed, self.every],
            "halving": None if self.halving is None else [self.halving.first, self.halving.factor],
            "first": list(self.first),
        }
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def trial(self, values: Mapping[str, Any]) -> Trial:
        """The trial of a configuration."""
        return self.base.override(dict(values))

    def override(self, changes: Mapping[str, Any]) -> "Search":
        """Fields of the base by path; what is set is not searched for any more."""
        changes = {path: value for path, value in changes.items() if path in self.base.paths()}
        if not changes:
            return self
        base = self.base.override(changes)
        space = {path: part for path, part in self.space.items() if path not in changes}
        for path, part in list(space.items()):
            if isinstance(part, When) and part.path in changes:
                owner, _, name = part.path.partition(".")
                if getattr(getattr(base, owner), name) == part.value:
                    space[path] = part.then
                else:
                    del space[path]
        if not space:
            raise InputError(f"search of {self.model}: every hyperparameter is set, so there is nothing to search for")
        first = tuple({path: v for path, v in values.items() if path in space} for values in self.first)
        return replace(self, base=base, space=space, first=tuple(v for v in first if v))

    def smoke(self) -> "Search":
        """A few samples of a few epochs."""
        epochs = min(self.base.training.epochs, SMOKE_EPOCHS)
        base = replace(self.base, training=replace(self.base.training, epochs=epochs))
        return replace(self, base=base, samples=min(self.samples, SMOKE_SAMPLES), seeds=1)


def own_values(trial: Trial, space: Space) -> Values | None:
    """The configuration that a trial has now, if the space holds it: a good first point, since defaults are no accident."""
    values: Values = {}
    for path in space:
        owner, _, name = path.partition(".")
        values[path] = getattr(getattr(trial, owner), name)
    for path, part in space.items():
        if isinstance(part, When) and values.get(part.path) != part.value:
            del values[path]
    return values if holds(space, values) else None


def known_values(model: Any, training: Mapping[str, Any], space: Space) -> Values:
    """The configuration that a model and fields of its training stand for, as far as the space asks for them."""
    values: Values = {}
    for path in space:
        owner, _, name = path.partition(".")
        if owner == "model":
            values[path] = getattr(model, name)
        elif name in training:
            values[path] = training[name]
    return values


@dataclass(frozen=True)
class Tuned:
    """What a search found: a model and fields of its training; ``str`` is Python, ``to_json`` what a file holds."""

    model: Any  # ModelSpec
    training: Training
    origin: Mapping[str, Any] = field(default_factory=dict)  # objective, samples, dataset: for people

    def __str__(self) -> str:
        fields, how = (
            ", ".join(f"{name}={value!r}" for name, value in _changed(spec).items())
            for spec in (self.model, self.training)
        )
        model = f'pr.MODELS["{MODELS.name_of(self.model)}"]({fields})'
        return f"pr.Trial(\n    dataset=dataset,\n    model={model},\n    training=pr.Training({how}),\n)"

    def to_json(self) -> str:
        """All fields, also those that are as they come, so that another default changes nothing."""
        parts = {
            "model": {"name": MODELS.name_of(self.model), **_fields(self.model)},
            "training": _fields(self.training),
            "origin": dict(self.origin),
        }
        return json.dumps(parts, indent=1, default=str)

    @classmethod
    def read(cls, path: str) -> "Tuned":
        """The configuration in a file. Raises InputError that says what is wrong with it."""
        try:
            with open(path, encoding="utf-8") as file:
                parts = json.load(file)
            named, training = dict(parts["model"]), dict(parts["training"])
            kind = MODELS[named.pop("name")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise InputError(f"{path}: {error}") from None
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: holds no tuned configuration ({reason})") from None
        return cls(
            model=_made(kind, named, path), training=_made(Training, training, path), origin=parts.get("origin", {})
        )


def _made(kind: type, values: Mapping[str, Any], path: str) -> Any:
    hints, known = typing.get_type_hints(kind), [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise InputError(f"{path}: {kind.__name__} has no field {name!r}: {nearest(name, known)}")
    return kind(**{name: convert(value, hints[name], name) for name, value in values.items()})


def _fields(spec: Any) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}


def _changed(spec: Any) -> dict[str, Any]:
    """The fields that are not as they come."""
    return {
        f.name: getattr(spec, f.name)
        for f in dataclasses.fields(spec)
        if f.default is dataclasses.MISSING or getattr(spec, f.name) != f.default
    }


def _anything(space: Space) -> Values:
    """A value for each hyperparameter: what a base has where it is searched for is no part of what a search is."""
    values: Values = {}
    for path in space:
        kind = distribution(space, path)
        values[path] = kind.values[0] if isinstance(kind, Choice) else getattr(kind, "values", (kind.low,))[0]
    return values


def _described(part: Any) -> list:
    return [type(part).__name__, *(_described(v) if dataclasses.is_dataclass(v) else v for v in _fields(part).values())]


def searches(
    bases: Sequence[Trial],
    *,
    space: str | Space = "small",
    objective: str | Objective = PAPER,
    scaled: bool = False,
    no_halving: bool = False,
    first: str = "",
    search_seed: int = 0,
    trial_memory: float = 0.0,
    track: str = "",
    **fields: Any,
) -> tuple[Search, ...]:
    """A search around each trial, by the options of `sweeps/search.py`: in its model's space, its own configuration first.

    ``first``: a dataset whose best published configuration comes after it; ``fields``: those of Search.
    """
    if isinstance(objective, str):
        objective = Objective.parse(objective, scaled=scaled)
    found = []
    for base in bases:
        within = base.model.space(space) if isinstance(space, str) else space
        points = [own] if (own := own_values(base, within)) else []
        if first:
            published = base.model.published(first)
            points.append(known_values(published.model, published.training, within))
        options = {"halving": None} if no_halving else {}
        options |= {"first": tuple(points), "seed": search_seed, "trial_memory_gb": trial_memory, **fields}
        found.append(Search(base=base, space=within, objective=objective, **options))
    return tuple(found)
