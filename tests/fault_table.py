"""The table of faults: a row a fault, made by the test that brings it about; `faults/faults.md` holds it.

PERTURBRAY_FAULTS=write with the tests of faults (``pytest -m slow tests/faults tests/engine/test_lost_nodes.py``) writes it
anew. Otherwise a test fails whose row is not the one that stands there.
"""

import os
from dataclasses import astuple, dataclass
from pathlib import Path

PLACE = Path(__file__).parent / "faults" / "faults.md"
WRITE = os.environ.get("PERTURBRAY_FAULTS") == "write"
FAULTS = (
    "a spot node that vanishes",
    "a scorer's node that vanishes",
    "a full disk",
    "a full disk in a search",
    "a full cache",
    "a full temporary folder of Ray's",
    "an object store that fills",
    "memory that runs out",
    "memory that other programs hold",
    "a truncated state file",
    "a corrupt checkpoint",
    "another Ray on the same host",
    "a small shared-memory mount",
    "a read-only home",
)
HEAD = "| fault | what happens | what is lost | how one goes on |\n|---|---|---|---|\n"


@dataclass(frozen=True, kw_only=True)
class Row:
    fault: str
    happens: str
    lost: str
    goes_on: str

    def __str__(self) -> str:
        return f"| {' | '.join(astuple(self))} |"


def read() -> dict[str, str]:
    """The rows that are stored, as lines by fault."""
    lines = PLACE.read_text().splitlines() if PLACE.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def record(row: Row) -> None:
    """Store a row, or fail where another stands there."""
    if row.fault not in FAULTS:
        raise ValueError(f"{row.fault!r} is no fault of {FAULTS}")
    rows = read()
    if WRITE:
        rows[row.fault] = str(row)
        PLACE.write_text(HEAD + "".join(f"{rows[fault]}\n" for fault in FAULTS if fault in rows))
        return
    assert rows.get(row.fault) == str(row), f"{PLACE} says otherwise; PERTURBRAY_FAULTS=write writes it anew"
