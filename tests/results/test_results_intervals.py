"""Intervals: they are the bootstrap that the specification states, and they cover what they claim to."""

import numpy as np
import pytest

from perturbray.results import intervals


def slow(values, context, perturbation, *, resamples, seed):
    """The same samples, but every one is laid out row by row and averaged in loops."""
    weights = np.concatenate(list(intervals.draw(context, perturbation, resamples=resamples, seed=seed)))
    found = np.empty((resamples, values.shape[1]))
    for number, times in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(len(values)), times)
        for column in range(values.shape[1]):
            by_context = []
            for code in sorted(set(context)):
                inside = [values[row, column] for row in rows if context[row] == code]
                inside = [value for value in inside if not np.isnan(value)]
                if inside:
                    by_context.append(sum(inside) / len(inside))
            found[number, column] = sum(by_context) / len(by_context) if by_context else np.nan
    return found


def screen(rng, *, contexts=3, perturbations=12, share=0.8):
    context, perturbation = np.nonzero(rng.random((contexts, perturbations)) < share)
    return context, perturbation


def test_the_fast_bootstrap_equals_a_loop_over_rows():
    rng = np.random.default_rng(1)
    context, perturbation = screen(rng)
    values = rng.normal(size=(len(context), 3))
    values[rng.random(values.shape) < 0.1] = np.nan
    fast = intervals.resampled(values, context=context, perturbation=perturbation, resamples=60, seed=4)
    np.testing.assert_allclose(fast, slow(values, context, perturbation, resamples=60, seed=4), rtol=0, atol=1e-12)


def test_the_samples_do_not_depend_on_the_part_in_which_they_are_drawn(monkeypatch):
    context, perturbation = screen(np.random.default_rng(2))
    whole = np.concatenate(list(intervals.draw(context, perturbation, resamples=50)))
    monkeypatch.setattr(intervals, "_WEIGHTS_AT_ONCE", 7 * len(context))
    parts = list(intervals.draw(context, perturbation, resamples=50))
    assert len(parts) == 8
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_perturbation_is_drawn_with_all_its_contexts():
    context, perturbation = screen(np.random.default_rng(3))
    for weights in intervals.draw(context, perturbation, resamples=20):
        for code in set(perturbation):
            assert (np.ptp(weights[:, perturbation == code], axis=1) == 0).all()


@pytest.mark.parametrize("shared", [True, False])
def test_each_context_keeps_its_number_of_conditions(shared):
    context = np.repeat([0, 1], [20, 30])
    perturbation = np.r_[np.arange(20), np.arange(30) if shared else 20 + np.arange(30)]
    for weights in intervals.draw(context, perturbation, resamples=40):
        assert (weights[:, context == 0].sum(axis=1) == 20).all()
        assert (weights[:, context == 1].sum(axis=1) == 30).all()


def test_perturbations_with_few_of_their_kind_still_vary():
    occurs = np.eye(6, dtype=bool)  # every perturbation has contexts of its own
    context, perturbation = np.nonzero(occurs)
    weights = next(intervals.draw(context, perturbation, resamples=200))
    assert (weights.std(axis=0) > 0).all()


def test_the_macro_mean_weighs_contexts_and_not_conditions():
    values = np.array([[1.0], [1.0], [1.0], [5.0], [np.nan]])
    assert intervals.macro(values, np.array([0, 0, 0, 1, 1])) == pytest.approx(3.0)


def test_an_infinite_value_keeps_its_price_in_every_sample():
    values = np.ones((20, 2))
    values[3, 1] = np.inf
    zeros, own = np.zeros(20, int), np.arange(20)
    found = intervals.resampled(values, context=zeros, perturbation=own, resamples=100)
    assert np.isinf(found[:, 1]).all()
    assert np.isnan(intervals.interval(found)[0][1])


def coverage(*, clustered, repeats=300):
    """How often the interval holds the true mean 0, where the contexts of a perturbation share most of their value."""
    rng, hits = np.random.default_rng(5), 0
    context, perturbation = (code.ravel() for code in np.indices((3, 40)))
    for repeat in range(repeats):
        values = (rng.normal(size=(1, 40)) + 0.3 * rng.normal(size=(3, 40))).reshape(-1, 1)
        drawn = perturbation if clustered else np.arange(120)
        draws = intervals.resampled(values, context=context, perturbation=drawn, resamples=400, seed=repeat)
        low, high = intervals.interval(draws)
        hits += bool(low[0] <= 0 <= high[0])
    return hits / repeats


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    assert 0.90 <= coverage(clustered=True) <= 0.98


def test_drawing_conditions_of_a_perturbation_apart_would_claim_too_much():
    assert coverage(clustered=False) < 0.85
