"""Laws of a search as data: its objective, what it refuses, what a changed field does to it, and tuned specs in files."""

import json
from dataclasses import replace

import numpy as np
import pytest

import perturbray as pr
from perturbray.errors import InputError
from perturbray.metrics.metric import Metric
from perturbray.models.published import SEARCHED
from perturbray.search import PAPER, Halving, Objective, Search, Tuned, own_values, searches
from perturbray.space import Choice, LogUniform, When, draw

BASE = pr.Trial(dataset=pr.DatasetSpec(path="screen.h5ad"), model=pr.LatentAdditive(), training=pr.Training(epochs=27))
SPACE = {"model.width": Choice(64, 128), "training.lr": LogUniform(1e-4, 1e-2)}
SEARCH = Search(base=BASE, space=SPACE)


def test_the_default_objective_is_the_papers():
    assert PAPER.name == "rmse/average + 0.1 * rmse/average/rank"
    assert PAPER.of({"rmse/average": 0.2, "rmse/average/rank": 0.3}) == pytest.approx(0.23)
    assert Objective.parse(PAPER.name) == PAPER


def test_each_metric_of_an_objective_has_its_own_direction():
    objective = Objective.parse("0.5*cosine/logfc_logmean + 2 * rmse/average")
    worse = objective.of({"cosine/logfc_logmean": 0.1, "rmse/average": 0.2})
    assert objective.of({"cosine/logfc_logmean": 0.6, "rmse/average": 0.2}) == pytest.approx(worse - 0.25)
    assert objective.of({"cosine/logfc_logmean": 0.1, "rmse/average": 0.1}) == pytest.approx(worse - 0.2)


def test_a_scaled_objective_is_one_for_its_baseline_zero_for_perfection_and_knows_no_unit():
    objective = Objective.parse("rmse/average + cosine/logfc_logmean", scaled=True)
    reference = {"rmse/average": 0.2, "cosine/logfc_logmean": 0.4}
    assert objective.of(reference, reference) == pytest.approx(2)
    assert objective.of({"rmse/average": 0.0, "cosine/logfc_logmean": 1.0}, reference) == pytest.approx(0)
    found = objective.of({"rmse/average": 0.1, "cosine/logfc_logmean": 0.7}, reference)
    other_unit = {"rmse/average": 0.2 * 1.44}, {"rmse/average": 0.1 * 1.44}  # as with log2 in the place of log
    assert objective.of(
        {**other_unit[1], "cosine/logfc_logmean": 0.7}, {**reference, **other_unit[0]}
    ) == pytest.approx(found)
    with pytest.raises(InputError, match=r"mean_shift has rmse/average 0 .* no scale"):
        objective.of(reference, {**reference, "rmse/average": 0.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(()), "at least one metric"),
        (lambda: Objective(((Metric("rmse"), 0.0),)), "weight of rmse/average is 0"),
        (lambda: Objective.parse("energy/pca"), "energy/pca needs cells"),
        (lambda: Objective.parse("x * rmse/average"), "'x' is no weight"),
        (lambda: Objective.parse("rmse/averge"), "no metric is named 'rmse/averge'"),
        (lambda: replace(SEARCH, space={}), "at least one hyperparameter"),
        (lambda: replace(SEARCH, space={"model.widht": Choice(1, 2)}), "did you mean 'model.width'"),
        (lambda: replace(SEARCH, space={"split.seed": Choice(1, 2)}), "no hyperparameter of a model or its training"),
        (lambda: replace(SEARCH, first=({"model.depth": 3},)), "unknown path 'model.depth'"),
        (lambda: replace(SEARCH, way="tpee"), "did you mean 'tpe'"),
        (lambda: replace(SEARCH, samples=0), "samples=0: at least 1"),
        (lambda: replace(SEARCH, gpus=0.0), "gpus=0"),
        (lambda: replace(SEARCH, every=3), "passes over"),
        (lambda: Halving(first=0), "first is at least 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_rungs_grow_by_the_factor_and_end_before_training_does():
    assert Halving(first=2, factor=3).rungs(60) == (2, 6, 18, 54)
    assert Halving(first=2, factor=3).rungs(54) == (2, 6, 18)
    assert Halving(first=5, factor=2).rungs(4) == ()


def test_an_identity_holds_what_decides_the_proposals_and_no_more():
    same = [
        replace(SEARCH, samples=7),
        replace(SEARCH, seconds=5.0, at_once=1, trial_seconds=3.0, max_failed=2, gpus=0.5, seeds=1, widen=True),
        replace(SEARCH, base=replace(BASE, model=pr.LatentAdditive(width=64))),  # width is searched for
    ]
    assert {one.identity("content") for one in same} == {SEARCH.identity("content")}
    other = [
        replace(SEARCH, seed=1),
        replace(SEARCH, way="random"),
        replace(SEARCH, halving=None),
        replace(SEARCH, space={**SPACE, "model.width": Choice(64, 128, 256)}),
        replace(SEARCH, objective=Objective.parse("rmse/average")),
        replace(SEARCH, first=({"model.width": 64, "training.lr": 1e-3},)),
        replace(SEARCH, base=replace(BASE, model=pr.LatentAdditive(latent_dim=8))),
    ]
    assert len({one.identity("content") for one in [SEARCH, *other]}) == len(other) + 1
    assert SEARCH.identity("other content") != SEARCH.identity("content")


def test_a_field_that_is_set_is_not_searched_for():
    fixed = SEARCH.override({"model.width": "512", "split.seed": "3", "model.penalty_weight": "1"})
    assert set(fixed.space) == {"training.lr"}
    assert (fixed.base.model.width, fixed.base.split.seed) == (512, 3)
    with pytest.raises(InputError, match="nothing to search for"):
        SEARCH.override({"model.width": 512, "training.lr": 0.1})


def test_a_condition_goes_with_what_it_depends_on():
    space = {
        "model.covariates": Choice(True, False),
        "model.width": When("model.covariates", True, Choice(8, 16)),
        "training.lr": SPACE["training.lr"],
    }
    conditional = Search(base=BASE, space=space)
    on, off = (conditional.override({"model.covariates": value}) for value in (True, False))
    assert on.space == {"model.width": Choice(8, 16), "training.lr": SPACE["training.lr"]}
    assert off.space == {"training.lr": SPACE["training.lr"]}


@pytest.mark.parametrize("kind", ["small", "published"])
@pytest.mark.parametrize("name", sorted(set(SEARCHED) & set(pr.MODELS) - {"knn_embedding"}))
def test_every_model_with_a_space_can_be_searched_by_its_name(name, kind):
    base = replace(BASE, model=pr.MODELS[name]())
    (search,) = searches([base], space=kind)
    rng = np.random.default_rng(0)
    trial = search.trial(draw(search.space, rng))
    assert type(trial.model) is type(base.model)
    assert trial.key("") != base.key("")


def test_the_own_configuration_of_a_model_comes_first_where_the_space_holds_it():
    (search,) = searches([BASE])
    own = own_values(BASE, search.space)
    assert search.first == (own,)
    assert search.trial(own) == BASE
    assert own_values(BASE, {"model.width": Choice(5, 6)}) is None


def test_the_published_best_is_tried_first_where_asked_for():
    (search,) = searches([BASE], first="srivatsan20", space="published")
    published = pr.LatentAdditive.published("srivatsan20")
    assert search.first[-1]["model.width"] == published.model.width
    assert search.first[-1]["training.lr"] == published.training["lr"]


def test_a_tuned_configuration_is_python_that_makes_it_and_a_file_that_holds_it(tmp_path):
    model, training = pr.LatentAdditive(width=96, dropout=0.3), pr.Training(lr=1.25e-4, epochs=12)
    tuned = Tuned(model=model, training=training, origin={"objective": PAPER.name})
    made = eval(str(tuned), {"pr": pr, "dataset": BASE.dataset})
    assert made == pr.Trial(dataset=BASE.dataset, model=model, training=training)
    path = tmp_path / "tuned.json"
    path.write_text(tuned.to_json())
    assert Tuned.read(str(path)) == tuned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts["model"].update(widht=3), "has no field 'widht': did you mean 'width'"),
        (lambda parts: parts["model"].update(name="latent"), "no model is named 'latent'"),
        (lambda parts: parts.pop("training"), "no tuned configuration"),
        (lambda parts: parts["training"].update(lr=-1.0), "training.lr"),
    ],
)
def test_a_file_that_holds_no_tuned_configuration_is_refused(change, message, tmp_path):
    parts = json.loads(Tuned(model=pr.LatentAdditive(), training=pr.Training()).to_json())
    change(parts)
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(parts))
    with pytest.raises(InputError, match=message):
        Tuned.read(str(path))


def test_a_sweep_changes_its_searches_with_its_trials():
    sweep = pr.Sweep(name="search", trials=[BASE], searches=[SEARCH])
    changed = sweep.override({"training.epochs": "9"})
    assert changed.searches[0].base.training.epochs == changed.trials[0].training.epochs == 9
    with pytest.raises(InputError, match=r"did you mean 'model\.width'"):
        sweep.override({"model.widht": 1})
    smoke = sweep.smoke()
    assert (smoke.searches[0].samples, smoke.searches[0].base.training.epochs) == (4, 3)
