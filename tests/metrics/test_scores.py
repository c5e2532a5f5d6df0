import numpy as np
import pytest
from scipy import stats

from perturbray.errors import InputError
from perturbray.metrics import SCORES, score

RNG = np.random.default_rng(3)
PREDICTED, OBSERVED, WEIGHTS = RNG.normal(0, 1, (7, 40)), RNG.normal(0, 1, (7, 40)), RNG.random((7, 40))
everything = pytest.mark.parametrize("name", list(SCORES))
unweighted = pytest.mark.parametrize("name", [name for name, thing in SCORES.items() if not thing.weighted])


def test_scores_agree_with_scipy():
    a, b = PREDICTED[0], OBSERVED[0]
    assert SCORES["pearson"](a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-14)
    assert SCORES["spearman"](a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-14)
    assert SCORES["cosine"](a, b) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-14)
    assert SCORES["mse"](a, b) == pytest.approx(np.mean((a - b) ** 2), rel=1e-14)
    assert SCORES["rmse"](a, b) == pytest.approx(np.sqrt(np.mean((a - b) ** 2)), rel=1e-14)
    assert SCORES["l1"](a, b) == pytest.approx(40 * SCORES["mae"](a, b), rel=1e-14)
    assert SCORES["l2"](a, b) == pytest.approx(np.linalg.norm(a - b), rel=1e-14)


def test_weighted_scores_agree_with_their_formulas():
    a, b, w = PREDICTED[0], OBSERVED[0], WEIGHTS[0]
    mean = (w * b).sum() / w.sum()
    assert SCORES["wmse"](a, b, w) == pytest.approx((w * (a - b) ** 2).sum() / w.sum(), rel=1e-13)
    total = (w * (b - mean) ** 2).sum()
    assert SCORES["r2_w"](a, b, w) == pytest.approx(1 - (w * (a - b) ** 2).sum() / total, rel=1e-13)
    cov = np.cov(a, b, aweights=w, ddof=0)
    assert SCORES["pearson_w"](a, b, w) == pytest.approx(cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1]), abs=1e-13)


@pytest.mark.parametrize(("weighted", "plain"), [("wmse", "mse"), ("r2_w", "r2"), ("pearson_w", "pearson")])
def test_equal_weights_change_nothing(weighted, plain):
    weights = np.full_like(OBSERVED, 0.3)
    np.testing.assert_allclose(
        SCORES[weighted](PREDICTED, OBSERVED, weights), SCORES[plain](PREDICTED, OBSERVED), rtol=1e-12
    )


@everything
def test_a_perfect_prediction_gets_the_best_value_exactly(name):
    assert (SCORES[name](OBSERVED, OBSERVED, WEIGHTS) == SCORES[name].best).all()


@unweighted
def test_one_definition_serves_a_pair_a_row_against_all_and_all_pairs(name):
    thing = SCORES[name]
    pairs = thing(PREDICTED[:, None], OBSERVED[None])
    assert pairs.shape == (7, 7)
    np.testing.assert_allclose(np.diag(pairs), thing(PREDICTED, OBSERVED), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(pairs[2], thing(PREDICTED[2], OBSERVED), rtol=1e-13, atol=1e-14)
    assert pairs[1, 4] == pytest.approx(thing(PREDICTED[1], OBSERVED[4]), rel=1e-13, abs=1e-14)


@unweighted
@pytest.mark.parametrize("genes", [1, 2, 3, 7, 8, 33, 40])
def test_equal_predictions_have_bitwise_equal_scores_against_every_observation(name, genes):
    same = np.repeat(PREDICTED[:1, :genes], 7, axis=0)
    pairs = SCORES[name](same[:, None], OBSERVED[None, :, :genes])
    assert all(np.array_equal(row, pairs[0], equal_nan=True) for row in pairs)


@pytest.mark.parametrize("case", ["noise", "some equal", "all equal", "near", "far"])
@pytest.mark.parametrize("name", ["rmse", "cosine", "pearson", "r2"])
def test_a_matrix_product_changes_no_comparison(name, case, monkeypatch):
    """Ranks and exact ties are those of direct differences."""
    rng = np.random.default_rng(0)
    observed = rng.normal(0, 1, (60, 300))
    predicted = 0.2 * observed + rng.normal(0, 1, (60, 300))
    if case == "some equal":
        predicted[10:20] = predicted[3]
        observed[30:34] = observed[31]
    elif case == "all equal":
        predicted[:] = predicted[0]
    elif case == "near":
        predicted = observed + 1e-9 * rng.normal(size=observed.shape)
    elif case == "far":
        predicted, observed = predicted + 1e5, observed + 1e5
    fast = SCORES[name].distance(predicted[:, None], observed[None])
    monkeypatch.setattr("perturbray.metrics.scores.SMALL", np.inf)
    slow = SCORES[name].distance(predicted[:, None], observed[None])
    np.testing.assert_allclose(fast, slow, rtol=1e-9, atol=1e-9)
    for axis in (0, 1):
        own = [np.expand_dims(np.diag(distance), axis) for distance in (fast, slow)]
        if name == "r2" and axis == 1:
            continue  # each observation has its own scale, so rounding differs
        np.testing.assert_array_equal(fast < own[0], slow < own[1])
        np.testing.assert_array_equal(fast == own[0], slow == own[1])


@everything
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_constant_truth_is_undefined_and_says_so(name, value):
    thing, truth = SCORES[name], np.full((7, 40), value)
    undefined = thing.needs == "spread" or (thing.needs == "norm" and value == 0)
    assert (np.isnan(thing(PREDICTED, truth, WEIGHTS)) == undefined).all()
    assert (thing.status(PREDICTED, truth, WEIGHTS) == ("constant_truth" if undefined else "")).all()


@pytest.mark.parametrize("name", ["cosine", "pearson", "spearman", "pearson_w"])
def test_a_constant_prediction_gets_the_chance_value_zero_and_counts(name):
    constant = np.zeros((7, 40)) if name == "cosine" else np.full((7, 40), 0.3)
    assert (SCORES[name](constant, OBSERVED, WEIGHTS) == 0).all()
    assert (SCORES[name].status(constant, OBSERVED, WEIGHTS) == "constant_prediction").all()


def test_r2_puts_the_truth_first():
    truth = np.array([0.0, 1.0, 2.0, 3.0])
    assert SCORES["r2"](np.full(4, truth.mean()), truth) == 0
    assert SCORES["r2"](2 * truth, truth) < SCORES["r2"](0.9 * truth, truth)


@pytest.mark.parametrize("name", ["wmse", "r2_w", "pearson_w"])
def test_no_weight_at_all_is_undefined(name):
    nothing = np.zeros_like(OBSERVED)
    assert np.isnan(SCORES[name](PREDICTED, OBSERVED, nothing)).all()
    assert (SCORES[name].status(PREDICTED, OBSERVED, nothing) == "no_weight").all()


@pytest.mark.parametrize("scale", [1e-200, 1e-8, 1e8, 1e200])
def test_angles_neither_under_nor_overflow(scale):
    expected = SCORES["cosine"](PREDICTED, OBSERVED)
    np.testing.assert_allclose(SCORES["cosine"](scale * PREDICTED, OBSERVED), expected, atol=1e-14)


def test_a_zero_vector_is_at_distance_one_to_everything():
    pairs = SCORES["cosine"].distance(np.zeros((3, 1, 40)), OBSERVED[None])
    assert (pairs == 1).all()
    assert (SCORES["cosine"].distance(PREDICTED[:, None], np.zeros((1, 3, 40))) == 1).all()


def test_a_score_is_registered_once():
    with pytest.raises(InputError, match="already"):
        score("mse", best=0.0, higher_is_better=False)(lambda predicted, observed: 0 * predicted)
