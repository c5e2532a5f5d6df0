"""The table of a sweep: one Parquet file a finished trial, written last; to record more, add a column to it.

A results folder holds ``sweep.json`` (the plan), ``<key>.parquet`` a finished trial, ``<key>.failed.json`` a failed
one, and ``reference.parquet`` where values are known analytically. Whatever else lies there is ignored.
"""

import errno
import json
import math
import os
import re
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from perturbray.errors import InputError

PLAN = "sweep.json"
REFERENCE = "reference.parquet"
FAILED = ".failed.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM = "make room, and the same command goes on"
PROBE = 2**16  # bytes that must find room; a full disk still takes an empty file
ANCHORS = "anchors"  # a folder, so that no anchor is taken for a trial

ROWS = ("condition", "perturbation", "stratum", "metric", "value", "status")
"""Row columns that every trial has; ``covariate.<name>`` and those of ``BESIDE`` come with them."""

BESIDE = ("value_half", "n_observed", "n_control")
"""``value_half``: against one half of the observed cells, the scale of anchors. Numbers of cells of the condition, and of
the control that the model predicted from."""

VOLATILE = (
    *("fit_seconds", "predict_seconds", "score_seconds", "peak_memory_mb", "host"),
    *("started", "trained", "scoring", "ended"),
)
"""Columns that differ between two runs of one trial; every other column is equal, value for value."""

LAYOUT = {"compression": "none", "write_statistics": False}
"""Of a file with some eighty columns, most of them constant: statistics would weigh more than the values, and to set up a
decompressor for each column takes more than half of the time of reading thousands of files, which it hardly makes smaller."""

CONSTANT = b"perturbray.constant"
"""Where a trial's file says its constant columns once more, in its footer: an object in JSON, of a value each. Of thousands
of files that is read in half the time that the columns take; a file without it, or whose columns were changed, is as good."""

_KEY = re.compile(r"[A-Za-z0-9_-]+")

Made = TypeVar("Made")


def create(folder: str | Path) -> Path:
    """Make a results folder, or an InputError where it cannot be made or written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe(folder)
    except OSError as error:
        way = f"{ROOM}: finished trials are kept" if error.errno in FULL else "choose another folder"
        raise InputError(f"{folder}: results cannot be written there ({error.strerror}); {way}") from None
    return folder


def probe(folder: Path) -> None:
    """Write something there and delete it again; raises OSError where that cannot be."""
    place = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        place.write_bytes(bytes(PROBE))
    finally:
        place.unlink(missing_ok=True)


@contextmanager
def made(folder: str | Path) -> Iterator[None]:
    """A results folder, known to be writable before anything is read; taken away again if nothing came into it. Where it
    fills meanwhile, that is what is raised."""
    folder = Path(folder)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        create(folder)
        try:
            yield
        except OSError:
            create(folder)
            raise
    finally:
        for place in new:
            with suppress(OSError):  # it holds something, so it stays
                place.rmdir()


def write_plan(folder: str | Path, plan: Mapping) -> None:
    """Store the plan, ``sweep.json``. Only ``trials`` is needed; the page leaves out what the rest does not say.

    name, question, command, created    text; the question is the title of the page
    x, x_label                          the column on the figure's x axis, and what to call it there
    headline                            names of metrics, the most telling first
    metrics                             objects with name, higher_is_better, best, chance; also title, effect, unit
    baselines                           values of the column ``model`` that stand apart
    anchors                             keys of the files in ``anchors/``: replicates of the test conditions
    controls                            split or reference: where effects take their control cells from
    dataset                             object with name, cells, genes, contexts, perturbations, normalisation, ...
    notes                               sentences
    trials                              objects with key, name and columns (those constant ones known before a run)
    status                              object with state (running, done, interrupted), running, eta_seconds
    """
    text = json.dumps(_plain(plan), indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(Path(folder) / PLAN, lambda path: path.write_text(text, encoding="utf-8"))


def read_plan(folder: str | Path) -> dict:
    """The plan of a sweep; InputError where the folder holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a sweep writes its results to results/<sweep>")
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no {PLAN}, so it is not the results folder of a sweep") from None
    except ValueError as error:
        raise InputError(
            f"{folder / PLAN}: not readable JSON ({error}); run the sweep again, which rewrites it"
        ) from None
    if not isinstance(plan, dict):
        raise InputError(f"{folder / PLAN}: holds a {type(plan).__name__}, expected an object")
    return plan


def write_trial(folder: str | Path, key: str, *, columns: Mapping[str, object], rows: Mapping[str, Sequence]) -> Path:
    """Store a finished trial: constant ``columns`` beside long ``rows``, all of one length. Clears an earlier failure.

    The rows are put in the order of metric and condition, so the file does not depend on which scorer was first.
    """
    columns = {"key": key, **columns}
    if absent := [name for name in ROWS if name not in rows]:
        raise ValueError(f"{key}: the rows lack {', '.join(absent)}")
    if twice := sorted(set(columns) & set(rows)):
        raise ValueError(f"{key}: {', '.join(twice)} given both as constant and as row columns")
    length = len(rows["value"])
    if length == 0 or any(len(values) != length for values in rows.values()):
        raise ValueError(f"{key}: rows of lengths { {name: len(values) for name, values in rows.items()} }")
    order = np.lexsort([np.asarray(rows["condition"]), np.asarray(rows["metric"]).astype(str)])
    columns = {name: _flat(value) for name, value in columns.items()}
    arrays = {name: _constant(value, length) for name, value in columns.items()}
    arrays |= {name: _long(np.asarray(values)[order]) for name, values in rows.items()}
    path = _file(folder, key, ".parquet")
    write_parquet(path, pa.table(arrays), footer={CONSTANT: json.dumps(columns)})
    _file(folder, key, FAILED).unlink(missing_ok=True)
    return path


def write_failure(folder: str | Path, key: str, *, name: str, error: BaseException | str) -> Path:
    """Store why a trial failed, beside the trials that finished."""
    raised = isinstance(error, BaseException)
    record = {
        "key": key,
        "name": name,
        "error": f"{type(error).__name__}: {error}" if raised else str(error),
        "traceback": "".join(traceback.format_exception(error)) if raised else "",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = _file(folder, key, FAILED)
    replace_file(path, lambda target: target.write_text(json.dumps(record, indent=1), encoding="utf-8"))
    return path


def write_reference(folder: str | Path, rows: Mapping[str, Sequence]) -> Path:
    """Store values known analytically, in long form.

    ``reference`` names them (``mean_shift (analytic)``), ``model`` the model they are the truth of (default: the first
    word of ``reference``), ``ablation.level`` the level (default: the lowest); then the covariates, ``perturbation``,
    ``metric`` and ``value`` as in a trial.
    """
    if absent := [name for name in ("reference", "perturbation", "metric", "value") if name not in rows]:
        raise ValueError(f"the reference lacks {', '.join(absent)}")
    path = Path(folder) / REFERENCE
    write_parquet(path, pa.table({name: _long(np.asarray(values)) for name, values in rows.items()}))
    return path


def read_reference(folder: str | Path) -> pd.DataFrame | None:
    """The values known analytically, or None."""
    path = Path(folder) / REFERENCE
    return from_parquet(path, content).to_pandas() if path.exists() else None


def write_anchor(folder: str | Path, key: str, *, rows: Mapping[str, Sequence]) -> Path:
    """Store anchors (replicate, interpolated duplicate) of one set of test conditions, in the long form of a trial with
    ``reference`` naming them; their values are held against ``value_half`` of trials. ``effect_size`` and ``de_genes`` say
    how much is observed of the condition, -1 genes where that cannot be tested.
    """
    place = Path(folder) / ANCHORS
    place.mkdir(exist_ok=True)
    path = _file(place, key, ".parquet")
    write_parquet(path, pa.table({name: _long(np.asarray(values)) for name, values in rows.items()}))
    return path


def read_anchors(folder: str | Path, *, keys: Iterable[str] | None = None) -> pd.DataFrame | None:
    """The anchors of the plan's test conditions, or None where there are none."""
    keys = read_plan(folder).get("anchors", ()) if keys is None else keys
    paths = [path for key in sorted(keys) if (path := Path(folder) / ANCHORS / f"{key}.parquet").exists()]
    return pd.concat([from_parquet(path, content).to_pandas() for path in paths], ignore_index=True) if paths else None


def anchored(folder: str | Path) -> set[str]:
    """Keys of the anchors that are stored."""
    return {path.stem for path in (Path(folder) / ANCHORS).glob("*.parquet")}


def finished(folder: str | Path) -> set[str]:
    """Keys of the finished trials, of whatever plan."""
    return set(finished_files(folder))


def has(folder: str | Path, key: str) -> bool:
    """Whether one trial is finished."""
    return _file(folder, key, ".parquet").exists()


def failed(folder: str | Path) -> dict[str, dict]:
    """Why trials failed, by key; a trial that finished later is not among them."""
    done, found = finished(folder), {}
    for path in sorted(Path(folder).glob(f"*{FAILED}")):
        key = path.name.removesuffix(FAILED)
        if key in done:
            continue
        try:
            found[key] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found[key] = {
                "key": key,
                "name": key,
                "error": "the record of the failure is not readable",
                "traceback": "",
            }
    return found


def read(
    folder: str | Path, *, keys: Iterable[str] | None = None, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """The long table of a sweep, a row a (trial, metric, condition); text columns are categorical.

    The rows come in the order of (key, metric, condition), whatever finished first. ``keys`` defaults to those of the
    plan: files of other plans in the folder are left out, and ``table.attrs["others"]`` counts them. ``columns`` reads
    only those, which a sweep of many thousand trials needs to fit in memory.
    """
    files = finished_files(folder)
    present = present_keys(folder, files, keys=keys)
    table = concatenate(each_file(folder, present, lambda file: content(file, columns)))
    table.attrs["others"] = len(files) - len(present)
    return table


def present_keys(folder: str | Path, files: Iterable[str], *, keys: Iterable[str] | None = None) -> list[str]:
    """Those of the files that are asked for, by default by the plan, in the order of their rows in a table."""
    wanted = {trial["key"] for trial in read_plan(folder).get("trials", ())} if keys is None else set(keys)
    return sorted(wanted & set(files))


def each_file(folder: str | Path, keys: Iterable[str], make: Callable[[pq.ParquetFile], Made]) -> list[Made]:
    """What ``make`` makes of the files of finished trials, in the order of the keys; no more of them is kept."""

    def one(key: str) -> Made:
        return from_parquet(_file(folder, key, ".parquet"), make)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Arrow releases the interpreter while it decodes
        return list(pool.map(one, keys))


def trials(table: pd.DataFrame) -> pd.DataFrame:
    """One row a trial: the columns that are constant within it."""
    constant = [name for name in table.columns if not varies(name)]
    return table.loc[~table["key"].duplicated(), constant].reset_index(drop=True)


def varies(name: str) -> bool:
    """Whether the column differs within a trial."""
    return name in ROWS or name in BESIDE or name.startswith("covariate.")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a reader, or a kill, sees the old content or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(
        path.parent, os.O_RDONLY
    )  # the rename itself survives a power cut only once the folder is synced
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _file(folder: str | Path, key: str, suffix: str) -> Path:
    if not _KEY.fullmatch(key) or f"{key}.parquet" == REFERENCE:
        raise ValueError(f"{key!r} cannot be the key of a trial: letters, digits, _ and - only, and not 'reference'")
    return Path(folder) / f"{key}{suffix}"


def finished_files(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Key -> (modification time in ns, bytes) of the finished trials."""
    folder = Path(folder)
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        named = [(entry.name.removesuffix(".parquet"), entry) for entry in entries if entry.name.endswith(".parquet")]
        stats = {key: entry.stat() for key, entry in named if _KEY.fullmatch(key) and entry.name != REFERENCE}
    return {key: (stat.st_mtime_ns, stat.st_size) for key, stat in stats.items()}


def write_parquet(path: Path, content: pa.Table, *, footer: Mapping[bytes, str] = MappingProxyType({})) -> None:
    def write(target: Path) -> None:
        with pq.ParquetWriter(target, content.schema, **LAYOUT) as writer:
            writer.write_table(content)
            writer.add_key_value_metadata(footer)

    replace_file(path, write)


def from_parquet(path: Path, make: Callable[[pq.ParquetFile], Made]) -> Made:
    """What ``make`` makes of a file; InputError where it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:  # and not read_table: a third of the time for a small file
            return make(file)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not a readable Parquet file ({reason}); delete it and run the sweep again, which repeats only it"
        ) from None


def content(file: pq.ParquetFile, columns: Iterable[str] | None = None) -> pa.Table:
    """The columns that there are, without what the footer says."""
    wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
    return file.read(columns=wanted, use_threads=False).replace_schema_metadata()


def concatenate(parts: Sequence[pa.Table]) -> pd.DataFrame:
    """Tables of unlike columns under one another: what a trial lacks is missing (NaN)."""
    if not parts:
        return pd.DataFrame({name: pd.Series(dtype=float) for name in ("key", "name", *ROWS)})
    types: dict[str, set] = {}
    for part in parts:
        for field in part.schema:
            types.setdefault(field.name, set()).add(field.type)
    # A field that is text for one model and a number for another (a width, a list of widths) becomes text for all.
    mixed = {
        name
        for name, kinds in types.items()
        if any(map(_is_text, kinds)) and not all(_is_text(k, null=True) for k in kinds)
    }
    parts = [_as_text(part, mixed & set(part.column_names)) for part in parts] if mixed else parts
    return pa.concat_tables(parts, promote_options="permissive").unify_dictionaries().to_pandas()


def _is_text(kind: pa.DataType, *, null: bool = False) -> bool:
    return pa.types.is_dictionary(kind) or pa.types.is_string(kind) or (null and pa.types.is_null(kind))


def _as_text(part: pa.Table, names: set[str]) -> pa.Table:
    for name in names:
        if not _is_text(part.schema.field(name).type, null=True):
            text = [None if value is None else str(value) for value in part[name].to_pylist()]
            index = part.column_names.index(name)
            part = part.set_column(index, name, pa.array(text, pa.string()).dictionary_encode())
    return part


def _flat(value: object) -> str | bool | int | float | None:
    """As a column holds it: a list or an object as its JSON."""
    value = _plain(value)
    return value if value is None or isinstance(value, str | bool | int | float) else json.dumps(value)


def _constant(value: str | bool | int | float | None, length: int) -> pa.Array:
    if value is None:
        return pa.nulls(length)
    if isinstance(value, str):
        return pa.DictionaryArray.from_arrays(np.zeros(length, np.int32), pa.array([value]))
    return pa.repeat(value, length)


def _long(values: np.ndarray) -> pa.Array:
    if values.dtype.kind in "OUST":
        return pa.array([None if value is None else str(value) for value in values], pa.string()).dictionary_encode()
    return pa.array(values)


def _plain(value: object) -> object:
    """What JSON can hold: numbers of numpy become Python's, NaN becomes null, anything unknown its text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return [_plain(part) for part in value]
    return value.isoformat() if isinstance(value, date | datetime) else str(value)
