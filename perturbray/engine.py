"""The engine: runs a sweep on Tune. Finished work is known by key and never repeated; one failure stops nothing else."""

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import cloudpickle
import numpy as np

from perturbray import plugin, scoring
from perturbray.cluster import SCORER_CPUS, Cluster, Placement, connect, place
from perturbray.data.dataset import Conditions, DatasetSpec, open_screen, target_sum
from perturbray.data.loading import Delivery
from perturbray.data.splits import TRAIN
from perturbray.data.store import Store
from perturbray.data.truth import CELLS_SEED, digest, observe
from perturbray.metrics.cell_metrics import COMPONENTS
from perturbray.metrics.distribution import fit_pca
from perturbray.models.base import MODELS
from perturbray.plan import Plan, reference, task_of, versions
from perturbray.prediction import Truth
from perturbray.randomness import generator
from perturbray.results import table
from perturbray.results.anchors import MEAN_RESPONSE
from perturbray.trial import Outcome, Trial, run

ROUNDS = 3  # times that trials lost with their process are started again
PCA_CELLS = 50_000  # training cells that the space of distribution metrics is fitted on
CHECKPOINT_SECONDS = 30.0  # between two checkpoints of a trial


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every trial of a sweep is given: once in the object store, whatever the number of trials."""

    folder: Path
    plugins: tuple[plugin.Plugin, ...]
    trials: bytes  # pickled {key: Trial}; opened once the plugins that define the specs are installed
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


class Events:
    """What the engine tells whoever watches; every method may be left as it is."""

    def line(self, text: str) -> None:
        """A line for the user."""

    def connected(self, cluster: Cluster, placement: Placement, tune_folder: Path) -> None:
        """Ray is there, and the trials fit."""

    def planned(self, plan: Plan) -> None:
        """Keys are known, and the plan is stored."""

    def started(self, key: str) -> None:
        """A trial began to run."""

    def stopped(self, key: str) -> None:
        """A trial ended, well or not; its scores may still be under way."""

    @contextmanager
    def watching(self, plan: Plan) -> Iterator[None]:
        """Around the running of trials."""
        yield


class TrialError(RuntimeError):
    """A trial failed; the traceback of where it ran is a note."""


def run_sweep(
    plan: Plan,
    *,
    address: str | None = None,
    plugins: tuple[plugin.Plugin, ...] = (),
    command: str = "",
    events: Events | None = None,
) -> int:
    """Run what remains of a plan; the number of trials that ran.

    Raises ExceptionGroup of TrialError, after all others are stored, if trials failed. Interrupted, or killed at any
    time, it goes on where it was when called again.
    """
    events = events or Events()
    if plan.known and not plan.remaining():
        table.create(plan.folder)
        _store(plan, command)
        events.planned(plan)
        return 0
    with table.made(plan.folder):
        stores = {spec: plan.read(spec, events.line) for spec in plan.conditions}
        _store(plan, command)
        events.planned(plan)
        wanted = plan.remaining()
        if wanted:
            _run(plan, wanted, stores, address=address, plugins=plugins, events=events)
    _raise_failures(plan, set(wanted))
    return len(wanted)


def _run(
    plan: Plan,
    wanted: dict[str, Trial],
    stores: dict[DatasetSpec, Store],
    *,
    address: str | None,
    plugins: tuple[plugin.Plugin, ...],
    events: Events,
) -> None:
    """Connect to Ray, share what is needed, train and score."""
    for key in wanted:
        (plan.folder / f"{key}{table.FAILED}").unlink(missing_ok=True)
    with connect(address) as cluster:
        import ray

        from perturbray.data import blocks
        from perturbray.metrics.pool import WAITING, WAITING_CELLS, Pool

        placement = place(cluster.cpus, cluster.gpus, trials=len(wanted))
        nodes = address is not None or cluster.nodes > 1
        shared_stores = {spec: blocks.share(store, nodes=nodes) for spec, store in stores.items()}
        tune_folder = plan.folder / "tune" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        truths = _observe(plan, stores)
        if plan.sweep.needs_linear:
            for depth in sorted({truth.target_sum for truth in truths.values()}):
                events.line(f"log fold changes of linear means: target sum {depth:,.6g} counts a cell")
        stored = ray.put(truths)
        work = partial(
            scoring.score,
            folder=plan.folder.resolve(),
            metrics=plan.sweep.metrics,
            source=plan.sweep.controls,
            plugins=plugins,
        )
        waiting = WAITING_CELLS if plan.sweep.needs_cells else WAITING
        pool = None
        if placement.scorers:
            pool = Pool.start(work, stored, actors=placement.scorers, cpus=SCORER_CPUS, waiting=waiting)
        events.connected(cluster, placement, tune_folder)
        shared = Shared(
            folder=plan.folder.resolve(),
            plugins=plugins,
            trials=cloudpickle.dumps(plan.trials),
            conditions=plan.conditions,
            blocks=shared_stores,
            windows=deliver(stores, placement, events),
            truths=stored,
            truth_of={key: plan.truth_of(trial) for key, trial in plan.trials.items()},
            cells=plan.sweep.cells if plan.sweep.needs_cells else 0,
            score=work,
            pool=pool,
            order={key: i for i, key in enumerate(plan.trials)},
            columns={f"version.{name}": text for name, text in versions().items()},
            models={key: plan.model_of(key).resolve() for key in plan.trials} if plan.keep_models else {},
            depths={spec: n.depth if (n := plan.normalisation(spec)).log1p else None for spec in plan.conditions},
        )
        with events.watching(plan):
            state = "interrupted"
            try:
                for number, (key, anchor) in enumerate(plan.anchors.items()):
                    if key in table.anchored(plan.folder):
                        continue
                    if pool is None:
                        work(anchor, truths)
                    else:
                        pool.submit(f"anchor {key}", anchor, turn=number)
                _run_rounds(plan, shared, placement, tune_folder, events)
                state = "done"
            finally:
                if pool is not None:
                    pool.drain()  # what is trained is scored, also after Ctrl-C
                    pool.stop()
                table.write_plan(plan.folder, {**table.read_plan(plan.folder), "status": {"state": state}})


def _store(plan: Plan, command: str) -> None:
    state = "running" if plan.remaining() else "done"
    table.write_plan(plan.folder, plan.describe(command=command, state=state))
    known = reference(plan)
    if known:
        table.write_reference(plan.folder, known)
    else:
        (plan.folder / table.REFERENCE).unlink(missing_ok=True)


def _run_rounds(plan: Plan, shared: Shared, placement: Placement, tune_folder: Path, events: Events) -> None:
    """Tune's run, again for the trials that were lost with a process: Tune gives up where its own monitor kills one."""
    for number in range(ROUNDS):
        failed = table.failed(plan.folder)
        keys = [key for key in plan.remaining() if key not in failed]
        if not keys:
            return
        if number:
            events.line(f"{len(keys)} trials were lost with the process that ran or scored them: running them again")
        try:
            _tune(keys, shared, placement, tune_folder.with_name(f"{tune_folder.name}-{number}"), events)
        except RuntimeError as error:
            events.line(f"Ray Tune gave up ({error})")
        if shared.pool is not None:
            shared.pool.drain()
            shared.pool.revive()
    failed = table.failed(plan.folder)
    for key, trial in plan.remaining().items():
        if key not in failed:
            table.write_failure(plan.folder, key, name=trial.name, error=f"its process died {ROUNDS} times")


def _tune(keys: list[str], shared: Shared, placement: Placement, tune_folder: Path, events: Events) -> None:
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C reaches us as KeyboardInterrupt
    from ray import tune

    class Callback(tune.Callback):
        def __init__(self, events: Events) -> None:
            self.events = events

        def __getstate__(self) -> dict:
            return {"events": Events()}  # Tune pickles its callbacks, and a terminal does not pickle

        def on_trial_start(self, iteration, trials, trial, **info) -> None:
            self.events.started(trial.config["key"])

        def on_trial_complete(self, iteration, trials, trial, **info) -> None:
            self.events.stopped(trial.config["key"])

        def on_trial_error(self, iteration, trials, trial, **info) -> None:
            self.events.stopped(trial.config["key"])

    resources = {"cpu": placement.trial_cpus, "gpu": placement.trial_gpus}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(train, shared=shared), resources),
        param_space={"key": tune.grid_search(keys)},
        tune_config=tune.TuneConfig(
            reuse_actors=True,  # a fresh process a trial costs 2 s of imports
            max_concurrent_trials=placement.at_once,
            trial_name_creator=lambda trial: trial.config["key"],
            trial_dirname_creator=lambda trial: trial.config["key"],
        ),
        run_config=tune.RunConfig(
            name=tune_folder.name,
            storage_path=str(tune_folder.parent.resolve()),
            failure_config=tune.FailureConfig(max_failures=2),  # of a process: errors of a trial do not reach Tune
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            callbacks=[Callback(events)],
            verbose=0,
        ),
    )
    tuner.fit()


def train(config: dict, *, shared: Shared) -> None:
    """Tune's trainable: one trial, from mapped rows to a prediction in a scorer's queue. Leaves no state in its process."""
    import ray
    from ray import tune

    from perturbray.metrics.pool import NoScorerError, keep_here

    key, started = config["key"], scoring.now()
    plugin.install(shared.plugins)
    trial: Trial = pickle.loads(shared.trials)[key]
    try:
        with one_thread():
            checkpoints = Checkpoints(tune)
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
            _keep(outcome, trial, conditions, shared.depths[trial.dataset], shared.models[key])
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
    except NoScorerError:  # not the trial's fault: without a result and without a record, it is run again
        tune.report({"failed": 1})
        return
    except Exception as error:
        # Recorded here and not raised: Tune would run it again, and an error of the trial itself would come again.
        table.write_failure(shared.folder, key, name=trial.name, error=error)
        tune.report({"failed": 1})
        return
    checkpoints.finish(outcome)


def _keep(outcome: Outcome, trial: Trial, conditions: Conditions, depth: float | None, place: Path) -> None:
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

    def __init__(self, tune, *, seconds: float = CHECKPOINT_SECONDS) -> None:
        self.tune, self.seconds = tune, seconds
        self.last = time.monotonic()

    def restore(self) -> dict | None:
        """The state to go on from, if this trial's process died before."""
        from perturbray.training import checkpoint

        stored = self.tune.get_checkpoint()
        if stored is None:
            return None
        with stored.as_directory() as folder:
            return checkpoint.load(folder)

    def report(self, values: dict[str, float], snapshot: Callable[[], dict]) -> None:
        if time.monotonic() - self.last < self.seconds:
            self.tune.report(values)
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
            self.tune.report(values, checkpoint=self.tune.Checkpoint.from_directory(folder))


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


def deliver(
    stores: dict[DatasetSpec, Store], placement: Placement, events: Events
) -> dict[DatasetSpec, "Windows | None"]:  # noqa: F821  # imports ray
    """What streams a dataset to each trial, where it is too large to be mapped."""
    found = {}
    for spec, store in stores.items():
        delivery = Delivery.choose(store)
        events.line(f"{spec.name}: {delivery.reason}")
        found[spec] = delivery.windows(at_once=placement.at_once)
    return found


def _observe(plan: Plan, stores: dict[DatasetSpec, Store]) -> dict[str, Truth]:
    """Every truth of a plan by digest, each computed once."""
    truths: dict[str, Truth] = {}
    for trial in plan.sweep.trials:
        key, conditions, split = plan.truth_of(trial), plan.conditions[trial.dataset], plan.splits[task_of(trial)]
        if key in truths:
            continue
        cells = stores[trial.dataset].cells()
        asked = {"linear": plan.sweep.needs_linear}
        if not plan.normalisation(trial.dataset).log1p:
            with open_screen(trial.dataset.path) as file:
                asked["target_sum"] = target_sum(file)
        if not plan.sweep.needs_cells:
            truths[key] = observe(cells, conditions, split, **asked)
            continue
        # Fitted once for all levels and seeds: on the training cells of the task before anything is taken away.
        whole = trial.split.split(conditions)
        fitted_on = whole if digest(conditions, whole) == key else split
        truth = observe(cells, conditions, split, sample=plan.sweep.cells, **asked)
        rows = np.flatnonzero(fitted_on.cell == TRAIN)
        rows = rows[np.argsort(conditions.cell_names[rows], kind="stable")]
        if len(rows) > PCA_CELLS:
            rows = np.sort(generator(0, "pca").choice(rows, PCA_CELLS, replace=False))
        space = fit_pca(cells.select(rows), COMPONENTS)
        truths[key] = replace(truth, pca_mean=space.mean, pca_loadings=space.loadings)
    return truths


def _raise_failures(plan: Plan, wanted: set[str]) -> None:
    failed = {key: record for key, record in table.failed(plan.folder).items() if key in wanted}
    if not failed:
        return
    errors = []
    for key, record in failed.items():
        error = TrialError(f"{record['name']} ({key}): {record['error']}")
        error.add_note(record["traceback"])
        errors.append(error)
    raise ExceptionGroup(f"{len(failed)} of {len(plan.trials)} trials failed", errors)
