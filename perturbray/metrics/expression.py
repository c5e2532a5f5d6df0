"""Differential expression: tests of a condition against control, and how a predicted table agrees with the observed.

A test fills a ``Table``; a way to compare two tables is a function of two ``Genes`` registered with ``@agreement``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from perturbray.errors import InputError, nearest
from perturbray.metrics.cells import Cells, moments
from perturbray.registry import Registry

LEVEL = 0.05  # of the q value
GATE = 5e-6  # of the target sum: a control mean below is too low to test
FEWEST_CELLS = 10
FEWEST_GENES = 10
TOP = 50  # genes of top-k recall
GENE_BLOCK = 1024  # genes densified at once in the rank-sum test
DEGENERATE = 0.1  # variance ratio below which a prediction has almost no variance between cells


@dataclass(frozen=True, kw_only=True)
class Table:
    """Tests of conditions against control, each (conditions, genes) float64."""

    score: np.ndarray  # signed statistic: > 0 is up
    p: np.ndarray
    q: np.ndarray  # Benjamini-Hochberg within the condition, over tested genes; 1 elsewhere
    logfc: np.ndarray  # log2

    def row(self, condition: int, genes: np.ndarray, names: np.ndarray) -> "Genes":
        parts = {name: getattr(self, name)[condition][genes] for name in ("score", "p", "q", "logfc")}
        return Genes(names=names[genes], **parts)


@dataclass(frozen=True, kw_only=True)
class Genes:
    """The tested genes of one condition, (genes,) each."""

    names: np.ndarray
    score: np.ndarray
    p: np.ndarray
    q: np.ndarray
    logfc: np.ndarray
    level: float = LEVEL
    significant: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "significant", self.q < self.level)

    def order(self, *keys: np.ndarray) -> np.ndarray:
        """Gene indices by these keys, smallest first; then by abs(log fold change) descending, then by name."""
        size = np.abs(np.nan_to_num(self.logfc, nan=0.0, posinf=np.inf, neginf=-np.inf))
        return np.lexsort((self.names, -size, *reversed(keys)))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q values along the last axis: q_(k) = min over j ≥ k of min(1, p_(j)·M/j); NaN counts as p = 1."""
    p = np.where(np.isnan(p), 1.0, p)
    count = p.shape[-1]
    order = np.argsort(p, axis=-1, kind="stable")
    scaled = np.take_along_axis(p, order, -1) * count / np.arange(1, count + 1)
    falling = np.minimum.accumulate(scaled[..., ::-1], axis=-1)[..., ::-1]
    q = np.empty_like(p)
    np.put_along_axis(q, order, np.minimum(falling, 1), -1)
    return q


def rank_sum(x: np.ndarray, reference: np.ndarray, *, continuity: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided Wilcoxon rank-sum test by column with tie correction: z and p, (genes,).

    p is 1 where all values are tied. By ``scipy.stats.mannwhitneyu`` on float64; z is signed and without continuity.
    """
    x, reference = np.asarray(x, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # σ = 0
        test = stats.mannwhitneyu(x, reference, axis=0, method="asymptotic", use_continuity=continuity)
    middle = len(x) * len(reference) / 2
    p = np.where(np.isnan(test.pvalue) | (test.statistic == middle), 1.0, test.pvalue)
    return _z(p, test.statistic - middle), p


def _z(p: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The normal quantile of a two-sided p value with the sign of the statistic: orders genes as the test does."""
    return np.sign(direction) * stats.norm.isf(np.maximum(p, np.finfo(float).tiny) / 2)


def welch(
    x: tuple[np.ndarray, np.ndarray, int],
    y: tuple[np.ndarray, np.ndarray, int],
    *,
    overestimate: bool = False,
    p_values: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Welch's t and two-sided p from (mean, unbiased variance, cells) of two groups; no variance and equal means: 0, 1.

    ``overestimate`` puts the first group's size in place of the second's (scanpy's ``t-test_overestim_var``). Without
    ``p_values``, which cost more than all the rest, p is NaN.
    """
    (mean_x, var_x, n_x), (mean_y, var_y, n_y) = x, y
    n_y = n_x if overestimate else n_y
    share_x, share_y = var_x / n_x, var_y / n_y
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (mean_x - mean_y) / np.sqrt(share_x + share_y)
        if not p_values:
            return np.where(np.isnan(t), 0.0, t), np.full(t.shape, np.nan)
        freedom = (share_x + share_y) ** 2 / (share_x**2 / max(n_x - 1, 1) + share_y**2 / max(n_y - 1, 1))
        p = 2 * stats.t.sf(np.abs(t), freedom)
    p = np.where(np.isinf(t), 0.0, p)
    return np.where(np.isnan(t), 0.0, t), np.where(np.isnan(p), 1.0, p)


def t_table(
    cells: Cells,
    groups: Sequence[int],
    control: tuple[np.ndarray, np.ndarray, int],
    *,
    overestimate: bool,
    p_values: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """t and p, as ``welch``, of each group against the moments of the control, (groups, genes) each."""
    tests = []
    for group in groups:
        x = cells.of(group)
        tests.append(welch((*moments(x), len(x)), control, overestimate=overestimate, p_values=p_values))
    return tuple(np.stack(part) for part in zip(*tests, strict=True))


def rank_sum_table(
    cells: Cells, groups: Sequence[int], reference: Cells, control: int, *, engine: str = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """z and p of each group against the reference's control cells, (groups, genes) each.

    ``engine="auto"`` takes illico where it is installed (about 80 times as fast as scanpy; one pass over the
    non-zeros) and scipy otherwise; both agree to rounding.
    """
    if engine not in ("auto", "illico", "scipy"):
        raise InputError(f"no rank-sum engine {engine!r}: {nearest(engine, ('auto', 'illico', 'scipy'))}")
    if engine != "scipy":
        try:
            from perturbray.metrics.engine_illico import rank_sums
        except ImportError:
            if engine == "illico":
                raise
        else:
            return rank_sums(cells, groups, reference, control)
    z, p = np.zeros((2, len(groups), cells.X.shape[1]))
    rows = reference.X[reference.rows(control)]
    members = [cells.X[cells.rows(group)] for group in groups]
    for start in range(0, cells.X.shape[1], GENE_BLOCK):
        genes = slice(start, start + GENE_BLOCK)
        against = _columns(rows, genes)
        for position, member in enumerate(members):
            z[position, genes], p[position, genes] = rank_sum(_columns(member, genes), against)
    return z, p


def _columns(X, genes: slice) -> np.ndarray:
    block = X[:, genes]
    return np.asarray(block.toarray() if hasattr(block, "toarray") else block, dtype=np.float64)


def table(score: np.ndarray, p: np.ndarray, logfc: np.ndarray, tested: np.ndarray | None = None) -> Table:
    """A table with q values over the tested genes, (genes,) or (conditions, genes) bool; all by default."""
    tested = np.broadcast_to(True if tested is None else tested, p.shape)
    q = np.ones(p.shape)
    for row, kept in enumerate(tested):
        q[row, kept] = benjamini_hochberg(p[row, kept])
    return Table(score=score, p=p, q=q, logfc=logfc)


@dataclass(frozen=True)
class Agreement:
    """How the predicted table of one condition agrees with the observed one."""

    name: str
    function: Callable[[Genes, Genes], tuple[float, str]]
    best: float
    worst: float
    higher_is_better: bool = True

    def __call__(self, predicted: Genes, observed: Genes) -> tuple[float, str]:
        """Value and status; NaN only where the truth leaves it undefined."""
        if len(observed.names) < FEWEST_GENES:
            return np.nan, "too_few_genes"
        return self.function(predicted, observed)


AGREEMENTS: Registry[Agreement] = Registry("agreement of differential expression")
NO_TRUE_DE = (np.nan, "no_true_de")


def agreement(name: str, *, best: float = 1.0, worst: float = 0.0, higher_is_better: bool = True) -> Callable:
    """Register a function of two ``Genes``, predicted and observed, that returns a value and a status."""

    def keep(function: Callable[[Genes, Genes], tuple[float, str]]) -> Agreement:
        return AGREEMENTS.register(name)(Agreement(name, function, best, worst, higher_is_better))

    return keep


@agreement("topk_recall")
def topk_recall(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """Shared share of the k genes most up and of the k most down, averaged; k = min(50, tested genes)."""
    k = min(TOP, len(observed.names))
    shared = [
        np.intersect1d(predicted.order(sign * predicted.score)[:k], observed.order(sign * observed.score)[:k]).size / k
        for sign in (-1, 1)
    ]
    return float(np.mean(shared)), ""


def _sets(predicted: Genes, observed: Genes) -> tuple[int, int, int]:
    both = int((predicted.significant & observed.significant).sum())
    return both, int(predicted.significant.sum()), int(observed.significant.sum())


@agreement("des")
def des(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """Hits among the min(N, |R̂|) called genes of largest abs(log fold change), over N = |R| observed ones."""
    n = int(observed.significant.sum())
    if n == 0:
        return NO_TRUE_DE
    called = predicted.order(~predicted.significant)[: min(n, int(predicted.significant.sum()))]
    return float(observed.significant[called].sum() / n), ""


@agreement("recall")
def recall(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """|R∩R̂|/|R|. Calling every gene gives 1, so it is meaningless alone."""
    both, _, n = _sets(predicted, observed)
    return (both / n, "") if n else NO_TRUE_DE


@agreement("jaccard")
def jaccard(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """|R∩R̂|/|R∪R̂|; 1 where both are empty."""
    both, called, n = _sets(predicted, observed)
    union = called + n - both
    return (both / union if union else 1.0), ""


@agreement("fidelity")
def fidelity(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """Called genes with the observed sign over max(|R̂|, |R|); genes without an observed sign are not called."""
    signed = predicted.significant & np.isfinite(observed.logfc) & (observed.logfc != 0)
    right = int((signed & (np.sign(predicted.logfc) == np.sign(observed.logfc))).sum())
    most = max(int(signed.sum()), int(observed.significant.sum()))
    return (right / most, "") if most else NO_TRUE_DE


@agreement("reach")
def reach(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """Depth to which the prediction's most confident genes of R have at least 90 % right signs, as a share of |R|."""
    n = int(observed.significant.sum())
    if n == 0:
        return NO_TRUE_DE
    order = predicted.order(~predicted.significant, predicted.q, predicted.p)
    order = order[observed.significant[order]]
    right = np.cumsum(np.sign(predicted.logfc[order]) == np.sign(observed.logfc[order]))
    deep = np.flatnonzero(right >= 0.9 * np.arange(1, n + 1) - 1e-9)
    return (float(deep[-1] + 1) / n if len(deep) else 0.0), ""


@agreement("lfc_nmae", best=0.0, worst=np.inf, higher_is_better=False)
def lfc_nmae(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """Σ|l̂−l|/Σ|l| over R of at least 10 genes; an undefined l̂ counts as 0. Predicting no change gives 1."""
    true = observed.significant & np.isfinite(observed.logfc)
    size = np.abs(observed.logfc[true]).sum()
    if true.sum() < FEWEST_GENES or size == 0:
        return NO_TRUE_DE
    guess = np.where(np.isfinite(predicted.logfc[true]), predicted.logfc[true], 0.0)
    return float(np.abs(guess - observed.logfc[true]).sum() / size), ""


@agreement("lfc_spearman", worst=-1.0)
def lfc_spearman(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """Spearman correlation of l̂ and l over R of at least 3 genes."""
    true = observed.significant & ~np.isnan(observed.logfc)
    if true.sum() < 3 or np.ptp(stats.rankdata(observed.logfc[true])) == 0:
        return NO_TRUE_DE
    guess = stats.rankdata(np.nan_to_num(predicted.logfc[true], nan=0.0, posinf=np.inf, neginf=-np.inf))
    if np.ptp(guess) == 0:
        return 0.0, "constant_prediction"
    return float(np.corrcoef(guess, stats.rankdata(observed.logfc[true]))[0, 1]), ""


@agreement("direction_match")
def direction_match(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """Share of R with the same sign of the log fold change."""
    true = observed.significant
    if not true.any():
        return NO_TRUE_DE
    return float((np.sign(predicted.logfc[true]) == np.sign(observed.logfc[true])).mean()), ""


@agreement("pr_auc")
def pr_auc(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """Average precision of −log10 p̂ for membership of R; equal p values are one step."""
    if not observed.significant.any():
        return NO_TRUE_DE
    return average_precision(observed.significant, -predicted.p), ""


@agreement("roc_auc")
def roc_auc(predicted: Genes, observed: Genes) -> tuple[float, str]:
    """Area under the ROC curve of −log10 p̂ for membership of R, ties counted half."""
    if not observed.significant.any():
        return NO_TRUE_DE
    if observed.significant.all():
        return np.nan, "one_class"
    return area_under_roc(observed.significant, -predicted.p), ""


def average_precision(label: np.ndarray, score: np.ndarray) -> float:
    """Σ over distinct thresholds of (gain in recall)·precision; equal scores are one step. Needs a positive label."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # last entry of each step
    hits = np.cumsum(label[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def area_under_roc(label: np.ndarray, score: np.ndarray) -> float:
    """Mann–Whitney form with mid-ranks. Needs both classes."""
    positive = int(label.sum())
    ranks = stats.rankdata(score)[label].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * (len(label) - positive)))
