"""Search spaces draw what they hold, evenly on their own scale, and refuse what is no range."""

import pickle

import numpy as np
import pytest
from scipy import stats

from perturbray.errors import InputError
from perturbray.space import Choice, IntLogUniform, LogUniform, QUniform, Uniform

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
