from dataclasses import replace

import numpy as np
import pytest
from test_conventions import OPTIONS, small

from perturbray.metrics import Metric
from perturbray.metrics.anchors import additive, halve, mean_response, no_change, null, perfect, replicates
from perturbray.metrics.calibration import better_share, calibrate, dynamic_range_fraction, intervals, scaled_score
from perturbray.metrics.cells import compare
from perturbray.metrics.standard import prediction_of

RNG = np.random.default_rng(8)


@pytest.fixture(scope="module")
def comparison():
    return compare(small(0), small(1), **OPTIONS)


@pytest.fixture(scope="module")
def prediction(comparison):
    return prediction_of(comparison)


def test_the_truth_itself_is_perfect(prediction):
    assert (Metric("cosine", "delta_ctrl").evaluate(perfect(prediction))[0] == 1).all()


def test_no_change_has_no_direction(prediction):
    values, status = Metric("cosine", "delta_ctrl").evaluate(no_change(prediction))
    assert (values == 0).all()
    assert (status == "constant_prediction").all()


def test_the_mean_response_never_holds_the_condition_itself(prediction):
    changed = prediction.observed.mean.copy()
    changed[0] += 1000
    moved = replace(prediction, observed=replace(prediction.observed, mean=changed))
    before, after = (mean_response(p).predicted.mean for p in (prediction, moved))
    np.testing.assert_array_equal(before[0], after[0])
    assert (before[1] != after[1]).any()


def test_the_mean_response_is_that_of_training_where_known(prediction):
    mean = RNG.random((2, 40))
    known = replace(prediction, training_mean=mean)
    np.testing.assert_array_equal(mean_response(known).predicted.mean, mean[prediction.context])


def test_single_effects_add_up_for_combinations_with_known_singles(prediction):
    singles = {(code, name): RNG.normal(size=40) for code in (0, 1) for name in ("G1", "G2")}
    del singles[1, "G2"]
    got = additive(prediction, singles)
    assert got.perturbation.tolist() == ["G1+G2"]
    assert got.context.tolist() == [0]
    expected = prediction.control.mean[0] + singles[0, "G1"] + singles[0, "G2"]
    np.testing.assert_allclose(got.predicted.mean[0], expected, rtol=1e-12)


def test_halves_share_no_cell(comparison):
    one, other = halve(comparison.observed, comparison, seed=0, split=0)
    assert not ((one.group >= 0) & (other.group >= 0)).any()
    assert (one.count() == 12).all()
    assert (one.count() == other.count()).all()
    again = halve(comparison.observed, comparison, seed=0, split=1)[0]
    assert (again.group != one.group).any()


def test_a_half_does_not_depend_on_the_other_conditions(comparison):
    observed = small(0)
    kept = np.asarray(observed.obs["perturbation"] != "G3")
    fewer = compare(observed[kept], small(1)[kept], **OPTIONS)
    full, part = (halve(c.observed, c, seed=0, split=0)[0] for c in (comparison, fewer))
    names = (full.of(0).sum(), part.of(0).sum())
    assert names[0] == names[1]


def test_replicates_agree_in_direction(prediction, comparison):
    values = [Metric("cosine", "delta_ctrl").evaluate(r)[0].mean() for r in replicates(prediction, comparison)]
    assert len(values) == 5
    assert min(values) > 0.5


def test_without_any_effect_ranks_are_at_chance_and_angles_show_the_shared_control(prediction, comparison):
    ranks, angles = [], []
    for seed in range(20):
        nothing = null(prediction, comparison, seed=seed)
        ranks.append(Metric("rmse", rank=True, exclude="none").evaluate(nothing)[0].mean())
        angles.append(Metric("cosine", "delta_ctrl").evaluate(nothing)[0].mean())
    assert np.mean(ranks) == pytest.approx(0.5, abs=0.06)
    # about n/(n + n₀) with n = 4 cells a side and n₀ = 8 or 9 in the control
    assert np.mean(angles) == pytest.approx(4 / (4 + 8.5), abs=0.1)


def test_calibration_puts_a_replicate_above_the_mean_response(prediction, comparison):
    metrics = [Metric("cosine", "delta_ctrl"), Metric("rmse"), Metric("rmse", rank=True)]
    table = calibrate(prediction, comparison, metrics).set_index("metric")
    assert table.loc["cosine/delta_ctrl", "replicate"] > table.loc["cosine/delta_ctrl", "baseline"]
    assert table.loc["rmse/average", "replicate"] < table.loc["rmse/average", "baseline"]
    assert (table["status"] == "").all()
    assert (table["scaled"] > 0.8).all()  # the prediction is another sample of the same cells
    assert not table["weak"].any()


@pytest.mark.parametrize("higher", [True, False])
def test_scaled_scores_are_zero_at_the_baseline_and_one_at_the_replicate(higher):
    sign = 1 if higher else -1
    baseline, replicate = sign * RNG.normal(0, 0.1, 30), sign * RNG.normal(1, 0.1, 30)
    assert scaled_score(baseline, baseline, replicate, higher_is_better=higher) == (0.0, "")
    assert scaled_score(replicate, baseline, replicate, higher_is_better=higher) == (1.0, "")
    assert scaled_score(2 * replicate - baseline, baseline, replicate, higher_is_better=higher)[0] == pytest.approx(2)
    score, status = scaled_score(replicate, replicate, baseline, higher_is_better=higher)
    assert np.isnan(score)
    assert status == "uncalibrated"


def test_the_dynamic_range_is_the_share_of_the_way_to_the_best():
    negative, positive = np.full(12, 0.2), np.full(12, 0.6)
    share, mean = dynamic_range_fraction(positive, negative, best=1.0)
    assert mean == pytest.approx(0.5)
    assert dynamic_range_fraction(np.full(12, 1.0), np.full(12, 4.0), best=0.0)[1] == pytest.approx(0.75)
    assert dynamic_range_fraction(np.full(12, -99.0), negative, best=1.0)[1] == -1
    assert np.isnan(dynamic_range_fraction(positive[:9], negative[:9], best=1.0)[1])
    assert len(share) == 12


def test_ties_count_half_in_the_share_of_better_conditions():
    assert better_share(np.array([1.0, 2, 3, np.nan]), np.array([0.0, 2, 4, 1]), higher_is_better=True) == 0.5
    assert better_share(np.array([1.0, 2]), np.array([2.0, 3]), higher_is_better=False) == 1


def test_intervals_cover_the_mean_and_pairs_are_tighter_than_each():
    difficulty = RNG.normal(0, 1, 60)
    values = {"a": difficulty + RNG.normal(0, 0.05, 60), "b": difficulty + 0.1 + RNG.normal(0, 0.05, 60)}
    means, pairs = intervals(values, np.repeat([0, 1], 30), np.arange(60).astype(str))
    assert ((means["low"] < means["mean"]) & (means["mean"] < means["high"])).all()
    assert not pairs["tied"][0]
    assert pairs["high"][0] - pairs["low"][0] < 0.2 * (means["high"] - means["low"]).min()


def test_intervals_are_as_wide_as_the_standard_error_says():
    values = {"a": RNG.normal(0, 1, 400)}
    means, _ = intervals(values, np.zeros(400), np.arange(400).astype(str))
    assert means["high"][0] - means["low"][0] == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_a_perturbation_in_several_contexts_is_resampled_as_one():
    difficulty = RNG.normal(0, 1, 40)
    values = {"a": np.concatenate([difficulty, difficulty])}
    together, _ = intervals(values, np.repeat([0, 1], 40), np.tile(np.arange(40), 2).astype(str))
    apart, _ = intervals(values, np.repeat([0, 1], 40), np.arange(80).astype(str))
    width = [table["high"][0] - table["low"][0] for table in (together, apart)]
    assert width[0] == pytest.approx(width[1] * np.sqrt(2), rel=0.15)


def test_few_conditions_have_no_interval():
    means, pairs = intervals({"a": np.arange(9.0), "b": np.arange(9.0)}, np.zeros(9), np.arange(9).astype(str))
    assert means["low"].isna().all()
    assert (means["status"] == "few_conditions").all()
    assert pairs["tied"].all()


def test_a_model_that_failed_has_an_infinite_mean_and_no_interval():
    values = {"a": np.r_[np.inf, np.ones(20)], "b": np.ones(21)}
    means, _ = intervals(values, np.zeros(21), np.arange(21).astype(str))
    assert means["mean"][0] == np.inf
    assert np.isnan(means["low"][0])
