"""Laws of proposals: they stay in the space, depend on what is known, a seed and a number alone, and find what is good."""

import math

import numpy as np
import pytest

from perturbray.errors import InputError
from perturbray.proposals import WAYS, Seen, propose
from perturbray.space import Choice, IntLogUniform, LogUniform, QUniform, Uniform, When, holds, points

SPACE = {
    "rate": LogUniform(1e-5, 1e-1),
    "width": Choice(64, 128, 256),
    "kind": Choice("a", "b"),
    "dropout": QUniform(0.0, 0.8, 0.1),
    "units": IntLogUniform(2, 300),
    "share": Uniform(-1, 2),
    "on": Choice(True, False),
    "weight": When("on", True, LogUniform(0.1, 20)),
    "steps": When("on", True, Choice(2, 3, 5)),
}
STEPS = {"a": Choice(1, 2, 3), "on": Choice(True, False), "b": When("on", True, QUniform(0, 1, 0.5))}


def loss(values) -> float:
    """0 at rate 1e-3, width 128, kind b, without the conditional part."""
    found = abs(math.log10(values["rate"]) + 3) + abs(math.log2(values["width"] / 128)) + (values["kind"] == "a")
    return found + (1 + abs(math.log10(values["weight"])) if values["on"] else 0)


def searched(way: str, seed: int, number: int, *, space=SPACE, loss=loss) -> list[Seen]:
    seen: list[Seen] = []
    for n in range(number):
        values = propose(space, seen, way=way, seed=seed, number=n)
        seen.append(Seen(values, loss(values)))
    return seen


@pytest.mark.parametrize("way", ["tpe", "hyperopt", "random"])
def test_proposals_stay_in_the_space_and_have_what_counts_alone(way):
    seen = searched(way, 0, 40)
    assert all(holds(SPACE, one.values) for one in seen)
    assert {one.values["on"] for one in seen} == {True, False}
    assert all(("weight" in one.values) == ("steps" in one.values) == one.values["on"] for one in seen)
    assert {type(one.values["units"]) for one in seen} == {int}


@pytest.mark.parametrize("way", ["tpe", "hyperopt", "random"])
def test_a_proposal_is_a_function_of_what_is_known_the_seed_and_the_number(way):
    seen = searched(way, 3, 25)
    assert searched(way, 3, 25) == seen
    for number in (0, 7, 24):  # made from the records alone, as after a kill
        assert propose(SPACE, seen[:number], way=way, seed=3, number=number) == seen[number].values
    assert propose(SPACE, seen, way=way, seed=3, number=25) != propose(SPACE, seen, way=way, seed=4, number=25)


@pytest.mark.parametrize("way", ["tpe", "hyperopt"])
def test_tpe_finds_the_optimum_of_a_small_known_space_with_fewer_trials_than_chance(way):
    space = {"rate": SPACE["rate"], "width": SPACE["width"], "kind": SPACE["kind"]}

    def simple(values):
        return loss({**values, "on": False})

    def needed(way, seed):
        found = [one.loss for one in searched(way, seed, 120, space=space, loss=simple)]
        return next((n for n, value in enumerate(found) if value < 0.2), 120)

    tpe, random = ([needed(of, seed) for seed in range(16)] for of in (way, "random"))
    assert max(tpe) < 120, "TPE comes to the optimum from every seed"
    assert np.mean(tpe) < 0.75 * np.mean(random)


def test_tpe_finds_the_optimum_of_four_ranges_in_half_of_the_trials_of_chance():
    space = {name: Uniform(0, 1) for name in "abcd"}

    def distance(values):
        return math.dist(list(values.values()), (0.3, 0.4, 0.5, 0.6))

    def needed(way, seed):
        found = [one.loss for one in searched(way, seed, 80, space=space, loss=distance)]
        return next((n for n, value in enumerate(found) if value < 0.15), 80)

    tpe, random = ([needed(way, seed) for seed in range(8)] for way in ("tpe", "random"))
    assert np.mean(tpe) < 0.5 * np.mean(random)


@pytest.mark.parametrize("way", ["tpe", "hyperopt"])
def test_tpe_leaves_what_failed(way):
    """Half of the space fails: TPE goes there less often than chance would, though it never gets a number there."""
    space = {"rate": LogUniform(1e-4, 1.0)}

    def half(values):
        return None if values["rate"] > 1e-2 else abs(math.log10(values["rate"]) + 3)

    seen = []
    for n in range(40):
        values = propose(space, seen, way=way, seed=1, number=n)
        seen.append(Seen(values, half(values)))
    assert sum(one.loss is None for one in seen[10:]) < 0.25 * 30


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_proposed_twice_and_a_space_comes_to_an_end(way):
    seen = []
    while (values := propose(STEPS, seen, way=way, seed=0, number=len(seen))) is not None:
        seen.append(Seen(values, float(values["a"])))
    proposed = {tuple(sorted(one.values.items())) for one in seen}
    assert len(proposed) == len(seen)
    every = {tuple(sorted(values.items())) for values in points(STEPS)}
    assert len(every) == 3 * (3 + 1), "b has three values, and counts in half of them"
    assert proposed <= every
    if way == "grid":
        assert proposed == every
    else:
        assert len(proposed) > 0.7 * len(every)


def test_a_grid_of_a_range_without_steps_is_refused():
    with pytest.raises(InputError, match=r"rate: .* has no steps to make a grid of"):
        propose(SPACE, [], way="grid", seed=0, number=0)


def test_a_point_outside_of_the_space_is_no_obstacle():
    seen = [*searched("tpe", 0, 12), Seen({"rate": 5.0, "width": 4096}, 0.0)]
    assert holds(SPACE, propose(SPACE, seen, way="tpe", seed=0, number=13))
