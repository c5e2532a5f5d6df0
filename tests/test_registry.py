"""Laws of registries, of the clause that names the nearest, and of generators by purpose."""

import os
import subprocess
import sys

import numpy as np
import pytest

from perturbray.errors import InputError, nearest
from perturbray.randomness import derive, generator
from perturbray.registry import Registry


@pytest.fixture
def colours() -> Registry:
    registry = Registry("colour")
    registry.register("red")(type("Red", (), {}))
    registry.register("dark red")(type("DarkRed", (), {}))
    return registry


def test_a_registry_maps_names_to_things_in_order_of_registration(colours):
    assert list(colours) == ["red", "dark red"]
    assert len(colours) == 2
    assert "red" in colours
    assert "blue" not in colours
    assert colours["red"].__name__ == "Red"
    assert dict(colours) == {"red": colours["red"], "dark red": colours["dark red"]}


def test_a_thing_or_an_instance_of_it_has_its_name(colours):
    assert colours.name_of(colours["dark red"]) == "dark red"
    assert colours.name_of(colours["dark red"]()) == "dark red"
    with pytest.raises(KeyError, match="not a registered colour"):
        colours.name_of(3)


def test_registering_returns_the_thing(colours):
    @colours.register("green")
    class Green:
        pass

    assert colours["green"] is Green


def test_a_name_is_refused_twice_and_its_holder_named(colours):
    with pytest.raises(InputError, match=r"a colour named 'red' already: .*Red"):
        colours.register("red")(type("Rosso", (), {}))
    assert colours["red"].__name__ == "Red"


def test_the_same_definition_read_again_replaces_itself(colours):
    again = type("Red", (), {})
    assert colours.register("red")(again) is again
    assert colours["red"] is again
    assert len(colours) == 2


def test_a_missing_name_is_refused_with_the_nearest(colours):
    with pytest.raises(InputError, match="no colour is named 'rot': there are: dark red, red"):
        colours["rot"]
    with pytest.raises(InputError, match="no colour is named 'Red': did you mean 'red'"):
        colours["Red"]


@pytest.mark.parametrize(
    ("name", "options", "clause"),
    [
        ("cosin", ["cosine", "rmse"], "did you mean 'cosine'?"),
        ("COSINE", ["cosine", "rmse"], "did you mean 'cosine'?"),
        ("zzz", ["b", "a"], "there are: a, b"),
        ("zzz", [], "there are none"),
        ("zzz", map(str, range(30)), "... (30 in all)"),
        ("1", [1, 2], "did you mean '1'?"),
    ],
)
def test_nearest_names_what_is_close_or_all_there_is(name, options, clause):
    assert nearest(name, options).endswith(clause)


def test_generators_of_other_seeds_or_purposes_are_unlike():
    scopes = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "a", 1), (0, "a", 2), (-1,)]
    assert len({derive(*scope) for scope in scopes}) == len(scopes)
    draws = np.stack([generator(*scope).random(2000) for scope in scopes])
    assert np.abs(np.corrcoef(draws) - np.eye(len(scopes))).max() < 0.1


def test_a_derived_seed_fits_every_generator_and_is_the_same_on_every_machine():
    assert derive(3, "controls", 7) == 8972718859681704415, "a change would make every result another"
    assert all(0 <= derive(seed, "x") < 2**63 for seed in range(100))
    assert (generator(3, "x").random(5) == generator(3, "x").random(5)).all()
    script = "from perturbray.randomness import derive; print(derive(3, 'controls', 7))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert int(found.stdout) == derive(3, "controls", 7)
