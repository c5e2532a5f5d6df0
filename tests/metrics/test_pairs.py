import hashlib
import math
import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from perturbray.metrics import pairs
from perturbray.metrics.cells import Cells, dense
from perturbray.metrics.distribution import Euclidean, energy_matrix, within
from perturbray.metrics.pairs import Cloud, Target, rare_genes, squared_distances

RNG = np.random.default_rng(11)
SPARSE = np.where(RNG.random((60, 40)) < np.linspace(0.02, 0.9, 40), RNG.gamma(2, 1, (60, 40)), 0).astype(np.float32)
KINDS = {
    "normal": RNG.normal(size=(60, 7)),
    "sparse": SPARSE,
    "duplicated rows": np.repeat(RNG.normal(size=(6, 5)), 10, axis=0),
    "all equal": np.ones((30, 4)),
    "zero vectors": np.concatenate([np.zeros((20, 6)), RNG.normal(size=(15, 6))]),
    "near 1000, 0.01 apart": 1000 + 0.01 * RNG.normal(size=(60, 9)),
    "near 1000 where expressed": np.where(SPARSE > 0, 1000 + 0.01 * SPARSE, 0),
    "1e-9 apart": np.repeat(RNG.normal(size=(10, 8)), 3, axis=0) + 1e-9 * RNG.normal(size=(30, 8)),
}
FORMS = [np.asarray, sparse.csr_matrix]
ENGINES = {"numpy": math.inf, "compiled": 0}


def by_loop(predicted, observed, estimator="U"):
    """Direct differences, one pair of groups after the other."""

    def mean_within(x):
        return cdist(x, x).sum() / (len(x) * (len(x) - 1 if estimator == "U" else len(x)))

    predicted, observed = ([dense(X) for X in side] for side in (predicted, observed))
    return np.array([[2 * cdist(y, x).mean() - mean_within(x) - mean_within(y) for x in observed] for y in predicted])


def groups(cells, form, sizes=(2, 9, 3, 12)):
    """Predicted and observed groups, some of the same cells."""
    starts = np.cumsum([0, *sizes]) % (len(cells) - max(sizes))
    parts = [form(cells[start : start + size]) for start, size in zip(starts, sizes, strict=False)]
    return [*parts[1:], parts[0]], [*parts[:-1], form(cells[-5:])]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["U", "V"])
def test_energies_of_groups_are_those_of_a_loop_of_direct_differences(kind, form, engine, estimator, monkeypatch):
    monkeypatch.setattr(pairs, "COMPILED", ENGINES[engine])
    monkeypatch.setattr("perturbray.metrics.distribution.FEW", 2)
    predicted, observed = groups(KINDS[kind], form)
    got = energy_matrix(predicted, observed, estimator=estimator)
    size = cdist(KINDS[kind], KINDS[kind]).max()
    np.testing.assert_allclose(got, by_loop(predicted, observed, estimator), rtol=1e-9, atol=1e-12 * size)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tile", "block"), [(4, 4), (5, 8), (16, 64)])
def test_the_size_of_tiles_changes_nothing(form, engine, tile, block, monkeypatch):
    monkeypatch.setattr(pairs, "COMPILED", ENGINES[engine])
    monkeypatch.setattr("perturbray.metrics.distribution.FEW", 2)
    predicted, observed = groups(SPARSE, form)
    expected = energy_matrix(predicted, observed)
    monkeypatch.setattr(pairs, "TILE", tile)
    monkeypatch.setattr(pairs, "BLOCK", block)
    monkeypatch.setattr("perturbray.metrics.distribution.STRIP", 4)
    monkeypatch.setattr("perturbray.metrics.distribution.RUN_VALUES", 300)
    monkeypatch.setattr("perturbray.metrics.distribution._REMEMBERED", {})
    np.testing.assert_allclose(energy_matrix(predicted, observed), expected, rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_are_at_distance_exactly_zero(engine, monkeypatch):
    """A matrix product leaves rounding there, whose root is 1e-8."""
    monkeypatch.setattr(pairs, "COMPILED", ENGINES[engine])
    monkeypatch.setattr("perturbray.metrics.distribution.FEW", 2)
    for form, copy in product(FORMS, (SPARSE[:1], np.full((1, 4), 999.99))):
        cells = form(np.repeat(copy, 5, axis=0))
        np.testing.assert_array_equal(energy_matrix([cells, cells], [cells]), 0)


def test_the_pairs_that_were_computed_directly_are_the_close_ones(monkeypatch):
    cells = KINDS["1e-9 apart"]
    expected = cdist(cells, cells, "sqeuclidean")
    np.testing.assert_allclose(squared_distances(cells, cells), expected, rtol=1e-12)
    monkeypatch.setattr(pairs, "CLOSE", 0.0)
    worst = np.abs(squared_distances(cells, cells) - expected)[expected > 0] / expected[expected > 0]
    assert worst.max() > 1e-3  # the law above would otherwise hold without any repair


def test_rare_genes_are_those_that_few_cells_express():
    share = (SPARSE > 0).mean(axis=0)
    rare = rare_genes([sparse.csr_matrix(SPARSE[:20]), sparse.csr_matrix(SPARSE[20:])], 0.4)
    np.testing.assert_array_equal(rare, share < 0.4)
    assert 0 < rare.sum() < len(rare)
    assert rare_genes([sparse.csr_matrix(SPARSE[:20]), SPARSE[20:]], 0.4) is None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.1])
def test_the_part_of_rare_genes_adds_to_that_of_the_others(share, engine):
    X = sparse.csr_matrix(SPARSE)
    rare, compiled = rare_genes([X], share), pairs.compiled(1, 1) if engine == "numpy" else _engine()
    x = Cloud.of(X, np.asarray(X.mean(axis=0), dtype=float).ravel(), rare)
    y = Target(x, compiled)
    got = np.concatenate([y.squares(x, slice(0, 60), j).copy() for j in y.blocks(0, 60)], axis=1)
    np.testing.assert_allclose(got, cdist(dense(X), dense(X), "sqeuclidean"), rtol=1e-12)


def _engine():
    from perturbray.metrics import engine_numba

    return engine_numba


@pytest.mark.parametrize("engine", ENGINES)
def test_close_pairs_in_one_tile_do_not_change_the_others(engine):
    cells = np.concatenate([RNG.normal(size=(300, 3)), np.zeros((1, 3)), np.full((1, 3), 1e-9)])
    x = Cloud.of(cells, np.zeros(3))
    y = Target(x, _engine() if engine == "compiled" else None)
    got = y.root_sums(x, np.array([0, 100, 290, 302]))
    distance = cdist(cells, cells)
    expected = [distance[:, a:b].sum(axis=1) for a, b in ((0, 100), (100, 290), (290, 302))]
    np.testing.assert_allclose(got, np.stack(expected, axis=1), rtol=1e-13)


def test_small_work_does_not_load_a_compiler():
    code = (
        "import sys, numpy as np; from perturbray.metrics.distribution import energy_matrix; x = np.eye(50);"
        "energy_matrix([x, x + 1], [x]); print('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_threads_change_no_bit():
    """Large enough for compiled loops and for BLAS to take several threads if it is let; sparse cells and normal ones."""
    code = (
        "import hashlib, numpy as np; from scipy import sparse; from perturbray.metrics import distribution, pairs\n"
        "pairs.COMPILED = 0; rng = np.random.default_rng(0); normal = rng.normal(size=(900, 70)).astype(np.float32)\n"
        "for X in (sparse.csr_matrix(np.maximum(normal - 1 + np.arange(70) / 35, 0)), normal):\n"
        "    found = distribution.energy_matrix([X[:300], X[300:450], X[450:]], [X[100:700], X[:50]])\n"
        "    print(hashlib.sha256(found.tobytes()).hexdigest())"
    )
    processes = []
    for threads in ("1", "2", "3"):
        variables = {f"{library}_NUM_THREADS": threads for library in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
        run = [sys.executable, "-c", code]
        processes.append(subprocess.Popen(run, env=os.environ | variables, stdout=subprocess.PIPE, text=True))
    found = {process.communicate()[0] for process in processes}
    assert not any(process.returncode for process in processes)
    assert len(found) == 1
    sparse_one, normal_one = found.pop().split()
    assert sparse_one != normal_one
    assert len(sparse_one) == len(normal_one) == len(hashlib.sha256().hexdigest())


def test_parts_are_cut_out_when_asked_for_and_as_often():
    cells = Cells(X=sparse.csr_matrix(SPARSE), group=np.arange(60) % 4, groups=4)
    parts = cells.parts([2, 0, 3])
    assert len(parts) == 3
    np.testing.assert_array_equal(parts[1].toarray(), SPARSE[::4])
    assert [part.shape[0] for part in parts[1:]] == [15, 15]
    np.testing.assert_array_equal(
        energy_matrix(parts, parts[:1]), energy_matrix([X.copy() for X in parts], [parts[0].copy()])
    )


@pytest.mark.parametrize("form", FORMS)
def test_one_cell_has_no_distance_within(form):
    assert np.isnan(within(form(SPARSE[:1]), Euclidean())).all()
    assert within(form(SPARSE[:2]), Euclidean())[0] == pytest.approx(cdist(SPARSE[:1], SPARSE[1:2])[0, 0])
