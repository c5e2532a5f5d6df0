"""Distribution: how far two sets of cells are apart. Energy distance and kernel MMD; a new one is a ``Kernel``.

Both are sums of a function of squared distances over pairs of cells, which ``pairs`` gives tile by tile. Sources:
Székely & Rizzo (energy statistics), Gretton et al. 2012 (MMD).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from types import ModuleType
from typing import TypeVar

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, svds

from perturbray.metrics.cells import Matrix, dense, shuffled
from perturbray.metrics.pairs import (
    RARE,
    RARE_COMPILED,
    Cloud,
    Target,
    compiled,
    rare_genes,
    squared_distances,
    tiles,
)
from perturbray.randomness import generator

T = TypeVar("T")

RUN_VALUES = 2**20  # coordinates of cells that are prepared for distances at once, 8 MB
FEW = 64  # rows among which it costs more to set rare genes apart than it saves
STRIP = 128  # cells at once where each pair is needed once; a divisor of BLOCK and at most TILE
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # in units of the median distance between observed cells


@dataclass(frozen=True)
class Euclidean:
    """‖x − y‖, the kernel of the energy distance (up to sign)."""

    terms: int = 1
    diagonal: float = 0.0

    def sums(self, squares: np.ndarray) -> np.ndarray:
        """(terms,); overwrites its argument, as that of every kernel does."""
        return np.sqrt(squares, out=squares).sum()[None]


@dataclass(frozen=True)
class Squared:
    """‖x − y‖²; its energy distance compares means only."""

    terms: int = 1
    diagonal: float = 0.0

    def sums(self, squares: np.ndarray) -> np.ndarray:
        return squares.sum()[None]


@dataclass(frozen=True)
class Gaussian:
    """exp(−‖x − y‖²/(2σ²)) for several σ, in increasing order."""

    sigmas: tuple[float, ...]
    diagonal: float = 1.0

    @property
    def terms(self) -> int:
        return len(self.sigmas)

    def sums(self, squares: np.ndarray) -> np.ndarray:
        """One exponential for the widest kernel; one half as wide is its fourth power."""
        wide = sorted(self.sigmas, reverse=True)
        halving = all(last == 2 * sigma for last, sigma in pairwise(wide))
        kernel, out = squares if halving else np.empty_like(squares), []
        for position, sigma in enumerate(wide):
            if position and wide[position - 1] == 2 * sigma:
                np.square(kernel, out=kernel)
                np.square(kernel, out=kernel)
            else:
                np.multiply(squares, -0.5 / sigma**2, out=kernel)
                np.exp(kernel, out=kernel)
            out.append(kernel.sum())
        return np.array(out[::-1])


Kernel = Euclidean | Squared | Gaussian


def between(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Mean of the kernel over all pairs of rows, (terms,). The sums of tiles are added exactly: no order matters."""
    centre = x.mean(axis=0, dtype=np.float64)  # a common shift leaves distances alone and makes cancellation small
    x, y = Cloud.of(x, centre), Target(Cloud.of(y, centre))
    parts = [kernel.sums(y.squares(x, i, j)) for i in tiles(0, len(x)) for j in y.blocks(0, len(y.cloud))]
    return _add(parts) / (len(x) * len(y.cloud))


def within(X: Matrix, kernel: Kernel, engine: ModuleType | None = None) -> np.ndarray:
    """Mean of the kernel over ordered pairs of different rows, (terms,); NaN for fewer than 2 rows.

    ``engine``, as ``compiled`` gives it, is of use for sparse rows.
    """
    n = X.shape[0]
    if n < 2:
        return np.full(kernel.terms, np.nan)
    engine = engine if sparse.issparse(X) and n >= FEW else None
    x = _cloud(X if engine else dense(X), rare_genes([X], RARE_COMPILED) if engine else None)
    y, parts = Target(x, engine), []
    for i in tiles(0, n, STRIP):
        for j in y.blocks(i.start, n):
            same = i.stop - i.start if j.start == i.start else 0
            squares = y.squares(x, i, j, same=same > 0)
            parts.append(kernel.sums(squares[:, :same]) - same * kernel.diagonal)
            parts.append(2 * kernel.sums(squares[:, same:]))
    return _add(parts) / (n * (n - 1))


def _cloud(X: Matrix, rare: np.ndarray | None) -> Cloud:
    """Cells around their own mean."""
    return Cloud.of(X, np.asarray(X.mean(axis=0), dtype=np.float64).ravel(), rare)


_REMEMBERED: dict[tuple, np.ndarray] = {}  # a few numbers each; the oldest go first
REMEMBER = 20_000


def remembered(make: Callable[[], T], *key: object) -> T:
    """What depends on observed cells only, computed once a process and shared by all models scored in it.

    Arrays in ``key`` count by their content.
    """
    key = tuple(_digest(part) if isinstance(part, np.ndarray) or sparse.issparse(part) else part for part in key)
    if key not in _REMEMBERED:
        while len(_REMEMBERED) >= REMEMBER:
            _REMEMBERED.pop(next(iter(_REMEMBERED)), None)
        _REMEMBERED[key] = make()
    return _REMEMBERED[key]


def _digest(x: Matrix) -> bytes:
    digest = hashlib.blake2b(str((x.shape, x.dtype)).encode(), digest_size=16)
    for part in (x.data, x.indices, x.indptr) if sparse.issparse(x) else (x,):
        digest.update(np.ascontiguousarray(part))
    return digest.digest()


def _add(parts: list[np.ndarray]) -> np.ndarray:
    return np.array([math.fsum(term) for term in np.stack(parts, axis=1)])


def _estimate(unbiased: np.ndarray, n: int, kernel: Kernel, estimator: str) -> np.ndarray:
    """The mean over pairs within a sample: of different cells (``U``), or of all n² (``V``)."""
    return unbiased if estimator == "U" else (unbiased * (n - 1) + kernel.diagonal) / n


def energy(
    x: np.ndarray,
    y: np.ndarray,
    *,
    estimator: str = "U",
    scale: str = "full",
    kernel: Kernel | None = None,
    within_x: float | None = None,
    within_y: float | None = None,
) -> float:
    """Energy distance 2 E‖x−y‖ − E‖x−x'‖ − E‖y−y'‖ of two sets of cells, (n, d) and (m, d).

    ``estimator="V"`` is never negative but grows by about 1/n; ``"U"`` (default) has no such bias and may be negative.
    ``scale="half"`` is half of it. ``within_x`` and ``within_y`` are known values of ``within``. Not square-rooted.
    """
    kernel = kernel or Euclidean()
    b = within(x, kernel)[0] if within_x is None else within_x
    c = within(y, kernel)[0] if within_y is None else within_y
    b, c = (_single(value, len(cells), estimator) for value, cells in ((b, x), (c, y)))
    value = 2 * between(x, y, kernel)[0] - b - c
    return float(value / 2 if scale == "half" else value)


def _single(unbiased: float, n: int, estimator: str) -> float:
    if estimator == "U":
        return unbiased
    return 0.0 if n == 1 else unbiased * (n - 1) / n


def energy_sq(x: np.ndarray, y: np.ndarray) -> float:
    """The V statistic with squared distances, 2‖x̄ − ȳ‖²: a comparison of means only."""
    difference = x.mean(axis=0) - y.mean(axis=0)
    return float(2 * difference @ difference)


def mmd(
    x: np.ndarray,
    y: np.ndarray,
    sigmas: Sequence[float],
    *,
    estimator: str = "U",
    within_x: np.ndarray | None = None,
    within_y: np.ndarray | None = None,
) -> np.ndarray:
    """MMD² with a Gaussian kernel for each σ, (sigmas,); the mean over them is that of the averaged kernel."""
    kernel = Gaussian(tuple(sigmas))
    b = within(x, kernel) if within_x is None else within_x
    c = within(y, kernel) if within_y is None else within_y
    b, c = (_estimate(value, len(cells), kernel, estimator) for value, cells in ((b, x), (c, y)))
    return b + c - 2 * between(x, y, kernel)


def median_distance(x: np.ndarray) -> float:
    """Median distance over distinct pairs of rows: the unit of bandwidths. Of observed cells only."""
    x = x - x.mean(axis=0)
    pairs = np.triu_indices(len(x), 1)
    return float(np.median(np.sqrt(squared_distances(x, x)[pairs])))


def energy_matrix(
    predicted: Sequence[Matrix],
    observed: Sequence[Matrix],
    *,
    space: Callable[[Matrix], np.ndarray] = dense,
    estimator: str = "U",
    scale: str = "full",
) -> np.ndarray:
    """Energy distance of every prediction to every observation in a space, (K, K'); each within term is computed once.

    Cells stay as they are, sparse for one, but for a few predictions and observations at a time: both arguments may
    read theirs only when asked.
    """
    sizes, counts = (np.array([X.shape[0] for X in side]) for side in (observed, predicted))
    pairs = float(counts.sum()) * sizes.sum() + (sizes**2).sum() / 2 + (counts**2).sum() / 2
    first = observed[0][:1]
    engine = compiled(pairs, (first if space is dense else space(first)).shape[1])
    b = [_single(_within(X, space, engine, known=True), n, estimator) for X, n in zip(observed, sizes, strict=True)]
    c = [_single(_within(X, space, engine), n, estimator) for X, n in zip(predicted, counts, strict=True)]
    cross = _cross(predicted, observed, space, counts, sizes, engine) / (counts[:, None] * sizes)
    value = 2 * cross - np.array(b) - np.array(c)[:, None]
    return value / 2 if scale == "half" else value


def _within(X: Matrix, space: Callable, engine: ModuleType | None, *, known: bool = False) -> float:
    cells, kernel = X if space is dense else space(X), Euclidean()
    if not known:
        return within(cells, kernel, engine)[0]
    kind = "compiled" if engine and sparse.issparse(cells) else ""  # the last digit depends on it
    return remembered(lambda: within(cells, kernel, engine)[0], "within", kernel, *filter(None, [kind]), cells)


def _cross(predicted, observed, space, counts: np.ndarray, sizes: np.ndarray, engine: ModuleType | None) -> np.ndarray:
    """Sums of distances between the cells of each prediction and each observation, (K, K')."""
    rare = None
    if space is dense:
        rare = rare_genes(chain(observed, predicted), RARE_COMPILED if engine else RARE)
    centre = sum(np.asarray(X.mean(axis=0), dtype=np.float64).ravel() for X in observed) / len(observed)
    centre = centre if space is dense else space(centre[None])[0]
    values = len(centre) if rare is None else np.where(rare, 0.25, 1).sum()  # rare genes take less, being sparse
    most = max(1, int(RUN_VALUES / max(1, values)))
    cross = np.empty((len(predicted), len(observed)))
    for first, last in _runs(sizes, most):
        y = Target(_stacked(observed[first:last], space, centre, rare), engine)
        for one, end in _runs(counts, most):
            x = _stacked(predicted[one:end], space, centre, rare)
            sums = y.root_sums(x, _edges(sizes[first:last]))
            cross[one:end, first:last] = np.add.reduceat(sums, _edges(counts[one:end])[:-1], axis=0)
    return cross


def _stacked(parts: Sequence[Matrix], space, centre: np.ndarray, rare: np.ndarray | None) -> Cloud:
    stack = sparse.vstack(parts, format="csr") if sparse.issparse(parts[0]) else np.concatenate(parts)
    return Cloud.of(stack if rare is not None else space(stack), centre, rare)


def _edges(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def _runs(sizes: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive groups of at most ``most`` cells together (or a single larger one)."""
    first, total = 0, 0
    for position, size in enumerate(sizes):
        if total and total + size > most:
            yield first, position
            first, total = position, 0
        total += size
    yield first, len(sizes)


@dataclass(frozen=True)
class PCA:
    """A linear space fitted once on observed cells and shared by every model: coordinates (x − mean)·loadings."""

    mean: np.ndarray  # (genes,)
    loadings: np.ndarray  # (genes, components)

    def __call__(self, X: Matrix) -> np.ndarray:
        """(cells, genes) CSR or dense -> (cells, components) float64; sparse cells stay sparse."""
        product = X.astype(np.float64) @ self.loadings
        return np.asarray(product) - self.mean @ self.loadings


def fit_pca(X: Matrix, components: int = 50) -> PCA:
    """Principal axes of centred cells, min(components, cells − 1, genes) of them, the largest loading of each positive.

    Up to 2,000 genes by the covariance matrix, beyond by a seeded Lanczos iteration; float64 in both cases.
    """
    n, genes = X.shape
    components = min(components, n - 1, genes)
    mean = np.asarray(X.mean(axis=0, dtype=np.float64)).ravel()
    if genes <= 2000 or components >= min(n, genes) - 1:
        covariance = np.zeros((genes, genes))
        for start in range(0, n, 4096):
            block = dense(X[start : start + 4096]) - mean
            covariance += block.T @ block
        loadings = np.linalg.eigh(covariance)[1][:, ::-1][:, :components]
    else:
        X = X.astype(np.float64)
        operator = LinearOperator(
            shape=X.shape,
            dtype=np.float64,
            matvec=lambda v: X @ v.ravel() - mean @ v.ravel(),
            rmatvec=lambda u: X.T @ u.ravel() - mean * u.sum(),
        )
        start = generator(0, "pca").normal(size=min(X.shape))
        loadings = svds(operator, k=components, v0=start)[2][::-1].T
    sign = np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(components)])
    return PCA(mean=mean, loadings=np.ascontiguousarray(loadings * np.where(sign == 0, 1, sign)))


def halvings(signature: np.ndarray, *scope: str | int, splits: int = 5) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers of disjoint random halves of cells, ``splits`` times; an odd cell is left out."""
    half = len(signature) // 2
    for split in range(splits):
        order = shuffled(signature, *scope, split)
        yield np.sort(order[:half]), np.sort(order[half : 2 * half])


def skill(value: float, floor: Sequence[float], ceiling: float) -> float:
    """(K − v)/(K − F): 1 as near as a replicate, 0 as far as control cells, negative worse.

    ``floor`` holds the metric between halves of the observed cells, ``ceiling`` is that of the control cells. NaN where
    the two cannot be told apart (K − F within 2 standard errors of F).
    """
    floor = np.asarray(floor, dtype=float)
    error = floor.std(ddof=1) / math.sqrt(len(floor)) if len(floor) > 1 else 0.0
    span = ceiling - floor.mean()
    return float((ceiling - value) / span) if span > 2 * error else float("nan")


def copied_cells(value: float, within_observed: float, n: int) -> bool:
    """Whether a U energy distance is so far below 0 that the prediction must hold the observed cells themselves.

    Copies give −2·B/n with the mean distance B within the n observed cells; a replicate gives 0 on average.
    """
    return value < -within_observed / n


def correlation_structure(predicted: np.ndarray, observed: np.ndarray, *, most: int = 100) -> float:
    """Frobenius distance between gene correlation matrices on the 100 genes most variable in the observed cells.

    Beside the energy distance, which hardly sees whether genes vary together. A constant gene correlates with none.
    """
    genes = np.argsort(-observed.var(axis=0), kind="stable")[:most]
    matrices = []
    for cells in (predicted, observed):
        centred = cells[:, genes] - cells[:, genes].mean(axis=0)
        norm = np.sqrt((centred**2).sum(axis=0))
        scaled = centred / np.where(norm > 0, norm, 1)
        matrices.append(scaled.T @ scaled)
    return float(np.linalg.norm(matrices[0] - matrices[1]))


def variance_ratio(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Σ var(predicted)/Σ var(observed) over genes; below 0.1 a prediction has almost no variance between cells."""
    total = observed.var(axis=0, ddof=1).sum()
    return float(predicted.var(axis=0, ddof=1).sum() / total) if total > 0 else float("nan")
