"""Sweep: a name, trials and metrics. ``grid`` makes trials from a base and lists of values."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perturbray.errors import InputError, nearest
from perturbray.metrics.effects import EFFECTS
from perturbray.metrics.metric import Metric
from perturbray.search import Search, Tuned
from perturbray.trial import Trial

METRICS = tuple(
    Metric(score=score, effect=effect, rank=rank)
    for score, effect in (("rmse", "average"), ("cosine", "logfc_logmean"), ("pearson", "delta_ctrl"))
    for rank in (False, True)
)
PUBLISHED = tuple(
    Metric(score=score, effect=effect, rank=rank, exclude="none")
    for score, effect in (("rmse", "average"), ("cosine", "logfc_logmean"))
    for rank in (False, True)
)
CONVENTIONS = {
    "perturbray": (METRICS, "split"),
    "perturbench": (PUBLISHED, "reference"),
}  # metrics, controls of effects
SMOKE_EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Trials that together answer a question."""

    name: str
    trials: tuple[Trial, ...]
    metrics: tuple[Metric, ...] = METRICS
    controls: str = "split"  # where effects take their control cells from: split | reference
    cells: int = 400  # cells of a condition that metrics of distributions see
    question: str = ""
    x: str = ""  # the column that a figure has on its x axis
    x_label: str = ""
    notes: tuple[str, ...] = ()  # what a reader must know, printed on the page
    baselines: tuple[str, ...] = ("no_change", "perturbed_mean", "mean_shift")
    searches: tuple[Search, ...] = ()  # run first; what they find is trained and judged beside the trials
    track: tuple[str, ...] = ()  # where trials of searches are also recorded: wandb, mlflow

    def __post_init__(self) -> None:
        object.__setattr__(self, "trials", tuple(self.trials))
        object.__setattr__(self, "searches", tuple(self.searches))
        object.__setattr__(self, "track", tuple(self.track))
        if not self.trials:
            raise InputError(f"sweep {self.name!r} has no trials")

    @property
    def needs_cells(self) -> bool:
        """Whether a metric looks at cells and not only at means."""
        return any(not isinstance(metric, Metric) for metric in self.metrics)

    @property
    def needs_linear(self) -> bool:
        """Whether a metric rests on means of expm1 of expression."""
        return any(isinstance(metric, Metric) and EFFECTS[metric.effect].linear for metric in self.metrics)

    @property
    def judged(self) -> tuple[str, ...]:
        """What decides the scores beside the trial itself."""
        cells = (f"cells={self.cells}",) if self.needs_cells else ()
        return *sorted(metric.name for metric in self.metrics), f"controls={self.controls}", *cells

    def judge(self, convention: str | None = None, metrics: Sequence[str] = ()) -> "Sweep":
        """The sweep under another convention, and with further metrics by name."""
        sweep = self
        if convention is not None:
            if convention not in CONVENTIONS:
                raise InputError(f"no convention of sweeps is named {convention!r}: {nearest(convention, CONVENTIONS)}")
            sweep = replace(sweep, metrics=CONVENTIONS[convention][0], controls=CONVENTIONS[convention][1])
        added = [Metric.parse(name) for name in metrics]
        return replace(sweep, metrics=tuple(dict.fromkeys([*sweep.metrics, *added])))

    def override(self, changes: Mapping[str, Any]) -> "Sweep":
        """Change fields of every trial that has them; a path that no trial has is an InputError."""
        trials = self.trials
        for path, value in changes.items():
            _check_path(path, (*trials, *(search.base for search in self.searches)))
            trials = tuple(t.override({path: value}) if path in t.paths() else t for t in trials)
        searches = tuple(search.override(changes) for search in self.searches)
        return replace(self, trials=_distinct(trials), searches=searches)

    def trained(self, found: Iterable[Tuned]) -> "Sweep":
        """Trials of what searches found are trained as it was found."""
        how = {one.model: one.training for one in found}
        trials = tuple(replace(t, training=how.get(t.model, t.training)) for t in self.trials)
        bases = [replace(s.base, training=how.get(s.base.model, s.base.training)) for s in self.searches]
        searches = tuple(replace(s, base=base) for s, base in zip(self.searches, bases, strict=True))
        return replace(self, trials=_distinct(trials), searches=searches)

    def grid(self, axes: Mapping[str, Sequence[Any]]) -> "Sweep":
        """Every combination of values for every trial that has the paths."""
        trials = self.trials
        for path, values in axes.items():
            _check_path(path, trials)
            trials = tuple(
                c for t in trials for c in ([t.override({path: v}) for v in values] if path in t.paths() else [t])
            )
        return replace(self, trials=_distinct(trials))

    def smoke(self) -> "Sweep":
        """A minute's work: one seed, the lowest and the highest level, a few epochs. Stored under a name of its own."""
        seed = min(t.seed for t in self.trials)
        trials = [
            replace(t, training=replace(t.training, epochs=min(t.training.epochs, SMOKE_EPOCHS))) for t in self.trials
        ]
        ablations = sorted(dict.fromkeys(t.ablation for t in trials), key=lambda a: getattr(a, "level", 0))
        kept = {ablations[0], ablations[-1]}
        trials = [t for t in trials if t.seed == seed and t.ablation in kept]
        searches = tuple(search.smoke() for search in self.searches if search.base.ablation in kept)
        return replace(self, name=f"{self.name}-smoke", trials=tuple(trials), searches=searches)


def grid(bases: Trial | Iterable[Trial], axes: Mapping[str, Sequence[Any]]) -> tuple[Trial, ...]:
    """Every base with every combination of values, e.g. ``grid(base, {"seed": range(5), "model.width": [64, 128]})``."""
    bases = [bases] if isinstance(bases, Trial) else list(bases)
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return tuple(base.override(changes) for base in bases for changes in combinations)


def balanced(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Those trials whose model trains in epochs, with contexts drawn equally often, as a variant of their own."""
    return tuple(
        replace(trial, training=replace(trial.training, balance=True), variant="balanced")
        for trial in trials
        if trial.model.learning == "gradient"
    )


def _check_path(path: str, trials: Sequence[Trial]) -> None:
    paths = {p for t in trials for p in t.paths()}
    if path not in paths:
        raise InputError(f"unknown path {path!r}: {nearest(path, paths)}")


def _distinct(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    return tuple(dict.fromkeys(trials))
