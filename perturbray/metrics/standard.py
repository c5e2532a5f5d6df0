"""Standard: the convention ``perturbray``, every registered metric on two sets of cells.

Means, ranks, distributions and differential expression are the metrics of ``METRICS`` and ``CELL_METRICS``, so an
evaluated file and a trial of a sweep are scored by the same code.
"""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import sparse

from perturbray.errors import InputError
from perturbray.metrics.anchors import Sizes, effect_sizes
from perturbray.metrics.calibration import with_variance
from perturbray.metrics.cell_metrics import CELL_METRICS, COMPONENTS
from perturbray.metrics.cells import Cells, Comparison, Matrix, dense, group_sums, pseudobulk, shuffled, signatures
from perturbray.metrics.conventions import Results, convention
from perturbray.metrics.distribution import fit_pca
from perturbray.metrics.metric import METRICS, Metric, score_prediction
from perturbray.metrics.ranks import chance_error
from perturbray.metrics.weights import gene_weights
from perturbray.prediction import CellSample, Prediction

CELLS = 1000  # of a condition and side
MORE = (  # they need what only cells give: linear means, gene weights
    Metric("cosine", "logfc"),
    Metric("wmse", "average"),
    Metric("r2_w", "delta_mean"),
    Metric("pearson_w", "delta_mean"),
)


@convention("perturbray", mean="macro")
def perturbray(
    comparison: Comparison,
    results: Results,
    *,
    failed: str = "error",
    controls: str = "auto",
    training: Any = None,
    training_control: str = "control",
    target_sum: float | None = None,
    cells: bool = True,
    noise: str = "none",
) -> None:
    """Every metric of ``METRICS``, and with ``cells`` those of ``CELL_METRICS``.

    ``controls``: which control cells the prediction's effects subtract, ``reference`` (the observed ones), ``own``, or
    ``auto``: own where the prediction brings control cells that are none of the observed ones. ``training`` is
    AnnData-like with the training cells: it gives the centre of ``delta_mean`` and the PCA; ``training_control`` is its
    label of control cells. ``failed="worst"`` scores a
    condition without prediction as failed. ``noise="control_residual"`` gives predicted cells the variance of control
    cells (``with_control_noise``); it belongs to a comparison and holds for all of its models.
    """
    if failed not in ("error", "worst"):
        raise InputError(f"failed is 'error' or 'worst', not {failed!r}")
    own = _own_controls(comparison, controls)
    means, space = _training(comparison, training, training_control)
    prediction = prediction_of(comparison, own=own, target_sum=target_sum, cells=cells, space=space)
    prediction = replace(prediction, training_mean=means[0], training_linear=means[1])
    prediction = replace(prediction, weights=gene_weights(comparison))
    if noise not in ("none", "control_residual"):
        raise InputError(f"noise is 'none' or 'control_residual', not {noise!r}")
    if noise == "control_residual":
        prediction = with_control_noise(prediction)
    metrics = [*METRICS.values(), *MORE, *(CELL_METRICS.values() if cells else ())]
    scored = score_prediction(prediction, metrics)
    results.prediction, results.metrics = prediction, tuple(metrics)
    for metric in metrics:
        chosen = scored["metric"] == metric.name
        results.add(metric.name, scored["condition"][chosen], scored["value"][chosen], scored["status"][chosen])
    count, n0 = comparison.observed.count(), prediction.control.cells[comparison.context]
    n = count[: len(comparison)]
    results.notes |= {
        "controls": "own" if own else "reference",
        "target_sum": prediction.target_sum,
        "shared_control_cosine": 0.0 if own else float(np.mean(n / (n + n0))),
        "clamped_genes": int((prediction.predicted.mean < 0).sum()),
        "rank_error": {
            context: chance_error(int((comparison.context == i).sum())) for i, context in enumerate(comparison.contexts)
        },
        "noise": noise,
        "pca_fitted_on": "training cells" if space is not None else "observed cells",
        "mean_response_from": "training cells" if space is not None else "the other scored conditions",
    }


def prediction_of(
    comparison: Comparison,
    *,
    own: bool = False,
    target_sum: float | None = None,
    cells: bool = True,
    space: Any = None,
) -> Prediction:
    """The prediction behind two sets of cells. A condition without predicted cells is NaN, hence failed."""
    conditions, contexts = len(comparison), len(comparison.contexts)
    observed, predicted = (pseudobulk(side, linear=True) for side in (comparison.observed, comparison.predicted))
    inside, controls = np.arange(conditions), conditions + np.arange(contexts)
    control = observed.rows(controls)
    sample = None
    if cells:
        parts = {"pca_mean": space.mean, "pca_loadings": space.loadings} if space is not None else {}
        sides = {"observed": comparison.observed, "predicted": comparison.predicted}
        drawn = {name: tuple(_draw(side, row, comparison) for row in inside) for name, side in sides.items()}
        sample = CellSample(
            control=tuple(_draw(comparison.observed, row, comparison) for row in controls), **drawn, **parts
        )
    return Prediction(
        genes=comparison.genes,
        covariates=comparison.covariates,
        contexts=comparison.contexts,
        context=comparison.context,
        perturbation=comparison.perturbation,
        stratum=np.full(conditions, ""),
        predicted=predicted.rows(inside),
        observed=observed.rows(inside),
        control=predicted.rows(controls) if own else control,
        observed_control=control if own else None,
        target_sum=target_sum or _target_sum(comparison.observed, controls),
        cells=sample,
    )


def with_control_noise(prediction: Prediction) -> Prediction:
    """Every predicted cell replaced by the predicted mean plus the residual of a control cell, clamped at 0.

    A prediction without variance between cells makes every small bias significant; this gives all models the same
    variance, so that tests and distributions compare their means and shapes of effect.
    """
    sample = prediction.cells
    control = [dense(X) for X in sample.control]
    residuals = [cells - cells.mean(axis=0) for cells in control]
    signature = [signatures(X, prediction.genes) for X in sample.control]
    cells = []
    for row, code in enumerate(prediction.context):
        order = shuffled(signature[code], "noise", *prediction.contexts[code], str(prediction.perturbation[row]))
        chosen = np.resize(order, sample.predicted[row].shape[0])  # over again where there are more cells than controls
        cells.append(np.maximum(prediction.predicted.mean[row] + residuals[code][chosen], 0))
    form = sparse.csr_matrix if sparse.issparse(sample.control[0]) else np.asarray
    return replace(prediction, cells=replace(sample, predicted=tuple(form(X) for X in cells)))


def _draw(side: Cells, group: int, comparison: Comparison) -> Matrix:
    """At most 1,000 cells of a group, the same for every model."""
    rows = side.rows(group)
    if len(rows) > CELLS:
        order = shuffled(signatures(side.X[rows], comparison.genes), "cells", *comparison.label(group))
        rows = rows[np.sort(order[:CELLS])]
    return side.X[rows]


def _target_sum(cells: Cells, controls: np.ndarray) -> float:
    """Counts to which cells were normalised: the median over control cells of Σ expm1(X)."""
    sums = [np.expm1(dense(cells.X[chunk])).sum(axis=1) for group in controls for chunk in _chunks(cells.rows(group))]
    return float(np.median(np.concatenate(sums)))


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    return np.array_split(rows, max(1, -(-len(rows) // 4096)))


def _own_controls(comparison: Comparison, controls: str) -> bool:
    if controls not in ("auto", "own", "reference"):
        raise InputError(f"controls is 'auto', 'own' or 'reference', not {controls!r}")
    if controls == "own" and not comparison.own_control.all():
        raise InputError(f"{comparison.predicted.file}: controls='own' needs control cells in every context")
    if controls != "auto":
        return controls == "own"
    groups = [comparison.control(code) for code in range(len(comparison.contexts))]
    return bool(comparison.own_control.all()) and not any(
        _prints(comparison.observed, group) & _prints(comparison.predicted, group) for group in groups
    )


def _prints(cells: Cells, group: int) -> set[bytes]:
    """A fingerprint of each cell's expression, the same for CSR and dense."""
    return {
        hashlib.blake2b(row.astype(np.float32).tobytes(), digest_size=16).digest()
        for chunk in _chunks(cells.rows(group))
        for row in dense(cells.X[chunk])
    }


def sizes_of(comparison: Comparison, target_sum: float | None = None) -> Sizes:
    """How much is observed of each condition, in three passes over the observed cells."""
    conditions = len(comparison)
    controls = conditions + np.arange(len(comparison.contexts))
    bulk = with_variance(comparison.observed)
    return effect_sizes(
        bulk.rows(np.arange(conditions)),
        bulk.rows(controls),
        context=comparison.context,
        perturbation=comparison.perturbation,
        genes=comparison.genes,
        target_sum=target_sum or _target_sum(comparison.observed, controls),
    )


def _training(comparison: Comparison, training: Any, control: str) -> tuple[tuple, Any]:
    """Unweighted means over the training perturbations of each context, those of expm1, and the PCA of the training cells.

    A context without training perturbations takes the mean over all contexts.
    """
    if training is None:
        return (None, None), None
    genes = [str(gene) for gene in training.var_names]
    if sorted(genes) != sorted(comparison.genes):
        raise InputError("training cells: genes differ from the observed ones")
    position = {gene: index for index, gene in enumerate(genes)}
    X = training.X.tocsr() if sparse.issparse(training.X) else np.asarray(training.X)
    if tuple(genes) != comparison.genes:
        X = X[:, [position[gene] for gene in comparison.genes]]
    keys = [*comparison.covariates, comparison.perturbation_key]
    if lost := [key for key in keys if key not in training.obs]:
        raise InputError(f"training cells: obs has no column {lost[0]!r}")
    labels = list(training.obs[keys].astype(str).itertuples(index=False, name=None))
    conditions = sorted(set(labels))
    code = {label: index for index, label in enumerate(conditions)}
    group = np.array([code[label] for label in labels])
    sums = (group_sums(X, group, len(conditions), transform) for transform in (None, np.expm1))
    means = [part / np.bincount(group)[:, None] for part in sums]
    centres = np.full((2, len(comparison.contexts), len(genes)), np.nan)
    perturbed = np.array([label[-1] != control for label in conditions])
    for index, context in enumerate(comparison.contexts):
        rows = perturbed & np.array([label[:-1] == context for label in conditions])
        for centre, part in zip(centres, means, strict=True):
            centre[index] = part[rows if rows.any() else perturbed].mean(axis=0)
    return tuple(centres), fit_pca(X, COMPONENTS)
