"""What a person reads of a split: numbers that add up, what else came out, and a file that is the split itself."""

import json
import re

import numpy as np
import pytest
import screens
from split_laws import conditions_of

from perturbray.data.splits import CovariateTransfer, HeldOutContexts, Manual, Saved, UnseenPerturbation, summary
from perturbray.data.splits.summary import title, totals


def test_a_summary_says_task_contexts_and_numbers_that_add_up():
    conditions = conditions_of(screens.rectangle(3, 20, cells=5, controls=40))
    text = summary(CovariateTransfer().split(conditions).record)
    head, columns, *rows = text.splitlines()
    assert head == (
        "split transfer (controls 0.5+0.25+0.25, min_controls 2, fraction 0.3, max_contexts 1, min_train_contexts 1, "
        "seed 42); conditions (their cells)"
    )
    assert columns.split() == ["context", "train", "val", "test", "control", "cells"]
    assert [row.split()[0] for row in rows] == ["line_a", "line_b", "line_c", "all"]
    numbers = np.array([[int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", row)] for row in rows])
    assert (numbers[:3].sum(axis=0) == numbers[3]).all()
    assert (numbers[:3, 0:6:2].sum(axis=1) == 20).all()
    assert (numbers[:, 1:6:2] == 5 * numbers[:, 0:6:2]).all()
    assert (numbers[:3, 6:] == [20, 10, 10]).all()
    assert len({len(row) for row in [columns, *rows]}) == 1, "columns are straight"


def test_a_summary_says_what_came_out_beside_the_numbers():
    labels = ["A", "B", "C", "D", "A+B", "B+C", "C+D"]
    conditions = conditions_of([((c,), label) for c in "klm" for label in ["control"] * 8 + labels])
    split = UnseenPerturbation(fraction=0.5).split(conditions)
    combined = sum(len(s) > 1 for s, code in zip(conditions.singles, split.condition, strict=True) if code == 3)
    assert f"{combined} test conditions are reported apart, as combination" in summary(split.record)
    assert "held out: k for test, l for validation" in summary(
        HeldOutContexts(test=("k",), val=("l",)).split(conditions).record
    )
    manual = Manual(test=("A",), unused=("B+C", "k: D")).split(conditions).record
    assert summary(manual).splitlines()[1].split()[-3:] == ["unused", "control", "cells"]
    assert totals(manual) == "14 train, 0 val, 3 test, 4 unused conditions"
    assert "(controls 0.5+0.25+0.25, min_controls 2, test A, unused B+C; k: D, seed 42)" in title(manual)
    lone = [*screens.rectangle(2, 10), *[(("lone",), "control")] * 8, *[(("lone",), f"drug_00{i}") for i in range(3)]]
    assert "1 context(s) hold out a single condition (lone)" in summary(
        CovariateTransfer().split(conditions_of(lone)).record
    )


def test_a_summary_of_many_contexts_is_short_and_still_counts_them_all():
    conditions = conditions_of([((f"c{i:02d}",), x) for i in range(30) for x in ["control"] * 6 + ["x", "y", "z"]])
    lines = summary(CovariateTransfer().split(conditions).record).splitlines()
    assert len(lines) < 20
    assert "  ... 18 more" in lines
    assert "(90 " not in lines[-1]
    total = next(line for line in lines if line.startswith("  all"))
    assert sum(int(n) for n in re.findall(r"(\d+) \(", total)) == 90


def test_the_record_says_how_the_split_was_made_and_of_what():
    conditions = conditions_of(screens.rectangle(3, 9))
    record = json.loads(json.dumps(CovariateTransfer(seed=7).split(conditions).record))
    assert record["algorithm"] == "transfer"
    assert record["parameters"]["seed"] == 7
    other = CovariateTransfer(seed=7).split(conditions_of(screens.rectangle(3, 10))).record
    assert record["conditions"] != other["conditions"]
    assert record["conditions"] == CovariateTransfer().split(conditions).record["conditions"]


@pytest.mark.parametrize("name", ["split.csv", "split.csv.gz"])
@pytest.mark.parametrize("task", [CovariateTransfer(), Manual(test=("line_a: drug_001",), unused=("drug_005",))])
def test_a_split_that_is_saved_is_read_back_as_it_was(name, task, tmp_path):
    conditions = conditions_of(screens.rectangle(3, 10, cells=2))
    split = task.split(conditions)
    split.save(tmp_path / name, conditions)
    again = Saved(path=str(tmp_path / name)).split(conditions)
    assert (again.cell == split.cell).all()
    assert (again.condition == split.condition).all()
