"""Repeats and turns: seeds that follow one another, and turns in which everything is tested once."""

from collections import Counter

import numpy as np
import pytest
import screens
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from split_laws import conditions_of, designs

from perturbray.data.splits import (
    TEST,
    TRAIN,
    VAL,
    Combination,
    CovariateTransfer,
    HeldOutContexts,
    Manual,
    Saved,
    TransferInto,
    UnseenPerturbation,
    repeats,
    rotation,
)
from perturbray.data.splits.repeated import equal_folds
from perturbray.errors import InputError


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=70, unique=True),
    st.integers(2, 7),
    st.integers(0, 99),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_folds_are_equal_on_both_sides_of_any_set_of_pairs(pairs, folds, seed):
    left, right = np.array(pairs).T
    fold = equal_folds(left, right, folds, np.random.default_rng(seed))
    assert fold.shape == (len(pairs),)
    assert set(fold.tolist()) <= set(range(folds))
    for side in (left, right):
        for code in set(side.tolist()):
            sizes = np.bincount(fold[side == code], minlength=folds)
            assert sizes.max() - sizes.min() <= 1, sizes


def test_folds_are_drawn():
    left, right = np.divmod(np.arange(60), 3)
    folds = [equal_folds(left, right, 3, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2)]
    assert folds[0] == folds[1] != folds[2]


def test_which_pairs_of_a_context_meet_in_a_fold_is_chance():
    """20 pairs a context in folds of 7, 7 and 6: two meet in 57 of 190."""
    left, right = np.divmod(np.arange(60), 3)
    drawn = np.array([equal_folds(left, right, 3, np.random.default_rng(seed)) for seed in range(100)])
    first, second = np.triu_indices(20, 1)
    for context in range(3):
        here = drawn[:, right == context]
        times = (here[:, first] == here[:, second]).sum(axis=0)
        least, most = stats.binom.ppf([1e-6, 1 - 1e-6], 100, 57 / 190)
        assert least <= times.min() <= times.max() <= most
        assert times.mean() == pytest.approx(30, abs=0.5)


def turned(task, conditions) -> tuple[Counter, Counter]:
    """How often the turns of a task test a condition, and validate on it."""
    found = Counter(), Counter()
    for turn in rotation(task, conditions):
        split = turn.split(conditions)
        assert (split.condition == TEST).any()
        for counter, subset in zip(found, (TEST, VAL), strict=True):
            counter.update(np.flatnonzero(split.condition == subset).tolist())
    return found


@pytest.mark.parametrize(
    ("task", "turns", "may_be"),
    [
        (CovariateTransfer(), 6, "all"),
        (CovariateTransfer(fraction=0.5, max_contexts=2), 4, "all"),
        (CovariateTransfer(fraction=0.25), 8, "all"),
        (Combination(fraction=0.5), 4, "pairs"),
        (Combination(), 2, "pairs"),
        (UnseenPerturbation(fraction=0.34), 6, "singles"),
        (HeldOutContexts(), 3, "all"),
        (HeldOutContexts(number=2, by="covariate_0"), 1, None),
    ],
)
def test_in_all_turns_together_everything_is_tested_once(task, turns, may_be):
    labels = [*"ABCDEFGH", *(f"{a}+{b}" for a, b in zip("ABCDEF", "BCDEFG", strict=True))]
    cells = [((c,), label) for c in ("k", "l", "m") for label in ["control"] * 8 + labels]
    conditions = conditions_of(cells)
    if may_be is None:
        with pytest.raises(InputError, match=r"3 value\(s\) of covariate_0 with perturbations"):
            turned(task, conditions)
        return
    assert [turn.turn for turn in rotation(task, conditions)] == list(range(turns))
    often, watched = turned(task, conditions)
    pair = np.array([len(singles) > 1 for singles in conditions.singles])
    rows = ~conditions.is_control & {"all": True, "pairs": pair, "singles": ~pair}[may_be]
    assert {row: n for row, n in often.items() if rows[row]} == dict.fromkeys(np.flatnonzero(rows).tolist(), 1)
    if may_be == "singles":  # a combination is tested in the turns of its singles
        assert {often[row] for row in np.flatnonzero(pair)} <= {1, 2}
    elif not isinstance(task, HeldOutContexts):
        assert set(watched.values()) == {1}


def test_turns_of_a_transfer_hold_out_equal_parts_of_every_context():
    made = []

    @given(designs(), st.sampled_from([0.3, 0.5]), st.integers(0, 20))
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def on_a_design(cells, fraction, seed):
        conditions = conditions_of(cells)
        task = CovariateTransfer(fraction=fraction, max_contexts=5, seed=seed)
        try:
            splits = [turn.split(conditions) for turn in rotation(task, conditions)[::2]]
        except InputError:  # too few pairs to test in every turn, or too many contexts for the parts
            return
        held, sizes = Counter(), []
        for split in splits:
            rows = np.flatnonzero(np.isin(split.condition, [VAL, TEST]))
            held.update(rows.tolist())
            sizes.append(np.bincount(conditions.context[rows], minlength=len(conditions.contexts)))
        times = {label: (conditions.perturbation == label).sum() for label in conditions.perturbations}
        eligible = [r for r in np.flatnonzero(~conditions.is_control) if times[conditions.perturbation[r]] > 1]
        assert held == Counter(eligible)
        assert np.ptp(sizes, axis=0).max() <= 1
        made.append(cells)

    on_a_design()
    assert len(made) >= 10


def test_a_turn_that_cannot_be_is_refused():
    conditions = conditions_of(screens.rectangle(5, 10))
    with pytest.raises(InputError, match=r"split.turn=6: split.fraction=0.3 makes 6 turns, 0 to 5"):
        CovariateTransfer(turn=6).split(conditions)
    with pytest.raises(InputError, match=r"each of 3 parts holds out drug_000 in 2 of its contexts, and 1 are allowed"):
        CovariateTransfer(turn=0).split(conditions)
    with pytest.raises(InputError, match="10 cannot be held out in 10 parts of two or more"):
        UnseenPerturbation(turn=0, fraction=0.1).split(conditions)


def test_repeats_have_the_seeds_that_follow():
    assert [task.seed for task in repeats(TransferInto(contexts=("a",), seed=7), 3)] == [7, 8, 9]
    conditions = conditions_of(screens.rectangle(3, 20))
    splits = [task.split(conditions).condition.tolist() for task in repeats(CovariateTransfer(), 4)]
    assert len(set(map(tuple, splits))) == 4


def test_what_draws_nothing_has_no_repeats_and_what_has_no_parts_no_turns():
    with pytest.raises(InputError, match="Saved draws nothing"):
        repeats(Saved(path="x.csv"), 2)
    conditions = conditions_of(screens.rectangle(3, 4))
    with pytest.raises(InputError, match="Manual has no turns; transfer, combination"):
        rotation(Manual(test=("drug_000",)), conditions)
    assert len(rotation(HeldOutContexts(test=("line_a",)), conditions)) == 1
    assert TRAIN in HeldOutContexts(test=("line_a",)).split(conditions).condition
