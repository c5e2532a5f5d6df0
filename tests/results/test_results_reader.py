"""Tests of reading a folder that fills: whatever the files are, what is read is the whole table, taken apart."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_sweep import anchored_sweep, fake_rows, fake_sweep, finish

from perturbray.results import table
from perturbray.results.reader import Reader, Results
from perturbray.results.report import write_report

ROWS = fake_rows("decoder", level=0.1, seed=3)
CONSTANT = table.CONSTANT.decode()


def same(found: Results, expected: Results) -> None:
    pd.testing.assert_frame_equal(found.rows, expected.rows)
    pd.testing.assert_frame_equal(found.trials, expected.trials)
    assert found.others == expected.others


def folder_of(place, *trials: dict):
    """A folder with a trial of each set of columns, keys not in their order, and a file of another plan."""
    keys = [f"{(7 * number) % 11:x}" for number in range(len(trials))]
    place.mkdir()
    table.write_plan(place, {"trials": [{"key": key} for key in keys]})
    for key, columns in zip([*keys, "foreign"], [*trials, {}], strict=True):
        table.write_trial(place, key, columns={"name": key, "model": "decoder", **columns}, rows=ROWS)
    return place


UNLIKE = {
    "alike": [{"seed": 1}, {"seed": 0}, {"seed": 2}],
    "fields of some": [{"model.width": 128}, {"model": "mean", "dataset": "a"}, {"model.depth": 2, "dataset": "b"}],
    "text and numbers": [{"model.width": 128}, {"model.width": 0.5}, {"model.width": [64, 32]}, {"model.width": True}],
    "whole and broken numbers": [{"x": 1}, {"x": 0.5}, {"x": None}],
    "nothing known": [{"val_loss": None}, {"val_loss": float("nan")}],
    "one": [{"seed": 0, "controls": "split"}],
    "none": [],
}


@pytest.mark.parametrize("trials", UNLIKE.values(), ids=UNLIKE)
def test_what_is_read_is_the_whole_table_taken_apart(trials, tmp_path):
    folder = folder_of(tmp_path / "s", *trials)
    same(Reader(folder).read(), Results.of(table.read(folder)))


def rewritten(path, change=lambda content: content, **footer: str) -> None:
    """The file as another tool writes it, with a footer of its own."""
    content = change(pq.ParquetFile(path).read())  # unlike pq.read_table this takes the footer over
    with pq.ParquetWriter(path, content.schema) as writer:
        writer.write_table(content)
        writer.add_key_value_metadata(footer)


CHANGED = {
    "no footer": (lambda content: content.replace_schema_metadata(), {}),
    "a footer that is older than the columns": (
        lambda content: content.set_column(2, "model", pa.array(["changed"] * len(content)).dictionary_encode()),
        {},
    ),
    "another footer": (lambda content: content.replace_schema_metadata({"other": "1"}), {"and": "more"}),
    "a footer that is no JSON": (lambda content: content.replace_schema_metadata(), {CONSTANT: "{"}),
    "a footer of other things": (lambda content: content.replace_schema_metadata(), {CONSTANT: "[1, 2]"}),
    "a footer of other columns": (
        lambda content: content.replace_schema_metadata(),
        {CONSTANT: '{"key": "x", "name": "x", "mean": "x", "seed": 1}'},
    ),
    "a footer of other types": (
        lambda content: content.replace_schema_metadata(),
        {CONSTANT: '{"key": "x", "name": "x", "model": 1.5, "seed": "1"}'},
    ),
    "no rows": (lambda content: content[:0].replace_schema_metadata(), {}),
    "no rows, and a footer": (
        lambda content: content[:0].replace_schema_metadata(),
        {CONSTANT: '{"key": "x", "name": "x", "model": "x", "seed": 1}'},
    ),
}


@pytest.mark.parametrize(("change", "footer"), CHANGED.values(), ids=CHANGED)
def test_a_footer_is_believed_only_where_it_goes_with_the_columns(change, footer, tmp_path):
    folder = folder_of(tmp_path / "s", {"seed": 0}, {"seed": 1}, {"seed": 2})
    rewritten(folder / "3.parquet", change, **footer)
    same(Reader(folder).read(), Results.of(table.read(folder)))


def test_a_footer_says_what_the_columns_say_and_is_what_is_read(tmp_path):
    folder = folder_of(
        tmp_path / "s", {"seed": 0, "fields": {"a": [1, None]}, "rate": 0.1 + 0.2, "on": True, "not": None}
    )
    file = pq.ParquetFile(folder / "0.parquet")
    said = json.loads(file.metadata.metadata[table.CONSTANT])
    assert said == {name: file.read()[name][0].as_py() for name in said}
    assert {*said} == {name for name in file.schema_arrow.names if not table.varies(name)}
    calls = []
    part = Reader(folder)._part(Watched(file, calls))
    assert part.values == list(said.values())
    assert calls == [part.kind.varying], "the constant columns were not decoded"


class Watched:
    """A file that says which columns were read."""

    def __init__(self, file: pq.ParquetFile, calls: list) -> None:
        self.metadata, self.schema_arrow, self._file, self._calls = file.metadata, file.schema_arrow, file, calls

    def read(self, columns: list[str] | None = None, **options: object) -> pa.Table:
        self._calls.append(columns)
        return self._file.read(columns=columns, **options)


def test_a_sweep_with_anchors_is_read_as_its_table(tmp_path):
    anchored_sweep(tmp_path / "s")
    found = Reader(tmp_path / "s").read()
    same(found, Results.of(table.read(tmp_path / "s")))
    assert "value_half" in found.rows
    assert "value_half" not in found.trials


def test_a_reader_opens_only_new_files_and_agrees_with_a_fresh_one(tmp_path, monkeypatch):
    plan = fake_sweep(tmp_path / "s", models=["no_change", "decoder"], seeds=1, trials=3)
    opened = []
    read = table.from_parquet
    monkeypatch.setattr(table, "from_parquet", lambda path, make: opened.append(path.stem) or read(path, make))
    reader = Reader(tmp_path / "s")
    reader.read()
    assert sorted(opened) == sorted(trial["key"] for trial in plan["trials"][:3])
    opened.clear()
    finish(tmp_path / "s", plan["trials"][3])
    same(reader.read(), Reader(tmp_path / "s").read())
    assert opened.count(plan["trials"][3]["key"]) == 2
    assert opened.count(plan["trials"][0]["key"]) == 1  # the fresh one


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    folder = folder_of(tmp_path / "s", {"seed": 0}, {"seed": 1})
    reader = Reader(folder)
    reader.read()
    table.write_trial(
        folder, "0", columns={"name": "0", "model": "other", "seed": 0}, rows=fake_rows("mean", level=0.1, seed=5)
    )
    (folder / "7.parquet").unlink()
    same(reader.read(), Results.of(table.read(folder)))
    assert list(reader.read().trials["model"]) == ["other"]


def test_a_copy_of_a_trial_under_another_key_stays_one_trial(tmp_path):
    folder = folder_of(tmp_path / "s", {"seed": 0}, {"seed": 1})
    (folder / "7.parquet").write_bytes((folder / "0.parquet").read_bytes())
    found = Reader(folder).read()
    same(found, Results.of(table.read(folder)))
    assert (len(found.trials), len(found.rows)) == (1, 2 * len(ROWS["value"]))


def test_a_page_is_the_same_whatever_finished_first_and_however_often_it_was_read(tmp_path):
    plan = fake_sweep(tmp_path / "s", trials=0, levels=(0.0, 0.3), seeds=2)
    reader = Reader(tmp_path / "s")
    for at in np.random.default_rng(0).permutation(len(plan["trials"])):
        finish(tmp_path / "s", plan["trials"][at])
        if at % 7 == 0:
            reader.read()
    write_report(tmp_path / "s", reader=reader)
    often = (tmp_path / "s" / "summary.csv").read_bytes()
    write_report(tmp_path / "s")
    assert (tmp_path / "s" / "summary.csv").read_bytes() == often
