"""A synthetic screen with known effects: what tests and the embedded default run on.

`Screen` says what is drawn, `write` puts it into an h5ad file as raw counts, and `Truth.read` returns what no real
screen has: the true mean and variance of log1p-normalised expression in every condition. `expected_mean_shift_error`
turns them into the error that the mean shift must have, noise of the means included.

The model of a cell of context s under perturbation p, for gene g::

    counts[g]  ~ negative binomial, mean  library * fraction[s, p, g], variance  mean + dispersion[g] * mean ** 2
    library    ~ log-normal with median `depth`
    fraction   = exp(baseline[s, g] + effect[s, p, g]), scaled to a sum of 1 over genes

Effects of single perturbations are sparse sums of a part common to all perturbations (a stress response), a part of the
perturbation in every context and a part specific to the context; those of combinations are sums of their singles', but
for what `epistasis` adds at random and what `buffering` takes from those of one pathway. (A sum of log effects is no sum
in log1p of counts: `non_additivity` says by how much, for every combination.) To add a kind of effect, add a field to
`Screen` and a term to `_log_effects`.
"""

import json
import math
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Self

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import gammaln, ndtr
from scipy.stats import nbinom

from perturbray.errors import InputError, nearest

CONTROL = "control"
PERTURBATION_KEY = "condition"  # column of obs
COVARIATE_KEY = "cell_type"  # column of obs
DELIMITER = "+"  # joins the singles of a combination

Condition = tuple[str, str]  # context, perturbation


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What is drawn. The default has the structure of sci-Plex 3, 3 contexts x 188 perturbations, in 12,000 cells."""

    contexts: int = 3
    perturbations: int = 188  # labels a context beside the control, combinations among them
    combinations: int = 6  # how many of these labels join two of the others
    genes: int = 300
    cells: int = 20  # mean number a condition
    cells_spread: float = 0.35  # standard deviation of its logarithm
    cells_minimum: int = 8
    controls: int = 250  # cells a context
    depth: float = 100.0  # median molecules a cell
    depth_spread: float = 0.4  # standard deviation of its logarithm
    expression_spread: float = 1.8  # standard deviation of a gene's log mean fraction
    context_spread: float = 0.4  # standard deviation of a gene's log ratio between a context and the baseline
    dispersion: float = 0.5  # median over genes
    dispersion_spread: float = 0.5  # standard deviation of its logarithm
    affected: float = 0.1  # share of genes that a perturbation affects
    scale: float = 1.3  # standard deviation of the log effect on these genes
    strength_spread: float = 0.3  # standard deviation of the log strength of a perturbation
    common: float = 0.1  # share of effect variance that all perturbations have in common
    specific: float = 0.15  # share of effect variance that is specific to a context
    epistasis: float = 0.0  # standard deviation of what a combination adds to the log effects of its singles
    pathways: int = 0  # that single perturbations fall into, as many in each; 0: no pathways
    buffering: float = 0.0  # share of the sum of its log effects that a combination within a pathway lacks
    seed: int = 0
    replicate: int = 0  # draws other counts with the same effects, in the same numbers of cells

    def __post_init__(self) -> None:
        singles = self.perturbations - self.combinations
        problem = None
        if min(self.contexts, singles, self.genes, self.cells_minimum, self.controls) < 1 or self.combinations < 0:
            problem = "contexts, single perturbations, genes, cells and controls must be 1 or more"
        elif self.combinations > math.comb(singles, 2):
            problem = f"{singles} single perturbations make {math.comb(singles, 2)} pairs, fewer than combinations"
        elif min(self.common, self.specific) < 0 or self.common + self.specific > 1:
            problem = f"common + specific must be a share of variance, not {self.common} + {self.specific}"
        elif not 0 <= self.affected <= 1:
            problem = f"affected must be a share of genes, not {self.affected}"
        elif not 0 <= self.pathways <= singles:
            problem = f"pathways must be at most the {singles} single perturbations, not {self.pathways}"
        if problem:
            raise InputError(f"synthetic screen: {problem}")

    @classmethod
    def small(cls, **fields: object) -> Self:
        """2,000 cells of 3 contexts x 12 perturbations x 60 genes, for tests."""
        size = {"perturbations": 12, "combinations": 2, "genes": 60, "cells": 40, "controls": 150, "depth": 60.0}
        return cls(**{**size, **fields})

    def context_names(self) -> tuple[str, ...]:
        return _names("line", self.contexts, width=0)

    def gene_names(self) -> tuple[str, ...]:
        return _names("gene", self.genes)

    def perturbation_names(self) -> tuple[str, ...]:
        """Singles, then combinations; the control is not among them."""
        singles = _names("drug", self.perturbations - self.combinations)
        return singles + tuple(singles[a] + DELIMITER + singles[b] for a, b in self._pairs())

    def _pairs(self) -> np.ndarray:
        """Numbers of the two singles of each combination, (combinations, 2), in ascending order and without repeats."""
        first, second = np.triu_indices(self.perturbations - self.combinations, k=1)
        chosen = np.sort(self._rng("pairs").choice(len(first), self.combinations, replace=False))
        return np.stack([first[chosen], second[chosen]], axis=1)

    def within_pathway(self) -> np.ndarray:
        """Whether the singles of each combination are of one pathway, (combinations,) bool."""
        if not self.pathways:
            return np.zeros(self.combinations, dtype=bool)
        singles = self.perturbations - self.combinations
        pathway = self._rng("pathways").permutation(np.arange(singles) % self.pathways)
        first, second = self._pairs().T
        return pathway[first] == pathway[second]

    def _rng(self, subject: str) -> np.random.Generator:
        """One generator a subject, so that a field of one subject does not change the draws of another."""
        return np.random.default_rng([*subject.encode(), self.seed, self.replicate if subject == "counts" else 0])


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is true of a synthetic screen. Expression is log1p(count * target_depth / the cell's total count)."""

    screen: Screen
    contexts: tuple[str, ...]
    perturbations: tuple[str, ...]  # without the control
    genes: tuple[str, ...]
    conditions: tuple[Condition, ...]  # context by context, its control first
    cells: np.ndarray  # (conditions,) int64, cells in the file
    means: np.ndarray  # (conditions, genes) float64, expected expression
    variances: np.ndarray  # (conditions, genes) float64, of one cell's expression
    log_effects: np.ndarray  # (conditions, genes) float64, zero for controls; additive for combinations
    target_depth: float  # median of the cells' total counts in the file

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The truth in a file of `write`. InputError where the file has none."""
        with h5py.File(path, "r") as file:
            if "uns/truth" not in file:
                raise InputError(f"{path}: no ground truth in uns['truth']; only files of perturbray.synthetic have it")
            table = ad.io.read_elem(file["uns/truth"])
            arrays = {
                name: np.ascontiguousarray(file["varm"][name][()].T) for name in ("mean", "variance", "log_effect")
            }
            genes = ad.io.read_elem(file["var"]).index
        screen = Screen(**json.loads(str(table["screen"])))
        return cls(
            screen=screen,
            contexts=screen.context_names(),
            perturbations=screen.perturbation_names(),
            genes=tuple(map(str, genes)),
            conditions=tuple(zip(map(str, table["context"]), map(str, table["perturbation"]), strict=True)),
            cells=np.asarray(table["cells"]),
            means=arrays["mean"],
            variances=arrays["variance"],
            log_effects=arrays["log_effect"],
            target_depth=float(table["target_depth"]),
        )

    def mean(self, condition: Condition) -> np.ndarray:
        """Expected expression, (genes,); the control of a context is the condition (context, "control")."""
        return self.means[self._row(condition)]

    def variance(self, condition: Condition) -> np.ndarray:
        """Variance of the expression of one cell, (genes,)."""
        return self.variances[self._row(condition)]

    def log_effect(self, condition: Condition) -> np.ndarray:
        """Log ratio of a gene's fraction to the control's, before fractions are scaled to a sum of 1, (genes,)."""
        return self.log_effects[self._row(condition)]

    def non_additivity(self, condition: Condition) -> np.ndarray:
        """What a combination's expected expression has beyond the sum of its singles' effects, (genes,)."""
        context, label = condition
        control = self.mean((context, CONTROL))
        effects = [self.mean((context, single)) - control for single in label.split(DELIMITER)]
        return self.mean(condition) - control - np.sum(effects, axis=0)

    def _row(self, condition: Condition) -> int:
        if condition not in self.conditions:
            names = [" / ".join(known) for known in self.conditions]
            raise InputError(f"no condition {condition!r} in the truth: {nearest(' / '.join(condition), names)}")
        return self.conditions.index(condition)


def write(path: str | os.PathLike[str], screen: Screen | None = None) -> Path:
    """Draw a screen and write it as h5ad: complete or not at all, and the same bytes for the same `Screen`."""
    path = Path(path)
    screened = simulate(screen or Screen())
    # Beside the target: a rename is atomic only within a file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    try:
        screened.write_h5ad(name)
        mask = os.umask(0)  # mkstemp makes private files; the screen is to be as readable as any other new file
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def simulate(screen: Screen) -> ad.AnnData:
    """A screen in memory: integer counts as CSR float32 in X, rows in random order, the truth in varm and uns."""
    contexts, perturbations = screen.context_names(), (CONTROL, *screen.perturbation_names())
    conditions = [(context, perturbation) for context in contexts for perturbation in perturbations]
    effects = _log_effects(screen)
    fractions = _fractions(screen, effects)
    dispersion = screen.dispersion * np.exp(
        screen.dispersion_spread * screen._rng("dispersion").standard_normal(screen.genes)
    )
    cells = _cells(screen)
    code = screen._rng("order").permutation(np.repeat(np.arange(len(conditions)), cells))
    counts = _counts(screen, fractions[code], dispersion)
    target = float(np.median(counts.sum(axis=1)))
    mean, variance = _moments(screen, fractions, dispersion, target=target)

    label = {
        PERTURBATION_KEY: ([perturbation for _, perturbation in conditions], sorted(perturbations)),
        COVARIATE_KEY: ([context for context, _ in conditions], sorted(contexts)),
    }
    truth = {
        "screen": json.dumps(asdict(screen)),
        "context": np.array([context for context, _ in conditions], dtype=object),
        "perturbation": np.array([perturbation for _, perturbation in conditions], dtype=object),
        "cells": cells,
        "target_depth": target,
    }
    return ad.AnnData(
        X=sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {key: pd.Categorical(np.array(of, dtype=object)[code], levels) for key, (of, levels) in label.items()},
            index=np.array(_names("cell", len(code)), dtype=object),
        ),
        var=pd.DataFrame(index=np.array(screen.gene_names(), dtype=object)),
        varm={"mean": mean.T, "variance": variance.T, "log_effect": effects.reshape(-1, screen.genes).T},
        uns={"truth": truth},
    )


def expected_mean_shift_error(
    truth: Truth,
    *,
    condition: Condition,
    training_contexts: Collection[str],
    cells: Mapping[tuple[str, str, str], int],
) -> float:
    """Expected RMSE over genes of the mean shift's prediction of a held-out condition's mean expression (rmse/average).

    For condition (s, p) the mean shift predicts the mean of the test controls of s plus the average, over the training
    contexts s' of p, of the mean of the training cells of (s', p) less the mean of the training controls of s'; what is
    below 0 becomes 0. It is held against the mean of the observed test cells. No two of these means share a
    cell, so that the prediction of a gene is normal with the mean that the true means give and the variance

        v[s, control] / n + sum over s' of (v[s', p] / n + v[s', control] / n) / number of s' ^ 2,

    v the true variances and each n the number of cells behind that mean; clipping makes it a rectified normal. (Errors
    of two *conditions* covary, as they share controls; the mean of their errors is not changed by it.) The root of the
    mean squared error exceeds the mean of its root: the second-order term of that is taken off, for independent genes.

    ``cells`` maps (context, perturbation, subset) to numbers of cells: (s, p, "test"), (s, "control", "test") and, for
    each s', (s', p, "train") and (s', "control", "train") are looked up.
    """
    context, perturbation = condition
    mean = truth.mean((context, CONTROL))
    variance = truth.variance((context, CONTROL)) / cells[context, CONTROL, "test"]
    weight = 1 / len(training_contexts)
    for other in training_contexts:
        mean = mean + weight * (truth.mean((other, perturbation)) - truth.mean((other, CONTROL)))
        for label in (perturbation, CONTROL):
            variance = variance + weight**2 * truth.variance((other, label)) / cells[other, label, "train"]
    mean, variance = _rectified(mean, variance)
    bias = mean - truth.mean(condition)
    variance = variance + truth.variance(condition) / cells[context, perturbation, "test"]
    squared = np.mean(bias**2 + variance)
    spread = np.sum(2 * variance**2 + 4 * bias**2 * variance) / len(bias) ** 2  # variance of the mean squared error
    return float(np.sqrt(squared) * (1 - spread / (8 * squared**2)))


def _rectified(mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of max(x, 0) of a normal x."""
    deviation = np.sqrt(np.maximum(variance, np.finfo(float).tiny))
    above, density = ndtr(mean / deviation), np.exp(-((mean / deviation) ** 2) / 2) / math.sqrt(2 * math.pi)
    first = mean * above + deviation * density
    return first, np.maximum((mean**2 + variance) * above + mean * deviation * density - first**2, 0)


def _names(kind: str, number: int, *, width: int = 3) -> tuple[str, ...]:
    """Names whose alphabetical order is their order: line_a, gene_001."""
    if width == 0 and number <= 26:
        return tuple(f"{kind}_{chr(ord('a') + i)}" for i in range(number))
    width = max(width, len(str(number)))
    return tuple(f"{kind}_{i:0{width}d}" for i in range(1, number + 1))


def _log_effects(screen: Screen) -> np.ndarray:
    """(contexts, 1 + perturbations, genes); the control, all zero, comes first."""
    rng = screen._rng("effects")
    singles, genes = screen.perturbations - screen.combinations, screen.genes

    def draw(*shape: int) -> np.ndarray:
        # Of variance 1 and without tails: one gene of an outlying effect would take over the composition of a profile.
        return rng.uniform(-math.sqrt(3), math.sqrt(3), shape)

    def affected(rows: int) -> np.ndarray:
        number = round(screen.affected * genes)
        return rng.permuted(np.arange(genes) < np.full((rows, 1), number), axis=1)

    strength = np.exp(screen.strength_spread * draw(singles, 1))
    shared = math.sqrt(max(0.0, 1 - screen.common - screen.specific))
    effects = math.sqrt(screen.common) * affected(1) * draw(1, genes)
    own = shared * draw(singles, genes) + math.sqrt(screen.specific) * draw(screen.contexts, singles, genes)
    effects = screen.scale * strength * (effects + affected(singles) * own)
    first, second = screen._pairs().T
    beyond = screen.epistasis * affected(len(first)) * draw(len(first), genes)
    kept = 1 - screen.buffering * screen.within_pathway()[:, None]
    control = np.zeros((screen.contexts, 1, genes))
    return np.concatenate([control, effects, kept * (effects[:, first] + effects[:, second]) + beyond], axis=1)


def _fractions(screen: Screen, effects: np.ndarray) -> np.ndarray:
    """A gene's mean share of a cell's counts, (conditions, genes), conditions in the order of `Truth.conditions`."""
    rng = screen._rng("baseline")
    # Without the upper tail: a gene that is half of all counts would drown the others' changes in its own.
    baseline = screen.expression_spread * np.minimum(rng.standard_normal(screen.genes), 1.0)
    baseline = baseline + screen.context_spread * rng.standard_normal((screen.contexts, screen.genes))
    weight = np.exp(baseline[:, None, :] + effects).reshape(-1, screen.genes)
    return weight / weight.sum(axis=1, keepdims=True)


def _cells(screen: Screen) -> np.ndarray:
    """Number of cells a condition, (conditions,): log-normal around the mean, but for controls."""
    normal = screen._rng("cells").standard_normal((screen.contexts, 1 + screen.perturbations))
    number = screen.cells * np.exp(screen.cells_spread * normal - screen.cells_spread**2 / 2)
    cells = np.maximum(screen.cells_minimum, np.rint(number).astype(np.int64))
    cells[:, 0] = screen.controls
    return cells.reshape(-1)


def _counts(screen: Screen, fractions: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Negative-binomial counts, (cells, genes) float32, for each cell's fractions, (cells, genes)."""
    rng = screen._rng("counts")
    library = screen.depth * np.exp(screen.depth_spread * rng.standard_normal((len(fractions), 1)))
    rate = library * fractions * rng.standard_gamma(1 / dispersion, size=fractions.shape) * dispersion
    counts = rng.poisson(rate).astype(np.float32)
    if (counts.sum(axis=1) == 0).any():
        raise InputError(f"synthetic screen: a cell without counts; depth {screen.depth} is too low")
    return counts


def _moments(
    screen: Screen, fractions: np.ndarray, dispersion: np.ndarray, *, target: float, points: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of log1p(count * target / total), (conditions, genes) each.

    Gauss-Hermite quadrature over the library size and over the counts of the other genes (a cell's total contains the
    gene's own count), and the sum over the gene's negative-binomial counts. For each gene, both moments are evaluated
    at ``points`` Chebyshev nodes over the range of its log fractions, and interpolated.
    """
    library_node, library_weight = _hermite(7)
    library = screen.depth * np.exp(screen.depth_spread * library_node)
    rest_node, rest_weight = _hermite(3)
    # Overdispersion of the other genes' total, (conditions, genes). It enters nearly linearly: two ends are enough.
    own = dispersion * fractions**2
    overdispersion = own.sum(axis=1, keepdims=True) - own
    ends = np.stack([overdispersion.min(axis=0), overdispersion.max(axis=0) + 1e-9])

    low, high = np.log(fractions.min(axis=0)), np.log(fractions.max(axis=0))
    centre, half = (low + high) / 2, np.maximum((high - low) / 2, 0.01)
    node = np.polynomial.chebyshev.chebpts1(points)
    most = nbinom.ppf(1 - 1e-7, 1 / dispersion, 1 / (1 + dispersion * library.max() * np.exp(high))).astype(int)

    values = np.zeros((2, 2, points, screen.genes))  # moments, ends, points, genes
    for gene in range(screen.genes):
        fraction = np.exp(centre[gene] + half[gene] * node)[:, None]  # (points, 1)
        mean = library * fraction  # (points, libraries)
        others = library * (1 - fraction)  # mean count of the other genes
        count, shape = np.arange(1.0, most[gene] + 1.0), 1 / dispersion[gene]
        log_odds = np.log(mean / (mean + shape))[..., None]
        log_probability = gammaln(shape + count) - gammaln(shape) - gammaln(count + 1) + count * log_odds
        probability = np.exp(log_probability - shape * np.log1p(mean / shape)[..., None])
        probability *= library_weight[:, None]  # (points, libraries, counts)
        for end, (at, weight) in product(range(2), zip(rest_node, rest_weight, strict=True)):
            spread = np.sqrt(np.log1p(1 / others + ends[end, gene] / (1 - fraction) ** 2))
            rest = others * np.exp(spread * at - spread**2 / 2)
            expression = np.log1p(count * target / (count + rest[..., None]))
            weighted = weight * probability * expression
            values[0, end, :, gene] += weighted.sum(axis=(1, 2))
            values[1, end, :, gene] += np.einsum("plc,plc->p", weighted, expression)

    to_coefficients = np.linalg.inv(np.polynomial.chebyshev.chebvander(node, points - 1))
    position = (np.log(fractions) - centre) / half
    share = (overdispersion - ends[0]) / (ends[1] - ends[0])

    def interpolated(tables: np.ndarray) -> np.ndarray:
        at_ends = [np.polynomial.chebyshev.chebval(position, to_coefficients @ t, tensor=False) for t in tables]
        return at_ends[0] + share * (at_ends[1] - at_ends[0])

    mean = interpolated(values[0])
    return mean, interpolated(values[1]) - mean**2


def _hermite(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the expectation over a standard normal variable."""
    node, weight = np.polynomial.hermite_e.hermegauss(points)
    return node, weight / weight.sum()
