"""Laws of every registered split: nothing leaks or is lost, no order and no hash seed decides, and no name is favoured."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import screens
import split_laws
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy import stats

from perturbray.data.splits import (
    SPLITS,
    SUBSETS,
    TEST,
    TRAIN,
    VAL,
    Combination,
    CovariateTransfer,
    HeldOutContexts,
    InverseCombination,
    Manual,
    PublishedTransfer,
    SplitSpec,
    TransferInto,
    UnseenPerturbation,
    check,
    summary,
)
from perturbray.data.splits.base import Drawn
from perturbray.errors import InputError

SEEDS = range(100)
# A failing design is small as it is, and shrinking one that twelve tasks are drawn for takes minutes.
AS_DRAWN = {"deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate]}


def test_every_registered_split_is_held_to_the_laws():
    assert set(split_laws.TASKS) == set(SPLITS)


def test_every_registered_split_keeps_the_laws_on_any_design():
    made = Counter()

    @given(split_laws.designs(least=1), st.data())
    @settings(max_examples=80, **AS_DRAWN)
    def on_a_design(cells, data):
        conditions = split_laws.conditions_of(cells)
        for name, task_of in split_laws.TASKS.items():
            task = task_of(data.draw, conditions)
            assert type(task) is SPLITS[name]
            try:
                split = task.split(conditions)
            except InputError:  # any other error is one
                continue
            made[name] += 1
            assert not split_laws.broken(conditions, task, split), task
            assert hash(task) == hash(replace(task))
            counts = split.record["counts"]
            perturbed = int((~conditions.is_control).sum())
            assert sum(of[s][0] for of in counts.values() for s in SUBSETS) == perturbed
            assert sum(of[s][1] + of[s][2] for of in counts.values() for s in SUBSETS) == len(cells)
            said = summary(json.loads(json.dumps(split.record)))
            assert said.startswith(f"split {name} (")
            assert all(conditions.context_name(c) in said for c in range(len(conditions.contexts)))

    on_a_design()
    # How many of each depends on what hypothesis draws, which other modules that are loaded change.
    assert all(made[name] >= (1 if name.endswith("_published") else 5) for name in SPLITS), made


def test_neither_order_of_rows_nor_of_categories_changes_any_split():
    made = Counter(dict.fromkeys(SPLITS, 0))

    @given(split_laws.designs(), st.data(), st.randoms(use_true_random=False))
    @settings(max_examples=20, **AS_DRAWN)
    def on_a_design(cells, data, random):
        names = [f"cell_{i:05d}" for i in range(len(cells))]
        conditions = screens.conditions_of(cells, names=names)
        order = random.sample(range(len(cells)), len(cells))
        other = screens.conditions_of(
            [cells[i] for i in order],
            names=[names[i] for i in order],
            categories=lambda values: ["unused", *sorted(set(values), reverse=True)],
        )
        for name, task_of in split_laws.TASKS.items():
            task = task_of(data.draw, conditions)
            try:
                expected = split_laws.in_words(conditions, task.split(conditions))
            except InputError as error:
                with pytest.raises(InputError, match=re.escape(str(error))):
                    task.split(other)
                continue
            made[name] += 1
            assert split_laws.in_words(other, task.split(other)) == expected, task

    on_a_design()
    assert sum(map(bool, made.values())) >= len(SPLITS) - 2, made


@dataclass(frozen=True, kw_only=True)
class Spoilt(SplitSpec):
    """A task whose split is spoilt after it is drawn."""

    task: SplitSpec
    leak: str

    @property
    def apart(self):
        return self.task.apart

    def draw(self, conditions):
        split = self.task.draw(conditions)
        condition, cell = split_laws.leaks(conditions, split)[self.leak]
        return replace(split, condition=condition, cell=cell)


LEAKS = {
    "a cell of a test condition is trained on": r"1 cells leak: \S+ stands in train, but its condition \(.*\) in test",
    "training takes the test controls of a context": "has conditions but no control cell in test",
    "a test condition loses its cells": "is test without a cell",
    "a control condition is tested": "the control condition of .* is held out as test",
    "a test condition moves to validation and its cells stay": "stands in test, but its condition .* in val",
    "a test condition moves to training and its cells stay": "stands in test, but its condition .* in train",
}
# Little is held out, since a name that nearly every seed holds out shows nothing.
RANDOM = {
    "transfer": CovariateTransfer(fraction=0.05),
    "transfer, in turns": CovariateTransfer(fraction=0.1, turn=1),
    "transfer_into": TransferInto(contexts=("a,p", "b,q"), fraction=0.1),
    "combination": Combination(missing_single="allow", fraction=0.2),
    "combination, in turns": Combination(missing_single="allow", fraction=0.2, turn=2),
    "inverse_combination": InverseCombination(fraction=0.4),
    "unseen_perturbation": UnseenPerturbation(fraction=0.1),
    "unseen_perturbation, in turns": UnseenPerturbation(fraction=0.2, turn=3),
    "held_out_contexts": HeldOutContexts(),
    "held_out_contexts, by covariate": HeldOutContexts(by="covariate_0", turn=1),
}
SINGLES = [f"g{i:02d}" for i in range(12)]


def screen(rename=lambda name: name, *, covariates=(lambda value: value,) * 2):
    """3 x 2 contexts, 12 singles and 12 combinations of neighbours, some missing in some; names to be changed."""
    cells = []
    for number, (line, drug) in enumerate(itertools.product("abc", "pq")):
        context = (covariates[0](line), covariates[1](drug))
        cells += [(context, "control")] * 24
        for i, single in enumerate(SINGLES):
            if (i + number) % 7:
                cells.append((context, rename(single)))
            if (i * 5 + number) % 4:
                cells.append((context, f"{rename(single)}+{rename(SINGLES[(i + 1) % 12])}"))
    return cells


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("name", ["transfer", "combination", "unseen_perturbation", "held_out_contexts"])
def test_a_split_that_leaks_is_refused_and_breaks_a_law(name, leak):
    conditions, task = split_laws.conditions_of(screen()), RANDOM[name]
    split = task.split(conditions)
    assert not split_laws.broken(conditions, task, split)
    condition, cell = split_laws.leaks(conditions, split)[leak]
    assert split_laws.broken(conditions, task, replace(split, condition=condition, cell=cell))
    with pytest.raises(InputError, match=f"Spoilt: .*{LEAKS[leak]}"):
        Spoilt(task=task, leak=leak).split(conditions)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("combination", "one context's", "a perturbation leaks"),
        ("inverse_combination", "one context's", "a perturbation leaks"),
        ("unseen_perturbation", "the combinations'", "g.* leaks"),
        ("held_out_contexts", "one label's", "a context leaks"),
    ],
)
def test_what_a_task_keeps_apart_may_not_stand_in_two_sets(name, rows, message):
    conditions, task = split_laws.conditions_of(screen()), RANDOM[name]
    split = task.split(conditions)
    held = np.flatnonzero(split.condition == TEST)
    if rows == "the combinations'":
        moved = [row for row in held if len(conditions.singles[row]) > 1]
    elif rows == "one context's":
        moved = held[conditions.context[held] == conditions.context[held[0]]]
    else:
        moved = held[:1]
    condition = split.condition.copy()
    condition[moved] = TRAIN
    cell = np.where(np.isin(conditions.cell_condition, moved), TRAIN, split.cell).astype(np.int8)
    leaky = replace(split, condition=condition, cell=cell)
    assert split_laws.broken(conditions, task, leaky)
    with pytest.raises(
        InputError, match=rf"{name}: {message}: \(.*\) stands in (train|test) and \(.*\) in (train|test)"
    ):
        check(conditions, leaky, apart=task.apart, name=name)
    check(conditions, leaky, name=name)  # where the task does not ask for it, as in transfer, it is no leak


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("condition", np.zeros(3, dtype=np.int8), r"split\.condition is \(3,\); the screen needs"),
        ("cell", np.zeros(3, dtype=np.int8), r"split\.cell is \(3,\)"),
        ("stratum", np.array(["common"]), r"split\.stratum is \(1,\)"),
        ("condition", None, r"split\.condition holds 4, which is no set"),
    ],
)
def test_a_split_of_another_screen_is_refused(part, value, message):
    conditions = split_laws.conditions_of(screen())
    split = CovariateTransfer().split(conditions)
    value = np.full(len(conditions), 4, dtype=np.int8) if value is None else value
    with pytest.raises(InputError, match=message):
        check(conditions, replace(split, **{part: value}))


# --- chance ---


@dataclass(frozen=True, kw_only=True)
class FirstOnes(Drawn):
    """A mutant: chooses by the alphabet, the seed deciding on the rest alone."""

    apart: ClassVar[str] = "perturbation"

    def draw(self, conditions):
        labels = sorted(set(conditions.perturbation[~conditions.is_control].tolist()))
        held = np.random.default_rng(self.seed).choice(labels[: len(labels) // 2], 3, replace=False)
        subset = np.full(len(conditions), TRAIN, dtype=np.int8)
        subset[np.isin(conditions.perturbation, held)] = TEST
        return self.finish(conditions, subset)


@pytest.fixture(scope="module")
def renamed():
    """The same screen 100 times, its singles and covariate values called otherwise each time, by chance."""
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        names = dict(zip(SINGLES, rng.permutation(SINGLES).tolist(), strict=True))
        values = [dict(zip(text, rng.permutation(list(text)).tolist(), strict=True)) for text in ("abc", "pq")]
        found.append(split_laws.conditions_of(screen(names.get, covariates=[value.get for value in values])))
    return found


def favoured(task, renamed, kind: str = "perturbation") -> float:
    """How unlikely it is, of the name that is held out most or least often, that chance alone does it; all names together.

    A screen whose names are dealt by chance is held out in parts that do not know the names: so in each seed every
    single, and every context, has the share of those held out as its chance, whatever the structure of the screen. The
    sum over seeds has lighter tails than a binomial of the mean chance (Hoeffding 1956).
    """
    rows = []
    for seed, conditions in zip(SEEDS, renamed, strict=True):
        held = np.isin(replace(task, seed=seed).split(conditions).condition, [VAL, TEST])
        if kind == "context":
            rows.append(np.isin(range(len(conditions.contexts)), conditions.context[held]))
        else:
            names = {single for row in np.flatnonzero(held) for single in conditions.singles[row]}
            rows.append(np.isin(SINGLES, sorted(names)))
    table = np.array(rows)
    count, chance = table.sum(axis=0), table.mean()
    assert 0.05 < chance < 0.95, "a share that could not show that a name is favoured"
    more, less = stats.binom.sf(count - 1, len(SEEDS), chance), stats.binom.cdf(count, len(SEEDS), chance)
    return float(min(1.0, 2 * table.shape[1] * np.minimum(more, less).min()))


@pytest.mark.parametrize("name", RANDOM)
def test_no_name_is_held_out_more_or_less_often_than_chance_allows(name, renamed):
    kind = "context" if isinstance(RANDOM[name], HeldOutContexts) else "perturbation"
    assert favoured(RANDOM[name], renamed, kind) > 1e-3


@pytest.mark.parametrize("task", [PublishedTransfer(fraction=0.05), FirstOnes()], ids=["published", "alphabet"])
def test_a_task_that_goes_by_the_alphabet_is_found_out(task, renamed):
    assert favoured(task, renamed) < 1e-9


def test_the_law_of_chance_covers_every_task_that_draws_conditions():
    drawn = {name for name, spec in SPLITS.items() if "seed" in {f.name for f in fields(spec)}} - {"manual"}
    assert {name.split(",")[0] for name in RANDOM} == {name for name in drawn if not name.endswith("_published")}
    assert Manual(test=("g00",)).split(split_laws.conditions_of(screen())).condition.tolist() == (
        Manual(test=("g00",), seed=1).split(split_laws.conditions_of(screen())).condition.tolist()
    )


def test_perturbations_with_the_same_partners_have_the_same_chance_of_an_inverse_task_and_others_the_chance_of_its_rule():
    """A star, a pair, and a triangle: the share of all orders of six that leads to each is the oracle."""
    edges = [("h", "x"), ("h", "y"), ("p", "q"), ("r", "s"), ("s", "t"), ("r", "t")]
    singles = sorted({single for edge in edges for single in edge})
    cells = [(("a", "b"), label) for label in ["control"] * 6 + singles + ["+".join(edge) for edge in edges]]
    conditions, number = split_laws.conditions_of(cells), round(0.5 * len(singles))
    expected = dict.fromkeys(singles, 0.0)
    orders = list(itertools.permutations(singles))
    for order in orders:
        taken = []
        for single in order:
            if len(taken) < number and not any({single, other} in map(set, edges) for other in taken):
                taken.append(single)
        for single in taken:
            expected[single] += 1 / len(orders)
    times = Counter()
    for seed in SEEDS:
        split = InverseCombination(fraction=0.5, seed=seed).split(conditions)
        times.update(conditions.perturbation[split.condition != TRAIN].tolist())
    for single, chance in expected.items():
        two_sided = stats.binomtest(times[single], len(SEEDS), min(chance, 1.0)).pvalue
        assert two_sided * len(singles) > 1e-3, (single, times[single], chance)
    assert expected["h"] < expected["x"] == pytest.approx(expected["y"])


# --- hash seeds ---

SCRIPT = """
import json, sys
import numpy as np, pandas as pd
from perturbray.data import dataset
from perturbray.data.splits import *
cells = pd.read_csv(sys.argv[1], dtype=str)
spec = dataset.DatasetSpec(path="", covariates=("line", "drug"))  # not from a file: reading one imports for seconds
found = dataset.conditions_of(spec, cells["condition"], [cells["line"], cells["drug"]],
                              cell_names=cells["name"].to_numpy(), genes=np.array(["gene"]))
for task in eval(sys.argv[2]):
    split = task.split(found)
    print(json.dumps([split.condition.tolist(), split.cell.tolist(), split.record]))
print(list(set(found.perturbation.tolist()))[:5])
"""


def test_no_split_depends_on_the_hash_seed(tmp_path):
    pairs = [(line, drug) for line in ("a", "b", "c_d") for drug in ("none", "a", "c_d")]
    labels = ["control"] * 12 + ["KO_1", "KO_1_2", "x+y", "y", "x", "x+a", "a", "b", "c", "b+c", "a+c"]
    cells = [(f"cell_{i}", *pair, x) for i, (pair, x) in enumerate(itertools.product(pairs, labels))]
    path = tmp_path / "cells.csv"
    pd.DataFrame(cells, columns=["name", "line", "drug", "condition"]).to_csv(path, index=False)
    sets = [SUBSETS[1 + i % 3] for i in range(len(cells))]  # every perturbed condition is a cell
    pd.DataFrame({"cell": [name for name, *_ in cells], "set": sets}).to_csv(tmp_path / "split.csv", index=False)
    made = {
        "transfer": "CovariateTransfer(fraction=0.5, max_contexts=3)",
        "transfer, in turns": "CovariateTransfer(turn=1, max_contexts=3)",
        "transfer_into": "TransferInto(contexts=('a,none', 'b,a'))",
        "combination": "Combination()",
        "inverse_combination": "InverseCombination()",
        "unseen_perturbation": "UnseenPerturbation(fraction=0.5)",
        "held_out_contexts": "HeldOutContexts(by='line')",
        "manual": "Manual(test=('a,none: x+y', 'KO_1'), val=('drug=c_d: b',), unused=('b,a: c',))",
        "saved": f"Saved(path={str(tmp_path / 'split.csv')!r})",
        "transfer_published": "PublishedTransfer()",
        "combination_published": "PublishedCombination()",
        "inverse_combination_published": "PublishedInverseCombination()",
    }
    assert {name.split(",")[0] for name in made} == set(SPLITS)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(path), f"[{', '.join(made.values())}]"],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": seed},
            text=True,
        )
        for seed in ("0", "1", "42", "4294967295")
    ]
    found = [run.communicate()[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0] * 4
    assert len({lines[-1] for lines in found}) > 1, "the seeds do change the order of a set"
    assert len({tuple(lines[:-1]) for lines in found}) == 1
    for name, line in zip(made, found[0], strict=False):
        assert TEST in json.loads(line)[0], name
