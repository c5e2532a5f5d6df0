"""What does it cost a model when a few contexts hold most of the training perturbations?

Models and baselines at rising imbalance of the number of training perturbations per context (0: every context has as
many; towards 1: one has them all), on test conditions and with a number of training conditions that are the same at
every level. Each replicate makes another context the largest.
"""

from __future__ import annotations

from dataclasses import replace

import perturbray as pr

LEVELS = (0.0, 0.1, 0.2, 0.3)
BASELINES = ("no_change", "perturbed_mean", "mean_shift")
MODELS = ("linear_additive", "latent_additive", "decoder", "decoder_cov", "decoder_pert")
FLAGS = {
    "balanced": "also each model that trains in epochs with contexts drawn equally often, as a remedy",
    "retune": "also each model that trains in epochs with hyperparameters searched for anew at every level",
    "free_total": "let the number of training conditions fall as the imbalance grows, with the same largest context",
    "published": "the triples of PerturBench's slides instead; the test set changes with them",
}
OPTIONS = {
    "replicates": (0, "with another context as the largest in turn (0: each equally often, and 3 or more)"),
    "samples": (30, "configurations that --retune tries at each level"),
}
SAME = (
    "The test conditions are the same at every level: those whose perturbation stays in training somewhere at every one. "
    "The others form the stratum “lost”. Imbalance is of numbers of conditions; controls and cells of a condition stay."
)
NOTES = {
    "imbalance": (
        SAME,
        "The number of training conditions is the same at every level: a difference is not one of the amount of data.",
        "A seed is a replicate: of training, of which perturbations a context keeps, and of which context is the largest.",
    ),
    "imbalance-free-total": (
        SAME,
        "The total number of training conditions falls as the imbalance grows: the two are not told apart here.",
    ),
    "imbalance-published": (
        "The triples of PerturBench's slides, in its order: conditions are dropped first and the rest is split. The "
        "test set therefore shrinks and changes with the level, and a difference between levels is also one "
        "between test sets.",
    ),
}


def imbalance(
    dataset: pr.DatasetSpec,
    models: list[pr.ModelSpec],
    *,
    balanced: bool = False,
    retune: bool = False,
    free_total: bool = False,
    published: bool = False,
    replicates: int = 0,
    samples: int = 30,
) -> pr.Sweep:
    """Baselines and models x levels x replicates."""
    name = "imbalance-published" if published else "imbalance-free-total" if free_total else "imbalance"
    fixed = pr.Imbalance(highest=max(LEVELS), fixed=not free_total, rotate=not free_total)
    levels = [replace(fixed, level=level) for level in LEVELS]
    if published:
        levels = [
            pr.PublishedImbalance(level=v, counts=n) for v, n in zip(LEVELS, pr.PublishedImbalance.LEVELS, strict=True)
        ]
    turns = 1 if published or free_total else len(pr.conditions(dataset).contexts)
    seeds = pr.replicates(turns, asked=replicates)
    baselines = [pr.MODELS[name]() for name in BASELINES]
    trials = [
        pr.Trial(dataset=dataset, model=model, ablation=level, seed=seed)
        for seed in seeds
        for level in levels
        for model in dict.fromkeys([*baselines, *models])
    ]
    bases = [t for t in trials if retune and t.seed == seeds[0] and t.model.learning == "gradient"]
    return pr.Sweep(
        name=name,
        question=__doc__.splitlines()[0],
        trials=[*trials, *pr.balanced(trials)] if balanced else trials,
        searches=pr.searches(bases, samples=samples, seeds=len(seeds)),
        baselines=BASELINES,
        x="imbalance",
        x_label="measured imbalance (1 − normalised entropy of training perturbations per context)",
        notes=NOTES[name],
    )


if __name__ == "__main__":
    pr.main(imbalance, models=MODELS, flags=FLAGS, options=OPTIONS)
