"""Published hyperparameters arrive in our fields, and search spaces hold what trials accept."""

from dataclasses import fields

import numpy as np
import pytest
import screens

from perturbray.data.dataset import DatasetSpec
from perturbray.errors import InputError
from perturbray.models.base import MODELS
from perturbray.models.baselines import MeanShift
from perturbray.models.latent_additive import LatentAdditive
from perturbray.models.linear_additive import LinearAdditive
from perturbray.models.published import DATASETS, FIELDS, NAMES, SEARCHED, SMALL, TRAINING, _rows
from perturbray.space import draw, holds
from perturbray.training.fit import Training
from perturbray.trial import Trial

REGISTERED = [name for name in NAMES if name in MODELS]
PUBLISHED = [
    (name, dataset, release)
    for (release, place, theirs) in _rows()
    for name in REGISTERED
    for dataset, title in DATASETS.items()
    if theirs == NAMES[name] and place == title
]


def test_latent_additive_on_srivatsan20_is_what_the_2025_file_says():
    model, training = LatentAdditive.published("srivatsan20")
    assert model == LatentAdditive(width=5376, layers=2, latent_dim=192, dropout=0.3, covariates=True, softplus=True)
    assert training["lr"] == 3.411309338851789e-05
    assert training["weight_decay"] == 6.078971860813963e-11
    assert (training["epochs"], training["batch_size"], training["patience"]) == (500, 4000, 50)
    assert (training["plateau_factor"], training["plateau_patience"]) == (0.2, 15)


def test_linear_on_norman19_has_no_covariates_and_its_defaults_where_the_file_says_nothing():
    model, training = LinearAdditive.published("norman19", release="2024")
    assert model == LinearAdditive(covariates=False)
    assert Training(**training).batch_size == 4000
    assert LinearAdditive.published("srivatsan20").model == LinearAdditive(covariates=True)


@pytest.mark.parametrize(("name", "dataset", "release"), PUBLISHED)
def test_every_published_value_is_a_field(name, dataset, release):
    model, training = MODELS[name].published(dataset, release=release)
    rows = _rows()[release, DATASETS[dataset], NAMES[name]]
    assert {field.name for field in fields(model)} >= set(FIELDS[name].values())
    for theirs, ours in FIELDS[name].items():
        if theirs in rows and ours != "basal":
            value = getattr(model, ours)
            assert str(value).lower() == rows[theirs].lower() or float(rows[theirs]) == value
    for theirs, ours in TRAINING.items():
        if theirs in rows:
            assert training[ours] == float(rows[theirs])
    Training(**training)
    unmapped = set(rows) - set(FIELDS[name]) - set(TRAINING)
    if not name.endswith("noadv"):
        assert unmapped <= {"model.mask_prior_probability", "data.embedding_key"}


def test_there_are_published_values_of_every_model_that_was_compared():
    assert set(NAMES) <= set(MODELS)
    assert set(SMALL) <= set(MODELS)
    assert len(PUBLISHED) >= 60
    assert {release for *_, release in PUBLISHED} == {"2024", "2025"}


@pytest.mark.parametrize("spaces", [SMALL, SEARCHED], ids=["small", "published"])
@pytest.mark.parametrize("name", [name for name in SMALL if name in MODELS])
def test_what_a_space_holds_is_what_a_trial_accepts(name, spaces):
    rng = np.random.default_rng(0)
    trial = Trial(dataset=DatasetSpec(path="x.h5ad"), model=screens.default_spec(name))
    kind = "small" if spaces is SMALL else "published"
    space = type(trial.model).space(kind)
    assert space == spaces[name]
    for _ in range(20):
        drawn = draw(space, rng)
        assert holds(space, drawn)
        changed = trial.override(drawn)
        for path, value in drawn.items():
            part, field = path.split(".")
            assert getattr(getattr(changed, part), field) == value


def test_the_weight_of_a_divergence_is_searched_only_where_there_is_one():
    space, rng = SMALL["cpa"], np.random.default_rng(0)
    drawn = [draw(space, rng) for _ in range(40)]
    assert {one["model.variational"] for one in drawn} == {True, False}
    assert all(("model.kl_weight" in one) == one["model.variational"] for one in drawn)


def test_the_small_space_fits_a_laptop():
    for space in SMALL.values():
        width = space.get("model.width")
        assert width is None or max(width.values) <= 256


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: LatentAdditive.published("srivatsan"), "no published values for dataset 'srivatsan': did you mean"),
        (lambda: MeanShift.published("norman19"), "nothing is published of model 'mean_shift'"),
        (
            lambda: LinearAdditive.published("jiang24", release="2024"),
            r"Linear was not published on jiang24 in 2024; it was on .*norman19 \(2024\)",
        ),
        (lambda: LatentAdditive.published("op3", variant="scGPT"), r"LA \(scGPT\) was not published on op3"),
        (lambda: LatentAdditive.space("large"), "no search space is named 'large'"),
        (lambda: MeanShift.space(), "model 'mean_shift' has no search space"),
    ],
)
def test_what_was_not_published_is_refused_by_name(ask, message):
    with pytest.raises(InputError, match=message):
        ask()
