"""Validation: what a model is worth on the validation conditions, by the functions of metrics/, in milliseconds.

Only cells of the validation split are read here. A search that learns from nothing else can be judged on the test split.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from perturbray import scoring
from perturbray.data.batches import Cells
from perturbray.data.dataset import Conditions
from perturbray.data.splits import VAL
from perturbray.data.truth import observe
from perturbray.errors import InputError
from perturbray.models.base import MODELS
from perturbray.prediction import Predicted, Truth
from perturbray.search import Objective, Search
from perturbray.space import Values
from perturbray.trial import run

OBJECTIVE = "objective"


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The objective of a prediction, and the means of its metrics, by name."""

    objective: Objective
    truth: Truth  # of the validation conditions
    stratum: np.ndarray  # (conditions of the truth,) str
    reference: dict[str, float] | None = None  # means of the baseline, where the objective is scaled

    @classmethod
    def of(cls, search: Search, cells: Cells, conditions: Conditions, *, target_sum: float | None = None) -> "Judge":
        """What the validation cells of a search's base hold. Raises InputError where they cannot judge a model."""
        split, objective = search.base.make_split(conditions), search.objective
        if not ((split.condition == VAL) & ~conditions.is_control).any():
            raise InputError(f"search of {search.shown}: the split leaves no validation condition; hold out more")
        truth = observe(cells, conditions, split, subset=VAL, linear=objective.needs_linear, target_sum=target_sum)
        judge = cls(objective=objective, truth=_lean(truth), stratum=split.stratum[truth.rows])
        return judge._scaled(search, cells, conditions) if objective.scaled else judge

    def means(self, predicted: Predicted) -> dict[str, float]:
        return scoring.means(
            self.truth, predicted, self.stratum, self.objective.metrics, source=self.objective.controls
        )

    def __call__(self, predicted: Predicted) -> dict[str, float]:
        means = self.means(predicted)
        if undefined := [name for name, value in means.items() if np.isnan(value)]:
            raise InputError(f"objective: {undefined[0]} is undefined for every validation condition")
        return {OBJECTIVE: self.objective.of(means, self.reference), **means}

    def _scaled(self, search: Search, cells: Cells, conditions: Conditions) -> "Judge":
        """With the means of the baseline, which is fitted here."""
        baseline = replace(search.base, model=MODELS[self.objective.baseline]())
        outcome = run(baseline, cells, conditions, truth=self.truth)
        judge = replace(self, reference=self.means(outcome.predicted))
        judge.objective.of(judge.reference, judge.reference)  # raises where it is no scale
        return judge


def alone(
    search: Search, judge: Judge, cells: Cells, conditions: Conditions
) -> Callable[[Values, Callable[[int, dict[str, float]], bool]], dict[str, float] | None]:
    """A trial of a search in this process, for ``Course.run``."""

    class Stopped(Exception):
        pass

    def work(values: Values, report: Callable[[int, dict[str, float]], bool]) -> dict[str, float] | None:
        def tell(found: dict[str, float], snapshot: Callable[[], dict]) -> None:
            if report(int(found["epoch"]), found):
                raise Stopped

        trial = search.trial(values)
        try:
            asked = {"judge": judge, "every": search.every, "report": tell}
            outcome = run(trial, cells, conditions, truth=judge.truth, **asked)
        except Stopped:
            return None
        return {"epochs": outcome.fit.epochs, **judge(outcome.predicted)}

    return work


def _lean(truth: Truth) -> Truth:
    """With one halving, which split controls need; the others serve calibration alone."""
    parts = {
        name: part[:1]
        for name in (
            "observed_halves",
            "observed_variance",
            "half_cells",
            "control_halves",
            "control_variance",
            "linear_halves",
            "control_linear_halves",
        )
        if (part := getattr(truth, name)) is not None
    }
    return replace(truth, **parts, control_weights=tuple(weights[:2] for weights in truth.control_weights))
