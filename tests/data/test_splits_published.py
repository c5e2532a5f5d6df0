"""The published forms: what PerturBench's own split of a file holds out, and the defects that the other tasks are free of."""

import numpy as np
import pytest
import screens
from split_laws import conditions_of, in_words

from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import (
    TEST,
    TRAIN,
    UNUSED,
    VAL,
    CovariateTransfer,
    PublishedCombination,
    PublishedInverseCombination,
    PublishedTransfer,
    Saved,
)
from perturbray.errors import InputError


def held(split) -> np.ndarray:
    return np.flatnonzero(np.isin(split.condition, [VAL, TEST]))


def test_it_holds_out_what_perturbenchs_own_split_of_its_development_file_does(shared_data):
    path = shared_data.parent / "golden" / "perturbench_training" / "devel_split.csv.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    conditions = DatasetSpec(path=str(shared_data / "perturbench_devel.h5ad")).conditions()
    expected = Saved(path=str(path)).split(conditions)
    split = PublishedTransfer(file_order=True).split(conditions)
    assert held(split).tolist() == held(expected).tolist()
    controls = conditions.is_control[conditions.cell_condition]
    for found in (split, expected):
        assert np.bincount(found.cell[controls], minlength=4).tolist() == [0, 200, 100, 100]
    assert held(PublishedTransfer().split(conditions)).tolist() != held(expected).tolist(), "contexts in another order"


@pytest.mark.parametrize(("max_contexts", "never"), [(1, 17), (2, 70)])
def test_the_last_drugs_in_the_alphabet_are_never_held_out(max_contexts, never):
    """188 x 3 and seed 42, as measured on PerturBench's own code."""
    conditions = conditions_of(screens.rectangle(3, 188, controls=60))
    split = PublishedTransfer(max_contexts=max_contexts).split(conditions)
    labels = set(conditions.perturbation[held(split)].tolist())
    assert sorted(set(conditions.perturbations) - labels) == list(conditions.perturbations[-never:])
    counts = np.bincount(conditions.context[held(split)])
    assert counts.tolist() == [57, 57, 57], "30 % of 189 labels, the control among them, and not of 188"


def test_a_condition_that_is_the_only_one_held_out_in_its_context_is_dropped_and_said_so():
    cells = [*screens.rectangle(3, 12, controls=9), *[(("small",), "control")] * 9, (("small",), "drug_000")]
    conditions = conditions_of(cells)
    for seed in range(20):
        split = PublishedTransfer(seed=seed).split(conditions)
        of_condition, _ = in_words(conditions, split)
        if of_condition[("small",), "drug_000"] == "train":
            continue
        assert of_condition[("small",), "drug_000"] == "unused"
        assert split.record["notes"] == ["small: the only condition held out is not used at all"]
        assert (split.cell == UNUSED).sum() == 1
        break
    else:
        pytest.fail("in no seed the small context holds out its condition")
    sound = [CovariateTransfer(fraction=0.6, seed=seed).split(conditions) for seed in range(20)]
    subsets = {in_words(conditions, split)[0][("small",), "drug_000"] for split in sound}
    assert subsets == {"train", "test"}, "the sound form tests a lone one"


def test_a_small_context_can_end_without_controls_and_then_the_split_is_refused():
    cells = [*screens.rectangle(2, 12, controls=200), *[(("small",), "control")] * 2]
    cells += [(("small",), f"drug_{i:03d}") for i in range(12)]
    conditions = conditions_of(cells)
    with pytest.raises(InputError, match="transfer_published: context small has conditions but no control cell in"):
        PublishedTransfer().split(conditions)


def test_combinations_are_drawn_by_context_so_that_one_is_tested_here_and_trained_on_there():
    labels = [*"ABCDEF", *(f"{a}+{b}" for a in "ABCDEF" for b in "ABCDEF" if a < b)]
    here, there = [label for label in labels if label != "A+B"], [label for label in labels if label != "E+F"]
    cells = [((c,), x) for c, of in (("k", here), ("l", there)) for x in ["control"] * 30 + of]
    conditions = conditions_of(cells)
    split = PublishedCombination().split(conditions)
    sets: dict[str, set] = {}
    for (_, label), where in in_words(conditions, split)[0].items():
        sets.setdefault(label, set()).add(where == "train")
    assert {True, False} in sets.values()
    for context in (0, 1):
        combined = [len(s) > 1 and c == context for s, c in zip(conditions.singles, conditions.context, strict=True)]
        assert np.isin(split.condition[combined], [VAL, TEST]).sum() == int(0.7 * sum(combined))


def test_the_inverse_task_holds_out_singles_that_no_combination_explains():
    labels = ["A", "B", "A+B", *(f"s{i}" for i in range(10))]
    conditions = conditions_of([(("k",), label) for label in ["control"] * 30 + labels])
    split = PublishedInverseCombination(fraction=0.6).split(conditions)
    names = set(conditions.perturbation[held(split)].tolist())
    assert not {"A", "B"} <= names
    assert names & {f"s{i}" for i in range(10)}
    assert len(names) in (6, 7), "of 13 labels without a combination, the control among them"
    assert (split.condition[conditions.is_control] == TRAIN).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PublishedTransfer(fraction=0), r"split\.fraction=0: a share"),
        (lambda: PublishedTransfer(train_controls=1.0), r"split\.train_controls=1\.0"),
        (
            lambda: PublishedTransfer(max_contexts=4).split(conditions_of(screens.rectangle(3, 9, controls=9))),
            r"split\.max_contexts=4: 1 to 3, the contexts",
        ),
        (
            lambda: PublishedCombination(fraction=0.1).split(
                conditions_of([(("k",), x) for x in ["control"] * 9 + ["A+B"]])
            ),
            "holds none out",
        ),
    ],
)
def test_a_published_task_that_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
