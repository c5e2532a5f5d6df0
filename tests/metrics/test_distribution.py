import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from perturbray.metrics.distribution import (
    BANDWIDTHS,
    Euclidean,
    Gaussian,
    between,
    copied_cells,
    correlation_structure,
    energy,
    energy_matrix,
    energy_sq,
    fit_pca,
    halvings,
    median_distance,
    mmd,
    remembered,
    skill,
    variance_ratio,
    within,
)
from perturbray.metrics.pairs import squared_distances

ORACLE = ("int3", "rand", "identical", "constant_pred", "dupes", "block", "large_offset")


@pytest.fixture(scope="module")
def oracle(golden_cases):
    values = pd.read_csv(golden_cases / "dist_oracle.csv", keep_default_na=False)
    inputs = pd.read_csv(golden_cases / "dist_oracle_inputs.csv")

    def side(case: str, name: str) -> np.ndarray:
        rows = inputs[(inputs["case"] == case) & (inputs["side"] == name)].sort_values("row")
        return rows.filter(like="v").dropna(axis=1, how="all").to_numpy()

    return values, side


@pytest.mark.parametrize("case", ORACLE)
def test_energy_and_mmd_agree_with_float64_loops(oracle, case):
    values, side = oracle
    x, y = side(case, "x"), side(case, "y")
    tolerance = 1e-9 if case == "large_offset" else 1e-12
    median = median_distance(x)
    checked = 0
    for row in values[values["case"] == case].itertuples():
        if row.metric == "energy":
            got = energy(x, y, estimator=row.estimator, scale=row.scale)
        elif row.metric == "energy_cross_mean":
            got = between(x, y, Euclidean())[0]
        elif row.metric == "energy_sq":
            got = energy_sq(x, y)
        elif row.metric == "median_distance_x":
            got = median
        elif row.metric == "mmd2_rbf":
            sigma = row.params.split("=")[1]
            got = mmd(x, y, [median if sigma == "median" else float(sigma)], estimator=row.estimator)[0]
        elif row.metric == "mmd2_rbf_multi":
            got = mmd(x, y, [median * factor for factor in BANDWIDTHS], estimator=row.estimator).mean()
        assert got == pytest.approx(float(row.value), rel=tolerance, abs=tolerance), (row.metric, row.estimator)
        checked += 1
    assert checked == 17


@pytest.mark.slow
def test_distances_of_real_cells_agree_with_dcor_and_direct_differences(case):
    expected = case.expected("expected_distances_float64.csv")
    keys = case.covariates
    for row in expected.iloc[:: 1 if case.exact else 6].to_dict("records"):
        sides = {}
        for name, cells, label in (
            ("observed", case.observed, row["condition"]),
            ("pred", case.predicted, row["condition"]),
            ("control", case.observed, "control"),
        ):
            chosen = np.asarray(cells.obs["condition"] == label)
            for key in keys:
                chosen &= np.asarray(cells.obs[key].astype(str) == str(row[key]))
            X = cells.X[chosen]
            sides[name] = np.asarray(X.toarray() if sparse.issparse(X) else X, dtype=float)
        for other in ("pred", "control"):
            pair = sides["observed"], sides[other]
            assert energy(*pair) == pytest.approx(row[f"energy_U_full_{other}"], rel=1e-10, abs=1e-12)
            assert energy(*pair, estimator="V") == pytest.approx(row[f"energy_V_full_{other}"], rel=1e-10, abs=1e-12)
            assert mmd(*pair, [3.0])[0] == pytest.approx(row[f"mmd2_U_sigma3_{other}"], rel=1e-10, abs=1e-13)


RNG = np.random.default_rng(2)
X, Y = RNG.normal(0, 1, (130, 7)), RNG.normal(0.4, 1.2, (90, 7))


def test_blocks_change_nothing(monkeypatch):
    expected = energy(X, Y), mmd(X, Y, [1.0, 2.0])
    monkeypatch.setattr("perturbray.metrics.distribution.STRIP", 8)
    monkeypatch.setattr("perturbray.metrics.pairs.BLOCK", 32)
    monkeypatch.setattr("perturbray.metrics.pairs.TILE", 24)
    assert energy(X, Y) == pytest.approx(expected[0], rel=1e-13)
    np.testing.assert_allclose(mmd(X, Y, [1.0, 2.0]), expected[1], rtol=1e-12)


def test_the_two_estimators_differ_by_the_mean_distances_within():
    b, c = within(X, Euclidean())[0], within(Y, Euclidean())[0]
    assert energy(X, Y, estimator="V") == pytest.approx(energy(X, Y) + b / len(X) + c / len(Y), rel=1e-12)
    assert energy(X, Y, scale="half") == pytest.approx(energy(X, Y) / 2)


def test_energy_is_that_of_rotated_and_shifted_cells_and_linear_in_scale():
    turn = np.linalg.qr(RNG.normal(size=(7, 7)))[0]
    assert energy(X @ turn + 5, Y @ turn + 5) == pytest.approx(energy(X, Y), rel=1e-10)
    assert energy(3 * X, 3 * Y) == pytest.approx(3 * energy(X, Y), rel=1e-12)
    order = RNG.permutation(len(X))
    assert energy(X[order], Y) == pytest.approx(energy(X, Y), rel=1e-13)


def test_copies_of_the_observed_cells_are_found_out():
    b = within(X, Euclidean())[0]
    assert energy(X, X, estimator="V") == pytest.approx(0, abs=1e-14)
    assert energy(X, X) == pytest.approx(-2 * b / len(X), rel=1e-12)
    assert copied_cells(energy(X, X), b, len(X))
    assert not copied_cells(energy(X, RNG.normal(0, 1, (130, 7))), b, len(X))


def test_squared_distances_keep_their_digits_far_from_the_origin_and_for_near_pairs():
    near = np.concatenate([X, X + 1e-9 * RNG.normal(size=X.shape)])
    np.testing.assert_allclose(squared_distances(near, near), cdist(near, near, "sqeuclidean"), rtol=1e-9, atol=0)
    far = near + 1e4
    np.testing.assert_allclose(squared_distances(far, far), cdist(far, far, "sqeuclidean"), rtol=1e-5, atol=1e-30)


def test_kernels_of_doubling_width_share_one_exponential():
    sigmas = (0.5, 1.0, 2.0, 4.0, 8.0)
    squares = cdist(X, Y, "sqeuclidean")
    expected = [np.exp(-squares / (2 * sigma**2)).sum() for sigma in sigmas]
    np.testing.assert_allclose(Gaussian(sigmas).sums(squares.copy()), expected, rtol=1e-12)
    uneven = (0.5, 0.7, 3.0)
    expected = [np.exp(-squares / (2 * sigma**2)).sum() for sigma in uneven]
    np.testing.assert_allclose(Gaussian(uneven).sums(squares.copy()), expected, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["U", "V"])
def test_a_matrix_of_energies_holds_those_of_its_pairs(estimator, monkeypatch):
    monkeypatch.setattr("perturbray.metrics.pairs.BLOCK", 8)
    predicted = [RNG.normal(i, 1, (5 + 3 * i, 4)) for i in range(5)]
    observed = [RNG.normal(i, 1, (9 + 20 * i, 4)) for i in range(4)]
    matrix = energy_matrix(predicted, observed, estimator=estimator, scale="half")
    for i, y in enumerate(predicted):
        for j, x in enumerate(observed):
            assert matrix[i, j] == pytest.approx(energy(x, y, estimator=estimator, scale="half"), rel=1e-11)


def test_principal_components_are_those_of_a_full_decomposition_dense_or_sparse():
    cells = np.maximum(RNG.normal(0, 1, (80, 30)) @ np.diag(np.linspace(0.2, 3, 30)), 0)
    values = np.linalg.svd(cells - cells.mean(axis=0), full_matrices=False)
    space = fit_pca(cells, 6)
    np.testing.assert_allclose(np.abs(space(cells)), np.abs(values[0] * values[1])[:, :6], atol=1e-9)
    assert (space.loadings[np.abs(space.loadings).argmax(axis=0), np.arange(6)] > 0).all()
    np.testing.assert_allclose(fit_pca(sparse.csr_matrix(cells), 6)(sparse.csr_matrix(cells)), space(cells), atol=1e-10)


def test_many_genes_take_an_iterative_solver_with_the_same_answer():
    cells = sparse.random(60, 2100, density=0.05, random_state=np.random.default_rng(0), format="csr")
    full = np.linalg.svd(cells.toarray() - cells.toarray().mean(axis=0), full_matrices=False)
    space = fit_pca(cells, 5)
    np.testing.assert_allclose(np.abs(space(cells)), np.abs(full[0] * full[1])[:, :5], atol=1e-7)
    np.testing.assert_array_equal(space.loadings, fit_pca(cells, 5).loadings)


def test_components_are_never_more_than_the_data_have():
    assert fit_pca(RNG.normal(size=(5, 30)), 50).loadings.shape == (30, 4)
    assert fit_pca(RNG.normal(size=(50, 3)), 50).loadings.shape == (3, 3)


def test_halves_are_disjoint():
    for a, b in halvings(np.arange(31, dtype=np.uint64), "test"):
        assert len(a) == len(b) == 15
        assert not set(a) & set(b)


def test_skill_is_one_for_a_replicate_and_zero_for_control_cells():
    floor = [0.01, 0.02, 0.0, -0.01, 0.0]
    assert skill(np.mean(floor), floor, 0.5) == pytest.approx(1)
    assert skill(0.5, floor, 0.5) == 0
    assert skill(1.0, floor, 0.5) < 0
    assert np.isnan(skill(0.0, floor, 0.01))


def test_genes_that_no_longer_vary_together_are_seen_beside_the_energy():
    base = RNG.normal(size=(300, 1))
    together = base + 0.3 * RNG.normal(size=(300, 8))
    apart = np.stack([RNG.permutation(column) for column in together.T], axis=1)
    again = base[::-1] + 0.3 * RNG.normal(size=(300, 8))
    assert correlation_structure(together, together) == 0
    assert correlation_structure(apart, together) > 10 * correlation_structure(again, together)


def test_what_depends_on_observed_cells_only_is_computed_once():
    calls = []
    for x in (X, X.copy(), X + 1):
        value = remembered(lambda x=x: calls.append(1) or x.sum(), "test", x)
        assert value == x.sum()
    assert len(calls) == 2


def test_a_prediction_without_variance_is_seen():
    assert variance_ratio(np.ones((20, 7)), X) == 0
    assert variance_ratio(X, X) == 1
