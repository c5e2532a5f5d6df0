"""What does a perturbation do in a context where nobody has tried it?

Every model of the zoo and the baselines that it must beat, on perturbations held out in one context and seen in others.
"""

from __future__ import annotations

import perturbray as pr

SEEDS = range(5)
BASELINES = ("no_change", "perturbed_mean", "perturbed_mean_global", "matching_mean", "mean_shift", "linear_plain")
MODELS = (
    "linear_additive",
    "latent_additive",
    "decoder",
    "decoder_cov",
    "decoder_pert",
    "cpa",
    "cpa_noadv",
    "sams_vae",
    "sams_vae_s",
    "biolord_star",
)
OPTIONS = {
    "split": (
        "transfer",
        "the task, e.g. held_out_contexts; fields with --set split.FIELD=; see `perturbray list splits`",
    )
}


def transfer(dataset: pr.DatasetSpec, models: list[pr.ModelSpec], split: str) -> pr.Sweep:
    """Baselines and models x seeds on one split."""
    baselines = [pr.MODELS[name]() for name in BASELINES]
    return pr.Sweep(
        name=split,
        question=__doc__.splitlines()[0],
        trials=[
            pr.Trial(dataset=dataset, model=model, split=pr.SPLITS[split](), seed=seed)
            for seed in SEEDS
            for model in dict.fromkeys([*baselines, *models])
        ],
        baselines=BASELINES,
        notes=(
            "The split is one for all seeds, so that the spread over seeds is that of training alone; intervals are over "
            "test conditions.",
        ),
    )


if __name__ == "__main__":
    pr.main(transfer, models=MODELS, options=OPTIONS)
