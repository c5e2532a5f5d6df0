"""Marks: the best is found, equals are not told apart, however many there are; and bad intervals would fail at both."""

from dataclasses import replace

import numpy as np
import pytest
import simulated_scores

from perturbray.results import intervals, marks
from perturbray.results.cube import Cube
from perturbray.results.summary import summarise

REPEATS, ENOUGH = 40, 34
BOOTSTRAP = {"resamples": 400, "seed": 0}
EQUALS = [f"equal_{number}" for number in range(7)]


def cube_of(seed):
    quality = {"best": 0.58, **dict.fromkeys(EQUALS, 0.5)}
    rows = simulated_scores.rows(quality, seed=seed, seeds=5)
    return Cube.of(rows.assign(series=rows["model"], level=0.0), bootstrap=BOOTSTRAP)


@pytest.fixture(scope="module")
def cubes():
    return [cube_of(seed) for seed in range(REPEATS)]


def correct(cube, apart):
    """Whether the known best stands first and alone, and no two equals are told apart."""
    order = np.argsort(-cube.means)
    places = marks.of(apart(cube, order))
    equal = [at for at, column in enumerate(order) if cube.columns["series"].iloc[column] != "best"]
    told = apart(cube, order)[np.ix_(equal, equal)]
    return cube.columns["series"].iloc[order[0]] == "best" and places[0][:2] == (1, False) and not told.any()


def one_by_one(cube, order):
    """Paired, but each pair on its own."""
    gaps = [cube.differences(order, np.full(len(order), column)) for column in order]
    return np.array([((gap["difference_low"] > 0) | (gap["difference_high"] < 0)).to_numpy() for gap in gaps])


def unpaired(cube, order):
    """Each series with conditions of its own draw; a pair on its own."""
    place = {"context": cube.context, "perturbation": cube.perturbation}
    drawn = [
        intervals.resampled(cube.values[:, [column]], **place, resamples=400, seed=1 + number)[:, 0]
        for number, column in enumerate(order)
    ]
    ends = [[intervals.interval((a - b)[:, None]) for b in drawn] for a in drawn]
    return np.array([[bool(low[0] > 0 or high[0] < 0) for low, high in row] for row in ends])


def without_seeds(cube, order):
    """Corrected and paired, but as if training again gave the same model."""
    return replace(cube, seed_draws=np.zeros_like(cube.seed_draws)).apart(order)


def test_the_known_best_is_first_alone_and_equals_are_not_told_apart(cubes):
    found = sum(correct(cube, Cube.apart) for cube in cubes)
    print(f"\nthe best first and alone, equals not told apart: {found} of {REPEATS}")
    assert found >= ENOUGH


@pytest.mark.parametrize("bad", [one_by_one, unpaired, without_seeds])
def test_a_bad_interval_would_fail_that_test(cubes, bad):
    found = sum(correct(cube, bad) for cube in cubes)
    print(f"\n{bad.__name__}: {found} of {REPEATS}")
    assert found < ENOUGH


def test_two_equal_models_are_marked_as_not_told_apart():
    found = 0
    for seed in range(REPEATS):
        table = simulated_scores.rows({"best": 0.6, "one": 0.5, "other": 0.5}, seed=100 + seed)
        means = summarise(table, simulated_scores.plan(), resamples=400).means.set_index("series")
        first = means["place"].idxmin() == "best" and not means.loc["best", "tied"]
        found += first and means.loc["one", "letters"] == means.loc["other", "letters"] == "b"
    print(f"\ntwo equal models not told apart, the best alone: {found} of {REPEATS}")
    assert found >= ENOUGH


def slow_letters(apart):
    """All largest groups without a pair that is told apart, by looking at every group there is."""
    count = len(apart)
    groups = [[at for at in range(count) if code >> at & 1] for code in range(1, 2**count)]
    clear = [set(group) for group in groups if not apart[np.ix_(group, group)].any()]
    largest = [group for group in clear if not any(group < other for other in clear)]
    return {frozenset(group) for group in largest}


@pytest.mark.parametrize("seed", range(20))
def test_letters_are_the_largest_groups_that_cannot_be_told_apart(seed):
    rng = np.random.default_rng(seed)
    apart = np.triu(rng.random((7, 7)) < rng.uniform(0.1, 0.9), 1)
    apart |= apart.T
    found = marks.letters(apart)
    groups = {letter: {at for at, text in enumerate(found) if letter in text} for letter in "".join(found)}
    assert {frozenset(group) for group in groups.values()} == slow_letters(apart)
    for one, other in np.argwhere(np.triu(np.ones((7, 7), bool), 1)):
        assert bool(set(found[one]) & set(found[other])) is not bool(apart[one, other])


def test_letters_go_from_the_best_down():
    apart = np.array([[0, 0, 1, 1], [0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 0]], bool)
    assert marks.letters(apart) == ["a", "ab", "b", "c"]
    assert marks.of(apart) == [(1, True, "a"), (1, True, "ab"), (3, False, "b"), (4, False, "c")]
    assert marks.of(np.zeros((0, 0), bool)) == []


def test_more_letters_than_the_alphabet_has():
    found = marks.letters(~np.eye(30, dtype=bool))
    assert len(set(found)) == 30
    assert found[:2] == ["a", "b"]
    assert found[26] == "a1"


def test_many_series_are_placed_without_letters_and_with_fewer_samples(monkeypatch):
    cube = cube_of(0)
    order = np.argsort(-cube.means)
    whole = cube.apart(order)
    monkeypatch.setattr("perturbray.results.cube.AT_ONCE", 1)
    monkeypatch.setattr("perturbray.results.cube.FEWEST_DRAWS", 200)
    assert (cube.apart(order) == whole).all()
    many = marks.of(~np.eye(marks.MOST + 1, dtype=bool))
    assert [place for place, _, _ in many] == list(range(1, marks.MOST + 2))
    assert {text for *_, text in many} == {""}


def test_the_seed_part_of_an_interval_is_the_variance_of_a_mean_over_seeds():
    trials = np.random.default_rng(3).normal(size=(4, 1))
    drawn = intervals.of_seeds(trials, resamples=200_000)
    assert drawn.mean() == pytest.approx(0, abs=0.01)
    assert drawn.var() == pytest.approx(trials.var(ddof=1) / 4, rel=0.02)


def test_one_seed_adds_nothing_and_says_nothing():
    assert not intervals.of_seeds(np.array([[1.0, 2.0]]), resamples=10).any()
    some = intervals.of_seeds(np.array([[1.0, 2.0], [np.nan, 3.0]]), resamples=50)
    assert not some[:, 0].any()
    assert some[:, 1].any()


def test_an_interval_covers_the_truth_where_seeds_vary_more_than_conditions():
    rng, hits = np.random.default_rng(6), {"nested": 0, "conditions alone": 0}
    context, perturbation = np.zeros(30, int), np.arange(30)
    for repeat in range(300):
        values = 0.05 * rng.normal(size=(3, 1)) + 0.02 * rng.normal(size=30) + 0.03 * rng.normal(size=(3, 30))
        place = {"context": context, "perturbation": perturbation, "resamples": 300, "seed": repeat}
        draws = intervals.resampled(values.mean(axis=0)[:, None], **place)
        of_seeds = intervals.of_seeds(values.mean(axis=1)[:, None], resamples=300, seed=repeat)
        for name, part in (("nested", intervals.nested(draws, of_seeds, np.array([3]))), ("conditions alone", draws)):
            low, high = intervals.interval(part)
            hits[name] += bool(low[0] <= 0 <= high[0])
    assert hits["nested"] >= 276  # 92 of 100
    assert hits["conditions alone"] < 180


def test_simultaneous_intervals_hold_together_as_often_as_they_say():
    rng, together, each = np.random.default_rng(8), 0, 0
    context, perturbation = np.zeros(60, int), np.arange(60)
    for repeat in range(200):
        values = 0.5 * rng.normal(size=(60, 1)) + rng.normal(size=(60, 6))
        draws = intervals.resampled(values, context=context, perturbation=perturbation, resamples=300, seed=repeat)
        half = intervals.simultaneous(draws)
        together += bool((np.abs(values.mean(axis=0)) <= half).all())
        low, high = intervals.interval(draws)
        each += bool(((low <= 0) & (high >= 0)).all())
    assert 180 <= together <= 198
    assert each < 170
