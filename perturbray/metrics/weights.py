"""Weights: how much each gene says about a condition, for ``wmse``, ``r2_w`` and ``pearson_w``.

From observed cells only. Computing them on the truth of a test set is fine for scoring and forbidden for training.
"""

import numpy as np

from perturbray.metrics.cells import Comparison, moments
from perturbray.metrics.expression import welch


def gene_weights(comparison: Comparison) -> np.ndarray:
    """((|t| − min)/(max − min))² of t against the other perturbations of the context, (conditions, genes); 0 where undefined.

    t is scanpy's ``t-test_overestim_var`` without control cells (Mejia et al., arXiv 2506.22641).
    """
    weights = np.zeros((len(comparison), len(comparison.genes)))
    for _, rows in comparison.by_context():
        sizes = comparison.observed.count()[rows]
        parts = [moments(comparison.observed.of(row)) for row in rows]
        means, variances = (np.stack(part) for part in zip(*parts, strict=True))
        for k, row in enumerate(rows):
            rest = np.arange(len(rows)) != k
            if not rest.any():
                continue
            others = pooled(means[rest], variances[rest], sizes[rest])
            t = np.abs(welch((means[k], variances[k], sizes[k]), others, overestimate=True)[0])
            weights[row] = _scaled(np.where(np.isfinite(t), t, np.nan))
    return weights


def pooled(means: np.ndarray, variances: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean, unbiased variance and size of groups put together, from (groups, genes) moments (Chan et al. 1983)."""
    share, total = sizes[:, None], int(sizes.sum())
    mean = (share * means).sum(axis=0) / total
    inside = np.where(share > 1, (share - 1) * np.nan_to_num(variances), 0.0).sum(axis=0)
    between = (share * (means - mean) ** 2).sum(axis=0)
    constant = (inside == 0) & (np.ptp(means, axis=0) == 0)
    variance = (inside + between) / max(total - 1, 1)
    return np.where(constant, means[0], mean), np.where(constant, 0.0, variance), total


def _scaled(t: np.ndarray) -> np.ndarray:
    if np.isnan(t).all():
        return np.zeros_like(t)
    low, high = np.nanmin(t), np.nanmax(t)
    return np.nan_to_num(((t - low) / (high - low)) ** 2) if high > low else np.zeros_like(t)
