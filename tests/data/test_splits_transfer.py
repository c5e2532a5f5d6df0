"""Laws of covariate transfer, over designs as unbalanced as they come: nothing is lost, and only the seed decides."""

import numpy as np
import pytest
import screens
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from split_laws import conditions_of, designs, in_words

from perturbray.data.splits import (
    TEST,
    TRAIN,
    UNUSED,
    VAL,
    CovariateTransfer,
    cut_controls,
)
from perturbray.errors import InputError


@st.composite
def tasks(draw) -> CovariateTransfer:
    return CovariateTransfer(
        fraction=draw(st.sampled_from([0.1, 0.3, 0.5, 0.9])),
        max_contexts=draw(st.integers(1, 3)),
        min_train_contexts=draw(st.integers(1, 2)),
        controls=draw(st.sampled_from([(0.5, 0.25, 0.25), (0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.0, 0.4, 0.6)])),
        seed=draw(st.integers(0, 1000)),
    )


def admits(conditions, task: CovariateTransfer) -> bool:
    """Whether any condition can be held out, said in another way than the splitter says it."""
    for context in range(len(conditions.contexts)):
        here = conditions.perturbation[(conditions.context == context) & ~conditions.is_control]
        often = [(conditions.perturbation == label).sum() > task.min_train_contexts for label in here]
        if round(task.fraction * len(here)) >= 1 and any(often):
            return True
    return False


@given(designs(), tasks())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_transfer_keeps_the_laws(cells, task):
    conditions = conditions_of(cells)
    if not admits(conditions, task):
        with pytest.raises(InputError, match="no condition can be held out"):
            task.split(conditions)
        return
    split = task.split(conditions)
    perturbed, control = ~conditions.is_control, conditions.is_control
    of_cell = conditions.cell_condition

    # Nothing is lost, and nothing stands in two sets.
    assert not (split.condition == UNUSED).any()
    assert not (split.cell == UNUSED).any()
    parts = [split.cells(s, conditions=conditions, controls=c) for s in range(4) for c in (False, True)]
    assert sorted(np.concatenate(parts)) == list(range(len(of_cell)))
    assert (split.cell[perturbed[of_cell]] == split.condition[of_cell[perturbed[of_cell]]]).all()
    assert (split.condition[control] == TRAIN).all()

    held = perturbed & (split.condition != TRAIN)
    assert held.any()
    for label in set(conditions.perturbation[held]):
        here = perturbed & (conditions.perturbation == label)
        assert (here & ~held).sum() >= task.min_train_contexts
        assert (here & held).sum() <= task.max_contexts

    for context in range(len(conditions.contexts)):
        here = conditions.context == context
        # Every context has controls in every set.
        rows = np.flatnonzero((control & here)[of_cell])
        assert {TRAIN, VAL, TEST} == set(split.cell[rows].tolist())
        # No more is held out than was asked for, and half of it is for either purpose; a lone one goes to test.
        n, val, test = ((held & here).sum(), *((here & perturbed & (split.condition == s)).sum() for s in (VAL, TEST)))
        assert n <= round(task.fraction * (here & perturbed).sum())
        assert n == val + test
        assert (val, test) == (0, 1) if n == 1 else abs(val - test) <= 1

    counts = split.record["counts"]
    assert list(counts) == [conditions.context_name(c) for c in range(len(conditions.contexts))]
    assert sum(sum(row[0] for row in of.values()) for of in counts.values()) == perturbed.sum()
    assert sum(sum(row[1] + row[2] for row in of.values()) for of in counts.values()) == len(of_cell)


def test_one_context_admits_no_transfer():
    conditions = conditions_of(screens.rectangle(1, 5))
    with pytest.raises(InputError, match=r"1 context\(s\) \(line_a\).*needs perturbations measured in two contexts"):
        CovariateTransfer().split(conditions)


def test_a_context_of_one_perturbation_keeps_it_and_its_controls():
    cells = [*screens.rectangle(2, 10), *[(("lone",), "control")] * 6, (("lone",), "drug_000")]
    conditions = conditions_of(cells)
    split = CovariateTransfer().split(conditions)
    of_condition, _ = in_words(conditions, split)
    assert of_condition[("lone",), "drug_000"] == "train"
    assert split.record["counts"]["lone"] == {
        "unused": [0, 0, 0],
        "train": [1, 1, 2],
        "val": [0, 0, 2],
        "test": [0, 0, 2],
    }


def test_a_context_with_too_few_controls_is_refused_in_words():
    cells = [*screens.rectangle(2, 10), *[(("lone",), "control")] * 2, (("lone",), "drug_000")]
    with pytest.raises(InputError, match="context lone has 2 control cells; 2 in each of train, validation and test"):
        CovariateTransfer().split(conditions_of(cells))


@given(
    st.integers(1, 60),
    st.integers(1, 6),
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)).filter(any),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_controls_are_cut_by_their_shares_with_the_least_in_each(number, least, weights):
    conditions = conditions_of([(("a",), "control")] * number + [(("a",), "x")])
    shares = tuple(w / sum(weights) for w in weights)
    cell = np.zeros(number + 1, dtype=np.int8)
    if number < 3 * least:
        with pytest.raises(InputError, match=f"context a has {number} control cells"):
            cut_controls(cell, conditions, shares=shares, least=least, seed=0)
        return
    cut_controls(cell, conditions, shares=shares, least=least, seed=0)
    sizes = np.bincount(cell[:number], minlength=4)
    assert sizes[UNUSED] == 0
    assert sizes[1:].min() >= least
    if number * min(shares) >= least:
        assert np.abs(sizes[1:] - number * np.array(shares)).max() <= 1.5


def test_the_seed_decides_and_one_seed_is_one_split():
    conditions = conditions_of(screens.rectangle(3, 20))
    splits = [CovariateTransfer(seed=seed).split(conditions) for seed in (1, 1, 2)]
    assert (splits[0].condition == splits[1].condition).all()
    assert (splits[0].cell == splits[1].cell).all()
    assert (splits[0].condition != splits[2].condition).any()
    assert (splits[0].cell != splits[2].cell).any()


def test_every_perturbation_has_the_same_chance_of_being_held_out():
    """188 x 3 over 100 seeds: 56 a line, each perturbation 89.4 times give or take (spec of the splitter)."""
    conditions = conditions_of(screens.rectangle(3, 188, controls=6))
    perturbed = ~conditions.is_control
    labels, code = np.unique(conditions.perturbation[perturbed], return_inverse=True)
    times = np.zeros((3, 188), dtype=int)
    for seed in range(100):
        held = CovariateTransfer(seed=seed).split(conditions).condition[perturbed] != TRAIN
        here = np.zeros_like(times)
        np.add.at(here, (conditions.context[perturbed][held], code[held]), 1)
        assert here.sum(axis=1).tolist() == [56, 56, 56]
        assert here.sum(axis=0).max() == 1
        times += here
    assert len(labels) == 188

    def within_four_standard_errors(count, chance):
        assert np.abs(count - 100 * chance).max() < 4 * np.sqrt(100 * chance * (1 - chance))

    within_four_standard_errors(times.sum(axis=0), 168 / 188)
    within_four_standard_errors(times, 56 / 188)


def test_where_there_are_too_few_perturbations_for_all_contexts_none_of_these_is_favoured():
    """Nine perturbations, of which two contexts are to hold out eight each: one gets five, and either is as likely."""
    conditions = conditions_of(screens.rectangle(2, 9))
    splits = [CovariateTransfer(fraction=0.9, seed=seed).split(conditions) for seed in range(100)]
    held = np.array([np.bincount(conditions.context[split.condition != TRAIN], minlength=2) for split in splits])
    assert set(map(tuple, held.tolist())) == {(4, 5), (5, 4)}
    assert stats.binomtest(int((held[:, 0] == 5).sum()), 100, 0.5).pvalue > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fraction": 0.0}, r"split\.fraction=0\.0"),
        ({"fraction": 1.0}, r"split\.fraction=1\.0"),
        ({"controls": (0.5, 0.5)}, r"split\.controls=\(0\.5, 0\.5\): three shares"),
        ({"controls": (0.5, 0.3, 0.3)}, "sum to 1"),
        ({"controls": (1.5, -0.25, -0.25)}, "three shares"),
        ({"min_controls": 0}, r"split\.min_controls=0: at least 1"),
        ({"max_contexts": 0}, r"split\.max_contexts=0: at least 1"),
    ],
)
def test_an_impossible_task_is_refused_by_its_field(fields, message):
    with pytest.raises(InputError, match=message):
        CovariateTransfer(**fields)
