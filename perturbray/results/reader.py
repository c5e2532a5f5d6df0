"""Reading a results folder, again and again while it fills, as Results: what the trials are, and apart from it their values.

A trial's file repeats some seventy columns in each of its rows, so the whole table of ten thousand trials takes gigabytes.
Here a trial is one row of a frame of its own, and beside the values stand only the columns that statistics part them by;
a statistic that asks for another one of the trial adds it to ``BY``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from perturbray.results import table

BY = ("key", "model", "dataset", "split", "ablation", "seed", "controls")


@dataclass(frozen=True, kw_only=True)
class Results:
    """The table of a sweep, taken apart."""

    rows: pd.DataFrame  # one row a (trial, metric, condition): the columns that differ within a trial, and those of BY
    trials: pd.DataFrame  # one row a trial: its other columns, and those of BY too
    others: int = 0  # files of other plans in the folder

    @classmethod
    def of(cls, whole: pd.DataFrame) -> "Results":
        """From the table that ``table.read`` gives."""
        kept = [name for name in whole if name in BY] + [name for name in whole if table.varies(name)]
        return cls(rows=whole[kept], trials=table.trials(whole), others=whole.attrs.get("others", 0))


class Reader:
    """Reads a folder again and again while it fills: each file is read once, and again only if it was replaced."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._parts: dict[str, tuple[tuple[int, int], _Part]] = {}  # key -> (time and size of the file, its content)
        self._kinds: dict[bytes, _Kind] = {}

    def read(self) -> Results:
        """The trials of the plan that have finished by now, in the order of their keys."""
        files = table.finished_files(self.folder)
        present = table.present_keys(self.folder, files)
        new = [key for key in present if self._parts.get(key, (None,))[0] != files[key]]
        parts = table.each_file(self.folder, new, self._part)
        self._parts |= {key: (files[key], part) for key, part in zip(new, parts, strict=True)}
        return _results([self._parts[key][1] for key in present], others=len(files) - len(present))

    def _part(self, content: pa.Table) -> "_Part":
        schema = content.schema
        name = schema.serialize().to_pybytes()  # quicker than the hash of a schema, which is made in Python
        kind = self._kinds.get(name) or self._kinds.setdefault(name, _Kind.of(schema))
        values = [content.column(at)[0].as_py() for at in kind.constant] if len(content) else []
        return _Part(kind=kind, values=values, rows=content.select(kind.varying))


@dataclass(frozen=True, eq=False)
class _Kind:
    """What the columns of some files are: of a few kinds among ten thousand files."""

    schema: pa.Schema  # of the constant columns
    constant: list[int]
    varying: list[int]

    @classmethod
    def of(cls, schema: pa.Schema) -> "_Kind":
        varying = [at for at, name in enumerate(schema.names) if table.varies(name)]
        constant = [at for at, name in enumerate(schema.names) if not table.varies(name)]
        return cls(pa.schema([schema.field(at) for at in constant]), constant, varying)


@dataclass(frozen=True)
class _Part:
    """A trial's file."""

    kind: _Kind
    values: list  # of the constant columns; none where the file has no rows
    rows: pa.Table  # the columns that differ within a trial


def _results(parts: Sequence[_Part], *, others: int) -> Results:
    parts = [part for part in parts if part.values]
    if not parts:
        return replace(Results.of(table.concatenate([])), others=others)
    trials, rows = _trials(parts), table.concatenate([part.rows for part in parts])
    times = [len(part.rows) for part in parts]
    for at, name in enumerate(name for name in trials if name in BY):
        rows.insert(at, name, trials[name].repeat(times).array)
    trials = trials[~trials["key"].duplicated()].reset_index(drop=True)
    return Results(rows=rows, trials=trials, others=others)


def _trials(parts: Sequence[_Part]) -> pd.DataFrame:
    """One row a part, in their order; values and categories as if the files had been put under one another."""
    groups: dict[_Kind, list[int]] = {}
    for at, part in enumerate(parts):
        groups.setdefault(part.kind, []).append(at)
    frame = table.concatenate([_table(kind, [parts[at].values for at in group]) for kind, group in groups.items()])
    order = np.argsort(np.concatenate(list(groups.values())))
    frame = frame.iloc[order].reset_index(drop=True)
    for name in frame.select_dtypes("category"):
        frame[name] = frame[name].cat.set_categories(frame[name].dropna().astype(object).unique())
    return frame


def _table(kind: _Kind, values: list[list]) -> pa.Table:
    columns = zip(*values, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, kind.schema, strict=True)]
    return pa.table(arrays, schema=kind.schema)
