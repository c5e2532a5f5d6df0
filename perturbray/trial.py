"""Trial: one model on one split of one dataset with one seed, as data; and what running it is."""

import dataclasses
import hashlib
import json
import math
import resource
import time
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from perturbray.data.ablations import ABLATIONS, AblationSpec
from perturbray.data.batches import BatchStream, Cells
from perturbray.data.dataset import Conditions, DatasetSpec
from perturbray.data.splits import SPLITS, TEST, TRAIN, VAL, CovariateTransfer, Split, SplitSpec, checked
from perturbray.data.truth import observe
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError, nearest
from perturbray.models.base import MODELS, Model, ModelSpec
from perturbray.prediction import Here, Predicted, Prediction, Truth, assemble
from perturbray.randomness import derive
from perturbray.training.fit import Fit, Report, Training, fit
from perturbray.training.predict import Keep, predict

WHERE = ("path", "name")  # fields of a dataset that say where it is, not what it is


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is trained and judged. ``seed`` seeds training, the pairing with controls, and an ablation's draw."""

    dataset: DatasetSpec
    model: ModelSpec
    split: SplitSpec = field(default_factory=CovariateTransfer)
    ablation: AblationSpec | None = None
    training: Training = field(default_factory=Training)
    seed: int = 0
    variant: str = ""  # for people, what tells trials of one model apart, as "tuned" does; no part of what a trial is

    @property
    def name(self) -> str:
        """For people: the model, what was taken away, the seed."""
        parts = [MODELS.name_of(self.model) + (f" ({self.variant})" if self.variant else ""), self.taken]
        return ", ".join([*filter(None, parts), f"seed {self.seed}"])

    @property
    def taken(self) -> str:
        """What the ablation takes from training, in words; "" without one."""
        return "" if self.ablation is None else f"{ABLATIONS.name_of(self.ablation)} {self.ablation.shown}".rstrip()

    def key(self, fingerprint: str, *, judged: Sequence[str] = ()) -> str:
        """A hash of what the trial is and how it is judged: every field, the dataset's content instead of its place, and
        the names of the metrics."""
        table = {"dataset": {name: value for name, value in _fields(self.dataset).items() if name not in WHERE}}
        table["dataset"]["content"] = fingerprint
        for part, registry in (("model", MODELS), ("split", SPLITS), ("ablation", ABLATIONS)):
            spec = getattr(self, part)
            table[part] = None if spec is None else {"": registry.name_of(spec), **_fields(spec), **_content(spec)}
        table |= {"training": _fields(self.training), "seed": self.seed, "judged": list(judged)}
        text = json.dumps(_canonical(table), sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def columns(self) -> dict[str, str | int | float | bool]:
        """Every field of the specs as a column of the results."""
        columns: dict[str, Any] = {
            "name": self.name,
            "model": MODELS.name_of(self.model),
            "dataset": self.dataset.name,
            "split": SPLITS.name_of(self.split),
            "ablation": "" if self.ablation is None else ABLATIONS.name_of(self.ablation),
            "seed": self.seed,
            **({"variant": self.variant} if self.variant else {}),
        }
        for part in ("dataset", "split", "ablation", "model", "training"):
            if getattr(self, part) is not None:
                for name, value in _fields(getattr(self, part)).items():
                    plain = isinstance(value, str | int | float | bool)
                    columns[f"{part}.{name}"] = value if plain else json.dumps(value)
        return columns

    def override(self, changes: dict[str, Any]) -> "Trial":
        """The trial with fields changed by dotted path, e.g. ``{"model.width": 256, "seed": 3}``.

        Values may be text as typed on a command line. Raises InputError that names the nearest path.
        """
        changed = self
        for path, value in changes.items():
            part, _, name = path.partition(".")
            if part not in _fields(changed) or part == "variant" or bool(name) == (part == "seed"):
                raise InputError(f"unknown path {path!r}: {nearest(path, self.paths())}")
            if part == "seed":
                changed = replace(changed, seed=convert(value, int, path))
                continue
            spec = getattr(changed, part)
            if spec is None or name not in _fields(spec):
                raise InputError(f"unknown path {path!r}: {nearest(path, self.paths())}")
            hint = typing.get_type_hints(type(spec))[name]
            changed = replace(changed, **{part: replace(spec, **{name: convert(value, hint, path)})})
        return changed

    def paths(self) -> list[str]:
        """The dotted paths that ``override`` takes."""
        parts = ("dataset", "split", "ablation", "model", "training")
        specs = {part: getattr(self, part) for part in parts if getattr(self, part) is not None}
        return [f"{part}.{name}" for part, spec in specs.items() for name in _fields(spec)] + ["seed"]

    def check(self, conditions: Conditions) -> None:
        """Raise InputError where the task holds out a single perturbation entirely and the model cannot predict it.

        The task's own split decides: what an ablation takes away from training is reported condition by condition.
        """
        if "perturbation" in self.model.unseen:
            return
        subset = self.split.split(conditions).condition
        trained, asked = (
            {single for row in np.flatnonzero(np.isin(subset, subsets)) for single in conditions.singles[row]}
            for subsets in ((TRAIN,), (VAL, TEST))
        )
        if unseen := sorted(asked - trained):
            able = [name for name, spec in MODELS.items() if "perturbation" in spec.unseen]
            raise InputError(
                f"{self.name}: the split holds out {', '.join(unseen[:10])}{', ...' if len(unseen) > 10 else ''} "
                f"({len(unseen)} of {len(asked | trained)} single perturbations) in every context, and "
                f"{MODELS.name_of(self.model)} cannot predict what it never saw; models that can: {', '.join(able)}"
            )

    def make_split(self, conditions: Conditions) -> Split:
        """The split with the ablation applied."""
        if self.ablation is None:
            return self.split.split(conditions)
        split = self.ablation.apply(conditions, self.split, seed=self.seed)
        return checked(conditions, split, apart=self.split.apart, name=ABLATIONS.name_of(self.ablation))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What running a trial gives: a prediction to score, and columns about the run."""

    predicted: Predicted
    truth: Truth
    split: Split
    vocabulary: Vocabulary
    fit: Fit
    model: Model
    columns: dict[str, str | int | float]

    @property
    def stratum(self) -> np.ndarray:
        """(conditions of the truth,) str."""
        return self.split.stratum[self.truth.rows]

    @property
    def prediction(self) -> Prediction:
        """Both sides together, for metrics outside of a sweep: the same control cells on both."""
        return assemble(self.truth, self.predicted, self.stratum)


def run(
    trial: Trial,
    cells: Cells,
    conditions: Conditions,
    *,
    truth: Truth | None = None,
    sample: int = 0,
    keep: Keep = Here,
    report: Report | None = None,
    state: dict | None = None,
    windows: "Windows | None" = None,  # noqa: F821  # imports ray
    judge: Callable[[Predicted], dict[str, float]] | None = None,
    every: int = 1,
) -> Outcome:
    """Split, build, fit, predict: in this process, on a GPU if there is one. Knows nothing of Ray.

    The numbers depend on the trial alone: torch's generator is seeded here and given back as it was. ``truth`` is that of
    the trial's split, where it is at hand; ``sample`` predicted cells of each condition are kept, by ``keep``.
    With ``windows`` the cells of an epoch are streamed (``data.loading.Delivery``), and the numbers are the same.
    ``judge``: what a prediction of the truth is worth, reported each ``every`` epochs; the truth is then one of validation.
    """
    started = time.perf_counter()
    trial.check(conditions)
    split = trial.make_split(conditions)
    truth = truth or observe(cells, conditions, split)
    width = cells.embedding_width(trial.model.embedding)
    vocabulary = Vocabulary.of(conditions, split, embedding_width=width)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream = BatchStream(
        cells,
        conditions,
        split,
        batch_size=trial.training.batch_size,
        seed=trial.seed,
        mode=trial.model.mode,
        device=device,
        sampling=trial.training.sampling(trial.model.unit, getattr(trial.model, "set_size", 0)),
        embedding=trial.model.embedding,
        windows=windows,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(trial.seed, "training"))
        model = trial.model.build(vocabulary).to(device)
        mean = None

        def judged(model: Model) -> dict[str, float]:
            nonlocal mean
            found = predict(model, stream, truth, training_mean=mean)
            mean = found.training_mean
            return judge(found)

        done = fit(
            model,
            stream,
            trial.training,
            report=report,
            state=state,
            judge=None if judge is None else judged,
            every=every,
        )
        fitted = time.perf_counter()
        predicted = predict(model, stream, truth, sample=sample, keep=keep, training_mean=mean)
    if not len(predicted.rows):
        raise InputError(f"{trial.name}: no test condition is left to predict; the split holds out too little")
    columns = {
        "imbalance": split.record.get("imbalance", math.nan),
        "training_perturbations": json.dumps(split.record.get("training_perturbations", {})),
        "train_conditions": int(vocabulary.is_train.sum()),
        "train_cells": len(split.cells(TRAIN, conditions=conditions, controls=False)),
        "test_conditions": len(truth),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": done.epochs,
        "best_epoch": done.best_epoch,
        "val_loss": done.best_loss,
        "curve": json.dumps(done.curve),
        "fit_seconds": fitted - started,
        "predict_seconds": time.perf_counter() - fitted,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    parts = {"split": split, "vocabulary": vocabulary, "fit": done, "model": model, "columns": columns}
    return Outcome(predicted=predicted, truth=truth, **parts)


def _fields(spec: Any) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}


def _content(spec: Any) -> dict[str, str]:
    """What the files hold that a spec names; a plugin's spec need not say."""
    return spec.content() if hasattr(spec, "content") else {}


def _canonical(value: Any) -> Any:
    """Values that are equal as one text: 1, 1.0 and numpy's 1 are the same level, and trials that hold them are equal."""
    if isinstance(value, dict):
        return {name: _canonical(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_canonical(part) for part in value]
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def convert(value: Any, hint: Any, path: str) -> Any:
    """A value as the type of its field; text is read as a person types it. Raises InputError."""
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, str):
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if hint is int and isinstance(value, float):  # what a search draws from a quantised range
            if not value.is_integer():
                raise InputError(f"{path}={value!r}: a whole number is needed")
            return int(value)
        return tuple(value) if isinstance(value, list) else value
    text = value.strip()
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("none", "null", ""):
            return None
        return convert(value, next(a for a in arguments if a is not type(None)), path)
    if origin is tuple:
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1]
        # A semicolon parts values that hold commas, as the contexts of two covariates do.
        parts = [part for part in text.split(";" if ";" in text else ",") if part.strip()]
        return tuple(convert(part, arguments[0], path) for part in parts)
    if hint is bool:
        if text.lower() in ("true", "yes", "1", "on"):
            return True
        if text.lower() in ("false", "no", "0", "off"):
            return False
        raise InputError(f"{path}={value!r}: true or false")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise InputError(f"{path}={value!r}: {'a whole number' if hint is int else 'a number'} is needed") from None
    return text
