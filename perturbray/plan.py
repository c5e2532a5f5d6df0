"""Plan: a sweep on its data. Which trials there are, by key, which are finished, and what they are held against."""

import hashlib
import json
import platform
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np

from perturbray import scoring, synthetic
from perturbray.data import matrix, store
from perturbray.data.dataset import Conditions, DatasetSpec, fingerprint, open_screen
from perturbray.data.splits import TEST, TRAIN, Split
from perturbray.data.truth import digest
from perturbray.errors import InputError
from perturbray.results import table
from perturbray.sweep import Sweep
from perturbray.trial import Trial

PROGRESS_SECONDS = 10.0  # between two lines while a screen is read
MODELS_FOLDER = "models"
PACKAGES = ("perturbray", "ray", "torch", "numpy", "anndata")


@dataclass(kw_only=True)
class Plan:
    """A sweep on its data: every trial by key, and which are finished. Reading obs, var and, if unknown, X once."""

    sweep: Sweep
    folder: Path
    conditions: dict[DatasetSpec, Conditions]
    splits: dict[tuple, Split]
    facts: dict[DatasetSpec, matrix.MatrixFacts] = field(default_factory=dict)
    keep_models: bool = False  # a trial is finished when its fitted model is stored too

    @classmethod
    def of(cls, sweep: Sweep, folder: Path, *, keep_models: bool = False) -> "Plan":
        """Check everything that can be checked before anything is read or written. Raises InputError."""
        specs = dict.fromkeys(trial.dataset for trial in sweep.trials)
        conditions = {spec: store.conditions(spec) for spec in specs}
        splits: dict[tuple, Split] = {}
        checked = set()
        for trial in sweep.trials:
            if (subject := (trial.dataset, trial.split, type(trial.model))) not in checked:
                trial.check(conditions[trial.dataset])
                checked.add(subject)
            if task_of(trial) not in splits:
                splits[task_of(trial)] = split = trial.make_split(conditions[trial.dataset])
                if not (split.condition == TEST).any():
                    raise InputError(
                        f"{trial.name}: the split leaves no test condition; hold out more or use more data"
                    )
        plan = cls(sweep=sweep, folder=folder, conditions=conditions, splits=splits, keep_models=keep_models)
        plan.facts = {spec: facts for spec in specs if (facts := matrix.remembered(spec)) is not None}
        return plan

    @property
    def known(self) -> bool:
        """Whether the content of every dataset is known, and with it the keys."""
        return len(self.facts) == len(self.conditions)

    def scan(self, say: store.Say = lambda _: None) -> None:
        """Read X where its content is not known yet, into the store that the sweep runs on later."""
        for spec in self.conditions.keys() - self.facts.keys():
            self.read(spec, say)

    def read(self, spec: DatasetSpec, say: store.Say) -> store.Store:
        """The store of a dataset, and with it what X holds."""
        progress = _Lines(say, f"reading {spec.path}")
        found = store.ingest(spec, self.conditions[spec], progress=progress, say=say)
        self.facts[spec] = found.facts
        return found

    @cached_property
    def contents(self) -> dict[DatasetSpec, str]:
        """The content of each dataset, as it goes into keys."""
        return {spec: fingerprint(conditions, self.facts[spec].digest) for spec, conditions in self.conditions.items()}

    @cached_property
    def trials(self) -> dict[str, Trial]:
        """Trials by key, in the order of the sweep."""
        return {trial.key(self.contents[trial.dataset], judged=self.sweep.judged): trial for trial in self.sweep.trials}

    @cached_property
    def anchors(self) -> dict[str, scoring.Anchor]:
        """What models are held against, by key: one for each set of test cells and its division into strata."""
        found = {}
        for trial in self.sweep.trials:
            split = self.splits[task_of(trial)]
            rows = np.flatnonzero((split.condition == TEST) & ~self.conditions[trial.dataset].is_control)
            stratum, truth = split.stratum[rows], self.truth_of(trial)
            text = "\n".join([self.contents[trial.dataset], truth, *stratum, *self.sweep.judged])
            key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            found.setdefault(key, scoring.Anchor(key=key, truth=truth, stratum=stratum, seed=trial.seed))
        return found

    def truth_of(self, trial: Trial) -> str:
        """The digest of the truth that a trial is judged against."""
        return digest(self.conditions[trial.dataset], self.splits[task_of(trial)])

    def finished(self) -> set[str]:
        """Keys of this plan that have a result."""
        if not self.folder.is_dir():
            return set()
        found = table.finished(self.folder) & set(self.trials)
        return {key for key in found if self.model_of(key).exists()} if self.keep_models else found

    def model_of(self, key: str) -> Path:
        """Where the fitted model of a trial is kept."""
        return self.folder / MODELS_FOLDER / f"{key}.pt"

    def remaining(self) -> dict[str, Trial]:
        """Trials without a result."""
        done = self.finished()
        return {key: trial for key, trial in self.trials.items() if key not in done}

    def normalisation(self, spec: DatasetSpec) -> matrix.Normalisation:
        """What is done to a dataset's values."""
        return matrix.decide(spec, self.facts[spec])

    def describe(self, *, command: str, state: str) -> dict:
        """The plan as stored in sweep.json."""
        spec = self.sweep.trials[0].dataset
        conditions = self.conditions[spec]
        perturbed = conditions.cells[~conditions.is_control].sum()
        return {
            "name": self.sweep.name,
            "question": self.sweep.question,
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "x": self.sweep.x,
            "x_label": self.sweep.x_label,
            "headline": [metric.name for metric in self.sweep.metrics],
            "metrics": [
                {
                    "name": metric.name,
                    "higher_is_better": metric.higher_is_better,
                    "best": metric.best,
                    "chance": metric.chance,
                }
                for metric in self.sweep.metrics
            ],
            "dataset": {
                "name": spec.name,
                "path": spec.path,
                "cells": len(conditions.cell_condition),
                "perturbed_cells": int(perturbed),
                "genes": len(conditions.genes),
                "contexts": len(conditions.contexts),
                "context_names": [conditions.context_name(c) for c in range(len(conditions.contexts))],
                "perturbations": len(conditions.perturbations),
                "normalisation": self.normalisation(spec).text,
                "content": self.facts[spec].digest,
            },
            "baselines": list(self.sweep.baselines),
            "notes": list(self.sweep.notes),
            "splits": list(
                {json.dumps(split.record, sort_keys=True): split.record for split in self.splits.values()}.values()
            ),
            "anchors": sorted(self.anchors),
            "controls": self.sweep.controls,
            "cells": self.sweep.cells if self.sweep.needs_cells else 0,
            "versions": versions(),
            "status": {"state": state},
            "trials": [
                {
                    "key": key,
                    "name": trial.name,
                    "columns": {**trial.columns(), "imbalance": self.splits[task_of(trial)].record.get("imbalance")},
                }
                for key, trial in self.trials.items()
            ],
        }


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def task_of(trial: Trial) -> tuple:
    return trial.dataset, trial.split, trial.ablation, trial.seed


def reference(plan: Plan) -> dict[str, list] | None:
    """What is known analytically of a synthetic screen: the error of the mean shift at the lowest level."""
    trials = [trial for trial in plan.trials.values() if type(trial.model).__name__ == "MeanShift"]
    if not trials:
        return None
    spec = trials[0].dataset
    truth, conditions = _truth(spec), plan.conditions[spec]
    if truth is None or spec.normalize == "none":
        return None
    lowest = min(trials, key=lambda t: getattr(t.ablation, "level", 0.0))
    at_lowest = [t for t in trials if t.ablation == lowest.ablation]
    rows: dict[str, list] = {name: [] for name in ("reference", "model", "perturbation", "metric", "value")}
    covariates: dict[str, list] = {f"covariate.{name}": [] for name in conditions.covariates}
    expected: dict[int, list[float]] = {}
    for trial in at_lowest:
        split = plan.splits[task_of(trial)]
        for row, value in _mean_shift_errors(truth, conditions, split).items():
            expected.setdefault(row, []).append(value)
    for row, values in sorted(expected.items()):
        rows["reference"].append("mean_shift (analytic)")
        rows["model"].append("mean_shift")
        rows["perturbation"].append(str(conditions.perturbation[row]))
        rows["metric"].append("rmse/average")
        rows["value"].append(float(np.mean(values)))
        for name, level in zip(covariates, conditions.contexts[conditions.context[row]], strict=True):
            covariates[name].append(level)
    return {**rows, **covariates} if rows["value"] else None


def _truth(spec: DatasetSpec) -> synthetic.Truth | None:
    """The known effects of a synthetic screen, from its store where there is one."""
    found = store.find(spec)
    if found is not None:
        return synthetic.Truth.read(found.truth) if found.truth else None
    with open_screen(spec.path) as file:
        there = isinstance(file, h5py.File) and "uns/truth" in file
    return synthetic.Truth.read(spec.path) if there else None


class _Lines:
    """Says every so often how much is done."""

    def __init__(self, say: store.Say, what: str) -> None:
        self.say, self.what, self.last = say, what, time.monotonic()

    def __call__(self, share: float) -> None:
        if time.monotonic() - self.last >= PROGRESS_SECONDS:
            self.say(f"{self.what}: {share:.0%}")
            self.last = time.monotonic()


def _mean_shift_errors(truth: "synthetic.Truth", conditions: Conditions, split: Split) -> dict[int, float]:
    """The expected RMSE of the mean shift for every test condition of the common stratum, by row."""
    names = [context[0] for context in conditions.contexts]
    code = conditions.cell_condition
    cells: dict[tuple[str, str, str], int] = {}
    for subset, name in ((TRAIN, "train"), (TEST, "test")):
        for row, n in enumerate(np.bincount(code[split.cell == subset], minlength=len(conditions))):
            cells[names[conditions.context[row]], str(conditions.perturbation[row]), name] = int(n)
    errors = {}
    for row in np.flatnonzero((split.condition == TEST) & ~conditions.is_control & (split.stratum == "common")):
        label = conditions.perturbation[row]
        train = (conditions.perturbation == label) & (split.condition == TRAIN)
        if not train.any():  # an unseen combination or perturbation: there is no shift to take over
            continue
        errors[int(row)] = synthetic.expected_mean_shift_error(
            truth,
            condition=(names[conditions.context[row]], str(label)),
            training_contexts=[names[c] for c in conditions.context[train]],
            cells=cells,
        )
    return errors
