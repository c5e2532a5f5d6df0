"""The kill campaign in short, and that it tells what would be wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import campaign
import pytest

SCRIPT = Path(__file__).with_name("campaign.py")


@pytest.mark.slow
def test_a_kill_of_every_kind_loses_nothing_and_runs_nothing_twice(tmp_path):
    words = [
        "--kills",
        str(len(campaign.KINDS)),
        "--seed",
        "1",
        "--keep",
        tmp_path / "sweeps",
        "--json",
        tmp_path / "tally.json",
    ]
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        env={**os.environ, "RAY_health_check_period_ms": "500"},  # a node that vanished is noticed after five of them
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    tally = json.loads((tmp_path / "tally.json").read_text())
    assert tally["kills"] == dict.fromkeys(campaign.KINDS, 1)
    assert tally["asked"] == tally["sweeps"] * campaign.TRIALS == tally["finished"] + tally["failed"]
    assert tally["begun"] >= tally["finished"]
    assert (tally["lost"], tally["twice"]) == (0, 0)


@pytest.mark.parametrize("wrong", [{"lost": 1}, {"twice": 1}, {"finished": 22}, {"failed": 2}])
def test_a_campaign_is_bad_where_one_trial_is_lost_or_run_twice_or_without_account(wrong):
    right = {"asked": 24, "finished": 23, "failed": 1}
    assert campaign.Tally(**right).good
    assert not campaign.Tally(**{**right, **wrong}).good


class Ended:
    """A driver that is there no more."""

    returncode = 0

    def poll(self) -> int:
        return 0


def run_in(folder: Path) -> campaign.Run:
    """A sweep of a campaign whose driver has ended, in a folder made by hand."""
    run = object.__new__(campaign.Run)
    run.folder, run.results, run.notes, run.tally = folder, folder, folder / "begun.txt", campaign.Tally()
    run.process, run.known, run.changed, run.idle, run.moved = Ended(), {}, set(), 0, 0.0
    return run


@pytest.mark.parametrize(
    ("what", "lost", "twice"), [("nothing", 0, 0), ("again", 0, 1), ("rewritten", 1, 0), ("deleted", 1, 0)]
)
def test_a_trial_run_again_and_a_result_written_again_or_gone_are_counted(tmp_path, what, lost, twice):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def store(number: int) -> Path:
        path = tmp_path / f"{number:016x}.parquet"
        pq.write_table(pa.table({"model.number": [number]}), path)
        os.utime(path, ns=(2000 * 10**9 + len(run.known), 2000 * 10**9 + len(run.known)))
        return path

    run = run_in(tmp_path)
    begun = [(0, 1000.0), (1, 1000.0)] + [(1, 3000.0)] * (what == "again")
    run.notes.write_text("".join(f"{number} {at}\n" for number, at in begun))
    first, second = store(0), store(1)
    run.look()
    if what == "rewritten":
        store(1)
    if what == "deleted":
        second.unlink()
    run.end()
    assert first.exists()
    assert (run.tally.lost, run.tally.twice, run.tally.begun) == (lost, twice, len(begun))


def test_the_counts_of_a_campaign_are_json():
    tally = campaign.Tally(kills=campaign.Counter(driver=2, node=1), asked=24, finished=24)
    assert json.loads(tally.json(seed=3))["kills"] == {"driver": 2, "node": 1}
    assert json.loads(tally.json(seed=3))["good"] is True
