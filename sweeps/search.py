"""What does a model gain when its hyperparameters are searched for, and by how much does it then beat simple baselines?

A search on the validation conditions, then the best configuration with several seeds on the test conditions, which the
search never sees, beside the model as it comes and the baselines.
"""

from __future__ import annotations

import perturbray as pr

BASELINES = ("no_change", "perturbed_mean", "mean_shift")
MODELS = ("latent_additive",)
OBJECTIVE = "rmse/average + 0.1 * rmse/average/rank"
FLAGS = {
    "scaled": "each metric of the objective as a share of mean_shift's error, so that weights do not depend on units",
    "no_halving": "stop trials by their loss alone, as PerturBench does",
    "widen": "search once more, in a wider space, where the best values lie at an end of it",
}
OPTIONS = {
    "samples": (60, "configurations to try"),
    "space": ("small", "small or published"),
    "objective": (OBJECTIVE, "what is minimised, a weighted sum of metrics; taken negative where higher is better"),
    "way": ("tpe", "how to propose: tpe, hyperopt, random or grid"),
    "first": ("", "try the best published configuration on this dataset first, e.g. srivatsan20"),
    "search_seed": (0, "of the proposals"),
    "seeds": (5, "with which the best configuration is judged"),
    "every": (1, "epochs between two looks at the validation conditions"),
    "seconds": (0.0, "for the search; 0: no limit"),
    "at_once": (0, "trials at the same time; 0: as many as there is room for"),
    "trial_seconds": (0.0, "for a trial; 0: no limit"),
    "trial_memory": (0.0, "GB that a trial may take beside the data; 0: no limit"),
    "max_failed": (10, "failed trials after which the search ends"),
    "track": ("", "record trials also in wandb or mlflow, by comma"),
}


def search(dataset: pr.DatasetSpec, models: list[pr.ModelSpec], **options: object) -> pr.Sweep:
    """Baselines, models as they come, and a search for each model."""
    seeds = range(options["seeds"])
    baselines = [pr.MODELS[name]() for name in BASELINES]
    bases = [pr.Trial(dataset=dataset, model=model) for model in models]
    return pr.Sweep(
        name="search",
        question=__doc__.splitlines()[0],
        trials=pr.grid([pr.Trial(dataset=dataset, model=model) for model in [*baselines, *models]], {"seed": seeds}),
        searches=pr.searches(bases, **options),
        track=[name for name in options["track"].split(",") if name],
        baselines=BASELINES,
        notes=(
            "Hyperparameters were chosen on the validation conditions; all scores are of the test conditions, which no "
            "choice has seen.",
        ),
    )


if __name__ == "__main__":
    pr.main(search, models=MODELS, flags=FLAGS, options=OPTIONS)
