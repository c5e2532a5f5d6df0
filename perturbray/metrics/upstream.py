"""Upstream: conventions that reproduce the numbers of PerturBench, cell-eval and two competitions, for comparison only.

Their choices are kept where they change a value, and named in comments where they are traps. Ties that upstream breaks
at random have their expected value here.
"""

import numpy as np
from scipy import stats
from scipy.spatial.distance import cdist

from perturbray.errors import InputError
from perturbray.metrics.cells import Comparison, Matrix, moments, pseudobulk
from perturbray.metrics.conventions import Results, convention
from perturbray.metrics.distribution import energy_matrix, fit_pca
from perturbray.metrics.effects import PSEUDOCOUNT
from perturbray.metrics.expression import (
    LEVEL,
    Table,
    area_under_roc,
    average_precision,
    rank_sum_table,
    t_table,
    table,
)
from perturbray.metrics.ranks import ranks
from perturbray.metrics.scores import SCORES

TOP_K = 50


@convention("perturbench-2024", drops_missing=True)
def perturbench_2024(comparison: Comparison, results: Results) -> None:
    """PerturBench at d357dfa (August 2024): two scores and their ranks among predictions, divided by n."""
    for rows, distances in _perturbench_means(comparison):
        for (score, aggregation), (value, distance) in distances.items():
            results.add(f"{score}_{aggregation}", rows, value, np.where(np.isnan(value), "undefined", ""))
            _add_rank(results, f"{score}_rank_{aggregation}", rows, distance, direction="obs", denominator="n")


@convention("perturbench-2026", drops_missing=True)
def perturbench_2026(comparison: Comparison, results: Results) -> None:
    """PerturBench at 4825e39 (February 2026): seven scores, each with its rank and transposed rank."""
    space = fit_pca(comparison.observed.X, _components(comparison.observed.X))
    for rows, distances in _perturbench_means(comparison):
        code = int(comparison.context[rows[0]])
        distances |= _perturbench_cells(comparison, rows, space)
        distances |= _perturbench_tests(comparison, rows, comparison.control(code))
        for (score, aggregation), (value, distance) in distances.items():
            results.add(f"{score}_{aggregation}", rows, value, np.where(np.isnan(value), "undefined", ""))
            for form, direction in (("rank", "obs"), ("rank_transpose", "pred")):
                _add_rank(results, f"{score}_{form}_{aggregation}", rows, distance, direction=direction)


def _components(X: Matrix) -> int:
    """100 where scanpy accepts them (fewer than cells and genes), else its default: 50, or one less than allowed."""
    smaller = min(X.shape)
    return 100 if smaller > 100 else min(50, smaller - 1)


def _add_rank(results: Results, name: str, rows: np.ndarray, distance: np.ndarray, **options: str) -> None:
    if len(rows) < 2:  # upstream: a single candidate is perfect
        results.add(name, rows, 0.0, "single_candidate")
    else:
        value = ranks(distance, exact=True, **options)
        results.add(name, rows, value, np.where(np.isnan(value), "undefined", ""))


def _pairs(score: str, predicted: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value of each condition, and all distances; an all-zero prediction has no cosine (0/0, upstream skips it)."""
    value = SCORES[score](predicted, observed)
    if SCORES[score].needs == "norm":
        value = np.where((predicted == 0).all(axis=1), np.nan, value)
    return value, SCORES[score].distance(predicted[:, None], observed[None])


def _perturbench_means(comparison: Comparison):
    """Conditions with a prediction and their rmse of means and cosine of fold changes, context by context."""
    observed, predicted = (pseudobulk(side).mean for side in (comparison.observed, comparison.predicted))
    for code, rows in comparison.by_context():
        rows = rows[~comparison.missing[rows]]  # upstream drops conditions without a prediction
        if not len(rows):
            continue
        control = np.log2(observed[comparison.control(code)] + PSEUDOCOUNT)
        with np.errstate(divide="ignore", invalid="ignore"):  # a mean of −0.1 or less: upstream NaN, then 0
            folds = [np.log2(side[rows] + PSEUDOCOUNT) - control for side in (predicted, observed)]
        folds = [np.where(np.isnan(fold), 0.0, fold) for fold in folds]
        yield (
            rows,
            {
                ("rmse", "average"): _pairs("rmse", predicted[rows], observed[rows]),
                ("cosine", "logfc"): _pairs("cosine", *folds),
            },
        )


def _perturbench_cells(comparison: Comparison, rows: np.ndarray, space) -> dict:
    """Cosine of mean PCA coordinates, and the half-scale V energy distance ("mmd") of cells in PCA and in genes."""
    cells = [list(side.parts(rows)) for side in (comparison.predicted, comparison.observed)]
    coordinates = [[space(X) for X in side] for side in cells]
    means = [np.stack([X.mean(axis=0) for X in side]) for side in coordinates]
    distances = {
        aggregation: energy_matrix(*side, estimator="V", scale="half")
        for aggregation, side in (("pca", coordinates), ("none", cells))
    }
    return {("cosine", "pca_average"): _pairs("cosine", *means)} | {
        ("mmd", aggregation): (np.diag(distance), distance) for aggregation, distance in distances.items()
    }


def _perturbench_tests(comparison: Comparison, rows: np.ndarray, control: int) -> dict:
    """R² of t scores, with the prediction passed as the truth, and recall of the 50 largest absolute scores."""
    cells = comparison.observed.of(control)
    against = (*moments(cells), len(cells))
    scores = [
        t_table(side, rows, against, overestimate=True, p_values=False)[0]
        for side in (comparison.predicted, comparison.observed)
    ]
    predicted, observed = (
        np.where(np.isfinite(score), score, 0.0).astype(np.float32).astype(float) for score in scores
    )
    fit = _r2_prediction_first(predicted, observed)
    k = min(TOP_K, predicted.shape[1])
    top = [np.argsort(np.abs(side), axis=1, kind="stable")[:, ::-1][:, :k] for side in (predicted, observed)]
    chosen = [np.zeros(predicted.shape) for _ in top]
    for mask, genes in zip(chosen, top, strict=True):
        np.put_along_axis(mask, genes, 1.0, axis=1)
    recall = chosen[0] @ chosen[1].T / k
    return {
        ("r2_score", "scores"): (np.diag(fit), -fit),
        ("top_k_recall", "scores"): (np.diag(recall), 1 - recall),
    }


def _r2_prediction_first(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """1 − Σ(a−b)²/Σ(a−ā)² for all predictions a and observations b; as scikit-learn, 0 or 1 for a constant a."""
    error = cdist(predicted, observed, "sqeuclidean")
    total = ((predicted - predicted.mean(axis=1, keepdims=True)) ** 2).sum(axis=1, keepdims=True)
    constant = np.where(error == 0, 1.0, 0.0)
    return np.where(total == 0, constant, 1 - error / np.where(total == 0, 1, total))


def _means_with_own_control(comparison: Comparison, name: str) -> tuple[np.ndarray, np.ndarray]:
    if not comparison.own_control.all():
        without = [", ".join(c) for c, has in zip(comparison.contexts, comparison.own_control, strict=True) if not has]
        place = f" in {'; '.join(without)}" if comparison.covariates else ""
        raise InputError(
            f"{comparison.predicted.file}: no control cells{place}; {name} subtracts each side's own controls"
        )
    return tuple(pseudobulk(side).mean for side in (comparison.predicted, comparison.observed))


@convention("cell-eval", mean="contaminated")
def cell_eval(comparison: Comparison, results: Results) -> None:
    """cell-eval 0.8.2, profile ``full`` without clustering_agreement, once a context."""
    predicted, observed = _means_with_own_control(comparison, "cell-eval")
    for code, rows in comparison.by_context():
        control = comparison.control(code)
        deltas = [side[rows] - side[control] for side in (predicted, observed)]
        means = predicted[rows], observed[rows]
        for suffix, sides in (("", means), ("_delta", deltas)):
            for score in ("mse", "mae"):
                results.add(f"{score}{suffix}", rows, SCORES[score](*sides))
        _add(results, "pearson_delta", rows, SCORES["pearson"](*deltas), SCORES["pearson"].status(*deltas))
        for score in ("l1", "l2", "cosine"):
            results.add(f"discrimination_score_{score}", rows, _discrimination(comparison, rows, score, *deltas))
        results.add("pearson_edistance", rows, _edistance_correlation(comparison, rows, control))
        _cell_eval_expression(comparison, results, rows, control, predicted, observed)


def _add(results: Results, name: str, rows: np.ndarray, values, status="") -> None:
    results.add(name, rows, values, status)


def _discrimination(
    comparison: Comparison, rows: np.ndarray, score: str, predicted: np.ndarray, observed: np.ndarray
) -> np.ndarray:
    """1 − r/n with r the position of the right observation; the gene named like the perturbation is left out.

    A gene set to zero on both sides adds nothing to these distances, which is cheaper than deleting its column. A
    combination is not the name of a gene, so it loses none.
    """
    distance = SCORES[score].distance(predicted[:, None], observed[None])
    position = {gene: index for index, gene in enumerate(comparison.genes)}
    without = observed.copy()
    norms = (observed**2).sum(axis=1)
    for k, name in enumerate(comparison.perturbation[rows]):
        gene = position.get(name)
        if gene is None:
            continue
        row, column = predicted[k].copy(), without[:, gene].copy()
        row[gene], without[:, gene] = 0.0, 0.0
        if score == "cosine":
            distance[k] = _cosine_distances(row, without, norms - column**2, norms)
        else:
            distance[k] = SCORES[score].distance(row[None, None], without[None])[0]
        without[:, gene] = column
    return 1 - ranks(distance, direction="pred", ties="position", exact=True, denominator="n")


def _cosine_distances(row: np.ndarray, others: np.ndarray, norms: np.ndarray, before: np.ndarray) -> np.ndarray:
    """1 − cosine of one vector to many whose squared norms are known up to cancellation against those ``before``."""
    lost = norms < 1e-6 * before
    norms[lost] = (others[lost] ** 2).sum(axis=1)
    length = np.sqrt(norms * (row @ row))
    return 1 - np.where(length > 0, others @ row / np.where(length > 0, length, 1), 0.0)


def _edistance_correlation(comparison: Comparison, rows: np.ndarray, control: int) -> float:
    """Pearson correlation over perturbations of the energy distance to each side's own control."""
    distances = []
    for side in (comparison.predicted, comparison.observed):
        distances.append(energy_matrix(side.parts(rows), side.parts([control]), estimator="V")[:, 0])
    return float(SCORES["pearson"](*distances))


def fold_change_of_geometric_means(mean: np.ndarray, control: np.ndarray) -> np.ndarray:
    """log2(expm1(m)/expm1(m₀)) without a pseudocount: ±inf for a zero on one side, 0 for zeros on both."""
    with np.errstate(divide="ignore", invalid="ignore"):
        fold = np.log2(np.expm1(mean) / np.expm1(control))
    return np.where((mean == 0) & (control == 0), 0.0, fold)


def _own_tables(comparison: Comparison, rows: np.ndarray, control: int, means) -> list[Table]:
    """Rank-sum tables of both sides (predicted, observed), each against its own control."""
    tables = []
    for side, mean in zip((comparison.predicted, comparison.observed), means, strict=True):
        z, p = rank_sum_table(side, rows, side, control)
        tables.append(table(z, p, fold_change_of_geometric_means(mean[rows], mean[control])))
    return tables


def _cell_eval_expression(comparison, results, rows, control, predicted, observed) -> None:
    guess, truth = _own_tables(comparison, rows, control, (predicted, observed))
    called, true = guess.q < LEVEL, truth.q < LEVEL
    counts = called.sum(axis=1), true.sum(axis=1)
    results.add("de_nsig_counts_pred", rows, counts[0])
    results.add("de_nsig_counts_real", rows, counts[1])
    some = counts[1] > 0
    correlation = _spearman(counts[0][some], counts[1][some]) if some.any() else 1.0
    results.add("de_spearman_sig", rows, correlation)
    for position, row in enumerate(rows):
        real, names = true[position], np.asarray(comparison.genes)
        orders = [
            np.lexsort((names, -np.abs(side.logfc[position]), ~significant[position]))[: significant[position].sum()]
            for side, significant in ((guess, called), (truth, true))
        ]
        for k in (None, 50, 100, 200, 500):
            for form, size in (("overlap", counts[1][position]), ("precision", counts[0][position])):
                deep = int(min(k or size, size))
                hits = len(np.intersect1d(orders[0][:deep], orders[1][:deep]))
                results.add(f"{form}_at_{k or 'N'}", row, hits / deep if deep else 0.0)
        status = "" if real.any() else "no_true_de"
        folds = guess.logfc[position][real], truth.logfc[position][real]
        match = (np.sign(folds[0]) == np.sign(folds[1])).mean() if real.any() else np.nan
        results.add("de_direction_match", row, match, status)
        results.add("de_spearman_lfc_sig", row, _spearman(*folds) if real.any() else np.nan, status)
        results.add("de_sig_genes_recall", row, called[position][real].mean() if real.any() else np.nan, status)
        confidence = -np.log10(np.clip(guess.q[position], 1e-10, 1))
        one_class = not real.any() or real.all()
        for name, area in (("pr_auc", average_precision), ("roc_auc", area_under_roc)):
            results.add(name, row, np.nan if one_class else area(real, confidence), "one_class" if one_class else "")


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of mid-ranks, infinities included; NaN for fewer than 2 values or a constant side."""
    if len(a) < 2:
        return np.nan
    a, b = stats.rankdata(a), stats.rankdata(b)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else np.nan


@convention("vcc2025")
def vcc2025(comparison: Comparison, results: Results) -> None:
    """The Virtual Cell Challenge of 2025: ``mae``, ``pds_l1`` and ``des``, each side with its own controls."""
    predicted, observed = _means_with_own_control(comparison, "vcc2025")
    for code, rows in comparison.by_context():
        control = comparison.control(code)
        results.add("mae", rows, SCORES["mae"](predicted[rows], observed[rows]))
        deltas = [side[rows] - side[control] for side in (predicted, observed)]
        results.add("pds_l1", rows, _discrimination(comparison, rows, "l1", *deltas))
        guess, truth = _own_tables(comparison, rows, control, (predicted, observed))
        for position, row in enumerate(rows):
            sizes = [int((side.q[position] < LEVEL).sum()) for side in (guess, truth)]
            orders = [
                np.lexsort((np.asarray(comparison.genes), -np.abs(side.logfc[position]), side.q[position] >= LEVEL))
                for side in (guess, truth)
            ]
            hits = len(np.intersect1d(orders[0][: min(sizes)], orders[1][: sizes[1]]))
            results.add("des", row, hits / sizes[1] if sizes[1] else 0.0)


def against_baseline(value: float, baseline: float, *, best: float) -> float:
    """A score of the 2025 challenge: 1 − u/b for errors (best 0), else (u − b)/(1 − b); 0 for NaN or worse than b.

    Clipping at 0 means that a model below the baseline loses nothing by getting worse.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        score = 1 - np.divide(value, baseline) if best == 0 else np.divide(value - baseline, 1 - baseline)
    return float(max(0.0, score)) if np.isfinite(score) else 0.0


@convention("neurips2023")
def neurips2023(comparison: Comparison, results: Results) -> None:
    """Single-cell perturbation prediction (2023): rows of sign(log fold change)·(−log10 p), one a condition.

    The competition tests donor pseudobulks with limma; here it is Welch's t-test over cells against observed control.
    """
    for code, rows in comparison.by_context():
        cells = comparison.observed.of(comparison.control(code))
        against = (*moments(cells), len(cells))
        rows = rows[~comparison.missing[rows]]
        sides = []
        for side in (comparison.predicted, comparison.observed):
            t, p = t_table(side, rows, against, overestimate=False)
            sides.append(np.sign(t) * -np.log10(np.maximum(p, 1e-300)))
        results.add("mrrmse", rows, SCORES["rmse"](*sides))  # its mean over rows is the competition's score
        for score in ("pearson", "spearman", "cosine"):
            results.add(score, rows, SCORES[score](*sides), SCORES[score].status(*sides))
    results.notes["test"] = "Welch t-test over cells; the competition used limma on donor pseudobulks"
