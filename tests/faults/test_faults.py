"""Faults of a machine, made for real: nothing finished is lost, and every trial is finished or failed with its reason."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import fault_table
import pytest
import small
from nodes import can_hide

import perturbray as pr
from perturbray import memory, tuning
from perturbray.data import store
from perturbray.errors import InputError
from perturbray.plan import Plan
from perturbray.results import ledger, table
from perturbray.search import Search
from perturbray.space import Choice

ROOT = Path(__file__).parents[2]
HANG = 400  # seconds that a driver may take on a busy machine
pytestmark = pytest.mark.slow


def accounted(folder: Path, plan: Plan) -> tuple[set[str], dict[str, dict]]:
    """The finished trials and the failed ones, which are all, none twice, and each failure with a reason."""
    finished, failed = table.finished(folder), table.failed(folder)
    assert finished | failed.keys() == set(plan.trials)
    assert not finished & failed.keys()
    assert all(record["error"] for record in failed.values())
    return finished, failed


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own for results, of 3 MB; how to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder], check=False).returncode:
        pytest.skip("this user may not mount: there is no small disk to fill")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


# Fills the disk that results are written to, from within its trial, and leaves the trial as any other.
FILLER = """
from dataclasses import dataclass

import perturbray as pr


@pr.MODELS.register("filler")
@dataclass(frozen=True, kw_only=True)
class Filler(pr.ModelSpec):
    path: str = ""

    def build(self, vocabulary):
        try:
            with open(self.path, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass
        return FillerNet(vocabulary)


class FillerNet(pr.Model):
    def predict(self, batch):
        return batch.control
"""


def test_a_full_disk_is_said_and_what_was_finished_stays(ray_session, small_screen, small_disk):
    filler, ballast = small.plugin(FILLER, "filler"), small_disk / "ballast"
    models = (pr.NoChange(), pr.MeanShift(), pr.MODELS["filler"](path=str(ballast)), pr.PerturbedMean())
    folder = small_disk / "out"
    small.run(small.sweep(small_screen, models[:1]), folder)
    before = small.stamps(folder)
    sweep = small.sweep(small_screen, models)
    with pytest.raises(InputError) as caught:
        small.run(sweep, folder, plugins=[filler])
    said = "results cannot be written there (No space left on device); make room, and the same command goes on"
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    stored = {name: stamp for name, stamp in small.stamps(folder).items() if name != table.REFERENCE}
    before.pop(table.REFERENCE, None)
    assert before.items() <= stored.items()
    table.read(folder, keys=table.finished(folder))  # what is there can be read
    with pytest.raises(InputError, match="No space left on device"):
        small.run(sweep, folder, plugins=[filler])  # still full: said again, before anything is trained

    ballast.unlink()
    ballast.mkdir()  # where nothing can be written any more
    _, plan = small.run(sweep, folder, plugins=[filler])
    finished, _ = accounted(folder, plan)
    assert len(finished) == len(models)
    assert stored.items() <= small.stamps(folder).items(), "what was finished is left alone"
    fault_table.record(
        fault_table.Row(
            fault="a full disk",
            happens=f"the sweep ends after the trials under way: `{said}`",
            lost="trials that ended while there was no room",
            goes_on="make room, the same command",
        )
    )


def test_a_full_disk_in_a_search_is_said_and_the_search_goes_on(ray_session, small_screen, small_disk):
    filler, ballast, folder = small.plugin(FILLER, "filler"), small_disk / "ballast", small_disk / "out"
    base = pr.Trial(dataset=pr.DatasetSpec(path=str(small_screen)), model=pr.MODELS["filler"]())
    places = {"model.path": Choice("", str(ballast), str(small_disk))}  # a folder is not filled either
    search = Search(base=base, space=places, samples=3, startup=3, at_once=1, seeds=1, first=({"model.path": ""},))
    sweep = pr.Sweep(name="s", trials=[base], metrics=small.METRICS, searches=(search,))
    with pytest.raises(InputError) as caught:
        tuning.tune(sweep, folder, plugins=(filler,))
    said = "results cannot be written there (No space left on device); make room, and the same command goes on"
    assert said in str(caught.value)
    (place,) = (folder / ledger.FOLDER).iterdir()
    before = {path: path.stat().st_mtime_ns for path in place.glob("*.json") if path.name != ledger.HEADER}
    assert len(before) == len(ledger.read_records(place)) in (1, 2)
    with pytest.raises(InputError, match="No space left on device"):
        tuning.tune(sweep, folder, plugins=(filler,))  # still full: said again, before anything is tried

    ballast.unlink()
    ballast.mkdir()
    tuning.tune(sweep, folder, plugins=(filler,))
    assert sorted(record["number"] for record in ledger.read_records(place).values()) == [0, 1, 2]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items(), "what was known is left alone"
    fault_table.record(
        fault_table.Row(
            fault="a full disk in a search",
            happens=f"the search ends with the trial whose record cannot be written: `{said}`",
            lost="the trials that ran",
            goes_on="make room, the same command",
        )
    )


def test_a_cache_that_fills_while_a_screen_is_read_is_said(own_screen, small_disk, monkeypatch):
    monkeypatch.setenv("PERTURBRAY_CACHE", str(small_disk))
    ballast, spec = small_disk / "ballast", pr.DatasetSpec(path=str(own_screen))

    def fill(share: float) -> None:
        if share == 1.0:  # the rows are written, and what belongs to them is not
            with suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(InputError) as caught:
        store.ingest(spec, spec.conditions(), progress=fill)
    said = "free some, or set PERTURBRAY_CACHE to a folder with more"
    assert str(caught.value).startswith(f"{own_screen}: {small_disk / 'stores'} is full (0.00 GB free) after ")
    assert str(caught.value).endswith(said)
    assert not [path for path in (small_disk / "stores").iterdir() if path.is_dir()], "half a store is left"
    ballast.unlink()
    assert len(store.ingest(spec, spec.conditions())) == len(spec.conditions().cell_condition)
    fault_table.record(
        fault_table.Row(
            fault="a full cache",
            happens=f"the sweep ends, before any trial, with how much is free and how much is needed or was written: `{said}`",
            lost="nothing; half a store is deleted",
            goes_on="make room or name another cache, the same command",
        )
    )


# A sweep that fills Ray's temporary folder once Ray is there; again while it is full; and once there is room.
FILLED = """
import sys
from pathlib import Path

import small

import perturbray as pr

screen, out, ballast = map(Path, sys.argv[1:])


class Filling(small.Record):
    def connected(self, cluster, placement, folder):
        print("connected", flush=True)
        try:
            with open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass


sweep = small.sweep(screen, (pr.NoChange(),))
for turn in range(2):
    try:
        small.run(sweep, out, events=Filling())
    except ValueError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
ballast.unlink()
print("ran", small.run(sweep, out)[0])
"""


def test_a_temporary_folder_of_rays_that_fills_is_said_and_no_trial_is_to_blame(small_screen, tmp_path):
    place = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: sockets lie in it
    paths = [str(ROOT), str(ROOT / "tests" / "engine")]
    words = [
        *mounted("size=60m", place),
        sys.executable,
        "-c",
        FILLED,
        small_screen,
        tmp_path / "out",
        place / "ballast",
    ]
    try:
        ended = subprocess.run(
            list(map(str, words)),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_TMPDIR": str(place)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=HANG,
            check=False,
        )
    finally:
        shutil.rmtree(place)
    assert ended.returncode == 0, ended.stdout
    said = ended.stdout.splitlines()
    why = (
        r"Ray's temporary folder is full \(No space left on device\); make room, and the same command goes on, or name "
    )
    first, second = [line for line in said if line.startswith("InputError: ")]
    assert re.match(rf"InputError: {place}/ray/session\S+: {why}", first), said
    assert re.match(rf"InputError: {place}: {why}", second), "it is said before Ray starts"
    assert said.count("connected") == 1
    assert said[-1] == "ran 1"
    assert not table.failed(tmp_path / "out")
    fault_table.record(
        fault_table.Row(
            fault="a full temporary folder of Ray's",
            happens="the sweep ends: `Ray's temporary folder is full (No space left on device); make room, and the same "
            "command goes on, or name another folder with RAY_TMPDIR`",
            lost="the trials that ran",
            goes_on="make room, or `RAY_TMPDIR`; the same command",
        )
    )


# Writes over the checkpoint that its trial would go on from, and dies.
SPOILER = """
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import perturbray as pr
import perturbray.process

perturbray.process.Checkpoints.__init__.__kwdefaults__["seconds"] = 0.0  # at every epoch


@pr.MODELS.register("spoiler")
@dataclass(frozen=True, kw_only=True)
class Spoiler(pr.LatentAdditive):
    out: str = ""

    def build(self, vocabulary):
        net = super().build(vocabulary)
        loss = net.loss

        def spoiling(batch):
            flag = Path(self.out).with_suffix(".flag")
            stored = list(Path(self.out, "tune").rglob("checkpoint.pt"))
            # The second: by then Tune has heard of the first for sure, and gives it to the trial that starts again.
            if any(path.parent.name > "checkpoint_000000" for path in stored) and not flag.exists():
                for path in stored:
                    os.truncate(path, path.stat().st_size // 2)
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(batch)

        net.loss = spoiling
        return net
"""


def test_a_checkpoint_that_cannot_be_read_starts_its_trial_again(ray_session, small_screen, tmp_path):
    spoiler = small.plugin(SPOILER, "spoiler")
    spoilt, folder = pr.MODELS["spoiler"], tmp_path / "out"
    sweep = small.sweep(small_screen, (spoilt(width=8, latent_dim=4, out=str(folder)), pr.MeanShift()), epochs=3)
    events = small.Record()
    _, plan = small.run(sweep, folder, plugins=[spoiler], events=events)
    assert folder.with_suffix(".flag").exists(), "no checkpoint was there to be spoilt"
    (key,) = [key for key, trial in plan.trials.items() if "spoiler" in trial.name]
    (line,) = [line for line in events.lines if "begins again" in line]
    assert line.startswith(f"{plan.trials[key].name} ({key}): its checkpoint {folder}/tune/")
    assert " cannot be read (" in line
    finished, failed = accounted(folder, plan)
    assert len(finished) == 2, failed
    small.run(small.sweep(small_screen, (pr.LatentAdditive(width=8, latent_dim=4),), epochs=3), tmp_path / "plain")
    values, expected = table.read(folder), table.read(tmp_path / "plain")
    values = values[values["model"] == "spoiler"]
    assert values["value"].tolist() == expected["value"].tolist(), "the numbers of a trial that nothing disturbed"
    fault_table.record(
        fault_table.Row(
            fault="a corrupt checkpoint",
            happens="the trial begins again, once, and ends with the numbers of one that nothing disturbed; a line says "
            "which trial, and which checkpoint was left aside",
            lost="that trial's epochs until then",
            goes_on="by itself",
        )
    )


def test_files_that_were_cut_off_are_named_and_only_they_are_made_again(ray_session, small_screen, tmp_path):
    folder = tmp_path / "out"
    sweep = small.sweep(small_screen, (pr.NoChange(), pr.MeanShift(), pr.PerturbedMean()))
    _, plan = small.run(sweep, folder)
    states = [path for path in (folder / "tune").rglob("*.json") if path.is_file()]
    assert states, "Tune keeps no state, so that none can be cut off"
    for path in (*states, folder / table.PLAN):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"sweep\.json: not readable JSON .*run the sweep again, which rewrites it"):
        table.read(folder)
    spoilt = folder / f"{min(plan.trials)}.parquet"
    stamps = small.stamps(folder)
    os.truncate(spoilt, spoilt.stat().st_size // 2)
    ran, _ = small.run(sweep, folder)
    assert ran == 0, "neither Tune's state nor the plan decides what is finished"
    with pytest.raises(InputError) as caught:
        table.read(folder)
    said = "delete it and run the sweep again, which repeats only it"
    assert str(caught.value).startswith(f"{spoilt}: not a readable Parquet file")
    assert str(caught.value).endswith(said)

    spoilt.unlink()
    (folder / f"{min(plan.trials)}{table.FAILED}").write_text('{"key": "')  # a record cut off as well
    ran, _ = small.run(sweep, folder)
    assert ran == 1
    assert accounted(folder, plan)[0] == set(plan.trials)
    for name in (spoilt.name, table.REFERENCE):
        stamps.pop(name, None)
    assert stamps.items() <= small.stamps(folder).items()

    records = tmp_path / "search"
    records.mkdir()
    ledger.write_record(records, {"key": "0123456789abcdef", "number": 0})
    os.truncate(records / "0123456789abcdef.json", 9)
    with pytest.raises(InputError, match="delete it, and that trial is run again"):
        ledger.read_records(records)
    fault_table.record(
        fault_table.Row(
            fault="a truncated state file",
            happens=f"Tune's state is never read again and the plan is written anew; of a result: `{said}`",
            lost="nothing, or the one trial whose result is cut off",
            goes_on="delete the file that the message names, the same command",
        )
    )


GREEDY = """
from dataclasses import dataclass

import numpy as np

import perturbray as pr


@pr.MODELS.register("greedy")
@dataclass(frozen=True, kw_only=True)
class Greedy(pr.ModelSpec):
    def build(self, vocabulary):
        np.ones(2**46)
"""


def driver(tmp_path: Path, screen: Path, *, begin: str = "", plugin: str = "", wrap=(), **environment: str) -> str:
    """A sweep of the three small models and a plugin's, by a process of its own; what it said."""
    source = f"""
import sys
from pathlib import Path

import small

import perturbray as pr

{begin}
sources = {[plugin] if plugin else []!r}
plugins = [small.plugin(source, "own") for source in sources]
models = [*small.MODELS, *(pr.MODELS[name]() for name in {["greedy"] if plugin else []!r})]
class Told(small.Record):
    def connected(self, cluster, placement, folder):
        import ray
        print("nodes:", *[node["NodeID"] for node in ray.nodes()], flush=True)
try:
    small.run(small.sweep(Path({str(screen)!r}), models), Path({str(tmp_path / "out")!r}), plugins=plugins, events=Told())
except ExceptionGroup as group:
    print(group.message)
"""
    paths = [str(ROOT), str(ROOT / "tests" / "engine")]
    environment = {"PERTURBRAY_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(paths), **environment}
    ended = subprocess.run(
        [*wrap, sys.executable, "-c", source],
        env={name: value for name, value in {**os.environ, **environment}.items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def plan_of(screen: Path, folder: Path, *more) -> Plan:
    return Plan.of(small.sweep(screen, (*small.MODELS, *more)), folder)


def test_memory_that_runs_out_fails_the_trials_with_a_reason(small_screen, tmp_path):
    asked = driver(tmp_path / "one", small_screen, plugin=GREEDY)
    assert "1 of 4 trials failed" in asked
    small.plugin(GREEDY, "own")
    finished, failed = accounted(
        tmp_path / "one" / "out", plan_of(small_screen, tmp_path / "one" / "out", pr.MODELS["greedy"]())
    )
    (reason,) = [record["error"] for record in failed.values()]
    assert "Unable to allocate" in reason
    assert len(finished) == 3
    fault_table.record(
        fault_table.Row(
            fault="memory that runs out",
            happens="the trial that asks too much fails as `Unable to allocate`, and the others go on",
            lost="that trial",
            goes_on="a smaller model or batch; in a search `--trial-memory` limits each trial; the same command tries failed "
            "ones again",
        )
    )


# A sweep and a search on a Ray whose memory monitor is above its threshold whatever they do.
ABOVE = """
import json
import sys
from pathlib import Path

import ray
import small

import perturbray as pr
import perturbray.memory
from perturbray.course import SearchError
from perturbray.results import ledger, table
from perturbray.search import Search
from perturbray.space import LogUniform
from perturbray.tuning import tune

perturbray.memory.KILLS = 2
screen, out = map(Path, sys.argv[1:])
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
sweep = small.sweep(screen)
found = {}
try:
    small.run(sweep, out)
except ExceptionGroup as group:
    found["sweep"] = [group.message, *(record["error"] for record in table.failed(out).values())]
base = pr.Trial(dataset=sweep.trials[0].dataset, model=small.MODELS[2], training=pr.Training(epochs=2))
search = Search(base=base, space={"training.lr": LogUniform(1e-3, 1e-1)}, samples=4, startup=2, at_once=2, seeds=1)
try:
    tune(pr.Sweep(name="s", trials=sweep.trials, metrics=small.METRICS, searches=(search,)), out)
except SearchError as error:
    (place,) = (out / ledger.FOLDER).iterdir()
    found["search"] = [str(error), *(record["reason"] for record in ledger.read_records(place).values())]
(out / "found.json").write_text(json.dumps(found))
"""


def test_a_node_above_its_memory_threshold_ends_a_sweep_and_a_search(small_screen, tmp_path):
    paths = [str(ROOT), str(ROOT / "tests" / "engine")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "RAY_memory_usage_threshold": "0.001"}
    words = [sys.executable, "-c", ABOVE, str(small_screen), str(tmp_path)]
    ended = subprocess.run(
        words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    message, *reasons = found["sweep"]
    assert message == "3 of 3 trials failed"
    accounted(tmp_path, plan_of(small_screen, tmp_path))
    (said,) = set(reasons)
    killed = r"Ray's memory monitor killed (\d+) processes in a row and nothing came of any; the last was scorer-0-\w+ "
    numbers = (
        r"\(process \d+, [\d.]+ GB\) on node \S+, of whose ([\d.]+) GB ([\d.]+) GB are in use and the threshold is "
    )
    numbers += r"([\d.]+) GB \(0\.1%\): free memory there, or start Ray with a higher RAY_memory_usage_threshold; "
    told = re.fullmatch(killed + numbers + "the same command goes on", said)
    assert told, said
    count, whole, used, threshold = map(float, told.groups())
    assert 2 <= count < 10
    assert abs(threshold - whole / 1000) < 0.01
    assert threshold < used <= whole
    ended_search, *reasons = found["search"]
    assert "search of latent_additive: Ray's memory monitor killed " in ended_search
    assert re.search(numbers, ended_search)
    assert reasons, "no trial of the search is accounted for"
    assert all(re.search(r"Ray's memory monitor killed .*the threshold is [\d.]+ GB", reason) for reason in reasons)
    fault_table.record(
        fault_table.Row(
            fault="memory that other programs hold",
            happens="where Ray's monitor kills whatever starts, a sweep or a search gives up after "
            f"{memory.KILLS} kills in a row without an epoch or a result; what is left fails as `Ray's memory monitor killed`, "
            "with process, node, memory and threshold in numbers",
            lost="nothing that was finished",
            goes_on="free memory, or a higher `RAY_memory_usage_threshold`; the same command tries a sweep's failed trials "
            "again",
        )
    )


def test_an_object_store_that_fills_moves_to_disk(small_screen, tmp_path):
    begin = f"""
import numpy as np
import ray

ray.init(
    address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
    object_spilling_directory={str(tmp_path / "spilled")!r},
)
held = [ray.put(np.full(20 * 2**20, i, np.uint8)) for i in range(8)]
"""
    (tmp_path / "spilled").mkdir()
    check = "\nimport atexit\natexit.register(lambda: print('spilled', sum(f.stat().st_size for f in Path("
    check += f"{str(tmp_path / 'spilled')!r}).rglob('*') if f.is_file()) > 2**20))"
    said = driver(tmp_path, small_screen, begin=begin + check)
    assert "spilled True" in said
    assert len(accounted(tmp_path / "out", plan_of(small_screen, tmp_path / "out"))[0]) == 3
    fault_table.record(
        fault_table.Row(
            fault="an object store that fills",
            happens="Ray moves objects to its spilling folder, and the sweep ends as ever",
            lost="time",
            goes_on="by itself",
        )
    )


def test_a_sweep_joins_no_other_ray_of_its_host(ray_session, small_screen, tmp_path):
    import ray

    theirs = {node["NodeID"] for node in ray.nodes()}
    said = driver(tmp_path, small_screen, RAY_ADDRESS="")
    (line,) = [line for line in said.splitlines() if line.startswith("nodes: ")]
    assert len(line.split()) == 2
    assert not theirs & set(line.split())
    assert {node["NodeID"] for node in ray.nodes() if node["Alive"]} == theirs
    assert len(accounted(tmp_path / "out", plan_of(small_screen, tmp_path / "out"))[0]) == 3
    fault_table.record(
        fault_table.Row(
            fault="another Ray on the same host",
            happens="without `--address` the sweep starts a Ray of its own beside it, and the other is as it was",
            lost="nothing",
            goes_on="by itself; `--address` where the other is meant",
        )
    )


def mounted(options: str, place: Path) -> list[str]:
    """Words in front of a command that sees an empty file system in a place."""
    if not can_hide() or shutil.which("unshare") is None:
        pytest.skip("this user may not mount")
    return ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs -o {options} none '{place}' && exec \"$@\"", "sh"]


def test_a_small_shared_memory_mount_suffices(small_screen, tmp_path):
    driver(tmp_path, small_screen, wrap=mounted("size=64m", Path("/dev/shm")))
    assert len(accounted(tmp_path / "out", plan_of(small_screen, tmp_path / "out"))[0]) == 3
    fault_table.record(
        fault_table.Row(
            fault="a small shared-memory mount",
            happens="Ray keeps its object store on the disk instead, which is slower, and the sweep ends as ever",
            lost="time",
            goes_on="by itself; a container is better given `--shm-size`",
        )
    )


def test_a_home_that_cannot_be_written_is_not_needed(small_screen, tmp_path):
    (tmp_path / "home").mkdir()
    lines = driver(
        tmp_path,
        small_screen,
        wrap=mounted("ro,size=64k", tmp_path / "home"),
        HOME=str(tmp_path / "home"),
        RAY_AUTH_TOKEN="",
        PERTURBRAY_CACHE="",
    )
    assert "failed" not in lines
    assert len(accounted(tmp_path / "out", plan_of(small_screen, tmp_path / "out"))[0]) == 3
    fault_table.record(
        fault_table.Row(
            fault="a read-only home",
            happens="the token of Ray is one of this run alone, the sweep ends as ever",
            lost="nothing; the store of the screen lies among temporary files",
            goes_on="by itself; `PERTURBRAY_CACHE` names a folder for what is read once",
        )
    )
