"""The best hyperparameters that PerturBench published, by model and dataset, and the ranges they were searched in.

``published.csv`` holds its configuration files' values under its own names, releases 2024 (d357dfa) and 2025 (4825e39).
What stands in no file of an experiment is the model's default, or the dataset's batch size, there too. What has no
counterpart here, and why:

- CPA and SAMS-VAE of 2024 are other models (CPA trained its encoder to help the adversary): only 2025 is here.
- ``hidden_dim_cond`` of SAMS-VAE acts on nothing in 2025; ``elementwise_affine`` of CPA is not a field here.
- ``use_covariates``, ``use_perturbations``, ``use_adversary``, ``disable_sparsity`` and ``disable_e_dist`` say which of
  our models it is. Norman19 has one context, so that the Decoder there with a constant input is the same model.
- ``trainer.precision`` 16 was half precision on their GPU; here float32 unless ``training.precision`` says otherwise.
- Seeds, splits, evaluation, workers and paths are no hyperparameters. ``lr_scheduler_freq`` 5 (LA (scGPT) on Srivatsan20:
  the plateau schedule looks at every fifth epoch) and ``use_legacy_mse`` (LA on OP3) have no counterpart.
- The 2025 files run MLPs with one more linear layer before the first hidden one (``models.md``); ours have none.
"""

import csv
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from perturbray.errors import InputError, nearest
from perturbray.models.base import MODELS, ModelSpec
from perturbray.space import Choice, IntLogUniform, LogUniform, QUniform, Space, When

DATASETS = {
    "norman19": "Norman19",
    "srivatsan20": "Srivatsan20",
    "frangieh21": "Frangieh21",
    "jiang24": "Jiang24",
    "op3": "OP3",
    "mcfaline23_small": "McFalineFigueroa23 (small)",
    "mcfaline23_medium": "McFalineFigueroa23 (medium)",
    "mcfaline23_full": "McFalineFigueroa23 (full)",
}
NAMES = {  # theirs by ours
    "linear_additive": "Linear",
    "latent_additive": "LA",
    "decoder": "Decoder",
    "decoder_cov": "Decoder (Cov)",
    "cpa": "CPA*",
    "cpa_noadv": "CPA* (noAdv)",
    "sams_vae": "SAMS-VAE*",
    "sams_vae_s": "SAMS-VAE* (S)",
    "biolord_star": "BioLord*",
}
BATCH_SIZES = {
    "Norman19": 4000,
    "Srivatsan20": 4000,
    "Frangieh21": 8000,
    "Jiang24": 2000,
    "OP3": 8000,
}  # McFaline: files
PROTOCOL = {"epochs": 500, "patience": 50, "plateau_factor": 0.2, "plateau_patience": 15}

TRAINING = {
    "model.lr": "lr",
    "model.wd": "weight_decay",
    "trainer.max_epochs": "epochs",
    "data.batch_size": "batch_size",
}
_MLP = {"model.encoder_width": "width", "model.n_layers": "layers", "model.softplus_output": "softplus"}
_CPA = {
    "model.hidden_dim": "width",
    "model.n_layers_encoder": "layers",
    "model.n_latent": "latent_dim",
    "model.n_layers_pert_emb": "perturbation_layers",
    "model.n_layers_covar_emb": "covariate_layers",
    "model.dropout": "dropout",
    "model.softplus_output": "softplus",
    "model.variational": "variational",
    "model.kl_weight": "kl_weight",
    "model.n_warmup_epochs": "warmup_epochs",
    "model.adv_classifier_hidden_dim": "adversary_width",
    "model.adv_classifier_n_layers": "adversary_layers",
    "model.adv_steps": "adversary_steps",
    "model.adv_weight": "adversary_weight",
    "model.penalty_weight": "penalty_weight",
    "data.embedding_key": "embedding",
}
_SAMS = {
    "model.hidden_dim_x": "width",
    "model.n_layers_encoder_x": "layers",
    "model.n_layers_encoder_e": "perturbation_layers",
    "model.n_layers_decoder": "decoder_layers",
    "model.latent_dim": "latent_dim",
    "model.dropout": "dropout",
    "model.softplus_output": "softplus",
    "model.inject_covariates_encoder": "encoder_covariates",
    "model.inject_covariates_decoder": "decoder_covariates",
    "model.mask_prior_probability": "mask_prior",
    "model.generative_counterfactual": "basal",
}
FIELDS = {  # our fields by their names
    "linear_additive": {"model.inject_covariates": "covariates"},
    "latent_additive": {
        **_MLP,
        "model.latent_dim": "latent_dim",
        "model.dropout": "dropout",
        "model.inject_covariates_encoder": "covariates",
        "model.inject_covariates_decoder": "covariates",  # always as the encoder's
        "data.embedding_key": "embedding",
    },
    "decoder": _MLP,
    "decoder_cov": _MLP,
    "cpa": _CPA,
    "cpa_noadv": {
        theirs: ours for theirs, ours in _CPA.items() if not ours.startswith(("adversary", "penalty", "warmup"))
    },
    "sams_vae": _SAMS,
    "sams_vae_s": {theirs: ours for theirs, ours in _SAMS.items() if ours != "mask_prior"},
    "biolord_star": {
        **_MLP,
        "model.latent_dim": "latent_dim",
        "model.dropout": "dropout",
        "model.penalty_weight": "penalty_weight",
    },
}


class Published(NamedTuple):
    """A model and how it was trained: ``Trial(model=model, training=Training(**training))``."""

    model: ModelSpec
    training: dict[str, int | float]  # fields of Training


FORMS = {"biolord_star": {"as_published": True}}  # fields that make a model the one whose values these are


def published(cls: type[ModelSpec], dataset: str, *, release: str = "2025", variant: str = "") -> Published:
    """The best configuration of a model on a dataset. ``variant="scGPT"``: on embeddings of cells instead of genes.

    Raises InputError where none was published.
    """
    name = _name(cls)
    if dataset not in DATASETS:
        raise InputError(f"no published values for dataset {dataset!r}: {nearest(dataset, DATASETS)}")
    theirs = NAMES[name] + (f" ({variant})" if variant else "")
    rows = _rows()
    found = rows.get((release, DATASETS[dataset], theirs))
    if found is None:
        title = {theirs: ours for ours, theirs in DATASETS.items()}
        others = [f"{title[place]} ({year})" for year, place, label in rows if label == theirs and place in title]
        raise InputError(
            f"{theirs} was not published on {dataset} in {release}; it was on {', '.join(others) or 'nothing'}"
        )
    base = NAMES[name].split(" (")[0]
    values = {**rows[release, "(model default)", base], **found}
    model = {ours: _typed(ours, values[key]) for key, ours in FIELDS[name].items() if key in values}
    training = {
        **PROTOCOL,
        **({"batch_size": BATCH_SIZES[DATASETS[dataset]]} if DATASETS[dataset] in BATCH_SIZES else {}),
    }
    training |= {ours: _typed(ours, values[key]) for key, ours in TRAINING.items() if key in values}
    return Published(replace(cls(), **model, **FORMS.get(name, {})), training)


def space(cls: type[ModelSpec], kind: str = "small") -> Space:
    """The search space of a model by dotted path: ``small``, for a laptop, or ``published``."""
    spaces = {"small": SMALL, "published": SEARCHED}
    if kind not in spaces:
        raise InputError(f"no search space is named {kind!r}: {nearest(kind, spaces)}")
    name = MODELS.name_of(cls)
    if name not in spaces[kind]:
        raise InputError(f"model {name!r} has no search space; {nearest(name, spaces[kind])}")
    return dict(spaces[kind][name])


def _name(cls: type[ModelSpec]) -> str:
    name = MODELS.name_of(cls)
    if name not in NAMES:
        raise InputError(f"nothing is published of model {name!r}; {nearest(name, NAMES)}")
    return name


@cache
def _rows() -> dict[tuple[str, str, str], dict[str, str]]:
    """Values by release, dataset and model."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    with files("perturbray.models").joinpath("published.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["release"], row["dataset"], row["model"]
            found.setdefault(key, {})[row["hyperparameter"]] = row["value"]
    return found


def _typed(field: str, text: str) -> str | bool | int | float:
    """A value as its field has it."""
    if field == "basal":
        return "prior" if text.lower() == "true" else "control"
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "e" not in text.lower() and "." not in text else number


# What PerturBench searched (its ranges include their ends), and the same questions at the size of a laptop. The ranges of
# CPA and SAMS-VAE in 2025 are not public; SAMS-VAE's and CPA's are those of the shipped files.

_RATE = {"training.lr": LogUniform(5e-6, 5e-3), "training.weight_decay": LogUniform(1e-8, 1e-3)}
_WIDE = QUniform(256, 5376, 1024)
_LAYERS, _LATENT, _DROPOUT = Choice(1, 3, 5, 7), Choice(64, 128, 192, 256, 512), QUniform(0.0, 0.8, 0.1)
_CPA_SEARCHED: Space = {
    "model.layers": _LAYERS,
    "model.perturbation_layers": Choice(1, 2, 3, 4, 5),
    "model.width": _WIDE,
    "model.latent_dim": _LATENT,
    "model.dropout": _DROPOUT,
    "model.kl_weight": LogUniform(0.1, 20),
    "training.lr": LogUniform(5e-6, 1e-3),
    "training.weight_decay": LogUniform(1e-8, 1e-3),
}
_SAMS_SEARCHED: Space = {
    "model.layers": _LAYERS,
    "model.perturbation_layers": _LAYERS,
    "model.decoder_layers": _LAYERS,
    "model.latent_dim": _LATENT,
    "model.width": _WIDE,
    "model.dropout": _DROPOUT,
    **_RATE,
}
_DECODER_SEARCHED: Space = {
    "model.layers": _LAYERS,
    "model.width": _WIDE,
    "model.softplus": Choice(True, False),
    **_RATE,
}
_BASELINES: dict[str, Space] = {  # not searched there; the same in both
    "linear_plain": {"model.ridge": LogUniform(1e-6, 1e2), "model.covariates": Choice(True, False)},
    "bilinear_ridge": {"model.components": Choice(5, 10, 20, 30, 50), "model.ridge": LogUniform(1e-3, 1e2)},
    "knn_embedding": {"model.neighbours": Choice(5, 10, 15, 20), "model.temperature": LogUniform(0.02, 1.0)},
}
SEARCHED: dict[str, Space] = {
    **_BASELINES,
    "linear_additive": _RATE,
    "latent_additive": {
        "model.layers": _LAYERS,
        "model.width": _WIDE,
        "model.latent_dim": _LATENT,
        "model.dropout": _DROPOUT,
        **_RATE,
    },
    "decoder": _DECODER_SEARCHED,
    "decoder_cov": _DECODER_SEARCHED,
    "decoder_pert": _DECODER_SEARCHED,
    "cpa": {
        **_CPA_SEARCHED,
        "model.warmup_epochs": Choice(5, 10, 15, 20),
        "model.adversary_layers": Choice(1, 2, 3, 4, 5),
        "model.adversary_width": IntLogUniform(128, 1024),
        "model.adversary_steps": Choice(2, 3, 5, 7, 10, 20, 30),
        "model.adversary_weight": LogUniform(0.1, 20),
        "model.penalty_weight": LogUniform(0.1, 20),
    },
    "cpa_noadv": _CPA_SEARCHED,
    "sams_vae": {**_SAMS_SEARCHED, "model.mask_prior": LogUniform(1e-4, 0.99)},
    "sams_vae_s": _SAMS_SEARCHED,
    "biolord_star": {
        "model.penalty_weight": LogUniform(1e1, 1e5),
        "model.layers": _LAYERS,
        "model.width": _WIDE,
        "model.latent_dim": _LATENT,
        "model.dropout": _DROPOUT,
        **_RATE,
    },
}
_LAPTOP: Space = {
    "model.width": Choice(64, 128, 256),
    "model.layers": Choice(1, 2, 3),
    "model.perturbation_layers": Choice(1, 2),
    "model.decoder_layers": Choice(1, 2, 3),
    "model.adversary_layers": Choice(1, 2),
    "model.adversary_width": Choice(32, 64, 128),
    "model.adversary_steps": Choice(2, 3, 5),
    "model.warmup_epochs": Choice(1, 3, 5),
    "model.latent_dim": Choice(16, 32, 64),
    "model.dropout": QUniform(0.0, 0.4, 0.1),
    "training.lr": LogUniform(3e-4, 1e-2),
    "training.weight_decay": LogUniform(1e-8, 1e-4),
}
SMALL: dict[str, Space] = {
    name: {path: _LAPTOP.get(path, found) for path, found in searched.items()} for name, searched in SEARCHED.items()
}
for _model in ("cpa", "cpa_noadv"):  # a deterministic encoder has no divergence to weigh
    SMALL[_model] |= {
        "model.variational": Choice(True, False),
        "model.kl_weight": When("model.variational", True, LogUniform(0.1, 20)),
    }
# The published penalty is another one: here it is on the unknown part, in units of the cells' variance.
SMALL["biolord_star"]["model.penalty_weight"] = LogUniform(0.05, 5)
