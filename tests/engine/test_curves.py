"""TensorBoard files of trials, and what Tune keeps beside them: work for each trial that does not grow with their number."""

import json
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import small
from tensorboardX.proto.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

import perturbray as pr
from perturbray import tuning
from perturbray.curves import Log, scalars
from perturbray.plan import Plan
from perturbray.results import ledger, table
from perturbray.search import Search
from perturbray.space import Choice

BROKEN = """
from dataclasses import dataclass

import perturbray as pr


@pr.MODELS.register("breaks")
@dataclass(frozen=True, kw_only=True)
class Breaks(pr.ModelSpec):
    text: str = "it breaks"

    def build(self, vocabulary):
        raise ValueError("this model cannot be built")
"""


def events(path: Path) -> list[Event]:
    """The entries of an event file, each with the checksums that the format asks for."""
    content, found, at = path.read_bytes(), [], 0
    while at < len(content):
        length, check = struct.unpack_from("<QI", content, at)
        assert check == masked_crc32c(content[at : at + 8])
        data = content[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", content, at + 12 + length) == (masked_crc32c(data),)
        found.append(Event.FromString(data))
        at += 16 + length
    return found


def told(folder: Path) -> dict[str, tuple[dict, dict, int]]:
    """Hyperparameters, curves as lists of (step, value), and the status of each trial below a folder."""
    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        first, *rest = events(path)
        assert first.file_version == "brain.Event:2"
        what, curves, status = {}, {}, None
        for event in rest:
            for value in event.summary.value:
                if value.tag.startswith("_hparams_"):
                    data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    for name, one in data.session_start_info.hparams.items():
                        what[name] = getattr(one, one.WhichOneof("kind"))
                    status = data.session_end_info.status if value.tag.endswith("session_end_info") else status
                else:
                    curves.setdefault(value.tag, []).append((event.step, value.simple_value))
        assert path.parent.name not in found, "a trial has one file"
        found[path.parent.name] = what, curves, status
    return found


@pytest.fixture(scope="module")
def swept(ray_session, small_screen, tmp_path_factory):
    """Three models of two seeds and one that fails: (folder, plan, what Tune staged at each snapshot, seconds)."""
    from ray.tune.execution.tune_controller import TuneController

    folder, snapshots, began = tmp_path_factory.mktemp("curves") / "small", [], time.monotonic()
    broken = small.plugin(BROKEN, name="breaks")
    save = TuneController.save_to_dir

    def counted(controller):
        save(controller)
        staging = Path(controller._storage.experiment_driver_staging_path)
        snapshots.append(sorted(path.name for path in staging.rglob("*") if path.is_file()))

    sweep = small.sweep(small_screen, (*small.MODELS, pr.MODELS["breaks"]()), seeds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TuneController, "save_to_dir", counted)
        with pytest.raises(ExceptionGroup, match="2 of 8 trials failed"):
            small.run(sweep, folder, plugins=[broken])
    return folder, Plan.of(sweep, folder), snapshots, time.monotonic() - began


def test_tensorboard_is_told_what_each_trial_is_and_how_it_ended(swept):
    folder, plan, _, _ = swept
    found = told(folder)
    assert set(found) == set(plan.trials)
    for key, trial in plan.trials.items():
        what, _, status = found[key]
        plain = {n: v if isinstance(v, str | int | float) else str(v) for n, v in trial.columns().items()}
        assert what == pytest.approx(plain) or what == plain
        assert {"model", "seed", "training.lr"} <= set(what)
        assert status == (STATUS_FAILURE if what["model"] == "breaks" else STATUS_SUCCESS)
    assert {what["model"] for what, *_ in found.values()} == {"no_change", "mean_shift", "latent_additive", "breaks"}


def test_a_curve_of_tensorboard_is_that_of_the_results(swept):
    folder = swept[0]
    found, rows = told(folder), table.trials(table.read(folder))
    for key, text in zip(rows["key"], rows["curve"], strict=True):
        curves, stored = found[key][1], json.loads(text)
        steps = [[step, value] for step, value in curves.get("train_loss", [])]
        assert steps == [[epoch, pytest.approx(loss)] for epoch, loss, _ in stored]
        if stored:
            assert curves["best_loss"] == [(len(stored), pytest.approx(min(watched for *_, watched in stored)))]
        else:
            # Nothing of Tune's own bookkeeping, and no number that is none.
            assert {"epochs"} <= set(curves) <= {"epochs", "memory_mb", "gpu_memory_mb", "gpu_percent"}
    assert sum(len(json.loads(text)) for text in rows["curve"]) == 2 * 2  # a gradient model, two epochs, two seeds


def test_no_snapshot_of_tune_carries_files_of_trials_and_no_trial_forces_one(swept):
    folder, plan, snapshots, seconds = swept
    assert len(snapshots) <= 4 + seconds / 10  # Tune's own period, and not one a trial
    for files in snapshots:
        assert len(files) <= 4, files  # its state: it is copied as a whole, so it must not grow with the trials
    for key in plan.trials:
        (place,) = (folder / "tune").rglob(key)
        kinds = sorted(path.name.split(".")[0] for path in place.iterdir())
        assert kinds in (["checkpoint_000000", "events"], ["checkpoint_000002", "events"], ["events"]), kinds


def test_a_search_tells_what_it_tried(ray_session, small_screen, tmp_path):
    base = pr.Trial(
        dataset=pr.DatasetSpec(path=str(small_screen)),
        model=pr.LatentAdditive(width=8, latent_dim=4),
        training=pr.Training(epochs=2),
    )
    search = Search(base=base, space={"model.width": Choice(8, 16, 32)}, samples=3, seeds=1)
    sweep = pr.Sweep(
        name="small", trials=[replace(base, model=pr.MeanShift())], searches=(search,), metrics=small.METRICS
    )
    tuning.tune(sweep, tmp_path / "small")
    (learnt,) = ledger.read_searches(tmp_path / "small")
    tried = sorted(learnt.trials["model.width"])
    found = told(tmp_path / "small")
    assert sorted(what["model.width"] for what, *_ in found.values()) == tried
    assert all(len(curves["train_loss"]) == 2 for _, curves, _ in found.values())


def test_an_event_file_is_written_once_in_a_while_and_holds_everything_at_the_end(tmp_path):
    log = Log(tmp_path)
    writes = []
    for step in range(1000):
        log.add(step=step, summary=scalars({"loss": 1 / (step + 1)}))
        log.flush(now=False)
        writes.append(log.path.stat().st_size)
    assert len(set(writes)) <= 1 + 5  # a write each five seconds
    log.flush()
    assert [event.step for event in events(log.path)[1:]] == list(range(1000))
