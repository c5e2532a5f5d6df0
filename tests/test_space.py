"""Search spaces draw what they hold, evenly on their own scale, and refuse what is no range."""

import pickle

import numpy as np
import pytest
from scipy import stats

from perturbray.errors import InputError
from perturbray.space import (
    Choice,
    IntLogUniform,
    LogUniform,
    QUniform,
    Uniform,
    When,
    borders,
    check,
    draw,
    holds,
    widen,
)

KINDS = (
    Choice(64, 128, 256),
    Choice(True, False),
    Uniform(-1.0, 2.0),
    LogUniform(5e-6, 5e-3),
    QUniform(0.0, 0.8, 0.1),
    QUniform(256, 5376, 1024),
    IntLogUniform(128, 1024),
)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_distribution_is_data_and_draws_what_it_holds(kind):
    assert pickle.loads(pickle.dumps(kind)) == kind
    hash(kind)
    drawn = [kind.sample(np.random.default_rng([1, i])) for i in range(300)]
    assert all(value in kind for value in drawn)
    assert drawn == [kind.sample(np.random.default_rng([1, i])) for i in range(300)]
    assert len(set(drawn)) > 1
    assert all(type(value) in (bool, int, float) for value in drawn), "plain values, not numpy's"


@pytest.mark.parametrize(
    ("kind", "scale"),
    [(Uniform(-1.0, 2.0), np.asarray), (LogUniform(5e-6, 5e-3), np.log), (IntLogUniform(128, 1024), np.log)],
)
def test_draws_are_even_on_their_scale(kind, scale):
    rng = np.random.default_rng(0)
    drawn = scale(np.array([kind.sample(rng) for _ in range(2000)], dtype=float))
    low, high = scale(kind.low), scale(kind.high)
    assert stats.kstest((drawn - low) / (high - low), "uniform").pvalue > 0.01


def test_steps_include_their_ends_and_are_round():
    assert QUniform(0.0, 0.8, 0.1).values == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    assert QUniform(256, 5376, 1024).values == (256, 1280, 2304, 3328, 4352, 5376)
    assert all(isinstance(value, int) for value in QUniform(256, 5376, 1024).values)
    assert 0.30000000000000004 not in QUniform(0.0, 0.8, 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Choice(),
        lambda: Choice(1, 1),
        lambda: Uniform(1.0, 1.0),
        lambda: Uniform(0.0, float("inf")),
        lambda: LogUniform(0.0, 1.0),
        lambda: QUniform(0.0, 1.0, 0.3),
        lambda: QUniform(0.0, 1.0, 0.0),
        lambda: IntLogUniform(5, 2),
    ],
)
def test_what_is_no_range_is_refused(wrong):
    with pytest.raises(InputError):
        wrong()


def test_a_space_does_not_hold_what_lies_outside():
    assert 0.5 not in Choice(0, 1)
    assert 6e-3 not in LogUniform(5e-6, 5e-3)
    assert 200.5 not in IntLogUniform(128, 1024)
    assert 0.05 not in QUniform(0.0, 0.8, 0.1)


def test_a_value_at_an_end_is_on_the_border_and_one_between_is_not():
    space = {"rate": LogUniform(1e-4, 1e-2), "width": Choice(64, 128, 256), "dropout": QUniform(0, 0.4, 0.1)}
    assert borders(space, {"rate": 9.5e-3, "width": 64, "dropout": 0.4}) == {
        "rate": "high",
        "width": "low",
        "dropout": "high",
    }
    assert borders(space, {"rate": 1e-3, "width": 128, "dropout": 0.2}) == {}
    assert borders({"kind": Choice("a", "b"), "on": Choice(True, False)}, {"kind": "a", "on": True}) == {}


def test_where_there_is_nothing_beyond_an_end_it_is_no_border():
    assert QUniform(0, 0.8, 0.1).border(0) is None, "a dropout cannot be below 0"
    assert Choice(1, 2, 3).border(1) is None, "nor can a network have no layer"
    assert Choice(1, 2, 3).border(3) == "high"


@pytest.mark.parametrize(
    ("part", "side", "wider"),
    [
        (Choice(64, 128, 256), "high", Choice(64, 128, 256, 512)),
        (Choice(64, 128, 256), "low", Choice(32, 64, 128, 256)),
        (Choice(1, 3, 5, 7), "high", Choice(1, 3, 5, 7, 9)),
        (QUniform(0, 0.4, 0.1), "high", QUniform(0, 0.5, 0.1)),
        (QUniform(256, 5376, 1024), "high", QUniform(256, 6400, 1024)),
        (LogUniform(1e-4, 1e-0), "low", LogUniform(1e-5, 1e-0)),
        (LogUniform(1e-4, 1e-0), "high", LogUniform(1e-4, 1e1)),
        (Uniform(0.0, 1.0), "low", Uniform(0.0, 1.0)),
        (Uniform(-1.0, 3.0), "high", Uniform(-1.0, 4.0)),
    ],
)
def test_a_wider_space_holds_the_old_one_and_goes_on_where_it_ended(part, side, wider):
    (found,) = widen({"x": part}, {"x": side}).values()
    if isinstance(part, LogUniform):
        assert (found.low, found.high) == (pytest.approx(wider.low), pytest.approx(wider.high))
    else:
        assert found == wider
    rng = np.random.default_rng(0)
    assert all(part.sample(rng) in found for _ in range(100))


def test_a_condition_on_what_is_no_choice_of_the_space_is_refused():
    for space in (
        {"a": When("b", 1, Choice(1, 2))},
        {"a": When("b", 5, Choice(1, 2)), "b": Choice(1, 2)},
        {"a": When("b", 1, Choice(1, 2)), "b": Uniform(0, 1)},
        {"a": When("b", 1, Choice(1)), "b": When("a", 1, Choice(1))},
    ):
        with pytest.raises(InputError, match=r"condition leads back|it counts when"):
            check(space)


def test_what_counts_may_depend_on_what_counts():
    space = {"c": When("b", 1, Choice(7, 8)), "b": When("a", True, Choice(1, 2)), "a": Choice(True, False)}
    check(space)
    drawn = [draw(space, np.random.default_rng(seed)) for seed in range(50)]
    assert all(holds(space, values) for values in drawn)
    assert {tuple(values) for values in drawn} == {("a",), ("b", "a"), ("c", "b", "a")}
    assert not holds(space, {"a": False, "b": 1})
    assert not holds(space, {"a": True})
