"""Kills of the command that runs a sweep: what was finished stays, what was in flight is run again, nothing else is lost."""

import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import small
from pandas.testing import assert_frame_equal
from processes import HANG, family, wait

from perturbray.metrics.metric import Metric
from perturbray.results import table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "sweeps" / "imbalance.py"
TRIALS = 16

SIGKILL_ONCE = """
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import perturbray as pr


@pr.MODELS.register("mortal")
@dataclass(frozen=True, kw_only=True)
class Mortal(pr.ModelSpec):
    flag: str = ""

    def build(self, vocabulary):
        if not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return MortalNet(vocabulary)


class MortalNet(pr.Model):
    def predict(self, batch):
        return batch.control
"""


@dataclass
class Command:
    """`python sweeps/imbalance.py` on the small screen, in a session of its own."""

    screen: Path
    results: Path

    @property
    def folder(self) -> Path:
        return self.results / f"imbalance-{self.screen.stem}"

    def words(self) -> list[str]:
        words = [SCRIPT, "--data", self.screen, "--results", self.results, "--set", "ablation.highest=0.2"]
        words += ["--grid", "ablation.level=0,0.2", "--grid", "seed=0", "--set", "training.epochs=15"]
        return [str(word) for word in words]

    def start(self) -> subprocess.Popen:
        log = open(self.results.with_suffix(".log"), "a")  # noqa: SIM115  # the process keeps it
        with log:
            return subprocess.Popen(
                [sys.executable, *self.words()],
                # A cache of its own, so that its first run reads the screen.
                env={**os.environ, "PYTHONPATH": str(ROOT), "PERTURBRAY_CACHE": str(self.results.parent / "cache")},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(
                    signal.SIGINT, signal.SIG_DFL
                ),  # a background job's children ignore it
            )

    def finish(self, process: subprocess.Popen) -> tuple[int, str]:
        """The exit code, and all that was said so far by this and earlier runs."""
        return process.wait(timeout=HANG), self.log()

    def run(self) -> tuple[int, str]:
        return self.finish(self.start())

    def log(self) -> str:
        return self.results.with_suffix(".log").read_text()

    def finished(self) -> set[str]:
        return table.finished(self.folder)

    def start_until(self, trials: int, delay: float) -> subprocess.Popen:
        """Start, and return a moment after so many trials are finished."""
        process = self.start()
        wait(lambda: len(self.finished()) >= trials or process.poll() is not None)
        assert process.poll() is None, self.log()
        time.sleep(delay)
        return process


def whole(folder: Path) -> bool:
    """Whether every file of the folder is one that a reader knows; temporary files of a killed writer are hidden."""
    known = (".parquet", ".json", ".html", ".svg", ".png", ".csv")
    return all(p.suffix in known for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def unchanged(folder: Path, *, since: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The finished trials' files; those of before are the same files, or their trials were run again."""
    now = {name: stamp for name, stamp in small.stamps(folder).items() if name != table.REFERENCE}
    assert since.items() <= now.items(), "a finished trial was run again"
    return now


@pytest.fixture
def command(small_screen, tmp_path):
    return Command(small_screen, tmp_path / "results")


@pytest.fixture(scope="module")
def uninterrupted(ray_session, small_screen, tmp_path_factory):
    """The folder of a run that nothing disturbed, by the same script, in this process and the Ray of the tests."""
    command = Command(small_screen, tmp_path_factory.mktemp("uninterrupted") / "results")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command.words())
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    signal.signal(signal.SIGTERM, before)
    assert not end.value.code
    assert len(command.finished()) == TRIALS
    return command.folder


def test_a_sweep_that_is_killed_and_interrupted_again_and_again_ends_with_the_table_of_an_undisturbed_one(
    command, uninterrupted, left
):
    """SIGTERM becomes the interrupt that SIGINT is in the driver; a terminal sends SIGINT to all of its processes."""
    moment = random.Random(0)
    stored: dict[str, tuple[int, int]] = {}
    for how, first, last in (
        ("SIGKILL", 0, 0),
        ("SIGINT to all", 2, 2),
        ("SIGKILL", 4, 6),
        ("SIGTERM", 9, 9),
        ("SIGKILL", 11, 13),
    ):
        if not last:
            process, said = command.start(), 0
            wait(lambda: "reading" in command.log())
        else:
            said = len(command.log())
            process = command.start_until(moment.randint(first, last), delay=moment.uniform(0, 1))
        left |= family(process.pid)
        if how == "SIGINT to all":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.Signals[how])
        code, log = command.finish(process)
        stored = unchanged(command.folder, since=stored)
        table.read(command.folder, keys=command.finished())  # whatever is there can be read
        if how != "SIGKILL":
            assert code == 130, log
            assert "Traceback" not in log[said:]
            assert log.rstrip().endswith("interrupted: finished trials are kept; the same command goes on from there")
            assert whole(command.folder)
            assert not list(command.folder.glob("*.failed.json"))
            assert table.read_plan(command.folder)["status"]["state"] == "interrupted"

    code, log = command.run()
    assert code == 0, log
    assert len(stored) >= 11
    *_, (before, to_run) = re.findall(r"(\d+) finished before, (\d+) to run", log)
    assert int(before) >= len(stored), "a scorer may outlive the kill by a moment, and finish what it holds"
    assert int(before) + int(to_run) == TRIALS
    assert len(unchanged(command.folder, since=stored)) == TRIALS
    assert_frame_equal(small.stable(command.folder), small.stable(uninterrupted), check_exact=True)


def test_a_sweep_interrupted_while_it_reads_leaves_no_folder(command):
    process = command.start()
    wait(lambda: "reading" in command.log())
    process.send_signal(signal.SIGINT)
    code, log = command.finish(process)
    if "to run" not in log:  # else the signal came later than the reading
        assert not command.results.exists()
    assert code == 130, log
    assert "Traceback" not in log


def test_a_trial_whose_process_is_killed_completes(ray_session, small_screen, tmp_path):
    import perturbray as pr

    mortal = small.plugin(SIGKILL_ONCE, "mortal")
    models = (pr.NoChange(), pr.MODELS["mortal"](flag=str(tmp_path / "killed")), pr.MeanShift())
    ran, plan = small.run(small.sweep(small_screen, models), tmp_path / "out", plugins=[mortal])
    assert (tmp_path / "killed").exists()
    assert ran == 3
    assert table.finished(tmp_path / "out") == set(plan.trials)


LETHAL_ONCE = """
import os
import signal
from pathlib import Path

import numpy as np

from perturbray.metrics import score


@score("lethal", best=0.0, higher_is_better=False)
def lethal(predicted, observed):
    flag = Path({flag!r})
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return np.abs(predicted - observed).mean(axis=-1)
"""


def test_trials_whose_scorer_is_killed_with_their_predicted_cells_are_run_again(ray_session, small_screen, tmp_path):
    import perturbray as pr

    deadly = small.plugin(LETHAL_ONCE.format(flag=str(tmp_path / "killed")), "deadly")
    metrics = (Metric("lethal"), Metric.parse("energy/pca"))
    sweep = small.sweep(small_screen, (pr.NoChange(), pr.MeanShift()), metrics=metrics, cells=20)
    _, plan = small.run(sweep, tmp_path / "out", plugins=[deadly])
    assert (tmp_path / "killed").exists()
    assert table.finished(tmp_path / "out") == set(plan.trials)
    assert not list((tmp_path / "out").glob("*.failed.json"))
    assert plan.anchors
    assert plan.anchors.keys() <= set(table.anchored(tmp_path / "out")), "what went with the scorer is scored again"
    assert table.read(tmp_path / "out")["value"].notna().all()


def test_ray_starts_also_where_it_was_imported_before(tmp_path):
    """Ray reads how to authenticate when it is imported; a notebook often imports it first."""
    source = "import ray; from perturbray.cluster import connect\nwith connect() as c: print(c.cpus, c.nodes)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, "-c", source],
        env={**env, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[1] == "1"
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
