"""Laws of the tasks beside covariate transfer: unseen combinations, unseen perturbations, and splits from a file."""

import numpy as np
import pandas as pd
import pytest
import screens
from hypothesis import given, settings
from hypothesis import strategies as st
from split_laws import conditions_of, designs

from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import (
    SUBSETS,
    TEST,
    TRAIN,
    UNUSED,
    VAL,
    Combination,
    CovariateTransfer,
    Saved,
    UnseenPerturbation,
)
from perturbray.errors import InputError
from perturbray.trial import Trial

SHARES = (0.1, 0.3, 0.7, 0.9)


def cells(labels, *, contexts=("a", "b"), controls=8) -> list[screens.Cell]:
    """Two cells of every label, and controls, in every context."""
    return [((c,), label) for c in contexts for label in [*["control"] * controls, *labels, *labels]]


def laws(conditions, split) -> None:
    """What holds of every split that uses all cells."""
    perturbed = ~conditions.is_control[conditions.cell_condition]
    assert not (split.cell == UNUSED).any()
    assert (split.cell[perturbed] == split.condition[conditions.cell_condition[perturbed]]).all()
    for context in range(len(conditions.contexts)):
        rows = (conditions.context[conditions.cell_condition] == context) & ~perturbed
        assert {TRAIN, VAL, TEST} == set(split.cell[rows].tolist())


def subset_of_labels(conditions, split) -> dict[str, int]:
    """The subset of every label, which is the same in all its contexts."""
    found: dict[str, set] = {}
    for label, code in zip(conditions.perturbation.tolist(), split.condition.tolist(), strict=True):
        found.setdefault(label, set()).add(code)
    assert all(len(codes) == 1 for codes in found.values()), "a label leaks from one context to another"
    return {label: codes.pop() for label, codes in found.items()}


@given(designs(), st.sampled_from(SHARES), st.sampled_from(["to_train", "allow", "error"]), st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_combinations_are_held_out_everywhere_and_singles_never(design, fraction, missing, seed):
    conditions = conditions_of(design)
    combined = {
        label for label, singles in zip(conditions.perturbation, conditions.singles, strict=True) if len(singles) > 1
    }
    pairs = {(c, p) for c, p in zip(conditions.context.tolist(), conditions.perturbation.tolist(), strict=True)}
    lacking = {p for c, p in pairs if p in combined and not all((c, single) in pairs for single in p.split("+"))}
    eligible = combined - lacking if missing == "to_train" else combined
    task = Combination(fraction=fraction, missing_single=missing, seed=seed)
    if not eligible or (missing == "error" and lacking):
        with pytest.raises(InputError, match="combination"):
            task.split(conditions)
        return
    split = task.split(conditions)
    laws(conditions, split)
    of_label = subset_of_labels(conditions, split)
    held = {label for label, code in of_label.items() if code != TRAIN}
    assert held <= eligible
    assert len(held) == max(1, round(fraction * len(eligible)))
    val, test = (sum(code == s for code in of_label.values()) for s in (VAL, TEST))
    assert (val, test) == (0, 1) if len(held) == 1 else abs(val - test) <= 1
    if missing != "allow":
        for label in held:
            assert all(of_label[single] == TRAIN for single in label.split("+"))


@given(designs(), st.sampled_from(SHARES), st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_an_unseen_perturbation_is_nowhere_in_training(design, fraction, seed):
    conditions = conditions_of(design)
    alone = {singles[0] for singles in conditions.singles if len(singles) == 1}
    task = UnseenPerturbation(fraction=fraction, seed=seed)
    if len(alone) < 2:
        with pytest.raises(InputError, match="two are needed"):
            task.split(conditions)
        return
    split = task.split(conditions)
    laws(conditions, split)
    of_label = subset_of_labels(conditions, split)
    unseen = {name: of_label[name] for name in alone if of_label[name] != TRAIN}
    assert len(unseen) == min(max(1, round(fraction * len(alone))), len(alone) - 1)
    assert TEST in unseen.values()
    for row, singles in enumerate(conditions.singles):
        codes = {unseen.get(name, TRAIN) for name in singles}
        expected = TEST if TEST in codes else VAL if VAL in codes else TRAIN
        assert split.condition[row] == expected
        assert split.stratum[row] == ("combination" if len(singles) > 1 else "common")


@pytest.mark.parametrize("task", [Combination, UnseenPerturbation])
def test_the_seed_decides_and_every_label_has_the_same_chance(task):
    labels = [f"p{i}" for i in range(12)] + [f"p{i}+p{i + 1}" for i in range(11)]
    conditions = conditions_of(cells(labels, contexts=("a",)))
    assert (task(seed=3).split(conditions).condition == task(seed=3).split(conditions).condition).all()
    times = sum((task(fraction=0.3, seed=s).split(conditions).condition != TRAIN).astype(int) for s in range(200))
    kind = 2 if task is Combination else 1
    drawn = times[[len(singles) == kind for singles in conditions.singles]]
    chance = round(0.3 * len(drawn)) / len(drawn)
    assert drawn.sum() == 200 * round(0.3 * len(drawn))
    assert np.abs(drawn - 200 * chance).max() < 4 * np.sqrt(200 * chance * (1 - chance))


def test_combinations_whose_singles_are_not_measured_are_named():
    conditions = conditions_of(cells(["A", "B", "A+B", "B+C", "A+D"]))
    with pytest.raises(
        InputError, match=r"2 of 3 combinations .*: A\+D \(D in a\); B\+C \(C in a\); .*to_train.*allow"
    ):
        Combination().split(conditions)
    of_label = subset_of_labels(conditions, Combination(missing_single="to_train").split(conditions))
    assert {label: code for label, code in of_label.items() if code != TRAIN} == {"A+B": TEST}


def test_a_single_that_another_context_measures_is_not_measured_in_this_one():
    design = [*cells(["A", "B", "A+B"], contexts=("a",)), *cells(["A", "A+B"], contexts=("b",))]
    with pytest.raises(InputError, match=r"A\+B \(B in b\)"):
        Combination().split(conditions_of(design))


def test_a_screen_without_combinations_says_how_labels_are_read():
    with pytest.raises(
        InputError, match=r"no label of this screen is a combination.*'KO_1' is taken as one perturbation"
    ):
        Combination().split(conditions_of(cells(["KO_1", "KO_2"])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Combination(fraction=1.5), r"split\.fraction=1\.5: a share between 0 and 1 of the combinations"),
        (lambda: Combination(missing_single="to_trian"), "did you mean 'to_train'"),
        (lambda: UnseenPerturbation(fraction=1.0), r"split\.fraction=1\.0"),
        (lambda: UnseenPerturbation(min_controls=0), r"split\.min_controls=0"),
        (lambda: Combination(controls=(1.0, 0.0)), "three shares"),
    ],
)
def test_an_impossible_task_is_refused_by_its_field(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.fixture
def screen():
    return conditions_of(screens.rectangle(3, 10, cells=2))


def saved(path, table, **options) -> Saved:
    pd.Series(table).to_csv(path, header=False, **options)
    return Saved(path=str(path))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("header", [False, True])
def test_a_saved_split_is_read_back_as_it_was(screen, tmp_path, header, compressed):
    split = CovariateTransfer().split(screen)
    table = {name: SUBSETS[code] for name, code in zip(screen.cell_names, split.cell, strict=True)}
    order = np.random.default_rng(0).permutation(list(table))
    place = tmp_path / ("split.csv.gz" if compressed else "split.csv")
    pd.Series({name: table[name] for name in order}).to_csv(
        place, header=["split"] if header else False, index_label="cell"
    )
    again = Saved(path=str(place)).split(screen)
    assert (again.cell == split.cell).all()
    assert (again.condition == split.condition).all()
    assert again.record["counts"] == split.record["counts"]
    assert again.record["excluded"] == again.record["not_named"] == 0


def test_cells_of_other_values_and_cells_that_are_not_named_are_not_used_and_are_counted(screen, tmp_path):
    split = CovariateTransfer().split(screen)
    table = {name: SUBSETS[code] for name, code in zip(screen.cell_names, split.cell, strict=True)}
    perturbed = np.flatnonzero(~screen.is_control[screen.cell_condition])
    some, none, whole = perturbed[0], perturbed[7], screen.cell_condition[perturbed[20]]
    table[screen.cell_names[some]] = "none"
    del table[screen.cell_names[none]]
    for row in np.flatnonzero(screen.cell_condition == whole):
        table[screen.cell_names[row]] = ""
    again = saved(tmp_path / "split.csv", table).split(screen)
    assert (again.cell == UNUSED).sum() == again.record["excluded"] == 4
    assert again.record["not_named"] == 1
    assert again.condition[whole] == UNUSED
    assert again.condition[screen.cell_condition[some]] == split.condition[screen.cell_condition[some]]
    assert (np.flatnonzero(again.condition != split.condition) == [whole]).all()


def _lost(table, screen):
    table["nobody"] = "train"


def _mixed(table, screen):
    rows = np.flatnonzero(screen.cell_condition == np.flatnonzero(~screen.is_control)[0])
    table[screen.cell_names[rows[0]]], table[screen.cell_names[rows[1]]] = "train", "test"


def _bare(table, screen):
    controls = np.flatnonzero(screen.is_control[screen.cell_condition])
    for row in controls[screen.context[screen.cell_condition[controls]] == 1]:
        table[screen.cell_names[row]] = "train"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _lost,
            r"1 of 85 cells are not in the screen; the first is 'nobody', and cells of the screen are called as 'cell_00000'",
        ),
        (_mixed, r"cells of one condition \(line_a, drug_000\) stand in train and test"),
        (_bare, "context line_b has conditions but no control cell in val"),
    ],
)
def test_a_saved_split_that_does_not_fit_is_refused(screen, tmp_path, spoil, message):
    split = CovariateTransfer().split(screen)
    table = {name: SUBSETS[code] for name, code in zip(screen.cell_names, split.cell, strict=True)}
    spoil(table, screen)
    with pytest.raises(InputError, match=message):
        saved(tmp_path / "split.csv", table).split(screen)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cell_00000,train\ncell_00000,test\n", "'cell_00000' stands in it twice"),
        ("cell_00000\n", "two columns are needed, cell and subset; it has 1"),
        ("", "cannot be read as CSV"),
        (None, "there is no such file"),
    ],
)
def test_a_file_that_holds_no_split_is_refused(screen, tmp_path, content, message):
    place = tmp_path / "split.csv"
    if content is not None:
        place.write_text(content)
    with pytest.raises(InputError, match=message):
        Saved(path=str(place)).split(screen)


def test_the_key_of_a_trial_holds_what_a_split_file_says_and_not_where_it_is(tmp_path):
    from perturbray.models.baselines import NoChange

    def key(path, table):
        trial = Trial(dataset=DatasetSpec(path="x.h5ad"), model=NoChange(), split=saved(path, table))
        return trial.key("content")

    first = key(tmp_path / "a.csv", {"c1": "train", "c2": "test"})
    assert key(tmp_path / "b.csv.gz", {"c1": "train", "c2": "test"}) == first
    assert key(tmp_path / "a.csv", {"c1": "train", "c2": "val"}) != first


def test_perturbenchs_own_split_of_its_development_file_is_read(shared_data):
    path = shared_data.parent / "golden" / "perturbench_training" / "devel_split.csv.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    conditions = DatasetSpec(path=str(shared_data / "perturbench_devel.h5ad")).conditions()
    split = Saved(path=str(path)).split(conditions)
    assert [int((split.cell == s).sum()) for s in (UNUSED, TRAIN, VAL, TEST)] == [0, 4945, 479, 537]
