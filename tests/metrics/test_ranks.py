import numpy as np
import pytest

from perturbray.errors import InputError
from perturbray.metrics.ranks import TIES, chance_error, ranks

RNG = np.random.default_rng(5)
DISTANCE = RNG.random((9, 9))
TIED = RNG.integers(0, 3, (9, 9)).astype(float)
DRAWS = RNG.random(9)


def by_definition(distance, direction, weight, denominator):
    n = len(distance)
    out = []
    for k in range(n):
        line = distance[:, k] if direction == "obs" else distance[k]
        others = [line[i] for i in range(n) if i != k]
        closer = sum(other < line[k] for other in others) + weight * sum(other == line[k] for other in others)
        out.append(closer / (n - 1 if denominator == "n-1" else n))
    return np.array(out)


@pytest.mark.parametrize("direction", ["obs", "pred"])
@pytest.mark.parametrize("denominator", ["n-1", "n"])
@pytest.mark.parametrize(("ties", "weight"), [("half", 0.5), ("strict", 0.0), ("inclusive", 1.0)])
@pytest.mark.parametrize("exact", [True, False])
def test_ranks_follow_their_definition(direction, denominator, ties, weight, exact):
    for distance in (DISTANCE, TIED):
        got = ranks(distance, direction=direction, ties=ties, denominator=denominator, exact=exact)
        np.testing.assert_array_equal(got, by_definition(distance, direction, weight, denominator))


@pytest.mark.parametrize("ties", list(TIES))
def test_without_ties_every_rule_gives_the_same(ties):
    np.testing.assert_array_equal(ranks(DISTANCE, ties=ties, draws=DRAWS), ranks(DISTANCE, ties="half"))


@pytest.mark.parametrize("direction", ["obs", "pred"])
def test_random_ties_average_to_half_ties(direction):
    draws = (np.arange(720) + 0.5) / 720
    got = np.mean([ranks(TIED, ties="random", draws=np.full(9, draw), direction=direction) for draw in draws], axis=0)
    np.testing.assert_allclose(got, ranks(TIED, direction=direction), atol=1e-3)


def test_ties_by_position_count_the_candidates_before():
    np.testing.assert_array_equal(ranks(np.zeros((4, 4)), ties="position"), [0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("direction", ["obs", "pred"])
@pytest.mark.parametrize(("ties", "expected"), [("half", 0.5), ("strict", 0.0), ("inclusive", 1.0)])
def test_one_distance_for_all_ranks_where_the_tie_rule_says(direction, ties, expected):
    assert (ranks(np.full((6, 6), 0.7), direction=direction, ties=ties) == expected).all()


def test_differences_of_rounding_are_ties_unless_exact():
    distance = np.full((5, 5), 0.3) + 1e-14 * RNG.normal(size=(5, 5))
    assert (ranks(distance) == 0.5).all()
    assert (ranks(distance, exact=True) != 0.5).any()


def test_a_single_candidate_has_no_rank():
    assert np.isnan(ranks(np.zeros((1, 1)))).all()


def test_more_candidates_than_queries_are_ranked_among_all():
    distance = np.array([[0.2, 0.1, 0.5, 0.05]])
    assert ranks(distance, np.array([0]), direction="pred") == pytest.approx(2 / 3)


def test_infinite_distances_are_never_nearer_and_tie_with_each_other():
    distance = np.array([[0.0, 1.0, 1.0], [np.inf, np.inf, np.inf], [np.inf, np.inf, np.inf]])
    np.testing.assert_array_equal(ranks(distance), [0, 0.75, 0.75])


def test_the_error_of_the_mean_rank_under_chance_is_that_of_random_distances():
    n, draws = 10, np.random.default_rng(0).random((1500, 10, 10))
    means = [ranks(distance, direction="pred").mean() for distance in draws]
    assert np.std(means) == pytest.approx(chance_error(n), rel=0.1)
    assert np.isnan(chance_error(1))


@pytest.mark.parametrize("option", [{"direction": "both"}, {"ties": "some"}, {"denominator": "n+1"}])
def test_an_unknown_option_names_those_there_are(option):
    with pytest.raises(InputError):
        ranks(DISTANCE, **option)
