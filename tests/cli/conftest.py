"""The command line as a user meets it, in this process where that is enough."""

import importlib.util
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "sweeps" / "imbalance.py"


@dataclass(frozen=True)
class Ended:
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def script():
    """sweeps/imbalance.py as a module."""
    spec = importlib.util.spec_from_file_location("imbalance_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(script, monkeypatch, capsys, tmp_path):
    """Runs `python sweeps/imbalance.py ...`, or another entry, in this process."""
    from perturbray import cli

    monkeypatch.chdir(tmp_path)

    def run(*words, entry=None) -> Ended:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                (entry or (lambda: cli.main(script.imbalance, flags={"published": "the published triples"})))()
        finally:
            signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return Ended(end.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def roles():
    """No flag is needed for the columns of a synthetic screen; the small one reaches other levels than the default."""
    return ["--grid", "ablation.level=0,0.2", "--set", "ablation.highest=0.2"]


@pytest.fixture
def locked(tmp_path):
    """A folder that nobody can write to, root included."""
    for place in (Path("/proc/self"), Path("/sys/kernel")):
        if place.is_dir():
            return place / "results"
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("nothing is locked for this user")
    return folder / "results"
