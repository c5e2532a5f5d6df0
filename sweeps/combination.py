"""What do two perturbations do together, when each has been seen alone?

Baselines and models on combinations that training never shows. The additive baseline is what a model must beat: effects
of most combinations are nearly the sum of their singles'.
"""

from __future__ import annotations

import perturbray as pr

SEEDS = range(5)
BASELINES = ("no_change", "perturbed_mean", "matching_mean", "additive", "linear_plain")
MODELS = ("linear_additive", "latent_additive", "decoder", "cpa", "cpa_noadv", "sams_vae", "sams_vae_s", "biolord_star")
# All pairs of 24 perturbations of three pathways; a pair within a pathway does much less than the sum of its singles.
SCREEN = {
    "contexts": 1,
    "perturbations": 300,
    "combinations": 276,
    "genes": 200,
    "cells": 20,
    "controls": 400,
    "pathways": 3,
    "buffering": 0.7,
}


def combination(dataset: pr.DatasetSpec, models: list[pr.ModelSpec]) -> pr.Sweep:
    """Baselines and models x seeds, each seed with a draw of held-out combinations of its own."""
    baselines = [pr.MODELS[name]() for name in BASELINES]
    return pr.Sweep(
        name="combination",
        question=__doc__.splitlines()[0],
        trials=[
            pr.Trial(
                dataset=dataset, model=model, split=pr.Combination(missing_single="to_train", seed=seed), seed=seed
            )
            for seed in SEEDS
            for model in dict.fromkeys([*baselines, *models])
        ],
        baselines=BASELINES,
        notes=(
            "Every seed holds out its own combinations; all single perturbations stay in training. A combination with a "
            "single that is not measured alone stays in training too.",
        ),
    )


if __name__ == "__main__":
    pr.main(combination, models=MODELS, screen=SCREEN)
