"""Reading a results folder, again and again while it fills, as Results: what the trials are, and apart from it their values.

A trial's file repeats some seventy columns in each of its rows, so the whole table of ten thousand trials takes gigabytes.
Here a trial is one row of a frame of its own, and beside the values stand only the columns that statistics part them by;
a statistic that asks for another one of the trial adds it to ``BY``.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

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

    def _part(self, file: pq.ParquetFile) -> "_Part":
        facts = file.metadata.metadata or {}
        stored = facts.get(b"ARROW:schema", b"")
        kind = self._kinds.get(stored)
        if kind is None:
            kind = _Kind.of(file.schema_arrow, stored)
            if stored:
                self._kinds[stored] = kind
        values = kind.said(facts.get(table.CONSTANT)) if kind.trusted else None
        rows = table.content(file) if values is None else file.read(columns=kind.varying, use_threads=False)
        if not len(rows):
            return _Part(kind=kind, values=[], rows=rows)
        values = [rows.column(name)[0].as_py() for name in kind.schema.names] if values is None else values
        return _Part(kind=kind, values=values, rows=rows.select(kind.varying).replace_schema_metadata())


_TYPES = {pa.int64(): int, pa.float64(): float, pa.bool_(): bool, pa.null(): type(None), pa.string(): str}


@dataclass(frozen=True, eq=False)
class _Kind:
    """What the columns of some files are: of a few kinds among ten thousand files."""

    schema: pa.Schema  # of the constant columns
    varying: list[str]
    types: list[type | None]  # of the constant columns' values as JSON gives them; None: it does not
    trusted: bool  # a footer goes with the columns: it was not taken over with a table that was changed since

    @classmethod
    def of(cls, schema: pa.Schema, stored: bytes) -> "_Kind":
        """``stored``: the schema that its writer was given, as Arrow keeps it; what else a footer holds is not in it."""
        constant = pa.schema([field for field in schema if not table.varies(field.name)])
        kinds = [field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in constant]
        given = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored))) if stored else schema
        return cls(
            schema=constant,
            varying=[name for name in schema.names if table.varies(name)],
            types=[_TYPES.get(kind) for kind in kinds],
            trusted=bool(stored) and table.CONSTANT not in (given.metadata or {}),
        )

    def said(self, footer: bytes | None) -> list | None:
        """The values of the constant columns by a footer; None where it does not say them."""
        try:
            said = json.loads(footer or b"null")
        except ValueError:
            return None
        if not isinstance(said, dict) or len(said) != len(self.types):
            return None
        values = [said.get(name) for name in self.schema.names]
        return values if [type(value) for value in values] == self.types else None


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
