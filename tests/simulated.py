"""Screens drawn from a model that is known, with the true mean of every condition: what properties of models are held to.

Each returns a ``Drawn``; all draws come from the seed. ``screens.noise_free`` and ``perturbray.synthetic`` are the others:
effects by context without noise, and counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import screens
from scipy import sparse

from perturbray.data.batches import Cells
from perturbray.data.dataset import Conditions
from perturbray.data.splits import TEST, TRAIN, VAL, Split


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A screen in memory, and what is true of it."""

    lab: screens.Lab
    means: np.ndarray  # (conditions, genes)
    factors: np.ndarray | None = None  # (cells, factors), a cell's own state
    masks: np.ndarray | None = None  # (perturbations, latent dimensions) bool, in the order of the vocabulary
    offsets: np.ndarray | None = None  # (perturbations, latent dimensions), zero where the mask is
    decoder: tuple[np.ndarray, ...] | None = None  # max(z A + b, 0) C as A, b, C; or z A as A


def design(contexts: int, labels: Sequence[str], *, cells: int, controls: int) -> list[screens.Cell]:
    """Cells of every label and control cells in every context."""
    found: list[screens.Cell] = []
    for c in range(contexts):
        context = (f"line_{chr(ord('a') + c)}",)
        found += [(context, "control")] * controls
        found += [(context, label) for label in labels for _ in range(cells)]
    return found


def lab(conditions: Conditions, expression: np.ndarray, split: Split, *, seed: int = 0) -> screens.Lab:
    conditions = replace(conditions, genes=tuple(f"gene_{i}" for i in range(expression.shape[1])))
    rows = sparse.csr_matrix(expression.astype(np.float32))
    return screens.Lab(conditions=conditions, cells=Cells([rows]), split=split, seed=seed)


def by_cell(conditions: Conditions, rng: np.random.Generator, *, shares=(0.6, 0.1, 0.3)) -> Split:
    """Every condition in training, and some of its cells kept for validation and for test."""
    cell = rng.choice(np.array([TRAIN, VAL, TEST], dtype=np.int8), len(conditions.cell_condition), p=shares)
    condition = np.full(len(conditions), TRAIN, dtype=np.int8)
    return Split(condition=condition, cell=cell, stratum=np.full(len(conditions), "common"))


def by_condition(conditions: Conditions, held: np.ndarray, rng: np.random.Generator) -> Split:
    """Conditions in ``held`` (bool) in test; validation sees a part of the other cells, controls are cut in three."""
    condition = np.where(held, TEST, TRAIN).astype(np.int8)
    cell = condition[conditions.cell_condition]
    controls = conditions.is_control[conditions.cell_condition]
    free = rng.choice(np.array([TRAIN, VAL, TEST], dtype=np.int8), len(cell), p=(0.8, 0.1, 0.1))
    cell = np.where(controls | ((cell == TRAIN) & (free == VAL)), free, cell).astype(np.int8)
    return Split(condition=condition, cell=cell, stratum=np.full(len(conditions), "common"))


def additive(
    *,
    singles: int = 12,
    pairs: int = 12,
    held: int = 6,
    genes: int = 60,
    cells: int = 30,
    controls: int = 120,
    affected: float = 0.2,
    size: float = 0.5,
    noise: float = 0.3,
    epistasis: float = 0.0,
    seed: int = 0,
) -> Drawn:
    """m[a+b] = m_control + d_a + d_b + g_ab, g_ab of size ``epistasis``; ``held`` of the pairs in test."""
    rng = np.random.default_rng(seed)
    names = [f"drug_{i:03d}" for i in range(singles)]
    first, second = np.triu_indices(singles, k=1)
    chosen = np.sort(rng.choice(len(first), pairs, replace=False))
    doubles = [f"{names[first[i]]}+{names[second[i]]}" for i in chosen]
    conditions = screens.conditions_of(design(1, [*names, *doubles], cells=cells, controls=controls))

    def sparse_effects(rows: int, scale: float) -> np.ndarray:
        return rng.normal(0, scale, (rows, genes)) * (rng.random((rows, genes)) < affected)

    effect = dict(zip(names, sparse_effects(singles, size), strict=True))
    beyond = dict(zip(doubles, sparse_effects(pairs, epistasis), strict=True))
    control = rng.uniform(1.5, 3, genes)  # far enough from 0 that nothing needs to be clipped
    means = np.stack([control + sum(effect[s] for s in singles_) for singles_ in conditions.singles])
    means += np.stack([beyond.get(label, np.zeros(genes)) for label in conditions.perturbation])
    pairs_ = np.flatnonzero([len(singles_) == 2 for singles_ in conditions.singles])
    test = np.zeros(len(conditions), dtype=bool)
    test[rng.choice(pairs_, held, replace=False)] = True
    expression = means[conditions.cell_condition]
    expression = expression + noise * rng.standard_normal(expression.shape)
    return Drawn(lab=lab(conditions, expression, by_condition(conditions, test, rng), seed=seed), means=means)


def latent_factors(
    *,
    contexts: int = 1,
    perturbations: int = 5,
    cells: int = 1250,
    genes: int = 50,
    factors: int = 8,
    noise: float = 0.3,
    shift: float = 0.0,
    seed: int = 0,
) -> Drawn:
    """x = shift_context + F W + effect_p + noise, with N(0, 1) factors, loadings and effects: a cell's own state, which a
    model should keep apart from its perturbation. Cells of all conditions in all subsets."""
    rng = np.random.default_rng(seed)
    labels = [f"drug_{i:03d}" for i in range(perturbations)]
    conditions = screens.conditions_of(design(contexts, labels, cells=cells, controls=cells))
    number = np.unique(conditions.perturbation, return_inverse=True)[1]
    effect = rng.standard_normal((number.max() + 1, genes))[number] * ~conditions.is_control[:, None]
    means = effect + shift * rng.standard_normal((contexts, genes))[conditions.context]
    own = rng.standard_normal((len(conditions.cell_condition), factors))
    expression = means[conditions.cell_condition] + own @ rng.standard_normal((factors, genes))
    expression = expression + noise * rng.standard_normal(expression.shape)
    split = by_cell(conditions, rng)
    return Drawn(lab=lab(conditions, expression, split, seed=seed), means=means, factors=own)


def sparse_offsets(
    *,
    perturbations: int = 60,
    latent: int = 10,
    active: int = 3,
    genes: int = 100,
    cells: int = 30,
    controls: int = 300,
    width: int = 64,
    gain: float = 1.0,
    size: float = 3.0,
    noise: float = 0.7,
    seed: int = 0,
) -> Drawn:
    """The generative model of SAMS-VAE: x = Dec(z + m_t e_t) + noise, Dec a fixed random network with one hidden layer,
    or with ``width`` 0 a matrix, z ~ N(0, 1), masks with ``active`` dimensions a perturbation, offsets of either sign and
    about the same size. ``gain`` is the size of what a decoder makes of z. The means are those of many draws of z."""
    rng = np.random.default_rng(seed)
    labels = [f"drug_{i:03d}" for i in range(perturbations)]
    conditions = screens.conditions_of(design(1, labels, cells=cells, controls=controls))
    decoder: tuple[np.ndarray, ...]
    if width:
        first, bias = rng.standard_normal((latent, width)) / np.sqrt(latent), rng.standard_normal(width)
        decoder = first, bias, gain * rng.standard_normal((width, genes)) / np.sqrt(width)
    else:
        decoder = (gain * rng.standard_normal((latent, genes)) / np.sqrt(latent),)

    def decode(z: np.ndarray) -> np.ndarray:
        first, *rest = decoder
        return np.maximum(z @ first + rest[0], 0) @ rest[1] if rest else z @ first

    masks = rng.permuted(np.arange(latent) < np.full((perturbations, 1), active), axis=1)
    sizes = size * rng.uniform(0.67, 1.33, masks.shape) * rng.choice([-1.0, 1.0], masks.shape)
    offsets = masks * sizes
    number = np.unique(conditions.perturbation, return_inverse=True)[1]  # 0: control, the first by name
    shift = np.concatenate([np.zeros((1, latent)), offsets])
    own = rng.standard_normal((len(conditions.cell_condition), latent))
    expression = decode(own + shift[number][conditions.cell_condition])
    expression = expression + noise * rng.standard_normal(expression.shape)
    draws = rng.standard_normal((2000, latent))
    means = np.stack([decode(draws + row).mean(axis=0) for row in shift])[number]
    split = by_cell(conditions, rng, shares=(0.8, 0.1, 0.1))
    return Drawn(
        lab=lab(conditions, expression, split, seed=seed),
        means=means,
        factors=own,
        masks=masks,
        offsets=offsets,
        decoder=decoder,
    )
