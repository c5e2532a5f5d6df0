"""Laws of scaling: a smaller level is a part of each larger one, and what is judged is the same at all of them."""

from itertools import pairwise

import numpy as np
import pytest
import screens
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perturbray.data.ablations import DataScaling
from perturbray.data.ablations.scaling import AXES, levels
from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import TEST, TRAIN, UNUSED, VAL, Combination, CovariateTransfer, UnseenPerturbation
from perturbray.data.truth import digest
from perturbray.errors import InputError
from perturbray.models import MODELS
from perturbray.training.fit import Training
from perturbray.trial import Trial, run

TASK = CovariateTransfer()


@pytest.fixture(scope="module")
def screen():
    """Five contexts, thirty perturbations of one to six cells."""
    rng = np.random.default_rng(0)
    cells = [c for c in screens.rectangle(5, 30) for _ in range(1 if c[1] == "control" else rng.integers(1, 7))]
    return screens.conditions_of(cells)


def scaled(conditions, task, axis: str, sizes, *, seed: int) -> list:
    return [
        DataScaling(axis=axis, level=size, smallest=min(sizes)).apply(conditions, task, seed=seed) for size in sizes
    ]


def check_laws(conditions, task, splits) -> None:
    """Nested, judged on the same, and with nothing in two places."""
    whole = task.split(conditions)
    code, control = conditions.cell_condition, conditions.is_control[conditions.cell_condition]
    for split in splits:
        perturbed = ~conditions.is_control
        for subset in (TRAIN, VAL, TEST):
            assert (whole.condition[(split.condition == subset) & perturbed] == subset).all(), "nothing changes sides"
            assert (whole.cell[split.cell == subset] == subset).all()
            assert (split.condition[code[(split.cell == subset) & ~control]] == subset).all()
        for subset in (TRAIN, VAL, TEST):  # a condition of a subset has cells there, and its context has controls
            rows = np.flatnonzero((split.condition == subset) & perturbed)
            assert set(rows) == set(code[(split.cell == subset) & ~control])
            assert set(conditions.context[rows]) <= set(conditions.context[code[(split.cell == subset) & control]])
        shown, asked = (
            {single for row in np.flatnonzero(rows) for single in conditions.singles[row]}
            for rows in ((split.condition == TRAIN) & perturbed, split.condition == TEST)
        )
        ever = {s for row in np.flatnonzero((whole.condition == TRAIN) & perturbed) for s in conditions.singles[row]}
        assert asked & ever <= shown
    for small, large in pairwise(splits):
        assert digest(conditions, small) == digest(conditions, large)
        assert digest(conditions, small, subset=VAL) == digest(conditions, large, subset=VAL)
        assert (small.stratum == large.stratum).all()
        assert not ((small.cell == TRAIN) & (large.cell != TRAIN)).any()
        assert not ((small.condition == TRAIN) & (large.condition != TRAIN)).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("axis", "sizes"),
    [
        ("contexts", (0.4, 0.6, 1.0)),
        ("contexts", (2, 3, 5)),
        ("perturbations", (0.25, 0.5, 1.0)),
        ("perturbations", (10, 20)),
        ("cells", (0.1, 0.5, 1.0)),
        ("cells", (2, 4)),
    ],
)
def test_levels_are_nested_and_judged_on_the_same_cells(screen, axis, sizes, seed):
    splits = scaled(screen, TASK, axis, sizes, seed=seed)
    check_laws(screen, TASK, splits)
    trained = [int(((s.cell == TRAIN) & ~screen.is_control[screen.cell_condition]).sum()) for s in splits]
    assert all(small < large for small, large in pairwise(trained))


@given(st.integers(0, 60))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_screens_with_gaps_and_other_tasks_keep_the_laws(seed):
    rng = np.random.default_rng(seed)
    cells = [c for c in screens.rectangle(4, 14, cells=2) if c[1] == "control" or rng.random() < 0.85]
    pairs = [(context, f"drug_{a:03d}+drug_{a + 1:03d}") for context, label in cells[:9] for a in (0, 3, 6)]
    conditions = screens.conditions_of(cells + pairs * 2)
    tasks = (TASK, Combination(missing_single="allow"), UnseenPerturbation())
    task, axis = tasks[seed % 3], tuple(AXES)[seed % 4 % 3]
    try:
        splits = scaled(conditions, task, axis, (0.5, 0.75, 1.0), seed=seed)
    except InputError:
        assume(False)
    check_laws(conditions, task, splits)


def test_a_level_keeps_as_many_contexts_as_it_says_and_their_controls(screen):
    for size, number in ((0.4, 2), (0.6, 3), (4, 4), (1.0, 5)):
        split = DataScaling(level=size, smallest=2).apply(screen, TASK, seed=1)
        cells = screen.cell_condition[split.cell == TRAIN]
        assert len(set(screen.context[cells].tolist())) == number
        assert set(split.record["training_perturbations"]) == {
            screen.context_name(c) for c in set(screen.context[cells])
        }
        judged = screen.cell_condition[np.isin(split.cell, [VAL, TEST])]
        assert len(set(screen.context[judged].tolist())) == 2, "those of the smallest level"


def test_a_level_keeps_as_many_perturbations_as_it_says_in_every_context_that_trains_on_them(screen):
    plain = TASK.split(screen)
    perturbed = ~screen.is_control
    for size, number in ((0.25, 8), (0.5, 15), (20, 20)):
        split = DataScaling(axis="perturbations", level=size, smallest=0.25).apply(screen, TASK, seed=1)
        train = (split.condition == TRAIN) & perturbed
        kept = set(screen.perturbation[train].tolist())
        assert len(kept) == number
        assert (train == (plain.condition == TRAIN) & np.isin(screen.perturbation, sorted(kept))).all()
        assert (split.cell[screen.is_control[screen.cell_condition]] != UNUSED).all()


def test_a_level_keeps_as_many_cells_of_each_training_condition_as_it_says(screen):
    plain = TASK.split(screen)
    train = np.flatnonzero((plain.condition == TRAIN) & ~screen.is_control)
    for size in (0.1, 0.5, 3):
        split = DataScaling(axis="cells", level=size).apply(screen, TASK, seed=1)
        kept = np.bincount(screen.cell_condition[split.cell == TRAIN], minlength=len(screen))[train]
        of = screen.cells[train]
        assert (kept == (np.maximum(1, np.round(size * of)) if size <= 1 else np.minimum(size, of))).all()
        assert (split.condition == plain.condition).all()
        other = split.cell != plain.cell
        assert (plain.cell[other] == TRAIN).all()
        assert not screen.is_control[screen.cell_condition[other]].any()


def test_all_of_it_is_the_task_itself(screen):
    plain = TASK.split(screen)
    for axis in AXES:
        split = DataScaling(axis=axis, level=1.0).apply(screen, TASK, seed=2)
        assert (split.condition == plain.condition).all()
        assert (split.cell == plain.cell).all()


def test_another_seed_nests_in_another_order(screen):
    for axis in AXES:
        found = {DataScaling(axis=axis, level=0.5).apply(screen, TASK, seed=seed).cell.tobytes() for seed in range(6)}
        assert len(found) > 2


def test_contexts_that_are_tested_come_first_and_named_ones_before_them():
    """As in McFaline-Figueroa 2023, where three of fifteen contexts are held out of and six are always there."""
    cells = screens.rectangle(6, 12)
    cells = [c for c in cells if c[0][0] in ("line_b", "line_e") or c[1] == "control" or int(c[1][-1]) % 2]
    conditions = screens.conditions_of(cells)
    whole = TASK.split(conditions)
    only = np.isin(conditions.context, [1, 4]) | (whole.condition == TRAIN)

    class TwoContexts(CovariateTransfer):
        def split(self, conditions):
            kept = np.where(only, whole.condition, TRAIN).astype(np.int8)
            perturbed = ~conditions.is_control[conditions.cell_condition]
            cell = np.where(perturbed, kept[conditions.cell_condition], whole.cell).astype(np.int8)
            return type(whole)(condition=kept, cell=cell, stratum=whole.stratum)

    for seed in range(6):
        split = DataScaling(level=3, smallest=2).apply(conditions, TwoContexts(), seed=seed)
        assert {"line_b", "line_e"} < set(split.record["training_perturbations"])
        named = DataScaling(level=3, smallest=3, order=("line_f",)).apply(conditions, TwoContexts(), seed=seed)
        assert set(named.record["training_perturbations"]) == {"line_b", "line_e", "line_f"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axis": "context"}, r"no axis of scaling is named 'context': did you mean 'contexts'\?"),
        ({"level": 0}, r"ablation\.level=0: a share up to 1, or a whole number of contexts"),
        ({"level": 2.5}, r"ablation\.level=2\.5: a share up to 1, or a whole number of contexts"),
        ({"smallest": -1}, r"ablation\.smallest=-1: a share up to 1"),
        ({"axis": "cells", "order": ("a",)}, r"ablation\.order: contexts or perturbations have an order"),
        ({"level": 6}, r"ablation\.level=6: training has 5 contexts"),
        ({"axis": "perturbations", "level": 31}, r"ablation\.level=31: training has 30 perturbations"),
        ({"axis": "cells", "level": 7}, r"ablation\.level=7: training has 6 cells in the largest condition"),
        ({"level": 0.05}, r"ablation\.level=0\.05: that is none of 5 contexts"),
        ({"level": 2, "smallest": 3}, r"ablation\.level=2 keeps less than ablation\.smallest=3"),
        (
            {"order": ("line_x",)},
            r"ablation\.order: 'line_x' is none of the contexts of training; did you mean 'line_\w'",
        ),
        (
            {"level": 0.2},
            r"ablation\.smallest=0\.2 keeps 1 of 5 contexts \(line_\w\) and 30 perturbations, .*more contexts",
        ),
    ],
)
def test_what_a_screen_does_not_admit_is_refused_in_numbers(screen, fields, message):
    with pytest.raises(InputError, match=message):
        DataScaling(**fields).apply(screen, TASK, seed=0)


@pytest.mark.parametrize(
    ("text", "axis", "message"),
    [
        ("0.5,3", "cells", r"levels '0\.5,3': either shares, up to 1, or numbers of cells, above 1, and not both"),
        ("a", "cells", r"levels 'a': numbers by comma"),
        ("", "genes", r"no axis of scaling is named 'genes'"),
    ],
)
def test_levels_that_mean_nothing_are_refused(text, axis, message):
    with pytest.raises(InputError, match=message):
        levels(text, axis)


def test_levels_are_typed_as_shares_or_numbers():
    assert levels("15, 6,9", "contexts") == (6, 9, 15)
    assert levels("1,0.5,0.5", "cells") == (0.5, 1)
    assert all(levels("", axis) == AXES[axis] for axis in AXES)


@pytest.mark.parametrize("name", ["mean_shift", "perturbed_mean", "latent_additive"])
def test_models_do_not_see_a_context_that_was_left_out(small_screen, name):
    """Its cells may be anything: nothing of the prediction changes."""
    spec = DatasetSpec(path=str(small_screen))
    lab = screens.lab_of(spec)
    trial = Trial(
        dataset=spec, model=MODELS[name](), ablation=DataScaling(level=2, smallest=2), training=Training(epochs=2)
    )
    kept = trial.make_split(lab.conditions).record["training_perturbations"]
    rows = lab.cells.select(np.arange(len(lab.cells)))
    context = lab.conditions.context[lab.conditions.cell_condition]
    (gone,) = [c for c in range(3) if lab.conditions.context_name(c) not in kept]
    other = rows.copy()
    other.data[np.repeat(context == gone, np.diff(rows.indptr))] *= 3
    first, second = (run(trial, type(lab.cells)([matrix]), lab.conditions) for matrix in (rows, other))
    np.testing.assert_array_equal(first.prediction.predicted.mean, second.prediction.predicted.mean)
    assert first.columns["train_conditions"] == sum(kept.values())
    assert gone not in set(first.prediction.context.tolist())
