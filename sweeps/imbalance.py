"""What does it cost a model when a few contexts hold most of the training perturbations?

Models and baselines at rising imbalance of the number of training perturbations per context (0: every context has as
many; towards 1: one has them all), on test conditions that are the same at every level.
"""

from __future__ import annotations

import perturbray as pr

LEVELS = (0.0, 0.1, 0.2, 0.3)
SEEDS = range(3)
BASELINES = ("no_change", "perturbed_mean", "mean_shift")
MODELS = ("linear_additive", "latent_additive", "decoder", "decoder_cov", "decoder_pert")


def imbalance(dataset: pr.DatasetSpec, models: list[pr.ModelSpec], *, published: bool = False) -> pr.Sweep:
    """Baselines and models x levels x seeds."""
    baselines = [pr.MODELS[name]() for name in BASELINES]
    levels = [pr.Imbalance(level=level, highest=max(LEVELS)) for level in LEVELS]
    notes = (
        "The test conditions are the same at every level: those whose perturbation stays in training somewhere at the "
        "highest level. The others form the stratum “lost”.",
        "The total number of training conditions falls as the imbalance grows: the two are not told apart here.",
    )
    if published:
        levels = [pr.PublishedImbalance(counts=counts) for counts in pr.PublishedImbalance.LEVELS]
        notes = (
            "The triples of PerturBench's slides, in its order: conditions are dropped first and the rest is split. The "
            "test set therefore shrinks and changes with the level, and a difference between levels is also one "
            "between test sets.",
        )
    return pr.Sweep(
        name="imbalance-published" if published else "imbalance",
        question=__doc__.splitlines()[0],
        trials=[
            pr.Trial(dataset=dataset, model=model, ablation=level, seed=seed)
            for seed in SEEDS
            for level in levels
            for model in dict.fromkeys([*baselines, *models])
        ],
        baselines=BASELINES,
        x="imbalance",
        x_label="measured imbalance (1 − normalised entropy of training perturbations per context)",
        notes=notes,
    )


if __name__ == "__main__":
    pr.main(
        imbalance,
        models=MODELS,
        flags={"published": "the triples of PerturBench's slides instead; the test set changes with them"},
    )
