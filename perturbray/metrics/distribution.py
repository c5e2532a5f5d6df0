"""Distribution: how far two sets of cells are apart. Energy distance and kernel MMD; a new one is a ``Kernel``.

Both are sums of a function of squared distances over pairs of cells, so they share one pass over tiles of
128 x 1,024 pairs in float64; no larger matrix is ever held. Sources: Székely & Rizzo (energy statistics),
Gretton et al. 2012 (MMD).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, svds

from perturbray.metrics.cells import Matrix, dense, shuffled
from perturbray.randomness import generator

T = TypeVar("T")

RUN_VALUES = 2**20  # coordinates of cells that are prepared for distances at once, 8 MB
TILE, BLOCK = 128, 1024  # pairs of cells at once: few enough for the cache of a core
RARE = 0.12  # share of cells that express a gene below which a sparse product costs less than a dense one
CLOSE = 1e-5  # of the squared norms: below, a squared distance from a product has lost digits
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # in units of the median distance between observed cells


def squared_distances(x: np.ndarray, y: np.ndarray, *, same: bool = False) -> np.ndarray:
    """‖x_i − y_j‖², (n, d) x (m, d) -> (n, m) float64, as norms minus product, and directly where that cancels.

    ``same`` says that x and y are the same cells: the diagonal is exactly 0.
    """
    return _squares(x, y, *_factors(x, y), same=same)


def _factors(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, d + 2) and (d + 2, m) whose product is the squared distances: the norms are added within it, in one pass."""
    return _left(x, 0.0), _right(_left(y, 0.0))


def _left(x: np.ndarray, centre: np.ndarray | float) -> np.ndarray:
    """(n, d + 2): centred cells, their squared norms, ones. Filled in place: in gene space a copy is tens of MB."""
    left = np.empty((len(x), x.shape[1] + 2))
    np.subtract(x, centre, out=left[:, :-2])
    left[:, -2], left[:, -1] = np.einsum("ij,ij->i", left[:, :-2], left[:, :-2]), 1
    return left


def _right(left: np.ndarray) -> np.ndarray:
    """(d + 2, n): what others' ``_left`` is multiplied with."""
    right = np.empty(left.shape[::-1])
    np.multiply(left[:, :-2].T, -2, out=right[:-2])
    right[-2], right[-1] = left[:, -1], left[:, -2]
    return right


def _squares(x: np.ndarray, y: np.ndarray, left: np.ndarray, right: np.ndarray, *, same: bool = False) -> np.ndarray:
    own, other, squares = left[:, -2], right[-1], left @ right
    if same:
        np.fill_diagonal(squares, np.inf)
    if squares.size and squares.min() < CLOSE * (own.max() + other.max()):
        near = np.nonzero(squares < CLOSE * (own[:, None] + other))
        step = max(1, 2**22 // max(1, x.shape[1]))
        for start in range(0, len(near[0]), step):
            i, j = near[0][start : start + step], near[1][start : start + step]
            difference = x[i] - y[j]
            squares[i, j] = np.einsum("ij,ij->i", difference, difference)
    if same:
        np.fill_diagonal(squares, 0)
    return squares


@dataclass(frozen=True)
class Euclidean:
    """‖x − y‖, the kernel of the energy distance (up to sign)."""

    terms: int = 1
    diagonal: float = 0.0

    def sums(self, squares: np.ndarray, axis: int | None = None) -> np.ndarray:
        return np.sqrt(squares).sum(axis=axis)[None]


@dataclass(frozen=True)
class Squared:
    """‖x − y‖²; its energy distance compares means only."""

    terms: int = 1
    diagonal: float = 0.0

    def sums(self, squares: np.ndarray, axis: int | None = None) -> np.ndarray:
        return squares.sum(axis=axis)[None]


@dataclass(frozen=True)
class Gaussian:
    """exp(−‖x − y‖²/(2σ²)) for several σ, in increasing order."""

    sigmas: tuple[float, ...]
    diagonal: float = 1.0

    @property
    def terms(self) -> int:
        return len(self.sigmas)

    def sums(self, squares: np.ndarray, axis: int | None = None) -> np.ndarray:
        """One exponential for the widest kernel; one half as wide is its fourth power."""
        out, kernel, last = [], None, None
        for sigma in sorted(self.sigmas, reverse=True):
            if kernel is not None and last == 2 * sigma:
                np.square(kernel, out=kernel)
                np.square(kernel, out=kernel)
            else:
                kernel = squares * (-0.5 / sigma**2)
                np.exp(kernel, out=kernel)
            last = sigma
            out.append(kernel.sum(axis=axis))
        return np.stack(out[::-1])


Kernel = Euclidean | Squared | Gaussian


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _tiles(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    left, right = _factors(x, y)
    for i in _blocks(0, len(x), TILE):
        for j in _blocks(0, len(y), BLOCK):
            yield _squares(x[i], y[j], left[i], right[:, j])


def between(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Mean of the kernel over all pairs of rows, (terms,). The sums of tiles are added exactly: no order matters."""
    centre = x.mean(axis=0)  # a common shift leaves distances alone and makes cancellation small
    return _add([kernel.sums(squares) for squares in _tiles(x - centre, y - centre)]) / (len(x) * len(y))


def within(x: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Mean of the kernel over ordered pairs of different rows, (terms,); NaN for fewer than 2 rows."""
    n = len(x)
    if n < 2:
        return np.full(kernel.terms, np.nan)
    left = _left(x, x.mean(axis=0))
    x, right = left[:, :-2], _right(left)
    parts = []
    for i in _blocks(0, n, TILE):
        squares = _squares(x[i], x[i], left[i], right[:, i], same=True)
        parts.append(kernel.sums(squares) - len(squares) * kernel.diagonal)
        for j in _blocks(i.stop, n, BLOCK):
            parts.append(2 * kernel.sums(_squares(x[i], x[j], left[i], right[:, j])))
    return _add(parts) / (n * (n - 1))


_REMEMBERED: dict[tuple, np.ndarray] = {}  # a few numbers each; the oldest go first
REMEMBER = 20_000


def remembered(make: Callable[[], T], *key: object) -> T:
    """What depends on observed cells only, computed once a process and shared by all models scored in it.

    Arrays in ``key`` count by their content.
    """
    key = tuple(_digest(part) if isinstance(part, np.ndarray) else part for part in key)
    if key not in _REMEMBERED:
        while len(_REMEMBERED) >= REMEMBER:
            _REMEMBERED.pop(next(iter(_REMEMBERED)), None)
        _REMEMBERED[key] = make()
    return _REMEMBERED[key]


def _digest(x: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(x), digest_size=16).digest() + str(x.shape).encode()


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

    Cells stay as they are, sparse for one, but for one prediction and a few observations at a time.
    """
    kernel = Euclidean()
    sizes, counts = (np.array([X.shape[0] for X in side]) for side in (observed, predicted))
    b, c = np.empty(len(observed)), np.empty(len(predicted))
    for k, X in enumerate(observed):
        cells = space(X)
        known = remembered(lambda cells=cells: within(cells, kernel)[0], "within", kernel, cells)
        b[k] = _single(known, len(cells), estimator)
    for k, X in enumerate(predicted):
        c[k] = _single(within(space(X), kernel)[0], counts[k], estimator)
    centre = sum(np.asarray(X.mean(axis=0)).ravel() for X in observed) / len(observed)
    rare = _rare([*observed, *predicted]) if space is dense else np.zeros(len(centre), dtype=bool)
    centre = np.where(rare, 0.0, centre) if space is dense else space(centre[None])[0]
    cross = np.empty((len(predicted), len(observed)))
    most = max(TILE, min(2 * BLOCK, RUN_VALUES // max(1, len(centre))))
    for first, last in _runs(sizes, most):
        y = _Cloud.of(observed[first:last], space, centre, rare)
        right, other = y.right()
        for one, end in _runs(counts, most):
            x = _Cloud.of(predicted[one:end], space, centre, rare)
            sums = np.empty((len(x.left), last - first))
            for i in _blocks(0, len(x.left), TILE):
                squares = x.left[i] @ right
                if other is not None:
                    squares += (x.rare[i] @ other).toarray()
                _repair(squares, x.left[i, -2], y.left[:, -2], lambda rows, i=i, x=x: x.cells(rows + i.start), y.cells)
                sums[i] = np.add.reduceat(np.sqrt(squares, out=squares), _starts(sizes[first:last]), axis=1)
            cross[one:end, first:last] = np.add.reduceat(sums, _starts(counts[one:end]), axis=0)
    value = 2 * cross / (counts[:, None] * sizes) - b[None] - c[:, None]
    return value / 2 if scale == "half" else value


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


def _rare(parts: Sequence[Matrix]) -> np.ndarray:
    """Genes that few cells express, whose part of a distance a sparse product gives in less time, (genes,) bool."""
    if not all(sparse.issparse(X) for X in parts):
        return np.zeros(parts[0].shape[1], dtype=bool)
    expressing = sum(np.bincount(X.indices, minlength=X.shape[1]) for X in parts)
    return expressing < RARE * sum(X.shape[0] for X in parts)


@dataclass(frozen=True)
class _Cloud:
    """Cells ready for squared distances, as ``_factors``, but with rare genes apart and sparse."""

    left: np.ndarray  # (cells, d + 2): coordinates or frequent genes, norms of all, ones
    rare: Any  # CSR (cells, rare genes), or None

    @classmethod
    def of(cls, parts: Sequence[Matrix], space: Callable[[Matrix], np.ndarray], centre, rare: np.ndarray) -> "_Cloud":
        stack = sparse.vstack(parts, format="csr") if sparse.issparse(parts[0]) else np.concatenate(parts)
        apart = stack[:, np.flatnonzero(rare)].astype(np.float64) if rare.any() else None
        if apart is not None:
            stack, centre = stack[:, np.flatnonzero(~rare)], centre[~rare]
        cells = dense(stack) if apart is not None else space(stack)
        left = _left(cells, centre)
        if apart is not None:
            left[:, -2] += np.asarray(apart.multiply(apart).sum(axis=1)).ravel()
        return cls(left, apart)

    def right(self) -> tuple[np.ndarray, Any]:
        """What ``left`` and ``rare`` of other cells are multiplied with."""
        return _right(self.left), None if self.rare is None else (-2 * self.rare).T.tocsr()

    def cells(self, rows: np.ndarray) -> np.ndarray:
        parts = [self.left[rows, :-2]]
        return np.concatenate([*parts, self.rare[rows].toarray()] if self.rare is not None else parts, axis=1)


def _repair(squares: np.ndarray, own: np.ndarray, other: np.ndarray, x: Callable, y: Callable) -> None:
    """Squared distances so small that the product cancelled, computed directly in place."""
    if squares.size and squares.min() < CLOSE * (own.max() + other.max()):
        near = np.nonzero(squares < CLOSE * (own[:, None] + other))
        for start in range(0, len(near[0]), 1024):
            i, j = near[0][start : start + 1024], near[1][start : start + 1024]
            difference = x(i) - y(j)
            squares[i, j] = np.einsum("ij,ij->i", difference, difference)


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
