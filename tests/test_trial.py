"""Laws of a trial: its key is what it is and not where it runs, its fields change by path, and its numbers are its own."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import screens
import torch

from perturbray.data.ablations import Imbalance, PublishedImbalance
from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import TEST, TRAIN, UNUSED, CovariateTransfer, SplitSpec
from perturbray.errors import InputError
from perturbray.models.base import MODELS
from perturbray.models.baselines import MeanShift, NoChange
from perturbray.models.latent_additive import LatentAdditive
from perturbray.training.fit import Training
from perturbray.trial import Trial, convert, run

BASE = Trial(dataset=DatasetSpec(path="screen.h5ad"), model=LatentAdditive(), ablation=Imbalance(level=0.1), seed=1)


def other(value, hint):
    """Another value of the same type that a field may have."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value + 0.125
        case str():
            return {"auto": "log1p", "random": "fixed"}.get(value, value + "x")
        case None:
            return 0 if hint == int | None else "counts"
        case tuple():
            return value[::-1] if len(set(value)) > 1 else (*value, "x")
    raise AssertionError(value)


def variations() -> dict[str, Trial]:
    """The base with one field changed, by the path of the field."""
    found = {"seed": replace(BASE, seed=2)}
    for part in ("dataset", "split", "ablation", "model", "training"):
        spec = getattr(BASE, part)
        for field in dataclasses.fields(spec):
            changed = replace(spec, **{field.name: other(getattr(spec, field.name), field.type)})
            found[f"{part}.{field.name}"] = replace(BASE, **{part: changed})
    return found


# The key.


def test_a_key_changes_with_every_field_but_path_and_name():
    keys = {path: trial.key("content") for path, trial in variations().items()}
    same = {path for path, key in keys.items() if key == BASE.key("content")}
    assert same == {"dataset.path", "dataset.name"}
    changed = [key for path, key in keys.items() if path not in same]
    assert len(set(changed)) == len(changed)


def test_a_key_changes_with_the_content_of_the_dataset_and_with_the_kind_of_each_part():
    keys = [
        BASE.key("content"),
        BASE.key("other content"),
        replace(BASE, model=NoChange()).key("content"),
        replace(BASE, model=MeanShift()).key("content"),
        replace(BASE, ablation=None).key("content"),
        replace(BASE, ablation=PublishedImbalance()).key("content"),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


def test_trials_that_are_equal_have_one_key():
    """Whatever type a number has: a level of 0 and of 0.0, a seed out of range() and out of numpy."""
    whole = replace(BASE, ablation=Imbalance(level=0), training=Training(lr=1))
    float_ = replace(BASE, ablation=Imbalance(level=0.0), training=Training(lr=1.0))
    assert whole == float_
    assert whole.key("content") == float_.key("content")
    assert replace(BASE, seed=np.int64(1)).key("content") == BASE.key("content")
    assert replace(BASE, ablation=Imbalance(level=np.float64(0.1))).key("content") == BASE.key("content")


SCRIPT = """
from perturbray.data.ablations import Imbalance
from perturbray.data.dataset import DatasetSpec
from perturbray.models.latent_additive import LatentAdditive
from perturbray.trial import Trial
trial = Trial(dataset=DatasetSpec(path="elsewhere.h5ad"), model=LatentAdditive(), ablation=Imbalance(level=0.1), seed=1)
print(trial.key("content"))
"""


def test_a_key_does_not_depend_on_the_hash_seed():
    environment = {**os.environ, "PYTHONHASHSEED": "42"}
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == BASE.key("content")


# Fields by dotted path.


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A model's hyperparameters of every kind of type."""

    whole: int = 1
    number: float = 1.0
    flag: bool = False
    text: str = "x"
    optional: int | None = 3
    maybe: str | None = None
    words: tuple[str, ...] = ()
    shares: tuple[float, float, float] = (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("whole", "12", 12),
        ("whole", 12, 12),
        ("whole", 128.0, 128),  # what a search draws from a quantised range
        ("whole", np.int64(12), 12),
        ("number", "1e-4", 1e-4),
        ("number", "3", 3.0),
        ("number", 3, 3.0),
        ("number", np.float32(0.5), 0.5),
        *[("flag", text, True) for text in ("true", "True", "yes", "1", "on")],
        *[("flag", text, False) for text in ("false", "no", "0", "OFF")],
        ("flag", True, True),
        ("text", "12", "12"),
        ("text", " none ", "none"),
        ("optional", "none", None),
        ("optional", "7", 7),
        ("optional", None, None),
        ("maybe", "counts", "counts"),
        ("maybe", "None", None),
        ("words", "a,b", ("a", "b")),
        ("words", "a, b,", ("a", "b")),
        ("words", "(a,b)", ("a", "b")),
        ("words", "a", ("a",)),
        ("words", "", ()),
        ("words", ["a", "b"], ("a", "b")),
        ("words", "K562,none;A549,IFN", ("K562,none", "A549,IFN")),
        ("words", "T cells,B cells (naive)", ("T cells", "B cells (naive)")),
        ("shares", "0.8,0.1,0.1", (0.8, 0.1, 0.1)),
        ("shares", "0.8;0.1;0.1", (0.8, 0.1, 0.1)),
    ],
)
def test_a_value_becomes_the_type_of_its_field(monkeypatch, name, value, expected):
    trial = replace(BASE, model=Fields())
    found = getattr(trial.override({f"model.{name}": value}).model, name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.width", "wide", r"model\.width='wide': a whole number is needed"),
        ("model.width", "12.5", r"model\.width='12\.5': a whole number"),
        ("model.width", 12.5, r"model\.width=12\.5: a whole number"),
        ("training.lr", "fast", r"training\.lr='fast': a number is needed"),
        ("model.softplus", "perhaps", r"model\.softplus='perhaps': true or false"),
        ("split.controls", "a,b,c", r"split\.controls='a': a number is needed"),
        ("seed", "x", "seed='x': a whole number"),
        ("training.epochs", "0", r"training\.epochs=0: at least 1"),
        ("split.fraction", "2", r"split\.fraction=2\.0: a share"),
        ("dataset.normalize", "log1q", "did you mean 'log1p'"),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_refused_with_its_path(path, value, message):
    with pytest.raises(InputError, match=message):
        BASE.override({path: value})


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("model.widht", "model.width"),
        ("training.learning", "training.lr"),
        ("trainig.lr", "training.lr"),
        ("sed", "seed"),
        ("split.seeds", "split.seed"),
        ("ablation.levels", "ablation.level"),
    ],
)
def test_an_unknown_path_is_refused_with_the_nearest(path, suggestion):
    with pytest.raises(InputError, match=rf"unknown path '{path}': did you mean .*'{suggestion}'"):
        BASE.override({path: "1"})


@pytest.mark.parametrize(
    "path", ["", "model", "training", "seed.x", ".width", "model.", "model.width.x", "model.build"]
)
def test_what_is_not_the_path_of_a_field_is_refused(path):
    with pytest.raises(InputError, match="unknown path"):
        BASE.override({path: 1})


def test_a_path_of_an_ablation_that_there_is_not_is_refused():
    with pytest.raises(InputError, match=r"unknown path 'ablation\.level'"):
        replace(BASE, ablation=None).override({"ablation.level": 0.1})
    assert not [path for path in replace(BASE, ablation=None).paths() if path.startswith("ablation")]


def test_every_path_can_be_overridden_with_the_value_that_it_has():
    assert set(BASE.paths()) == set(variations())
    for path in BASE.paths():
        part, _, name = path.partition(".")
        value = getattr(getattr(BASE, part), name) if name else BASE.seed
        assert BASE.override({path: value}) == BASE
        assert BASE.override({path: value}).key("") == BASE.key("")


def test_an_override_changes_what_it_names_and_not_the_trial_itself():
    before = pickle.dumps(BASE)
    changed = BASE.override({"model.width": 7, "seed": 3, "split.seed": 9})
    assert (changed.model.width, changed.seed, changed.split.seed) == (7, 3, 9)
    assert replace(changed, model=BASE.model, seed=1, split=BASE.split) == BASE
    assert pickle.dumps(BASE) == before


def test_conversion_is_the_same_for_fields_of_nested_options():
    assert convert("3", int | None, "x") == 3
    assert convert("", float | None, "x") is None


def test_columns_are_plain_values_and_hold_every_field():
    for trial in (BASE, replace(BASE, ablation=PublishedImbalance()), replace(BASE, ablation=None, model=NoChange())):
        columns = trial.columns()
        assert all(isinstance(value, str | int | float | bool) for value in columns.values())
        assert set(trial.paths()) <= set(columns)
    columns = BASE.columns()
    assert (columns["model"], columns["split"], columns["ablation"]) == ("latent_additive", "transfer", "imbalance")
    assert (columns["dataset"], columns["seed"], columns["ablation.level"]) == ("screen", 1, 0.1)
    assert json.loads(columns["dataset.covariates"]) == ["cell_type"]
    assert json.loads(columns["dataset.layer"]) is None
    assert json.loads(columns["split.controls"]) == [0.5, 0.25, 0.25]


def test_a_name_says_model_ablation_and_seed():
    assert BASE.name == "latent_additive, imbalance 0.1, seed 1"
    assert replace(BASE, model=NoChange(), ablation=None).name == "no_change, seed 1"
    assert "(188, 188, 188)" in replace(BASE, ablation=PublishedImbalance()).name


def test_a_trial_is_frozen_hashes_and_pickles():
    assert pickle.loads(pickle.dumps(BASE)) == BASE
    assert hash(replace(BASE, seed=1)) == hash(BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.seed = 3


# Running it.


@pytest.fixture(scope="module")
def screen(small_screen):
    spec = DatasetSpec(path=str(small_screen))
    conditions = spec.conditions()
    rows = screens.rows_of(spec, conditions)
    return SimpleNamespace(spec=spec, conditions=conditions, rows=rows, cells=screens.in_blocks(rows, 1))


def trial_of(screen, name: str, **fields) -> Trial:
    training = Training(epochs=2, batch_size=128)
    return Trial(**{"dataset": screen.spec, "model": screens.default_spec(name), "training": training, **fields})


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_numbers_and_torch_is_left_as_it_was(screen, name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = run(trial_of(screen, name), screen.cells, screen.conditions)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = run(trial_of(screen, name), screens.in_blocks(screen.rows, 4), screen.conditions)
    np.testing.assert_array_equal(first.prediction.predicted.mean, second.prediction.predicted.mean)
    np.testing.assert_array_equal(first.prediction.observed.cells, second.prediction.observed.cells)
    np.testing.assert_allclose(first.prediction.observed.mean, second.prediction.observed.mean, rtol=1e-12)
    timed = {"fit_seconds", "predict_seconds", "peak_memory_mb"}
    assert set(first.columns) == set(second.columns)
    for column in set(first.columns) - timed:
        np.testing.assert_equal(first.columns[column], second.columns[column])


def test_another_seed_gives_another_fit_on_the_same_task(screen):
    first, second = (
        run(trial_of(screen, "latent_additive", seed=seed), screen.cells, screen.conditions) for seed in (0, 1)
    )
    assert (first.split.condition == second.split.condition).all()
    assert (first.prediction.predicted.mean != second.prediction.predicted.mean).any()


def test_an_outcome_is_of_the_test_conditions(screen):
    outcome = run(trial_of(screen, "mean_shift"), screen.cells, screen.conditions)
    conditions, prediction = screen.conditions, outcome.prediction
    asked = np.flatnonzero((outcome.split.condition == TEST) & ~conditions.is_control)
    assert outcome.truth.rows[outcome.predicted.rows].tolist() == asked.tolist()
    assert prediction.perturbation.tolist() == conditions.perturbation[asked].tolist()
    dense = screen.rows.toarray().astype(np.float64)
    for row, observed, cells in zip(asked, prediction.observed.mean, prediction.observed.cells, strict=True):
        here = conditions.cell_condition == row
        assert here.sum() == cells
        np.testing.assert_allclose(observed, dense[here].mean(axis=0), rtol=1e-9)
    for context, control in enumerate(prediction.control.mean):
        rows = outcome.split.cells(TEST, conditions=conditions, controls=True)
        rows = rows[conditions.context[conditions.cell_condition[rows]] == context]
        np.testing.assert_allclose(control, dense[rows].mean(axis=0), rtol=1e-9)
    columns = outcome.columns
    assert columns["test_conditions"] == len(asked)
    assert columns["train_cells"] == len(outcome.split.cells(TRAIN, conditions=conditions, controls=False))
    assert columns["parameters"] == 0
    assert np.isnan(columns["imbalance"])


@pytest.mark.parametrize("name", MODELS)
def test_expression_of_test_cells_changes_no_prediction(screen, name):
    """Leakage: what is judged is not looked at before."""
    trial = trial_of(screen, name)
    expected = run(trial, screen.cells, screen.conditions)
    tested = expected.split.cells(TEST, conditions=screen.conditions, controls=False)
    rows = screen.rows.tolil()
    rows[tested] = screen.rows[tested[::-1]] * 3
    found = run(trial, screens.in_blocks(rows.tocsr(), 1), screen.conditions)
    np.testing.assert_array_equal(found.prediction.predicted.mean, expected.prediction.predicted.mean)
    assert (found.prediction.observed.mean != expected.prediction.observed.mean).any()


def test_what_was_taken_away_is_in_the_columns(screen):
    ablation = Imbalance(level=0.2, highest=0.2, tolerance=0.1)
    columns = run(trial_of(screen, "mean_shift", ablation=ablation), screen.cells, screen.conditions).columns
    assert columns["imbalance"] == pytest.approx(0.2, abs=0.1)
    assert sum(json.loads(columns["training_perturbations"]).values()) == columns["train_conditions"]


@dataclass(frozen=True, kw_only=True)
class Without(SplitSpec):
    """Holds out some labels in every context."""

    labels: tuple[str, ...]

    def draw(self, conditions):
        split = CovariateTransfer().split(conditions)
        held = np.isin(conditions.perturbation, self.labels)
        condition = np.where(held, TEST, split.condition).astype(np.int8)
        cell = np.where(held[conditions.cell_condition], TEST, split.cell).astype(np.int8)
        return replace(split, condition=condition, cell=cell)


def test_a_model_is_refused_a_task_with_perturbations_that_it_cannot_know(screen):
    conditions = screen.conditions
    labels = [label for label in conditions.perturbations if "+" not in label]
    held = tuple(sorted(labels)[:2])
    in_pairs = {single for singles in conditions.singles if len(singles) > 1 for single in singles}
    pairs = tuple(p for p in conditions.perturbations if "+" in p)
    trial = trial_of(screen, "latent_additive", split=Without(labels=(*held, *pairs)))
    message = rf"latent_additive, seed 0: the split holds out .*{held[0]}.* single perturbations\) in every context"
    with pytest.raises(InputError, match=message):
        run(trial, screen.cells, conditions)
    replace(trial, model=MODELS["no_change"]()).check(conditions)
    assert in_pairs, "combinations of singles that training shows are another thing"
    replace(trial, split=Without(labels=pairs)).check(conditions)


def test_perturbations_that_an_ablation_takes_away_are_reported_and_not_refused(screen):
    taken = trial_of(screen, "latent_additive", ablation=Imbalance(level=0.2, highest=0.2, tolerance=0.1))
    taken.check(screen.conditions)


def test_an_ablation_that_leaks_is_refused_as_a_split_is(screen, monkeypatch):
    """One that trains on cells of test conditions."""
    trial = trial_of(screen, "mean_shift", ablation=Imbalance(level=0.2, highest=0.2, tolerance=0.1))
    fair = trial.make_split(screen.conditions)
    assert sum(fair.record["strata"]["common"][1:]) == (fair.condition != UNUSED)[~screen.conditions.is_control].sum()

    def greedy(self, conditions, task, *, seed):
        split = task.split(conditions)
        return replace(split, cell=np.where(split.cell == TEST, TRAIN, split.cell))

    monkeypatch.setattr(Imbalance, "apply", greedy)
    with pytest.raises(
        InputError, match=r"imbalance: \d+ cells leak: .* stands in train, but its condition .* in test"
    ):
        trial.make_split(screen.conditions)


def test_a_split_that_leaves_nothing_to_predict_is_refused_by_the_trials_name(screen, monkeypatch):
    def nothing(self, conditions):
        split = CovariateTransfer().split(conditions)
        tested = split.condition == TEST
        return replace(split, condition=np.where(tested, TRAIN, split.condition))

    trial = trial_of(screen, "mean_shift")
    monkeypatch.setattr(Trial, "make_split", lambda self, conditions: nothing(self, conditions))
    with pytest.raises(InputError, match="mean_shift, seed 0: no test condition is left to predict"):
        run(trial, screen.cells, screen.conditions)
