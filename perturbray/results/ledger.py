"""The ledger of a search: a file a trial that ended, and one that says what is searched; read with pandas alone.

``searches/<model>-<identity>/`` in the results folder of a sweep holds ``search.json`` and ``<key>.json`` of each trial.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from perturbray.errors import InputError
from perturbray.results.table import replace_file

FOLDER = "searches"
HEADER = "search.json"
_KEY = re.compile(r"[0-9a-f]{16}")


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Store what is known of a trial that ended, all of it or nothing. Raises where it is stored already."""
    path = Path(folder) / f"{record['key']}.json"
    if path.exists():
        raise ValueError(f"{path}: this trial ended before")
    text = json.dumps(record, indent=1)
    replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))
    return path


def read_records(folder: str | Path) -> dict[str, dict]:
    """The trials that ended, by key. Raises InputError for a file that cannot be read."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        if not _KEY.fullmatch(path.stem):
            continue
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not readable JSON ({error}); delete it, and that trial is run again") from None
    return found


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Store what is searched and how far it is."""
    text = json.dumps(header, indent=1, default=str)
    replace_file(Path(folder) / HEADER, lambda target: target.write_text(text, encoding="utf-8"))


def read_header(folder: str | Path) -> dict:
    """What is searched; empty where that is not known, which a search that goes on writes again."""
    try:
        return json.loads((Path(folder) / HEADER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def describe(part: Any) -> dict:
    """A part of a space as plain values: its kind, and its fields."""
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    if "then" in fields:
        return {**describe(fields["then"]), "when": [fields["path"], fields["value"]]}
    steps = getattr(part, "values", None)
    return {"kind": type(part).__name__, **fields, **({"values": list(steps)} if steps else {})}


@dataclasses.dataclass(frozen=True)
class Learnt:
    """A search as it is read: its header, and a row a trial with the values by path."""

    header: dict
    trials: pd.DataFrame  # number, state, reason, objective, epochs, seconds, way, and a column a hyperparameter
    histories: dict[int, list[tuple[int, float]]]  # objective by epoch, of each trial
    folder: str = ""  # its name

    @property
    def name(self) -> str:
        return str(self.header.get("model", ""))


def read_searches(folder: str | Path, *, begun: bool = False) -> list[Learnt]:
    """The searches in a results folder that have at least one trial, or have but ``begun``; the earliest in front."""
    found = []
    for place in sorted((Path(folder) / FOLDER).glob(f"*/{HEADER}")):
        records = sorted(read_records(place.parent).values(), key=lambda record: record["number"])
        if records or begun:
            rows = [{**_row(record), **record["values"]} for record in records]
            histories = {record["number"]: [tuple(pair) for pair in record["history"]] for record in records}
            found.append(Learnt(read_header(place.parent), pd.DataFrame(rows), histories, place.parent.name))
    return sorted(found, key=lambda one: one.trials["started"].min() if len(one.trials) else "9")


def _row(record: Mapping[str, Any]) -> dict:
    names = ("number", "state", "reason", "objective", "epochs", "seconds", "way", "started")
    return {name: record.get(name) for name in names}
