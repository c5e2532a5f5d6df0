"""Scores of conditions drawn from a model that is known: what claims, marks and intervals are held to.

score = quality of the series at the level + condition + condition for the series + trial + noise. What is hard in a condition
is shared by all series and, in part, by the contexts of its perturbation; so series are compared in pairs or not at all.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

COSINE, RANK = "cosine/logfc_logmean", "rmse/average/rank"
METRICS = [
    {"name": COSINE, "higher_is_better": True, "best": 1.0, "chance": 0.0},
    {"name": RANK, "higher_is_better": False, "best": 0.0, "chance": 0.5},
]


def rows(
    quality: Mapping[str, float | Mapping[float, float]],
    *,
    seed: int,
    metric: str = COSINE,
    seeds: int = 5,
    contexts: int = 2,
    perturbations: int = 20,
    condition: float = 0.2,
    own: float = 0.04,
    trial: float | Mapping[str, float] = 0.01,
    noise: float = 0.03,
    axis: str = "imbalance",
    x: Mapping[float, float] | None = None,
    models: Mapping[str, dict] | None = None,
    **columns: object,
) -> pd.DataFrame:
    """A long table of a sweep. ``quality``: of each series, at one level or by level; ``x``: the column
    ``axis`` by level; ``models``: further columns of a series; ``columns``: of all."""
    rng = np.random.default_rng(seed)
    shape = contexts, perturbations
    hard = condition * (rng.normal(size=(1, perturbations)) + 0.5 * rng.normal(size=shape))
    context, label = (code.ravel() for code in np.indices(shape))
    names = np.array([f"drug{number:03d}" for number in range(perturbations)])
    parts = []
    for series, by_level in quality.items():
        spread = trial.get(series, 0.01) if isinstance(trial, Mapping) else trial
        mine = own * rng.normal(size=shape)  # what is hard for this model alone
        facts = {"model": series, "name": series, **(models or {}).get(series, {})}
        for level, value in (by_level if isinstance(by_level, Mapping) else {0.0: by_level}).items():
            draws = spread * rng.normal(size=(seeds, 1, 1)) + noise * rng.normal(size=(seeds, *shape))
            numbers = np.repeat(np.arange(seeds), label.size)
            parts.append(
                pd.DataFrame(
                    {
                        "key": np.repeat([f"{series}-{level:g}-{number}" for number in range(seeds)], label.size),
                        **{"seed": numbers, **facts, "ablation.level": level, axis: level if x is None else x[level]},
                        **{"covariate.line": np.tile(context.astype(str), seeds)},
                        **{
                            "perturbation": np.tile(names[label], seeds),
                            "condition": np.tile(np.arange(label.size), seeds),
                        },
                        **{"stratum": "common", "metric": metric, "status": "", **columns},
                        "value": (value + hard + mine + draws).ravel(),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def plan(*metrics: str, x: str = "", **entries: object) -> dict:
    """A plan whose metrics are the headline."""
    return {
        **{"name": "test", "x": x, "headline": list(metrics or (COSINE,)), "trials": []},
        **{"baselines": ["no_change", "perturbed_mean", "additive"], "metrics": METRICS, **entries},
    }
