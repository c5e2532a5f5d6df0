"""Searches on Tune: they run to their end, go on where they were, agree with a search without Tune, and fail aloud."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small

import perturbray as pr
from perturbray import tuning
from perturbray.course import Course, SearchError
from perturbray.data.store import ingest
from perturbray.errors import InputError
from perturbray.placement import Node
from perturbray.plan import Plan
from perturbray.process import BLIND
from perturbray.results import ledger, table
from perturbray.search import Halving, Search, Tuned
from perturbray.space import Choice, LogUniform
from perturbray.validation import Judge, alone

SPACE = {"model.width": Choice(8, 16, 32), "training.lr": LogUniform(1e-3, 1e-1)}
LIMITED = """
from dataclasses import dataclass
import os, signal
from pathlib import Path
import perturbray as pr
from perturbray.models.latent_additive import LatentAdditiveNet

@pr.MODELS.register("limited")
@dataclass(frozen=True, kw_only=True)
class Limited(pr.LatentAdditive):
    way: str = "well"
    flag: str = ""

    def build(self, vocabulary):
        if self.way == "memory":
            import torch
            torch.zeros(3 * 2**30, dtype=torch.uint8)
        return LimitedNet(self, vocabulary)

class LimitedNet(LatentAdditiveNet):
    def loss(self, batch):
        found = super().loss(batch)
        return found * float("nan") if self.spec.way == "nan" else found

    def step(self, batch, at):
        if self.spec.way == "death":
            began = Path(self.spec.flag)
            if not hasattr(self, "began"):  # once a process that trains this network
                self.began = True
                with began.open("a") as file:
                    file.write(f"{at.epoch} ")
            if at.epoch == 3 and len(began.read_text().split()) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step(batch, at)
"""


def search(path: Path, model=None, *, space=SPACE, epochs=5, **fields) -> Search:
    base = pr.Trial(
        dataset=pr.DatasetSpec(path=str(path)), model=model or pr.LatentAdditive(), training=pr.Training(epochs=epochs)
    )
    return Search(base=base, space=space, **{"samples": 6, "startup": 3, "at_once": 1, "seeds": 2, **fields})


def sweep(*searches: Search) -> pr.Sweep:
    return pr.Sweep(
        name="search",
        trials=[pr.Trial(dataset=s.base.dataset, model=pr.MeanShift()) for s in searches[:1]],
        searches=searches,
        metrics=small.METRICS,
    )


def told(folder: Path) -> list[dict]:
    (place,) = (folder / ledger.FOLDER).iterdir()
    records = sorted(ledger.read_records(place).values(), key=lambda record: record["number"])
    return [{k: v for k, v in record.items() if k not in ("seconds", "started", "ended")} for record in records]


def test_a_search_on_tune_is_the_search_without_it(ray_session, small_screen, tmp_path):
    asked = search(small_screen)
    record = small.Record()
    found = tuning.tune(sweep(asked), tmp_path / "out", events=record)

    spec = asked.base.dataset
    plan = Plan.of(sweep(asked), tmp_path / "plan")
    cells, conditions = ingest(spec, plan.conditions[spec]).cells(), plan.conditions[spec]
    course = Course(asked, tmp_path / "here" / ledger.FOLDER, _content(plan))
    course.run(alone(asked, Judge.of(asked, cells, conditions), cells, conditions))
    assert told(tmp_path / "out") == told(tmp_path / "here")

    best = course.best["values"]
    tuned = [trial for trial in found.trials if trial.variant == "tuned"]
    assert [trial.seed for trial in tuned] == [0, 1]
    assert {(trial.model.width, trial.training.lr) for trial in tuned} == {(best["model.width"], best["training.lr"])}
    kept = Tuned.read(str(tmp_path / "out" / "tuned-latent_additive.json"))
    assert (kept.model, kept.training) == (tuned[0].model, tuned[0].training)
    assert str(kept) in record.lines
    assert not list((tmp_path / "out").rglob("checkpoint_*"))

    before = small.stamps(tmp_path / "out")
    again = tuning.tune(sweep(asked), tmp_path / "out")
    assert again.trials == found.trials
    assert small.stamps(tmp_path / "out") == before

    ran, plan = small.run(found, tmp_path / "out")
    assert ran == 3
    assert table.finished(tmp_path / "out") == set(plan.trials)


def _content(plan: Plan) -> str:
    plan.scan()
    return next(iter(plan.contents.values()))


def test_a_trial_whose_process_dies_completes_from_its_checkpoint(ray_session, small_screen, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "CHECKPOINT_SECONDS", 0.0)
    plugin = small.plugin(LIMITED, "limited")
    flag = tmp_path / "killed"
    model = pr.MODELS["limited"](way="death", flag=str(flag))
    asked = search(small_screen, model, samples=3, halving=None)
    tuning.tune(sweep(asked), tmp_path / "out", plugins=(plugin,))
    first, restarted, *others = map(int, flag.read_text().split())
    assert first == 0
    assert restarted in (2, 3), "from the checkpoint of one of the last epochs before the kill"
    assert others == [0, 0]
    assert [record["state"] for record in told(tmp_path / "out")] == ["finished"] * 3


@pytest.mark.parametrize(
    ("way", "reason"), [("memory", "out of memory"), ("nan", "DivergedError: the loss is not finite in epoch 1")]
)
def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(way, reason, ray_session, small_screen, tmp_path):
    plugin = small.plugin(LIMITED, "limited")
    space = {**SPACE, "model.way": Choice("well", way)}
    asked = search(small_screen, pr.MODELS["limited"](), space=space, samples=5, trial_memory_gb=1.0, epochs=2)
    tuning.tune(sweep(asked), tmp_path / "out", plugins=(plugin,))
    records = told(tmp_path / "out")
    assert {record["values"]["model.way"] for record in records} == {"well", way}
    for record in records:
        assert (record["state"] == "failed") == (record["values"]["model.way"] == way), record["reason"]
        assert record["state"] != "failed" or record["reason"].startswith(reason)


def test_a_search_of_which_all_fails_ends_and_says_why(ray_session, small_screen, tmp_path):
    plugin = small.plugin(LIMITED, "limited")
    asked = search(small_screen, pr.MODELS["limited"](way="nan"), max_failed=2, at_once=2)
    with pytest.raises(SearchError, match=r"trials failed, and 2 end it .*the loss is not finite"):
        tuning.tune(sweep(asked), tmp_path / "out", plugins=(plugin,))


def test_what_lies_at_an_end_is_searched_once_more_beyond_it(ray_session, small_screen, tmp_path):
    """Wider is better here, and the rate cannot matter much: the second search begins from the best of the first."""
    space = {"model.width": Choice(1, 2, 4)}
    asked = search(small_screen, space=space, way="grid", samples=3, epochs=8, halving=None, widen=True)
    record = small.Record()
    tuning.tune(sweep(asked), tmp_path / "out", events=record)
    first, second = sorted((tmp_path / "out" / ledger.FOLDER).iterdir(), key=lambda place: place.stat().st_ctime_ns)[:2]
    widths = [
        sorted(r["values"]["model.width"] for r in ledger.read_records(place).values()) for place in (first, second)
    ]
    assert any("lies at the high end" in line for line in record.lines)
    assert sorted({*widths[0], *widths[1]}) == [1, 2, 4, 8]


def test_a_dry_run_says_what_is_known_and_writes_nothing(small_screen, tmp_path):
    record = small.Record()
    found = tuning.known(sweep(search(small_screen)), tmp_path / "out", record)
    assert record.lines[-1] == "search of latent_additive: 0 of 6 trials done"
    assert [trial.variant for trial in found.trials] == [""]
    assert not (tmp_path / "out").exists()


def test_a_search_asks_for_no_more_than_there_is(ray_session, small_screen, tmp_path):
    with pytest.raises(InputError, match=r"may take 9e\+06 GB, and the largest node lends"):
        tuning.tune(sweep(search(small_screen, trial_memory_gb=9e6)), tmp_path / "out")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_asked_for(name, small_screen, tmp_path):
    try:
        __import__(name)
    except ImportError:
        with pytest.raises(InputError, match=rf"pip install 'perturbray\[{name}\]'"):
            tuning.trackers([name], None)
    else:
        pytest.skip(f"{name} is installed")


def test_an_unknown_tracker_is_refused():
    with pytest.raises(InputError, match="no tracker is named 'tensorboard'"):
        tuning.trackers(["tensorboard"], None)


def test_room_is_shared_by_fractions_of_a_gpu():
    nodes = [Node(name="one", cpus=16, gpus=2, memory=64 * 2**30)]
    asked = search(Path("x"), gpus=0.25, at_once=0, samples=60, halving=Halving())
    found = tuning.room(asked)(nodes)
    assert (found.at_once, found.trial_cpus, found.trial_gpus, found.scorers) == (8, 1.0, 0.25, 0)
    limited = search(Path("x"), gpus=0.25, at_once=0, samples=60, trial_memory_gb=16)
    assert tuning.room(limited)(nodes).at_once == 4
    assert tuning.room(search(Path("x"), at_once=1, samples=60))(nodes).at_once == 1


def test_mlflow_records_every_trial_with_its_values_and_its_objective(ray_session, small_screen, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than mlflow-skinny
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    asked = search(small_screen, samples=2, epochs=2)
    tuning.tune(sweep(asked), tmp_path / "out", track=("mlflow",))
    (experiment,) = [e for e in mlflow.search_experiments() if e.name != "Default"]
    runs = mlflow.search_runs([experiment.experiment_id], output_format="list")
    found = {(run.data.params["values/model.width"], run.data.metrics["objective"]) for run in runs}
    assert found == {(str(r["values"]["model.width"]), r["objective"]) for r in told(tmp_path / "out")}


@pytest.mark.slow
def test_wandb_records_every_trial_with_its_values_and_its_objective(small_screen, tmp_path):
    """In a Ray of its own: the actor that records has the environment that Ray was started in."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_API_KEY": "0" * 40, "WANDB_DIR": str(tmp_path)}
    options = ["--smoke", "--track", "wandb", "--data", small_screen, "--results", tmp_path / "results"]
    command = [sys.executable, Path("sweeps/search.py").resolve(), "--model", "latent_additive", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    runs = [recorded(file) for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    found = {(run["values"]["model.width"], run["objective"]) for run in runs}
    (folder,) = (tmp_path / "results").iterdir()
    assert found == {(r["values"]["model.width"], r["objective"]) for r in told(folder)}


def recorded(file: Path) -> dict:
    """The configuration and the last values in a file of an offline run of W&B."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, found = DataStore(), {}
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        updates = [*record.run.config.update, *record.config.update, *record.history.item]
        found |= {one.key or one.nested_key[-1]: json.loads(one.value_json) for one in updates}
    store.close()
    return found


def test_a_node_that_joined_and_does_not_see_the_folder_fails_no_trial_and_ends_the_round(small_screen, tmp_path):
    asked = search(small_screen)
    course, record = Course(asked, tmp_path / ledger.FOLDER, "content"), small.Record()
    trouble = tuning.Trouble(memory=None)
    proposals, *_ = tuning._adapters(course, tuning._Lines(course, record), trouble)
    values = proposals.suggest("one")["values"]
    proposals.on_trial_complete("one", {"failed": "its node does not see the folder", BLIND: "abc late-node"})
    assert trouble.blind == {"abc": "late-node"}
    assert [line for line in record.lines if line.startswith("node late-node joined and does not see ")]
    assert not course.records
    assert not course.running
    assert proposals.suggest("two") == proposals.FINISHED, "or it would come to that node again, for ever"
    trouble.again = False  # the next round, which avoids it
    assert proposals.suggest("three")["values"] == values
