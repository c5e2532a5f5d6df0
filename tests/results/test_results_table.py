"""The table: what is written last is whole, and what is read does not depend on who was first."""

import json
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from fake_sweep import fake_plan, fake_rows, fake_sweep, finish

from perturbray.errors import InputError
from perturbray.results import table

ROWS = {
    "condition": [1, 0],
    "covariate.cell_type": ["K562", "A549"],
    "perturbation": ["b", "a"],
    "stratum": ["common", "common"],
    "metric": ["rmse/average", "rmse/average"],
    "value": [0.25, np.nan],
    "status": ["", "constant_truth"],
    "n_observed": [10, 20],
    "n_control": [100, 100],
}


def test_a_trial_reads_back_as_it_was_written(tmp_path):
    columns = {"model": "decoder", "model.width": 64, "ablation.level": 0.1, "model.layers": (8, 8), "dropped": None}
    table.write_trial(tmp_path, "abc", columns=columns, rows=ROWS)
    frame = table.read(tmp_path, keys=["abc"])
    assert list(frame["condition"]) == [0, 1]
    assert list(frame["value"].fillna(-1)) == [-1, 0.25]
    assert set(frame["model.width"]) == {64}
    assert set(frame["model.layers"]) == {"[8, 8]"}
    assert frame["dropped"].isna().all()


def test_pandas_alone_reads_a_file(tmp_path):
    path = table.write_trial(tmp_path, "abc", columns={"model": "decoder"}, rows=ROWS)
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["key", "model", *ROWS]


def test_a_file_of_a_thousand_rows_stays_small(tmp_path):
    plan = fake_plan(seeds=1)
    finish(tmp_path, plan["trials"][5])
    assert (tmp_path / f"{plan['trials'][5]['key']}.parquet").stat().st_size < 30_000


def test_the_table_does_not_depend_on_which_trial_or_scorer_was_first(tmp_path):
    plan = fake_plan(models=["no_change", "decoder"], seeds=2)
    mixed = np.random.default_rng(0).permutation(len(fake_rows("decoder", 0.0, 0)["value"]))
    names = list(fake_rows("decoder", 0.0, 0))
    for name, trials in (("one", plan["trials"]), ("other", plan["trials"][::-1])):
        (tmp_path / name).mkdir()
        table.write_plan(tmp_path / name, plan)
        shuffled = {row: (lambda rows, row=row: rows[row][mixed]) for row in names} if name == "other" else {}
        for trial in trials:
            finish(tmp_path / name, trial, **shuffled)
    pd.testing.assert_frame_equal(table.read(tmp_path / "one"), table.read(tmp_path / "other"))


def test_two_runs_differ_in_volatile_columns_alone(tmp_path):
    first = table.write_trial(tmp_path, "a", columns={"model": "x", "fit_seconds": 1.0, "host": "h"}, rows=ROWS)
    second = table.write_trial(tmp_path, "b", columns={"model": "x", "fit_seconds": 2.0, "host": "i"}, rows=ROWS)
    one, other = (pd.read_parquet(path).drop(columns="key") for path in (first, second))
    differing = [name for name in one if not one[name].astype(object).equals(other[name].astype(object))]
    assert differing == ["fit_seconds", "host"]
    assert set(differing) <= set(table.VOLATILE)


def test_models_with_unlike_fields_stand_in_one_table(tmp_path):
    table.write_trial(tmp_path, "a", columns={"model": "x", "model.width": 64, "model.kind": "wide"}, rows=ROWS)
    table.write_trial(tmp_path, "b", columns={"model": "y", "model.kind": 3}, rows=ROWS)
    frame = table.read(tmp_path, keys=["a", "b"]).set_index("key")
    assert np.isnan(frame.loc["b", "model.width"]).all()
    assert set(frame["model.kind"]) == {"wide", "3"}


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_kill_before_the_rename_leaves_no_file_that_counts(tmp_path, moment):
    code = f"""
        import os, pathlib, signal
        from perturbray.results import table
        die = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        {"pathlib.Path.replace" if moment == "replace" else "os.fsync"} = die
        rows = {{name: list(values) for name, values in {ROWS!r}.items()}}
        table.write_trial({str(tmp_path)!r}, "abc", columns={{"model": "x"}}, rows=rows)
    """
    code = "from numpy import nan\n" + textwrap.dedent(code)
    died = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".")
    assert table.finished(tmp_path) == set()
    assert table.read(tmp_path, keys=["abc"]).empty
    table.write_trial(tmp_path, "abc", columns={"model": "x"}, rows=ROWS)
    assert table.finished(tmp_path) == {"abc"}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")

    def fail(target):
        target.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        table.replace_file(path, fail)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("page.html", "old")]


def test_a_truncated_file_is_named_and_the_way_out_said(tmp_path):
    path = table.write_trial(tmp_path, "abc", columns={"model": "x"}, rows=ROWS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        InputError, match=r"abc\.parquet: not a readable Parquet file.*delete it and run the sweep again"
    ):
        table.read(tmp_path, keys=["abc"])


def test_files_of_other_plans_are_left_out_and_counted(tmp_path):
    plan = fake_sweep(tmp_path / "s", models=["no_change"], seeds=1)
    table.write_trial(tmp_path / "s", "foreign", columns={"model": "x"}, rows=ROWS)
    frame = table.read(tmp_path / "s")
    assert set(frame["key"]) == {trial["key"] for trial in plan["trials"]}
    assert frame.attrs["others"] == 1


def test_selected_columns_are_read_and_absent_ones_left_out(finished_sweep):
    frame = table.read(finished_sweep, columns=["key", "metric", "value", "model.nothing"])
    assert list(frame.columns) == ["key", "metric", "value"]


def test_a_trial_that_finishes_after_a_failure_is_finished(tmp_path):
    table.write_failure(tmp_path, "abc", name="decoder", error=ValueError("bad"))
    record = table.failed(tmp_path)["abc"]
    assert record["error"] == "ValueError: bad"
    assert record["name"] == "decoder"
    table.write_trial(tmp_path, "abc", columns={"model": "x"}, rows=ROWS)
    assert table.failed(tmp_path) == {}


def test_a_failure_keeps_its_traceback(tmp_path):
    try:
        raise RuntimeError("loss is NaN")
    except RuntimeError as error:
        table.write_failure(tmp_path, "abc", name="decoder", error=error)
    assert "test_results_table.py" in table.failed(tmp_path)["abc"]["traceback"]


def test_a_plan_keeps_its_text_and_writes_nan_as_null(tmp_path):
    table.write_plan(tmp_path, {"name": "größe", "trials": [{"key": "a", "columns": {"x": float("nan")}}]})
    assert table.read_plan(tmp_path) == {"name": "größe", "trials": [{"key": "a", "columns": {"x": None}}]}
    json.loads((tmp_path / table.PLAN).read_text(encoding="utf-8"), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such folder"), ("", "holds no sweep.json"), ("{", "not readable JSON"), ("[]", "expected an object")],
)
def test_a_folder_without_a_plan_gets_one_clear_line(tmp_path, content, message):
    folder = tmp_path / "results"
    if content is not None:
        folder.mkdir()
    if content:
        (folder / table.PLAN).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        table.read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_that_cannot_be_made_gets_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="results cannot be written there"):
        table.create(tmp_path / "file" / "results")
    assert table.create(tmp_path / "new" / "results").is_dir()
    assert list((tmp_path / "new" / "results").iterdir()) == []


def test_a_folder_into_which_nothing_came_is_taken_away_again(tmp_path):
    with pytest.raises(RuntimeError), table.made(tmp_path / "a" / "b"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with table.made(tmp_path / "a" / "b") as nothing:
        assert nothing is None
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


@pytest.mark.parametrize("key", ["a/b", "../a", "reference", "", "a b"])
def test_a_key_that_is_no_file_name_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match="cannot be the key"):
        table.write_trial(tmp_path, key, columns={}, rows=ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": [1.0]}, "rows of lengths"),
        ({"model": [1, 2]}, "both as constant and as row"),
        ({"value": None}, "lack"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, change, message):
    rows = {name: values for name, values in (ROWS | change).items() if values is not None}
    with pytest.raises(ValueError, match=message):
        table.write_trial(tmp_path, "abc", columns={"model": "x"}, rows=rows)
    assert list(tmp_path.iterdir()) == []


def test_results_import_neither_torch_nor_ray():
    code = """
        import sys
        import perturbray.results.report, perturbray.results.terminal
        names = {name.partition(".")[0] for name in sys.modules}
        ours = sorted(name for name in sys.modules if name.startswith("perturbray."))
        print(sorted(names & {"torch", "ray", "anndata", "scipy"}))
        print([name for name in ours if not name.startswith(("perturbray.results", "perturbray.errors"))])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
