"""Whole contexts held out, perturbations of named contexts, conditions by name: what is named is found, and nothing else."""

import numpy as np
import pytest
import screens
from split_laws import conditions_of, in_words

from perturbray.data.splits import TEST, TRAIN, UNUSED, VAL, HeldOutContexts, Manual, TransferInto
from perturbray.errors import InputError

LINES, DRUGS = ("A172", "T98G", "U87MG"), ("none", "lapatinib")


def two_keys(labels=("x", "y", "z"), *, missing=()) -> list[screens.Cell]:
    """Lines x drugs, every label in each but for the missing pairs of (line, drug) and label."""
    cells = []
    for line in LINES:
        for drug in DRUGS:
            cells += [((line, drug), "control")] * 8
            cells += [((line, drug), label) for label in labels if ((line, drug), label) not in missing]
    return cells


def held(conditions, split, *, subset: int = TEST) -> set:
    return {pair for pair, code in zip(conditions, split.condition, strict=True) if code == subset}


def test_a_named_context_is_held_out_whole_and_its_controls_are_seen():
    conditions = conditions_of(two_keys())
    split = HeldOutContexts(test=("A172,lapatinib",), val=("T98G / none",)).split(conditions)
    assert held(conditions, split) == {(("A172", "lapatinib"), label) for label in "xyz"}
    assert held(conditions, split, subset=VAL) == {(("T98G", "none"), label) for label in "xyz"}
    assert split.record["counts"]["A172 / lapatinib"]["train"] == [0, 0, 4]


def test_a_value_of_a_covariate_is_held_out_in_every_context_that_has_it():
    conditions = conditions_of(two_keys())
    split = HeldOutContexts(test=("covariate_0=A172",)).split(conditions)
    assert held(conditions, split) == {(("A172", drug), label) for drug in DRUGS for label in "xyz"}
    drawn = HeldOutContexts(by="covariate_0", seed=3).split(conditions)
    for subset in (TRAIN, VAL, TEST):
        lines = {context[0] for context, label in held(conditions, drawn, subset=subset) if label != "control"}
        assert len(lines) == 1, "three lines, one for each purpose"


def test_with_two_contexts_one_is_tested_and_none_is_left_for_validation():
    conditions = conditions_of(screens.rectangle(2, 3))
    split = HeldOutContexts().split(conditions)
    assert (np.bincount(split.condition[~conditions.is_control], minlength=4) == [0, 3, 0, 3]).all()
    assert "none for validation" in split.record["notes"][0]


@pytest.mark.parametrize(("unseen", "subset"), [("unused", UNUSED), ("allow", TEST)])
def test_a_perturbation_of_held_out_contexts_alone_is_refused_left_out_or_held_out(unseen, subset):
    cells = [*two_keys(), *[(("A172", "none"), "only here")] * 2]
    conditions = conditions_of(cells)
    task = {"test": ("A172,none",), "val": ("T98G,none",)}
    with pytest.raises(
        InputError, match=r"1 perturbation.* are in no training context: only here; split.unseen=unused"
    ):
        HeldOutContexts(**task).split(conditions)
    split = HeldOutContexts(**task, unseen=unseen).split(conditions)
    assert in_words(conditions, split)[0][("A172", "none"), "only here"] == ("unused", "train", "val", "test")[subset]
    assert "only here" in split.record["notes"][1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"val": ("A172,none",)}, "name the contexts of split.test too"),
        ({"test": ("A172,none",), "turn": 1}, r"names the contexts, so split\.turn and split\.by draw none"),
        ({"unseen": "unsued"}, "did you mean 'unused'"),
        ({"number": 0}, r"split\.number=0: at least 1"),
        ({"turn": -1}, r"split\.turn=-1: at least 0"),
    ],
)
def test_an_impossible_task_of_contexts_is_refused_by_its_field(fields, message):
    with pytest.raises(InputError, match=message):
        HeldOutContexts(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"test": ("A172,nonne",)},
            r"split\.test: no context is named 'A172,nonne'; did you mean 'A172,none'.*semicolon",
        ),
        ({"test": ("covariate_0=A127",)}, "did you mean 'covariate_0=A172'"),
        ({"test": ("A172,none",), "val": ("covariate_0=A172",)}, "A172 / none is named in split.test and in split.val"),
        ({"test": tuple(f"covariate_0={line}" for line in LINES)}, "no perturbation is left to train on"),
        ({"by": "line"}, "split.by='line' is no covariate"),
        ({"number": 4}, r"split.number=4: the screen has 6 context\(s\) with perturbations, and one must"),
        ({"turn": 6}, r"split.turn=6: this screen with split.number=1 makes 6 turns, 0 to 5"),
    ],
)
def test_contexts_that_the_screen_does_not_have_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        HeldOutContexts(**fields).split(conditions_of(two_keys()))


def test_contexts_of_two_keys_with_the_same_values_are_two_contexts():
    """frozensets made one of (a, b) and (b, a)."""
    cells = [((first, second), label) for first in "ab" for second in "ab" for label in ["control"] * 8 + ["x", "y"]]
    conditions = conditions_of(cells)
    assert len(conditions.contexts) == 4
    split = HeldOutContexts(test=("a,b",)).split(conditions)
    assert held(conditions, split) == {(("a", "b"), "x"), (("a", "b"), "y")}


def test_a_further_named_context_changes_nothing_in_the_others():
    """PerturBench paired each context with a seed by its place in the list."""
    conditions = conditions_of(two_keys([f"p{i}" for i in range(40)]))
    names = [",".join(values) for values in conditions.contexts]
    alone = TransferInto(contexts=(names[3],)).split(conditions)
    many = TransferInto(contexts=(names[0], names[3], names[5])).split(conditions)
    again = TransferInto(contexts=(names[5], names[3], names[0])).split(conditions)
    here = conditions.context == 3
    assert (alone.condition[here] == many.condition[here]).all()
    assert (many.condition == again.condition).all()
    for name in (0, 3, 5):
        counts = np.bincount(many.condition[(conditions.context == name) & ~conditions.is_control], minlength=4)
        assert counts.tolist() == [0, 12, 14, 14]
    assert not np.isin(many.condition[~np.isin(conditions.context, [0, 3, 5])], [VAL, TEST]).any()


def test_a_perturbation_that_no_other_context_has_stays_in_training_and_is_counted():
    missing = [((line, drug), "x") for line in LINES for drug in DRUGS if (line, drug) != ("A172", "none")]
    conditions = conditions_of(two_keys(missing=missing))
    split = TransferInto(contexts=("A172,none",), fraction=1.0).split(conditions)
    assert in_words(conditions, split)[0][("A172", "none"), "x"] == "train"
    assert split.record["notes"] == [
        "A172 / none: 2 of 3 perturbations are held out; the others are measured in fewer than 1 context(s) beside the "
        "named ones"
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contexts": ()}, "name some of the 6 contexts, but not all"),
        ({"contexts": tuple(f"covariate_0={line}" for line in LINES)}, "but not all"),
        ({"contexts": ("A172",)}, "no context is named 'A172'"),
        ({"contexts": ("A172,none",), "min_train_contexts": 6}, "no perturbation of these is measured in 6 other"),
    ],
)
def test_a_transfer_into_contexts_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        TransferInto(**fields).split(conditions_of(two_keys()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x", {(line, drug, "x") for line in LINES for drug in DRUGS}),
        ("perturbation=x", {(line, drug, "x") for line in LINES for drug in DRUGS}),
        ("A172,none", {("A172", "none", label) for label in "xyz"}),
        ("A172 / none", {("A172", "none", label) for label in "xyz"}),
        ("covariate_1=none", {(line, "none", label) for line in LINES for label in "xyz"}),
        ("A172,none: x", {("A172", "none", "x")}),
        ("covariate_0=A172: x", {("A172", drug, "x") for drug in DRUGS}),
    ],
)
def test_a_name_stands_for_a_perturbation_a_context_or_a_condition(name, expected):
    conditions = conditions_of(two_keys())
    split = Manual(test=(name,)).split(conditions)
    assert held(conditions, split) == {((line, drug), label) for line, drug, label in expected}
    assert not np.isin(split.condition, [VAL, UNUSED]).any()


def test_validation_and_what_is_not_used_are_named_as_well():
    conditions = conditions_of(two_keys())
    split = Manual(test=("A172,none: x",), val=("y",), unused=("T98G,none: x", "T98G,none: z")).split(conditions)
    of_condition, of_cell = in_words(conditions, split)
    assert of_condition[("A172", "none"), "x"] == "test"
    assert {where for (_, label), where in of_condition.items() if label == "y"} == {"val"}
    assert sorted(pair for pair, where in of_condition.items() if where == "unused") == [
        (("T98G", "none"), "x"),
        (("T98G", "none"), "z"),
    ]
    assert list(of_cell.values()).count("unused") == 2


def test_a_name_that_may_mean_two_things_is_refused_and_its_longer_form_is_not():
    cells = [((value,), label) for value in ("x", "b", "c") for label in ["control"] * 8 + ["x", "y"]]
    conditions = conditions_of(cells)
    with pytest.raises(
        InputError, match=r"split\.test: 'x' may be context \('x',\) or perturbation; say covariate=value"
    ):
        Manual(test=("x",)).split(conditions)
    assert held(conditions, Manual(test=("perturbation=x",)).split(conditions)) == {((v,), "x") for v in "xbc"}
    assert held(conditions, Manual(test=("covariate_0=x",)).split(conditions)) == {(("x",), "x"), (("x",), "y")}


def test_values_that_join_to_one_name_are_told_apart_by_covariate():
    values = [("a,b", "c"), ("a", "b,c"), ("d", "c")]
    conditions = conditions_of([(v, label) for v in values for label in ["control"] * 8 + ["x", "y"]])
    with pytest.raises(InputError, match="'a,b,c' may be context"):
        HeldOutContexts(test=("a,b,c",)).split(conditions)
    assert held(conditions, HeldOutContexts(test=("a / b,c",)).split(conditions)) == {
        (values[1], "x"),
        (values[1], "y"),
    }
    assert held(conditions, HeldOutContexts(test=("covariate_0=a,b",)).split(conditions)) == {
        (values[0], "x"),
        (values[0], "y"),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test": ("w",)}, r"split\.test: no perturbation, context or condition is named 'w'"),
        ({"test": ("control",)}, r"split\.test: no perturbation, context or condition is named 'control'"),
        ({"test": ("A172,none: w",)}, "did you mean 'A172,none: "),
        ({"test": ("x",), "val": ("A172,none",)}, r"A172 / none: x is named in split\.test and in split\.val \(1 such"),
        ({"test": ()}, r"split\.test names no condition"),
        ({"test": ("x", "y"), "unused": ("z",)}, "none is left to train on"),
    ],
)
def test_names_that_make_no_split_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Manual(**fields).split(conditions_of(two_keys()))
