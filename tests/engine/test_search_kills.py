"""Kills of the command that searches, at seeded moments: what a search has learnt stays, and its end is that of one which
nothing disturbed."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import family, wait

from perturbray.results import ledger, table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SAMPLES = 8
# Half of the configurations at random, half by TPE, which learns from those before: a search that lost or changed a record
# would go on to others.
FEW = """
from perturbray import proposals
proposals.STARTUP = 4
from perturbray.search import Search
assert Search.__dataclass_fields__["startup"].default == 4
"""
# Holds the process still in the middle of a write, a moment before the rename, so that a kill can hit it there.
SLOW_WRITES = """
import time
from perturbray.results import table
replace = table.Path.replace
def slow(self, target):
    if self.suffix == ".tmp":
        time.sleep(0.3)
    return replace(self, target)
table.Path.replace = slow
"""


@dataclass
class Command:
    """`python sweeps/search.py` on the small screen, one trial at a time, in a session of its own."""

    screen: Path
    results: Path

    @property
    def folder(self) -> Path:
        return self.results / f"search-{self.screen.stem}"

    def start(self, *, slow: bool = False) -> subprocess.Popen:
        words = ["--data", self.screen, "--results", self.results, "--samples", SAMPLES, "--at-once", 1, "--seeds", 1]
        words += ["--set", "training.epochs=8"]
        script = ROOT / "sweeps" / "search.py"
        source = f"import runpy, sys\n{FEW}{SLOW_WRITES if slow else ''}\nsys.argv = sys.argv[1:]\n"
        source += "runpy.run_path(sys.argv[0], run_name='__main__')"
        with open(self.results.with_suffix(".log"), "a") as log:
            return subprocess.Popen(
                [sys.executable, "-c", source, str(script), *map(str, words)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        return self.results.with_suffix(".log").read_text()

    def records(self) -> dict[str, dict]:
        found = list((self.folder / ledger.FOLDER).glob("*/"))
        assert len(found) <= 1
        return ledger.read_records(found[0]) if found else {}

    def stamps(self) -> dict[str, tuple[int, int]]:
        places = (self.folder / ledger.FOLDER).glob("*/????????????????.json")
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in places}

    def writing(self) -> bool:
        return any((self.folder / ledger.FOLDER).glob("*/.????????????????.json.*.tmp"))


def told(records: dict[str, dict]) -> list[dict]:
    ordered = sorted(records.values(), key=lambda record: record["number"])
    return [{k: v for k, v in record.items() if k not in ("seconds", "started", "ended")} for record in ordered]


@pytest.fixture
def undisturbed(small_screen, tmp_path):
    """A search that runs beside the one that is killed: each tries one trial at a time."""
    command = Command(small_screen, tmp_path / "undisturbed")
    process = command.start()
    try:
        wait(lambda: "trials known" in command.log() or process.poll() is not None)
        yield command, process
    finally:
        process.kill()


def test_a_search_that_is_killed_again_and_again_ends_like_an_undisturbed_one(
    small_screen, tmp_path, undisturbed, left
):
    undisturbed, beside = undisturbed
    command, moment = Command(small_screen, tmp_path / "results"), random.Random(0)
    stored: dict[str, tuple[int, int]] = {}
    plans = ("first trial", "write", "judging the best")
    for where in plans:
        process = command.start(slow=where == "write")
        enough = moment.randint(5, 6)  # one or two of them by TPE

        def reached(where=where, enough=enough, process=process) -> bool:
            if process.poll() is not None:
                return True
            return {
                "first trial": "trials known" in command.log(),
                "write": len(command.records()) >= enough and command.writing(),
                "judging the best": len(table.finished(command.folder)) >= 1,
            }[where]

        wait(reached, 600)
        assert process.poll() is None, command.log()
        left |= family(process.pid)
        process.kill()
        process.wait()
        now = command.stamps()
        assert stored.items() <= now.items(), f"{where}: a trial that had ended was run again"
        assert len(now) == len(command.records()), f"{where}: a file that cannot be read"
        stored = now
    judged = table.finished(command.folder)
    assert judged

    process = command.start()
    assert process.wait(timeout=900) == 0, command.log()
    assert beside.wait(timeout=900) == 0, undisturbed.log()
    assert stored.items() <= command.stamps().items()
    assert len(command.records()) == SAMPLES
    assert judged <= table.finished(command.folder)
    assert told(command.records()) == told(undisturbed.records()), "the same configurations, worth the same"
    tuned = [json.loads((c.folder / "tuned-latent_additive.json").read_text()) for c in (command, undisturbed)]
    assert tuned[0] == tuned[1]
    assert table.finished(command.folder) == table.finished(undisturbed.folder)
