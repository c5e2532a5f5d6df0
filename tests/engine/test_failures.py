"""What fails: a model, a metric, a scorer's process. The others go on, and the failure is told with its name."""

import json
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import small

import perturbray as pr
from perturbray.engine import TrialError
from perturbray.results import table

BROKEN = """
from dataclasses import dataclass

import perturbray as pr


@pr.MODELS.register("broken")
@dataclass(frozen=True, kw_only=True)
class Broken(pr.ModelSpec):
    def build(self, vocabulary):
        return BrokenNet(vocabulary)


class BrokenNet(pr.StreamingModel):
    def update(self, batch):
        raise ValueError("this model cannot be fitted")

    def finish(self):
        pass

    def predict(self, batch):
        return batch.control
"""

KILLER = """
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import ray

import perturbray as pr


@pr.MODELS.register("killer")
@dataclass(frozen=True, kw_only=True)
class Killer(pr.ModelSpec):
    how: str
    flag: str

    def build(self, vocabulary):
        if not Path(self.flag).exists():
            Path(self.flag).touch()
            if self.how == "ray.kill":
                (name,) = [name for name in ray.util.list_named_actors() if name.startswith("scorer-")]
                ray.kill(ray.get_actor(name))
            else:
                os.kill(scorer(), signal.SIGKILL)
        return KillerNet(vocabulary)


class KillerNet(pr.Model):
    def predict(self, batch):
        return batch.control


def scorer():
    # Workers of one Ray have one parent: other Rays of this machine are left alone.
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                command, parent = (place / "cmdline").read_bytes(), (place / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if command.startswith(b"ray::Scorer") and int(parent) == os.getppid():
                return int(place.name)
    raise RuntimeError("there is no scorer")
"""


def told(error: TrialError) -> str:
    return "".join(error.__notes__)


def test_failures_are_named_and_do_not_stop_the_others_and_are_tried_again(ray_session, small_screen, tmp_path):
    @dataclass(frozen=True)
    class Picky:
        name: ClassVar[str] = "picky"
        higher_is_better: ClassVar[bool] = False
        best: ClassVar[float] = 0.0
        chance: ClassVar[float | None] = None
        fails: bool

        def evaluate(self, prediction, memo):
            if self.fails and np.allclose(prediction.predicted.mean, prediction.control.mean[prediction.context]):
                raise ZeroDivisionError("no change is not worth a score")
            return np.zeros(len(prediction)), np.full(len(prediction), "")

    def sweep(*, fails):
        metrics = (*small.METRICS, Picky(fails))
        models = (pr.NoChange(), pr.MODELS["broken"](), pr.MeanShift(), pr.PerturbedMean())
        return small.sweep(small_screen, models, metrics=metrics)

    broken = small.plugin(BROKEN)
    with pytest.raises(ExceptionGroup, match="2 of 4 trials failed") as caught:
        small.run(sweep(fails=True), tmp_path, plugins=[broken])
    trained, scored = sorted(caught.value.exceptions, key=str)
    assert isinstance(trained, TrialError)
    assert str(trained).startswith("broken, seed 0 (")
    assert "ValueError: this model cannot be fitted" in str(trained)
    assert "in update" in told(trained), "the traceback of where it ran is a note"
    assert str(scored).startswith("no_change, seed 0 (")
    assert "ZeroDivisionError: no change is not worth a score" in str(scored)
    assert "while scoring trial" in told(scored)
    assert "in evaluate" in told(scored)

    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.failed.json")]
    records = {record["name"]: record for record in records}
    assert set(records) == {"broken, seed 0", "no_change, seed 0"}
    assert records["broken, seed 0"]["error"] == "ValueError: this model cannot be fitted"
    assert 'raise ValueError("this model cannot be fitted")' in records["broken, seed 0"]["traceback"]
    before = small.stamps(tmp_path)
    assert len(before) == 3, "two trials and the reference"

    mended = small.plugin(BROKEN.replace('raise ValueError("this model cannot be fitted")', "pass"))
    ran, plan = small.run(sweep(fails=False), tmp_path, plugins=[mended], events=(events := small.Record()))
    assert ran == 2
    assert set(events.began) == {record["key"] for record in records.values()}
    assert table.finished(tmp_path) == set(plan.trials)
    assert not list(tmp_path.glob("*.failed.json"))
    before.pop(table.REFERENCE)
    assert before.items() <= small.stamps(tmp_path).items(), "what was finished is left alone"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ray.kill", "SIGKILL"])
def test_a_killed_scorer_loses_nothing(ray_session, small_screen, tmp_path, how):
    @dataclass(frozen=True)
    class Slow:
        """Holds trials in the scorer's queue, so that its death takes some along."""

        name: ClassVar[str] = "slow"
        higher_is_better: ClassVar[bool] = False
        best: ClassVar[float] = 0.0
        chance: ClassVar[float | None] = None

        def evaluate(self, prediction, memo):
            time.sleep(0.5)
            return np.zeros(len(prediction)), np.full(len(prediction), "")

    killer = small.plugin(KILLER, "killer")
    models = [pr.NoChange(), pr.MeanShift(), pr.PerturbedMean()]
    models.append(pr.MODELS["killer"](how=how, flag=str(tmp_path / "killed")))
    models.append(pr.PerturbedMeanGlobal())
    sweep = small.sweep(small_screen, models, metrics=(*small.METRICS, Slow()))
    ran, plan = small.run(sweep, tmp_path / "out", plugins=[killer], events=(events := small.Record()))
    assert (tmp_path / "killed").exists()
    assert ran == 5
    assert table.finished(tmp_path / "out") == set(plan.trials)
    assert table.failed(tmp_path / "out") == {}
    assert any("were lost with the process" in line for line in events.lines)
    assert len(events.began) > 5, "the trials that the scorer held are run again"


LATE = """
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import perturbray as pr


@pr.MODELS.register("late")
@dataclass(frozen=True, kw_only=True)
class Late(pr.ModelSpec):
    folder: str

    def build(self, vocabulary):
        with open(Path(self.folder, "begun"), "a") as file:
            file.write("once\\n")
        net = LateNet(vocabulary)
        net.folder, net.predicted = Path(self.folder), False
        return net


class LateNet(pr.Model):
    def predict(self, batch):
        self.predicted = True
        return batch.control

    def state_dict(self, *args, **kwargs):
        # Asked for in training too, and last at the end of the trial, once its prediction is with a scorer.
        end = time.monotonic() + 5 * self.predicted
        while time.monotonic() < end and not (self.folder / "killed").exists():
            if list(self.folder.glob("out/*.parquet")):
                (self.folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)
        return super().state_dict(*args, **kwargs)
"""


@pytest.mark.slow
def test_a_trial_whose_process_dies_once_its_result_is_stored_is_not_run_again(ray_session, small_screen, tmp_path):
    late = small.plugin(LATE, "late")
    sweep = small.sweep(small_screen, [pr.MODELS["late"](folder=str(tmp_path))])
    _, plan = small.run(sweep, tmp_path / "out", plugins=[late])
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "begun").read_text() == "once\n"
    assert table.finished(tmp_path / "out") == set(plan.trials)
    assert table.failed(tmp_path / "out") == {}
