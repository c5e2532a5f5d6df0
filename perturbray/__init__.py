"""perturbray: benchmarks of perturbation-response models as resumable sweeps on Ray.

The public names are imported when first used, since torch, ray and anndata take seconds.
"""

import importlib

_PUBLIC = {
    "perturbray.cli": ["main"],
    "perturbray.data.ablations": [
        "ABLATIONS",
        "AblationSpec",
        "DataScaling",
        "Imbalance",
        "PublishedImbalance",
    ],
    "perturbray.data.ablations.imbalance": ["replicates"],
    "perturbray.data.ablations.scaling": ["levels"],
    "perturbray.data.batches": ["Batch", "BatchStream", "Cells", "Sampling"],
    "perturbray.data.dataset": ["Conditions", "DatasetSpec"],
    "perturbray.data.loading": ["load"],
    "perturbray.data.splits": [
        "SPLITS",
        "Combination",
        "CovariateTransfer",
        "HeldOutContexts",
        "InverseCombination",
        "Manual",
        "PublishedCombination",
        "PublishedInverseCombination",
        "PublishedTransfer",
        "Saved",
        "Split",
        "SplitSpec",
        "TransferInto",
        "UnseenPerturbation",
        "repeats",
        "rotation",
    ],
    "perturbray.data.store": ["conditions"],
    "perturbray.data.vocabulary": ["Vocabulary"],
    "perturbray.engine": ["run_sweep"],
    "perturbray.errors": ["InputError"],
    "perturbray.metrics.metric": ["METRICS", "Metric", "score_prediction"],
    "perturbray.metrics.scores": ["SCORES"],
    "perturbray.models.base": ["MODELS", "GradientModel", "Model", "ModelSpec", "StreamingModel"],
    "perturbray.models.baselines": [
        "Additive",
        "MatchingMean",
        "MeanShift",
        "NoChange",
        "PerturbedMean",
        "PerturbedMeanGlobal",
    ],
    "perturbray.models.bilinear": ["BilinearRidge"],
    "perturbray.models.decoder_only": ["DecoderCovariates", "DecoderOnly", "DecoderPerturbations"],
    "perturbray.models.latent_additive": ["LatentAdditive"],
    "perturbray.models.linear_additive": ["LinearAdditive"],
    "perturbray.models.linear_plain": ["LinearPlain"],
    "perturbray.models.neighbours": ["KnnEmbedding"],
    "perturbray.plan": ["Plan"],
    "perturbray.prediction": ["Prediction", "Pseudobulk"],
    "perturbray.results.table": ["read"],
    "perturbray.running": ["run"],
    "perturbray.search": ["Halving", "Objective", "Search", "Tuned", "searches"],
    "perturbray.space": ["Choice", "IntLogUniform", "LogUniform", "QUniform", "Uniform", "When"],
    "perturbray.sweep": ["Sweep", "balanced", "grid"],
    "perturbray.training.fit": ["Training"],
    "perturbray.trial": ["Trial"],
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'perturbray' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
