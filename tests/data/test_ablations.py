"""Laws of ablations: training shrinks as asked, in nested steps, and what is judged stays the same."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import screens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from perturbray.data.ablations import ABLATIONS, Imbalance, PublishedImbalance
from perturbray.data.ablations.imbalance import geometric_counts, geometric_shares, imbalance, replicates, rotated
from perturbray.data.splits import TEST, TRAIN, UNUSED, VAL, CovariateTransfer
from perturbray.errors import InputError

LEVELS = (0.0, 0.1, 0.2, 0.3)
TASK = CovariateTransfer()


@pytest.fixture(scope="module")
def screen():
    """The structure of sci-Plex 3, contexts of unequal size: line_b is the largest, then line_a."""
    cells = screens.rectangle(3, 188) + [(("line_b",), "control")] * 9 + [(("line_a",), "control")] * 5
    return screens.conditions_of(cells)


def training(conditions, split, context: int) -> set[str]:
    here = (split.condition == TRAIN) & ~conditions.is_control & (conditions.context == context)
    return set(conditions.perturbation[here].tolist())


@pytest.mark.parametrize(
    ("counts", "value"),
    [
        ((188, 188, 188), 0.0),
        ((188, 117, 50), 0.109),
        ((188, 81, 30), 0.202),
        ((188, 30, 30), 0.344),
        ((189, 34, 34), 0.307),
        ((60, 60, 60), 0.0),
        ((97, 54, 29), 0.100),
        ((114, 47, 19), 0.201),
        ((127, 40, 13), 0.299),
    ],
)
def test_imbalance_of_the_published_counts(counts, value):
    assert imbalance(np.array(counts)) == pytest.approx(value, abs=6e-4)
    assert imbalance(np.array(counts[::-1])) == pytest.approx(imbalance(np.array(counts)))
    assert imbalance(np.array(counts) * 7) == pytest.approx(imbalance(np.array(counts)))


def test_imbalance_is_one_where_one_context_has_all():
    assert imbalance(np.array([5, 0, 0])) == 1.0
    assert imbalance(np.array([5])) == imbalance(np.array([0, 0])) == 0.0


def test_counts_are_geometric_with_a_floor():
    assert geometric_counts(100, 0.5, contexts=4, minimum=2).tolist() == [100, 50, 25, 12]
    assert geometric_counts(100, 0.1, contexts=4, minimum=2).tolist() == [100, 10, 2, 2]
    assert geometric_counts(100, 1.0, contexts=3, minimum=2).tolist() == [100, 100, 100]


@given(st.integers(2, 200), st.integers(2, 6), st.integers(1, 4), st.floats(0, 0.6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_solved_counts_have_the_imbalance_that_was_asked_for(base, contexts, minimum, level):
    spec = Imbalance(level=level, minimum=minimum)
    try:
        counts = spec.solve(level, base=base, contexts=contexts)
    except InputError:
        assume(False)
    assert abs(imbalance(counts) - level) <= spec.tolerance
    assert counts[0] == base
    assert (np.diff(counts) <= 0).all()
    assert counts.min() >= min(minimum, base)


@given(st.integers(3, 200), st.integers(2, 6), st.integers(1, 4), st.lists(st.floats(0, 0.5), min_size=2, max_size=2))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_higher_level_has_no_more_of_any_context(base, contexts, minimum, levels):
    try:
        low, high = (
            Imbalance(minimum=minimum, tolerance=1).solve(level, base=base, contexts=contexts)
            for level in sorted(levels)
        )
    except InputError:
        assume(False)
    assert (high <= low).all()


@pytest.mark.parametrize("seed", range(3))
def test_levels_are_nested_and_judged_on_the_same_conditions(screen, seed):
    plain = TASK.split(screen)
    splits = {level: Imbalance(level=level).apply(screen, TASK, seed=seed) for level in LEVELS}
    highest = splits[LEVELS[-1]]
    for smaller, larger in zip(LEVELS[1:], LEVELS[:-1], strict=True):
        for context in range(3):
            assert training(screen, splits[smaller], context) <= training(screen, splits[larger], context)
    in_training = set().union(*(training(screen, highest, context) for context in range(3)))
    for level, split in splits.items():
        for subset in (VAL, TEST):
            common = (split.condition == subset) & (split.stratum == "common")
            assert (common == ((highest.condition == subset) & (highest.stratum == "common"))).all()
            assert set(screen.perturbation[common].tolist()) <= in_training
            assert (plain.condition[common] == subset).all()
        lost = split.stratum == "lost"
        assert not set(screen.perturbation[lost].tolist()) & in_training
        assert set(split.condition[lost].tolist()) <= {TEST, UNUSED}
        # Not one condition that was to be tested is gone.
        assert ((split.condition == TEST) == (plain.condition == TEST)).all()
        assert abs(split.record["imbalance"] - level) <= Imbalance().tolerance
        measured = [len(training(screen, split, context)) for context in range(3)]
        assert imbalance(np.array(measured)) == pytest.approx(split.record["imbalance"])
        assert split.record["training_perturbations"] == {f"line_{'abc'[c]}": measured[c] for c in range(3)}


@given(st.integers(6, 14), st.integers(2, 4), st.integers(0, 50))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_small_screens_keep_the_laws_too(perturbations, contexts, seed):
    rng = np.random.default_rng(seed)
    cells = [c for c in screens.rectangle(contexts, perturbations) if c[1] == "control" or rng.random() < 0.9]
    conditions = screens.conditions_of(cells)
    splits = []
    for level in LEVELS:
        ablation = Imbalance(level=level, tolerance=1.0)
        try:
            splits.append(ablation.apply(conditions, TASK, seed=seed))
        except InputError:
            assume(False)
    for larger, smaller in pairwise(splits):
        assert not ((smaller.condition == TRAIN) & (larger.condition != TRAIN)).any()
        for subset in (VAL, TEST):
            assert ((larger.condition == subset) == (smaller.condition == subset)).all()
        assert (larger.stratum == smaller.stratum).all()


def test_a_test_condition_without_training_at_the_highest_level_is_in_a_stratum_of_its_own():
    """At least one is certain to be lost where few training perturbations are left."""
    conditions = screens.conditions_of(screens.rectangle(3, 30))
    ablation = Imbalance(level=0.2, base=4, minimum=1, highest=0.2)
    split = ablation.apply(conditions, TASK, seed=0)
    lost = (split.condition == TEST) & (split.stratum == "lost")
    assert lost.any()
    trained = set().union(*(training(conditions, split, context) for context in range(3)))
    tested = ~conditions.is_control & (TASK.split(conditions).condition == TEST)
    assert (lost == tested & ~np.isin(conditions.perturbation, sorted(trained))).all()


@pytest.mark.parametrize("seed", range(3))
def test_labels_that_another_context_holds_out_are_removed_last(screen, seed):
    """So that no test condition is lost while a context keeps a label that nothing needs."""
    split = Imbalance(level=0.3).apply(screen, TASK, seed=seed)
    assert not (split.stratum[split.condition == TEST] == "lost").any()


def test_another_seed_keeps_other_perturbations_and_the_same_task(screen):
    first, second = (Imbalance(level=0.3).apply(screen, TASK, seed=seed) for seed in (0, 1))
    assert training(screen, first, 2) != training(screen, second, 2)
    held = np.isin(TASK.split(screen).condition, [TEST])
    assert (first.condition[held] == second.condition[held]).all()


@pytest.mark.parametrize(
    "ablation", [Imbalance(level=0.3), PublishedImbalance(counts=(188, 30, 30))], ids=["imbalance", "published"]
)
def test_nothing_happens_to_controls(screen, ablation):
    plain, split = TASK.split(screen), ablation.apply(screen, TASK, seed=0)
    control = screen.is_control[screen.cell_condition]
    assert (split.cell[control] == plain.cell[control]).all()
    assert (split.condition[screen.is_control] == TRAIN).all()


@pytest.mark.parametrize(
    "ablation", [Imbalance(level=0.3), PublishedImbalance(counts=(188, 30, 30))], ids=["imbalance", "published"]
)
def test_cells_follow_their_condition(screen, ablation):
    split = ablation.apply(screen, TASK, seed=0)
    perturbed = ~screen.is_control[screen.cell_condition]
    assert (split.cell[perturbed] == split.condition[screen.cell_condition[perturbed]]).all()
    assert (split.cell == UNUSED).any()


def test_a_level_out_of_reach_is_refused_with_the_range_there_is(screen):
    with pytest.raises(
        InputError, match=r"ablation\.level=0\.95: this screen reaches imbalance 0\.000 to 0\.\d+ \(3 con"
    ):
        Imbalance(level=0.95).apply(screen, TASK, seed=0)


def test_a_highest_level_out_of_reach_is_refused_by_its_own_name(screen):
    with pytest.raises(InputError, match=r"ablation\.highest=0\.95: this screen reaches imbalance"):
        Imbalance(level=0.1, highest=0.95).apply(screen, TASK, seed=0)


def test_one_context_has_no_imbalance():
    with pytest.raises(InputError, match="at least two contexts"):
        Imbalance().solve(0.1, base=10, contexts=1)


def test_a_base_that_a_context_does_not_have_is_refused_by_name(screen):
    with pytest.raises(InputError, match=r"ablation\.base=150: context line_\w has only 132 training perturbations"):
        Imbalance(base=150).apply(screen, TASK, seed=0)


def test_contexts_shrink_in_the_stated_order(screen):
    default = Imbalance(level=0.2).apply(screen, TASK, seed=0).record["training_perturbations"]
    assert list(default) == ["line_b", "line_a", "line_c"], "by cells"
    stated = Imbalance(level=0.2, order=("line_c", "line_a", "line_b")).apply(screen, TASK, seed=0)
    found = stated.record["training_perturbations"]
    assert list(found) == ["line_c", "line_a", "line_b"]
    assert list(found.values()) == list(default.values()) == sorted(default.values(), reverse=True)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("line_c", "line_a", "lime_b"), "no context 'lime_b'; did you mean 'line_b'"),
        (("line_c", "line_a"), "must name every context once: line_a, line_b, line_c"),
        (("line_c", "line_a", "line_a"), "must name every context once"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(screen, order, message):
    with pytest.raises(InputError, match=message):
        Imbalance(order=order).apply(screen, TASK, seed=0)


# where the total is fixed


def entropy_imbalance(counts) -> float:
    return 1 - entropy(counts, base=len(counts))


def test_with_the_total_of_the_published_design_counts_are_those_of_the_design(screen):
    """Worked out by hand for 180 training conditions and at most 132 in a line."""
    wanted = {0.0: [60, 60, 60], 0.1: [97, 54, 29], 0.2: [114, 47, 19], 0.3: [127, 40, 13]}
    for level, counts in wanted.items():
        split = Imbalance(level=level, fixed=True, total=180).apply(screen, TASK, seed=0)
        assert list(split.record["training_perturbations"].values()) == counts


@given(st.integers(0, 3000), st.integers(2, 12), st.integers(0, 4), st.floats(0, 1))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_shares_have_their_total_their_floor_and_their_order(beyond, contexts, minimum, ratio):
    total = contexts * minimum + beyond
    (counts,) = geometric_shares(total, np.array([ratio]), contexts=contexts, minimum=minimum)
    assert counts.sum() == total
    assert counts.min() >= minimum
    assert (np.diff(counts) <= 0).all()
    free = counts[counts > minimum + 1]  # in proportion, to the rounding of each
    for large, small in pairwise(free):
        assert abs(small - ratio * large) <= 1 + ratio


@pytest.mark.parametrize("seed", range(7))
def test_at_a_fixed_total_levels_differ_in_imbalance_and_in_nothing_else(screen, seed):
    splits = [Imbalance(level=v, fixed=True, rotate=True).apply(screen, TASK, seed=seed) for v in LEVELS]
    counts = [[len(training(screen, split, context)) for context in range(3)] for split in splits]
    assert len({sum(row) for row in counts}) == 1
    measured = [entropy_imbalance(row) for row in counts]
    for level, value, split, row in zip(LEVELS, measured, splits, counts, strict=True):
        assert value == pytest.approx(split.record["imbalance"], abs=1e-12)
        assert abs(value - level) <= Imbalance().tolerance
        assert split.record["training_perturbations"] == dict(zip(("line_a", "line_b", "line_c"), row, strict=True))
    assert (np.diff(measured) > 0.05).all()
    for first, second in pairwise(splits):
        for subset in (VAL, TEST):
            assert ((first.condition == subset) == (second.condition == subset)).all()
            assert ((first.cell == subset) == (second.cell == subset)).all()
        assert (first.stratum == second.stratum).all()
        for context in range(3):  # what falls is nested downward, what rises upward
            few, many = sorted((training(screen, split, context) for split in (first, second)), key=len)
            assert few <= many
    tested = splits[0].condition == TEST
    assert tested.sum() == (TASK.split(screen).condition == TEST).sum()
    common = set(screen.perturbation[tested & (splits[0].stratum == "common")].tolist())
    for split in splits:
        assert common <= set().union(*(training(screen, split, context) for context in range(3)))


@given(st.integers(8, 40), st.integers(2, 5), st.integers(0, 50))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_small_screens_have_one_total_too(perturbations, contexts, seed):
    rng = np.random.default_rng(seed)
    cells = [c for c in screens.rectangle(contexts, perturbations) if c[1] == "control" or rng.random() < 0.9]
    conditions = screens.conditions_of(cells)
    splits = []
    for level in LEVELS:
        ablation = Imbalance(level=level, fixed=True, rotate=True, tolerance=0.09)
        try:
            splits.append(ablation.apply(conditions, TASK, seed=seed))
        except InputError:
            assume(False)
    whole = TASK.split(conditions).condition
    assert len({int(((s.condition == TRAIN) & ~conditions.is_control).sum()) for s in splits}) == 1
    for low, high in pairwise(splits):
        assert low.record["imbalance"] <= high.record["imbalance"]
        assert (np.isin(low.condition, [VAL, TEST]) == np.isin(high.condition, [VAL, TEST])).all()
        assert (low.stratum == high.stratum).all()
    for split in splits:
        assert (whole[split.condition == TRAIN] == TRAIN).all(), "training holds nothing that the task holds out"
        assert (whole[split.condition == TEST] == TEST).all()


@pytest.mark.parametrize("contexts", [2, 3, 5])
def test_each_context_is_the_largest_equally_often(contexts):
    conditions = screens.conditions_of(screens.rectangle(contexts, 60))
    largest = []
    for seed in replicates(contexts):
        counts = Imbalance(level=0.2, fixed=True, rotate=True).apply(conditions, TASK, seed=seed)
        counts = counts.record["training_perturbations"]
        largest.append(max(counts, key=counts.get))
    assert len(largest) >= 3
    assert {largest.count(conditions.context_name(c)) for c in range(contexts)} == {len(largest) // contexts}


def test_replicates_go_through_all_orders_of_three_contexts():
    orders = [tuple(rotated([0, 1, 2], number)) for number in range(6)]
    assert set(orders) == set(permutations(range(3)))
    assert [order[0] for order in orders] == [0, 1, 2, 0, 1, 2]
    assert all(sorted(rotated(list(range(5)), number)) == list(range(5)) for number in range(10))
    assert list(replicates(3, asked=4)) == [0, 1, 2, 3]


def test_without_rotation_the_largest_context_stays(screen):
    for seed in range(3):
        found = Imbalance(level=0.2, fixed=True).apply(screen, TASK, seed=seed).record["training_perturbations"]
        assert list(found) == ["line_b", "line_a", "line_c"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"fixed": True, "total": 400},
            r"ablation\.total=400: 3 contexts of 2 to 132 training perturbations have 6 to 396",
        ),
        (
            {"fixed": True, "total": 380, "level": 0.2},
            r"ablation\.level=0\.2: .* 380 in all, at least 2 kept\); nearest",
        ),
        ({"total": 180}, r"ablation\.total=180: without ablation\.fixed=true"),
    ],
)
def test_a_total_that_contexts_cannot_share_is_refused_in_numbers(screen, fields, message):
    with pytest.raises(InputError, match=message):
        Imbalance(**fields).apply(screen, TASK, seed=0)


SCRIPT = """
import sys, json
sys.path.insert(0, {tests!r})
import numpy as np, screens
from perturbray.data.ablations import DataScaling, Imbalance
from perturbray.data.splits import CovariateTransfer

cells = [c for n, c in enumerate(screens.rectangle(4, 30, cells=3)) if n % 7]
names = [f"cell_{{i:05d}}" for i in range(len(cells))]
order = np.random.default_rng({order}).permutation(len(cells)) if {order} else np.arange(len(cells))
conditions = screens.conditions_of([cells[i] for i in order], names=[names[i] for i in order])
found = []
for ablation in (
    Imbalance(level=0.2, fixed=True, rotate=True),
    Imbalance(level=0.2),
    DataScaling(axis="contexts", level=0.75, smallest=0.5),
    DataScaling(axis="perturbations", level=0.5, smallest=0.25),
    DataScaling(axis="cells", level=0.5),
):
    split = ablation.apply(conditions, CovariateTransfer(), seed=5)
    by_name = dict(zip(conditions.cell_names.tolist(), split.cell.tolist()))
    found.append([split.condition.tolist(), sorted(by_name.items()), split.stratum.tolist(), split.record])
print(json.dumps(found, sort_keys=True))
"""


def test_neither_the_order_of_cells_nor_the_hash_seed_changes_what_is_kept():
    outputs = set()
    for order, hash_seed in ((0, "0"), (1, "1"), (2, "12345")):
        source = SCRIPT.format(tests=str(Path(__file__).parents[1]), order=order)
        run = subprocess.run(
            [sys.executable, "-c", source],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(run.stdout)
    assert len(outputs) == 1
    assert len(outputs.pop()) > 1000


# the published form


def test_published_triples_drop_and_then_split_so_that_the_test_set_shrinks(screen):
    splits = [PublishedImbalance(counts=counts).apply(screen, TASK, seed=0) for counts in PublishedImbalance.LEVELS]
    for counts, split in zip(PublishedImbalance.LEVELS, splits, strict=True):
        used = [(split.condition != UNUSED) & ~screen.is_control & (screen.context == c) for c in (1, 0, 2)]
        assert tuple(int(rows.sum()) for rows in used) == counts
        assert split.record["imbalance"] == imbalance(np.array(counts))
    plain = TASK.split(screen)
    assert (splits[0].condition == plain.condition).all()
    assert (splits[0].cell == plain.cell).all()
    tests = [int((split.condition == TEST).sum()) for split in splits]
    assert tests == sorted(tests, reverse=True)
    assert len(set(tests)) == 4
    used = [set(np.flatnonzero(split.condition != UNUSED)) for split in splits]
    assert used[0] > used[1] > used[2] > used[3]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((188, 30), r"is for 2 contexts; this screen has 3"),
        ((188, 189, 30), r"context line_a has 188 perturbations, not 189"),
    ],
)
def test_published_counts_that_do_not_fit_are_refused(screen, counts, message):
    with pytest.raises(InputError, match=message):
        PublishedImbalance(counts=counts).apply(screen, TASK, seed=0)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_registered_ablation_is_frozen_and_a_function_of_its_fields_and_the_seed(name, screen):
    spec = ABLATIONS[name]()
    hash(spec)
    first, second = (replace(spec).apply(screen, TASK, seed=3) for _ in range(2))
    assert (first.condition == second.condition).all()
    assert (first.cell == second.cell).all()
    assert {TRAIN, VAL, TEST} <= set(first.condition.tolist())
