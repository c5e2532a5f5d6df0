"""A trial's process: what it is given, how it trains, reports, and says what it is at. It leaves no state behind."""

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from perturbray import plugin, scoring
from perturbray.data.dataset import Conditions, DatasetSpec
from perturbray.data.truth import CELLS_SEED
from perturbray.models.base import MODELS
from perturbray.placement import Placement
from perturbray.results import table
from perturbray.results.anchors import MEAN_RESPONSE
from perturbray.trial import Outcome, Trial, run

CHECKPOINT_SECONDS = 30.0  # between two checkpoints of a trial
SETTLE_SECONDS = 5.0  # in which a network file system shows to one node what another has written
BLIND = "blind"  # what a trial reports in the place of a result, where its node does not see the sweep's folder
LOST = "lost"  # and where something that it needs went with another node or process
ASIDE = "aside"  # beside its first report: which checkpoint it could not go on from


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every trial of a sweep is given: once in the object store, whatever the number of trials."""

    folder: Path
    sweep: str  # its name
    marker: Path  # a folder made by this round: who does not see it does not see the results
    plugins: tuple[plugin.Plugin, ...]
    trials: dict[str, bytes]  # pickled one by one: a trial opens its own, once the plugins that define it are installed
    conditions: dict[DatasetSpec, Conditions]
    blocks: dict[DatasetSpec, "Blocks"]  # noqa: F821  # imports ray
    windows: dict[DatasetSpec, "Windows | None"]  # noqa: F821  # imports ray; None: cells are mapped and not streamed
    truths: "ray.ObjectRef"  # noqa: F821  # {digest: Truth}
    truth_of: dict[str, str]  # the truth of each trial, by key
    cells: int  # predicted cells of a condition that are handed to the scorers; 0: none
    score: Callable  # (item, truths), for a trial that scores itself
    pool: "Pool | None"  # noqa: F821  # imports ray
    order: dict[str, int]
    columns: dict[str, str]
    models: dict[str, Path]  # where to store fitted models, by key; empty: nowhere
    depths: dict[DatasetSpec, float | None]  # counts to which cells were scaled; None: they came log-normalised


def trainable(function: Callable, placement: Placement, *, name: str, avoid: Iterable[str] = (), **given: Any) -> type:
    """A function for Tune, with what it is given, what it takes of a node, and the nodes that it avoids. The dashboard calls
    its actors by the name, and not all of them ImplicitFunc."""
    from ray import tune
    from ray.tune.trainable import wrap_function

    from perturbray.nodes import but

    where = {"bundle_label_selector": [but(avoid)]} if avoid else {}
    resources = tune.PlacementGroupFactory([placement.resources], **where)
    made = tune.with_resources(wrap_function(tune.with_parameters(function, **given), name=name), resources)
    made.__name__ = made.__qualname__ = name
    return made


def newest_first() -> type:
    """A scheduler of Tune's, whose order puts every process to work: one that is free takes a trial for which none was asked.

    Tune's own gives it the oldest that waits, and ends the process that was starting for that one: of trials that are
    shorter than such a start, a single process would run all, one by one.
    """
    from ray.tune.experiment import Trial as Waiting
    from ray.tune.schedulers import FIFOScheduler

    class NewestFirst(FIFOScheduler):
        def choose_trial_to_run(self, tune_controller):
            return next((t for t in reversed(tune_controller.get_trials()) if t.status == Waiting.PENDING), None)

    return NewestFirst


def train(config: dict, *, shared: Shared) -> None:
    """Tune's trainable: one trial, from mapped rows to a prediction in a scorer's queue. Leaves no state in its process."""
    import ray
    from ray import tune

    from perturbray.metrics.pool import NoScorerError, keep_here

    key, started = config["key"], scoring.now()
    if not sees(shared.marker):  # not the trial's fault: it is run again on another node
        tune.report({"failed": 1, BLIND: node()})
        return
    if table.has(shared.folder, key) and (key not in shared.models or shared.models[key].exists()):
        tune.report({"failed": 0})  # whoever ran it was killed before Tune had its word, and Tune starts it again
        return
    plugin.install(shared.plugins)
    trial: Trial = pickle.loads(shared.trials[key])
    try:
        with one_thread():
            checkpoints = Checkpoints(tune, title=f"trial {shared.sweep} {trial.name} {key}")
            cells = shared.blocks[trial.dataset].cells()
            conditions = shared.conditions[trial.dataset]
            truths = ray.get(shared.truths)
            truth, pool, turn = shared.truth_of[key], shared.pool, shared.order[key]
            outcome = run(
                trial,
                cells,
                conditions,
                truth=truths[truth],
                sample=shared.cells,
                keep=keep_here if pool is None else partial(pool.keep, key, turn=turn),
                report=checkpoints.report,
                state=checkpoints.restore(),
                windows=shared.windows[trial.dataset],
            )
        if key in shared.models:  # before the result, which says that the trial is finished
            keep(outcome, trial, conditions, shared.depths[trial.dataset], shared.models[key])
        scorable = scoring.Scorable(
            key=key,
            name=trial.name,
            columns={**trial.columns(), **outcome.columns, "cells_cap": shared.cells, "cells_seed": CELLS_SEED},
            truth=truth,
            predicted=outcome.predicted,
            stratum=outcome.stratum,
            baseline=type(trial.model) is MODELS[MEAN_RESPONSE],
        )
        scorable.columns.update(shared.columns, started=started, trained=scoring.now(), host=socket.gethostname())
        if pool is None:
            shared.score(scorable, truths)
        else:
            pool.submit(key, scorable, turn=turn)
    except Exception as error:
        if isinstance(error, NoScorerError) or _of_ray(error):
            # Not the trial's fault: without a result and without a record, it is run again.
            tune.report({"failed": 1, LOST: f"{type(error).__name__}: {error}".splitlines()[0]})
            return
        # Recorded here and not raised: Tune would run it again, and an error of the trial itself would come again.
        table.write_failure(shared.folder, key, name=trial.name, error=error)
        tune.report({"failed": 1})
        return
    checkpoints.finish(outcome)


def keep(outcome: Outcome, trial: Trial, conditions: Conditions, depth: float | None, place: Path) -> None:
    """Store a fitted model."""
    from perturbray.training.fitted import Fitted

    fitted = Fitted(
        spec=trial.model,
        state=outcome.model.state_dict(),
        conditions=conditions,
        subset=outcome.split.condition,
        train_cells=outcome.vocabulary.train_cells,
        embedding_width=outcome.vocabulary.embedding_width,
        roles={name: getattr(trial.dataset, name) for name in ("perturbation", "delimiter", "layer")},
        depth=depth,
        seed=trial.seed,
        name=trial.name,
    )
    fitted.save(place)


class Checkpoints:
    """Reports epochs to Tune, with a checkpoint now and then and one of the fitted model at the end."""

    def __init__(self, tune, *, title: str, seconds: float = CHECKPOINT_SECONDS) -> None:
        self.tune, self.title, self.seconds = tune, title, seconds
        self.last = time.monotonic()
        self.aside: dict[str, str] = {}  # to be told with the next report
        show(title)

    def restore(self) -> dict | None:
        """The state to go on from, if this trial's process died before; None, the start, where it cannot be read."""
        from perturbray.training import checkpoint

        stored = self.tune.get_checkpoint()
        if stored is None:
            return None
        try:
            with stored.as_directory() as folder:
                return checkpoint.load(folder)
        except checkpoint.UNREADABLE as error:  # of a full disk, or a node that died: Tune would hand it out for ever
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            self.aside = {ASIDE: f"its checkpoint {stored.path} cannot be read ({why}): it begins again"}
            return None

    def report(self, values: dict[str, float], snapshot: Callable[[], dict]) -> None:
        if time.monotonic() - self.last < self.seconds:
            self.tune.report(self._all(values))
            show(self.title)
            return
        self._report(values, snapshot())
        self.last = time.monotonic()

    def finish(self, outcome: Outcome) -> None:
        values = {"failed": 0, "epochs": outcome.fit.epochs, "best_loss": outcome.fit.best_loss}
        self._report(values, {"fitted": outcome.model.state_dict()})

    def _report(self, values: dict, state: dict) -> None:
        import tempfile

        from perturbray.training import checkpoint

        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, state)
            self.tune.report(self._all(values), checkpoint=self.tune.Checkpoint.from_directory(folder))
        show(self.title)

    def _all(self, values: dict) -> dict:
        aside, self.aside = self.aside, {}
        return values | usage() | aside


def usage() -> dict[str, float]:
    """What this process takes: memory of its own, without what it maps and others do too, and of a GPU; MB, 2**20 bytes."""
    import torch

    found = {}
    with suppress(OSError):  # there is no /proc but on Linux
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        found["memory_mb"] = (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu_memory_mb"] = torch.cuda.max_memory_reserved() / 2**20
        if find_spec("pynvml"):
            found["gpu_percent"] = float(torch.cuda.utilization())
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread a CPU process, so that two trials on two cores do not fight; on a GPU the host's share is small too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_ray(error: BaseException) -> bool:
    """Whether a node, a process or an object of Ray's was lost, and no code of a task's own failed."""
    import ray

    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)


def sees(place: Path, *, seconds: float = SETTLE_SECONDS) -> bool:
    """Whether this node sees what another has just made."""
    end = time.monotonic() + seconds
    while not place.exists():
        if time.monotonic() > end:
            return False
        with suppress(OSError):
            os.listdir(place.parent)  # a network file system then looks again
        time.sleep(0.2)
    return True


def node() -> str:
    """This node, as an id and a name."""
    import ray

    return f"{ray.get_runtime_context().get_node_id()} {socket.gethostname()}"


def show(title: str) -> None:
    """Name this process, as `ps`, `top` and the dashboard's list of a node's processes have it, until Ray's next call."""
    import ray

    ray._raylet.setproctitle(f"ray::{title}")
