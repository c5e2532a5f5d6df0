"""What does a model gain from more training data: more contexts, more perturbations, or more cells of each condition?

Models and baselines on nested parts of the screen along one axis, each judged on the same test conditions. Each seed nests
the levels in another order.
"""

from __future__ import annotations

import perturbray as pr

BASELINES = ("no_change", "perturbed_mean", "mean_shift")
MODELS = ("linear_additive", "latent_additive", "decoder", "decoder_cov", "decoder_pert")
SCREEN = {"contexts": 8, "perturbations": 150, "combinations": 0, "genes": 200, "cells": 10, "controls": 80}
OPTIONS = {
    "axis": ("contexts", "what there is more of: contexts, perturbations or cells"),
    "levels": (
        "",
        "shares up to 1, or numbers, by comma, e.g. 6,9,15 (default: 0.4,0.6,0.8,1 of contexts, else 0.125,0.25,0.5,1)",
    ),
    "seeds": (3, "of training and of the order in which levels are nested"),
}
NOTES = {
    "contexts": "A level keeps some contexts, controls and all; those that are tested are among them at every level.",
    "perturbations": "A level keeps some perturbations, in all their contexts; those that are tested are among them at "
    "every level. All control cells stay.",
    "cells": "A level keeps some cells of every training condition. All conditions and all control cells stay.",
}


def scaling(
    dataset: pr.DatasetSpec, models: list[pr.ModelSpec], *, axis: str = "contexts", levels: str = "", seeds: int = 3
) -> pr.Sweep:
    """Baselines and models x levels x seeds."""
    sizes = pr.levels(levels, axis)
    baselines = [pr.MODELS[name]() for name in BASELINES]
    return pr.Sweep(
        name=f"scaling-{axis}",
        question=__doc__.splitlines()[0],
        trials=[
            pr.Trial(dataset=dataset, model=model, ablation=size, seed=seed)
            for seed in range(seeds)
            for size in [pr.DataScaling(axis=axis, level=level, smallest=min(sizes)) for level in sizes]
            for model in dict.fromkeys([*baselines, *models])
        ],
        baselines=BASELINES,
        x="train_cells" if axis == "cells" else "train_conditions",
        x_label="training cells" if axis == "cells" else "training conditions",
        notes=(
            "The test conditions are the same at every level: those that the smallest level has what it takes to learn. "
            "Levels are nested: a smaller one is a part of each larger one.",
            NOTES[axis],
        ),
    )


if __name__ == "__main__":
    pr.main(scaling, models=MODELS, options=OPTIONS, screen=SCREEN)
