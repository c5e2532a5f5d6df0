"""A results folder as a sweep would leave it, with effects that are known because they are drawn here."""

import hashlib
import json
from pathlib import Path

import numpy as np

from perturbray.results import table

CONTEXTS = ("A549", "K562", "MCF7")
LEVELS = (0.0, 0.1, 0.2, 0.3)
BASELINES = ("no_change", "perturbed_mean", "mean_shift")
# quality at level 0 and what is lost from level 0 to 0.3, on a scale where 1 is a perfect prediction
MODELS = {
    "no_change": (0.00, 0.00),
    "perturbed_mean": (0.28, 0.00),
    "mean_shift": (0.52, 0.05),
    "linear_additive": (0.50, 0.08),
    "latent_additive": (0.62, 0.14),
    "decoder": (0.60, 0.22),
    "decoder_cov": (0.27, 0.01),
    "decoder_pert": (0.49, 0.10),
}
METRICS = (
    {"name": "rmse/average", "higher_is_better": False, "best": 0.0, "chance": None},
    {"name": "cosine/logfc_logmean", "higher_is_better": True, "best": 1.0, "chance": 0.0},
    {"name": "pearson/delta_ctrl", "higher_is_better": True, "best": 1.0, "chance": 0.0},
    {"name": "rmse/average/rank", "higher_is_better": False, "best": 0.0, "chance": 0.5},
    {"name": "cosine/logfc_logmean/rank", "higher_is_better": False, "best": 0.0, "chance": 0.5},
    {"name": "pearson/delta_ctrl/rank", "higher_is_better": False, "best": 0.0, "chance": 0.5},
)


def fake_plan(*, models=MODELS, levels=LEVELS, seeds=3, **entries) -> dict:
    """A plan as `sweeps/imbalance.py` would write it."""
    trials = []
    for model in models:
        for level in levels:
            for seed in range(seeds):
                key = hashlib.sha256(f"{model} {level} {seed}".encode()).hexdigest()[:12]
                columns = {
                    **{"model": model, "dataset": "synthetic", "split": "covariate_transfer", "split.seed": 0},
                    **{"ablation": "imbalance", "ablation.level": level, "seed": seed, "training.lr": 5e-4},
                }
                if model not in BASELINES:
                    columns["model.width"] = 128
                trials.append({"key": key, "name": f"{model} level={level:g} seed={seed}", "columns": columns})
    return {
        "name": "imbalance",
        "question": "How much does a model lose when training perturbations are unevenly spread over contexts?",
        "command": "python sweeps/imbalance.py --results results",
        "created": "2026-11-22T09:00:00+00:00",
        "x": "imbalance",
        "x_label": "measured imbalance (1 - normalised entropy of training perturbations per context)",
        "headline": [metric["name"] for metric in METRICS],
        "metrics": list(METRICS),
        "dataset": {
            **{"name": "synthetic", "cells": 42180, "genes": 2000, "contexts": 3, "perturbations": 188},
            "normalisation": "auto: all values are integers, so they were taken as counts, scaled to the median depth "
            "of 3,412 counts a cell, and log1p was taken",
        },
        "baselines": list(BASELINES),
        "notes": [
            "The test conditions are the same at every level: those whose perturbation stays in training at 0.3.",
            "Cosine and Pearson use the split control: a model predicts from one half of the control cells and is "
            "scored against the other.",
        ],
        "trials": trials,
        "status": {"state": "done"},
        **entries,
    }


def fake_rows(
    model: str, level: float, seed: int, *, conditions=60, contexts=CONTEXTS, quality: float | None = None
) -> dict[str, np.ndarray]:
    """Long rows of a trial: a hard condition is hard for all models, a perturbation about as hard in each context."""
    shared = np.random.default_rng(0)
    hard = shared.normal(0, 0.08, (1, conditions)) + shared.normal(0, 0.06, (len(contexts), conditions))
    effect = np.exp(shared.normal(-2.4, 0.35, (len(contexts), conditions)))
    own = np.random.default_rng(sum(map(ord, model)) * 1000 + int(level * 100) * 10 + seed)
    noise = np.random.default_rng(sum(map(ord, model))).normal(0, 0.05, hard.shape) + own.normal(0, 0.02, hard.shape)
    start, loss = MODELS.get(model, (0.4, 0.1)) if quality is None else (quality, 0.0)
    harmed = np.random.default_rng(sum(map(ord, model)) + 1).gamma(2.0, 0.5, hard.shape)  # some lose more than others
    quality = start - loss * (level / 0.3) ** 1.3 * harmed - (hard + noise + own.normal(0, 0.01)) * (start > 0)
    constant = model in ("no_change", "perturbed_mean", "decoder_cov")
    rank = np.full(hard.shape, 0.5) if constant else np.clip(0.5 - 0.45 * quality - 0.5 * hard, 0, 1)
    values = {
        "rmse/average": effect * np.sqrt(np.clip(1 - quality, 0, None)),
        "cosine/logfc_logmean": np.clip(quality, -1, 1),
        "pearson/delta_ctrl": np.clip(quality * 0.95, -1, 1),
        "rmse/average/rank": rank,
        "cosine/logfc_logmean/rank": np.clip(rank - 0.01 * (rank != 0.5), 0, 1),
        "pearson/delta_ctrl/rank": np.clip(rank + 0.01 * (rank != 0.5), 0, 1),
    }
    context, perturbation = np.meshgrid(np.arange(len(contexts)), np.arange(conditions), indexing="ij")
    stratum = np.where(perturbation < conditions - 6, "common", "unseen at the highest level")
    parts = []
    for metric, value in values.items():
        value = value.ravel().copy()
        status = np.full(value.shape, "", dtype=object)
        if metric.startswith("pearson"):
            value[7], status[7] = np.nan, "constant_truth"
        if not start and not metric.endswith("rank") and not metric.startswith("rmse"):
            status[status == ""] = "constant_prediction"
        parts.append((np.full(value.shape, metric), value, status))
    repeat = len(values)
    return {
        "condition": np.tile(np.arange(context.size), repeat),
        "covariate.cell_type": np.tile(np.asarray(contexts)[context.ravel()], repeat),
        "perturbation": np.tile([f"drug{number:03d}" for number in perturbation.ravel()], repeat),
        "stratum": np.tile(stratum.ravel(), repeat),
        "metric": np.concatenate([part[0] for part in parts]),
        "value": np.concatenate([part[1] for part in parts]),
        "status": np.concatenate([part[2] for part in parts]),
        "n_observed": np.tile(np.full(context.size, 87), repeat),
        "n_control": np.tile(np.full(context.size, 1204), repeat),
    }


def fake_curve(seed: int) -> list[list[float]]:
    """Epoch, training loss, validation loss: the best is the 30th of 40."""
    epochs = np.arange(1, 41)
    watched = 0.3 + 0.2 * np.exp(-epochs / 8) + 2e-3 * np.maximum(epochs - 30, 0) + 0.002 * seed
    return [[int(e), float(0.28 + 0.3 * np.exp(-e / 6)), float(w)] for e, w in zip(epochs, watched, strict=True)]


def finish(folder: Path, trial: dict, **changes) -> None:
    """Write the file of one trial of the plan."""
    columns = trial["columns"]
    model, level, seed = columns["model"], columns["ablation.level"], columns["seed"]
    gradient = model not in BASELINES
    constant = {
        **{"name": trial["name"], **columns, "imbalance": level + 0.002, "train_cells": 30000},
        "train_conditions": columns.get("train_conditions", 500),
        **{"epochs": 40 if gradient else 0, "fit_seconds": 21.5 + seed if gradient else 0.4, "predict_seconds": 0.6},
        **{"score_seconds": 1.9, "peak_memory_mb": 812.0, "host": "node-1", "started": "2026-11-22T09:00:00+00:00"},
        **{"parameters": 51_200 if gradient else 0, "curve": json.dumps(fake_curve(seed) if gradient else [])},
        **{"ended": "2026-11-22T09:01:00+00:00", "perturbray": "0.1.0", "ray": "2.50.0", "torch": "2.8.0"},
    }
    rows = fake_rows(model, level, seed)
    rows |= {name: change(rows) for name, change in changes.items()}
    table.write_trial(folder, trial["key"], columns=constant, rows=rows)


def fake_reference(folder: Path) -> None:
    """Analytic values 2 % below those measured, of the mean shift at level 0."""
    rows = fake_rows("mean_shift", 0.0, 0)
    keep = rows["metric"] == "rmse/average"
    rows = {name: values[keep] for name, values in rows.items() if name not in ("status", "condition")}
    rows["value"] = rows["value"] / 1.02
    table.write_reference(folder, {**rows, "reference": np.full(keep.sum(), "mean_shift (analytic)")})


def fake_halves(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Against half of the cells everything is a bit worse, by the same for all models; ranks hardly change."""
    metric, value = rows["metric"].astype(str), rows["value"]
    rank, rmse = np.char.endswith(metric, "rank"), metric == "rmse/average"
    return np.where(rank, value, np.where(rmse, np.sqrt(value**2 + 0.03**2), 0.9 * value))


def fake_anchors(folder: Path, *, replicate: float = 0.7, interpolated: float = 0.75) -> None:
    """Anchors of the given quality, on the scale of ``MODELS``, beside the trials of a plan that names them."""
    parts = []
    for name, quality in (("split_half", replicate), ("interpolated_duplicate", interpolated)):
        rows = fake_rows(f"anchor{quality}", 0.0, 0, quality=quality)
        rows["value"] = fake_halves(rows)
        parts.append({**rows, "reference": np.full(len(rows["value"]), name)})
    wanted = [name for name in parts[0] if name not in ("status", "n_observed", "n_control")]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in wanted}
    table.write_anchor(folder, "anchor", rows=rows | {"seed": np.zeros(len(rows["value"]), int)})


def anchored_sweep(folder: Path, *, replicate: float = 0.7, **plan_entries) -> dict:
    """A finished sweep with ``value_half`` and anchors, as an engine that splits its controls leaves it."""
    plan = fake_plan(anchors=["anchor"], controls="split", **plan_entries)
    folder.mkdir(parents=True, exist_ok=True)
    table.write_plan(folder, plan)
    for trial in plan["trials"]:
        finish(folder, trial, value_half=fake_halves)
    fake_anchors(folder, replicate=replicate)
    return plan


def fake_sweep(folder: Path, *, trials: int | None = None, failing: int = 0, **plan_entries) -> dict:
    """A folder with the first ``trials`` finished (default: all), then ``failing`` failed; returns the plan."""
    plan = fake_plan(**plan_entries)
    folder.mkdir(parents=True, exist_ok=True)
    table.write_plan(folder, plan)
    count = len(plan["trials"]) - failing if trials is None else trials
    for trial in plan["trials"][:count]:
        finish(folder, trial)
    for trial in plan["trials"][count : count + failing]:
        try:
            raise RuntimeError("loss is NaN in epoch 3; training.lr 0.0005 may be too high")
        except RuntimeError as error:
            table.write_failure(folder, trial["key"], name=trial["name"], error=error)
    return plan
