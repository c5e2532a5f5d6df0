"""Curves: what TensorBoard shows of trials, by epoch and beside what they are; and how little else Tune keeps of them.

Tune's own loggers write into a folder that it copies, whole, to the results with every snapshot of its state, and a limit on
checkpoints makes it take a snapshot at every one. Both are work that grows with the square of the number of trials, for
files that nobody reads. So a trial's file is written here once, in its place, and old checkpoints are removed here.
"""

import logging
import math
import os
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

FLUSH_SECONDS = 5.0  # between two writes of a trial's file while it runs
START, END = "_hparams_/session_start_info", "_hparams_/session_end_info"
OURS = ("failed", "final", "epoch", "blind")  # what a trial reports for the engine, and is no curve


class Log:
    """The event file of one trial: opened for each write, so that a thousand running trials take neither files nor threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns() // 10**9}.perturbray"
        self.waiting: list[bytes] = []
        self.last = 0.0
        self.add(file_version="brain.Event:2")

    def add(self, **content) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.waiting.append(framed(Event(wall_time=time.time(), **content).SerializeToString()))

    def flush(self, *, now: bool = True) -> None:
        if self.waiting and (now or time.monotonic() - self.last >= FLUSH_SECONDS):
            with suppress(OSError), self.path.open("ab") as file:  # curves are no reason to end a sweep
                file.write(b"".join(self.waiting))
            self.waiting, self.last = [], time.monotonic()


def framed(content: bytes) -> bytes:
    """An entry of an event file: its length, its content, and the checksum of each."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))


def scalars(values: Mapping[str, float]) -> "Summary":  # noqa: F821
    """Numbers by name, as TensorBoard has them."""
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()])


def session(tag: str, **content) -> "Summary":  # noqa: F821
    """What the hyperparameter page reads of a trial: what it is at the start, and how it ended.

    No trial lists which hyperparameters there are, as tensorboardX has it: the page would show those of the first alone.
    """
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    data = HParamsPluginData(version=0, **content).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data)
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])


def started(name: str, what: Mapping[str, object]) -> "Summary":  # noqa: F821
    """The first entry: what the trial is. Whatever is neither text nor a number becomes text."""
    from tensorboardX.proto.plugin_hparams_pb2 import SessionStartInfo

    info = SessionStartInfo(group_name=name, start_time_secs=time.time())
    for field, value in what.items():
        if isinstance(value, bool):
            info.hparams[field].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[field].number_value = value
        else:
            info.hparams[field].string_value = str(value)
    return session(START, session_start_info=info)


def ended(*, well: bool) -> "Summary":  # noqa: F821
    """The last entry."""
    from tensorboardX.proto.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
    from tensorboardX.proto.plugin_hparams_pb2 import SessionEndInfo

    status = STATUS_SUCCESS if well else STATUS_FAILURE
    return session(END, session_end_info=SessionEndInfo(status=status, end_time_secs=time.time()))


def keepers(what: Callable[[dict], Mapping[str, object]]) -> list:
    """Tune's callbacks that keep curves and the newest checkpoint of each trial, in place of Tune's own loggers.

    ``what`` says what a trial is from the configuration that Tune gave it.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # At its end Tune looks for what its loggers wrote, and would list every trial as one without results.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    from ray import tune
    from ray.tune.logger import LoggerCallback
    from ray.tune.result import AUTO_RESULT_KEYS

    none = {*OURS, *AUTO_RESULT_KEYS, "done", "should_checkpoint"}

    class Unstored:
        """Tune pickles its callbacks, and never needs them back."""

        def __deepcopy__(self, memo):
            return self

        def __reduce__(self):
            return object, ()

    class Curves(Unstored, LoggerCallback):
        def __init__(self) -> None:
            self.logs: dict[str, Log] = {}

        def log_trial_start(self, trial):
            place = Path(trial.storage.trial_fs_path)
            if before := self.logs.get(trial.trial_id):  # of a process that died
                before.flush()
            log = self.logs[trial.trial_id] = Log(place)
            log.add(summary=started(place.name, what(trial.config)))
            log.flush()

        def log_trial_result(self, iteration, trial, result):
            found = {
                k: v for k, v in result.items() if k not in none and isinstance(v, int | float) and math.isfinite(v)
            }
            step = int(result.get("epoch", result.get("epochs", iteration)))
            if found and (log := self.logs.get(trial.trial_id)):
                log.add(step=step, summary=scalars(found))
                log.flush(now=False)

        def log_trial_end(self, trial, failed=False):
            if log := self.logs.pop(trial.trial_id, None):
                log.add(summary=ended(well=not failed and not (trial.last_result or {}).get("failed")))
                log.flush()

    class Newest(Unstored, tune.Callback):
        def on_checkpoint(self, iteration, trials, trial, checkpoint, **info):
            newest = Path(checkpoint.path)
            for place in newest.parent.glob("checkpoint_*"):
                if place.name < newest.name:
                    shutil.rmtree(place, ignore_errors=True)

    return [Curves(), Newest()]
