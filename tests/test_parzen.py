"""Laws of the density that TPE proposes from: it is one, draws follow it, and it holds together what was good together."""

import numpy as np
import pytest

from perturbray.parzen import Parzen
from perturbray.randomness import generator
from perturbray.space import Choice, IntLogUniform, LogUniform, QUniform, Uniform, When, draw, holds

SPACE = {
    "rate": LogUniform(1e-5, 1e-1),
    "share": Uniform(-1, 2),
    "width": Choice(64, 128, 256),
    "kind": Choice("a", "b", "c"),
    "dropout": QUniform(0.0, 0.8, 0.2),
    "on": Choice(True, False),
    "weight": When("on", True, LogUniform(0.1, 20)),
}
KNOWN = [
    {"rate": 1e-3, "share": 0.0, "width": 64, "kind": "a", "dropout": 0.2, "on": True, "weight": 1.0},
    {"rate": 2e-5, "share": 1.9, "width": 256, "kind": "c", "dropout": 0.0, "on": False},
    {"rate": 9e-2, "share": 0.5, "width": 128, "kind": "a", "dropout": 0.8, "on": True, "weight": 0.11},
]


@pytest.fixture(scope="module")
def flat() -> list[dict]:
    """Uniform draws."""
    rng = generator(0, "uniform")
    return [draw(SPACE, rng) for _ in range(10_000)]


@pytest.mark.parametrize("known", [KNOWN[:1], KNOWN])
def test_its_integral_is_1(known, flat):
    """Over uniform draws the ratio to the uniform density is 1 on average, whatever counts."""
    ratios = np.exp(Parzen(SPACE, known).log(flat) - Parzen(SPACE, []).log(flat))
    error = ratios.std() / np.sqrt(len(flat))
    assert error < 0.1
    assert ratios.mean() == pytest.approx(1, abs=3.5 * error)


def test_draws_follow_it(flat):
    """The mean of a statistic is the same over draws and over uniform ones weighted by the density."""
    parzen, rng = Parzen(SPACE, KNOWN), generator(1, "draws")
    drawn = [parzen.draw(rng) for _ in range(4000)]
    assert all(holds(SPACE, values) for values in drawn)
    weights = np.exp(parzen.log(flat) - Parzen(SPACE, []).log(flat))
    statistics = {
        "rate": lambda v: np.log(v["rate"]),
        "share": lambda v: v["share"],
        "width": lambda v: v["width"] == 128,
        "kind": lambda v: v["kind"] == "a",
        "dropout": lambda v: v["dropout"],
        "on": lambda v: v["on"],
        "weight": lambda v: np.log(v["weight"]) if v["on"] else 0.0,
        "together": lambda v: v["kind"] == "c" and not v["on"],
    }
    for name, of in statistics.items():
        here, there = np.array([of(v) for v in drawn], float), np.array([of(v) for v in flat], float)
        error = here.std() / np.sqrt(len(here)) + (weights * there).std() / np.sqrt(len(there))
        assert here.mean() == pytest.approx((weights * there).mean(), abs=3.5 * error), name


def test_without_configurations_it_is_uniform():
    assert (
        np.exp(Parzen({"kind": Choice("a", "b"), "share": Uniform(0, 9)}, []).log([{"kind": "a", "share": 3}])) == 0.5
    )
    parzen, rng = Parzen({"kind": Choice("a", "b")}, []), generator(2, "flat")
    assert sum(parzen.draw(rng)["kind"] == "a" for _ in range(1000)) == pytest.approx(500, abs=60)


def test_what_was_good_together_is_likelier_together():
    space = {"a": Choice("x", "y"), "b": Choice("x", "y")}
    parzen = Parzen(space, [{"a": "x", "b": "x"}, {"a": "y", "b": "y"}])
    same, mixed = parzen.log([{"a": "x", "b": "x"}, {"a": "x", "b": "y"}])
    assert np.exp(same) + np.exp(mixed) == pytest.approx(0.5)
    assert same > mixed


def test_neighbours_of_rising_numbers_are_likelier_than_what_lies_further():
    near, far = Parzen({"n": Choice(1, 2, 3, 4)}, [{"n": 1}]).log([{"n": 2}, {"n": 4}])
    assert near > far
    other, another = Parzen({"n": Choice("1", "2", "3", "4")}, [{"n": "1"}]).log([{"n": "2"}, {"n": "4"}])
    assert other == another


@pytest.mark.parametrize("kind", [Uniform(0, 1), LogUniform(1e-6, 1.0), IntLogUniform(1, 1000)])
def test_kernels_become_narrower_with_more_configurations(kind):
    def spread(number):
        middle = {"x": kind.sample(generator(0, "middle"))}
        parzen, rng = Parzen({"x": kind}, [middle] * number), generator(number, "spread")
        near = [kind.share(parzen.draw(rng)["x"]) - kind.share(middle["x"]) for _ in range(600)]
        return np.median(np.abs(near))

    assert spread(20) < 0.85 * spread(1)
