"""The command line as a user meets it, in this process where that is enough."""

import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "sweeps" / "imbalance.py"


@dataclass(frozen=True)
class Ended:
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `python sweeps/imbalance.py WORDS`, or another entry point, in an empty working folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words: object, entry: Callable[[], None] | None = None, script: Path = SCRIPT) -> Ended:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                entry() if entry else runpy.run_path(str(script), run_name="__main__")
        finally:
            signal.signal(signal.SIGTERM, before)
        printed = capsys.readouterr()
        return Ended(end.value.code, printed.out, printed.err)

    return run


@pytest.fixture
def small(small_screen) -> list[str]:
    """The small screen, and levels that its twelve perturbations reach."""
    return ["--data", str(small_screen), "--set", "ablation.highest=0.2", "--grid", "ablation.level=0,0.2"]
