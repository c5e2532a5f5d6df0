"""Folders as sweeps leave them; the fake sweep is that of the results' tests, the real one of the engine's."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "results"))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from fake_sweep import fake_sweep


@pytest.fixture
def half(tmp_path):
    """A folder and its plan: 24 trials, of which 10 are done and 2 failed."""
    folder = tmp_path / "imbalance"
    plan = fake_sweep(folder, trials=10, failing=2, levels=(0.0, 0.3), seeds=1, status={"state": "running"})
    return folder, [trial["key"] for trial in plan["trials"]]
