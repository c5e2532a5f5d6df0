"""The engine: runs a sweep on Tune. Finished work is known by key and never repeated; one failure stops nothing else."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from perturbray import plugin, scoring
from perturbray.cluster import check_temporary, connect, settle
from perturbray.curves import keepers
from perturbray.data.dataset import DatasetSpec, open_screen, target_sum
from perturbray.data.loading import Delivery
from perturbray.data.splits import TRAIN
from perturbray.data.store import Store
from perturbray.data.truth import digest, observe
from perturbray.errors import MemoryShortError
from perturbray.events import Events
from perturbray.metrics.cell_metrics import COMPONENTS
from perturbray.metrics.distribution import fit_pca
from perturbray.placement import SCORER_CPUS, Placement, place
from perturbray.plan import Plan, reference, task_of, versions
from perturbray.prediction import Truth
from perturbray.process import ASIDE, BLIND, LOST, Shared, newest_first, train, trainable
from perturbray.randomness import generator
from perturbray.recorder import recording
from perturbray.results import table
from perturbray.trial import Trial

ROUNDS = 3  # times that trials lost with their process are started again
OOM = "OOM kill reason: "  # begins the line in which Ray says, in numbers, why its memory monitor killed a process
PCA_CELLS = 50_000  # training cells that the space of distribution metrics is fitted on


class TrialError(RuntimeError):
    """A trial failed; the traceback of where it ran is a note."""


def run_sweep(
    plan: Plan,
    *,
    address: str | None = None,
    gpus: float = 1.0,
    plugins: tuple[plugin.Plugin, ...] = (),
    command: str = "",
    events: Events | None = None,
) -> int:
    """Run what remains of a plan; the number of trials that ran. ``gpus``: of each trial, where there are any.

    Raises ExceptionGroup of TrialError, after all others are stored, if trials failed. Interrupted, or killed at any
    time, it goes on where it was when called again.
    """
    events = events or Events()
    if plan.known and not plan.remaining():
        table.create(plan.folder)
        _store(plan, command)
        events.planned(plan)
        return 0
    with table.made(plan.folder), recording(plan.folder, events) as events:
        stores = {spec: plan.read(spec, events.line) for spec in plan.conditions}
        _store(plan, command)
        events.planned(plan)
        wanted = plan.remaining()
        if wanted:
            try:
                _run(plan, wanted, stores, address=address, gpus=gpus, plugins=plugins, events=events)
            except MemoryShortError as error:
                events.line(str(error))
                _give_up(plan, str(error))
            except BaseException:  # also Ctrl-C while nodes are waited for
                _end(plan, "interrupted")
                raise
    _raise_failures(plan, set(wanted))
    return len(wanted)


def _run(
    plan: Plan,
    wanted: dict[str, Trial],
    stores: dict[DatasetSpec, Store],
    *,
    address: str | None,
    gpus: float,
    plugins: tuple[plugin.Plugin, ...],
    events: Events,
) -> None:
    """Connect to Ray, share what is needed, train and score."""
    for key in wanted:
        (plan.folder / f"{key}{table.FAILED}").unlink(missing_ok=True)
    with connect(address, say=events.line) as cluster:
        import ray

        from perturbray.data import blocks
        from perturbray.memory import Watch
        from perturbray.metrics.pool import WAITING, WAITING_CELLS, Pool
        from perturbray.nodes import check_sight, home

        cluster, placement = settle(cluster, partial(place, trials=len(wanted), gpus=gpus), say=events.line)
        check_sight(plan.folder.resolve(), cluster.there)
        shared_stores = {spec: blocks.share(store, nodes=cluster.shared) for spec, store in stores.items()}
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
        pool, memory = None, Watch(lambda: len(table.finished(plan.folder)))
        if placement.scorers:
            options = {"actors": placement.scorers, "cpus": SCORER_CPUS, "waiting": waiting, "wait": memory.wait}
            if cluster.shared:
                # What Ray is told they take is nothing, though room is left for them: one that is started again after its
                # node is gone must not wait for room that trials hold which wait for it.
                options |= {"cpus": 0.0, "home": home}
            pool = Pool.start(work, stored, **options)
        events.connected(cluster, placement, tune_folder)
        shared = Shared(
            folder=plan.folder.resolve(),
            sweep=plan.sweep.name,
            marker=tune_folder,
            plugins=plugins,
            trials={key: cloudpickle.dumps(trial) for key, trial in plan.trials.items()},
            conditions=plan.conditions,
            blocks=shared_stores,
            windows=deliver(stores, placement, events, nodes=cluster.shared),
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
                if pool is None:
                    for key, anchor in plan.anchors.items():
                        if key not in table.anchored(plan.folder):
                            work(anchor, truths)
                Rounds(plan, shared, placement, tune_folder, events, memory, growing=cluster.shared).run()
                state = "done"
            finally:
                try:
                    if pool is not None:
                        pool.drain()  # what is trained is scored, also after Ctrl-C
                finally:
                    if pool is not None:
                        pool.stop()
                    _end(plan, state)


def _end(plan: Plan, state: str) -> None:
    with suppress(OSError):  # of a full disk, which is told by what it kept from being stored
        table.write_plan(plan.folder, {**table.read_plan(plan.folder), "status": {"state": state}})


def _give_up(plan: Plan, reason: str) -> None:
    """Trials that have neither a result nor a record failed for that reason."""
    for key in _left(plan):
        table.write_failure(plan.folder, key, name=plan.trials[key].name, error=reason)
    _end(plan, "done")


def _left(plan: Plan) -> list[str]:
    """Trials that have neither a result nor a record."""
    failed = table.failed(plan.folder)
    return [key for key in plan.remaining() if key not in failed]


def _store(plan: Plan, command: str) -> None:
    state = "running" if plan.remaining() else "done"
    table.write_plan(plan.folder, plan.describe(command=command, state=state))
    known = reference(plan)
    if known:
        table.write_reference(plan.folder, known)
    else:
        (plan.folder / table.REFERENCE).unlink(missing_ok=True)


class Rounds:
    """Tune's runs of a plan: again for the trials that were lost with a process, a node or its sight. Tune gives up where
    its own monitor kills a process; and a trial that was lost has neither a result nor a record."""

    def __init__(
        self,
        plan: Plan,
        shared: Shared,
        placement: Placement,
        tune_folder: Path,
        events: Events,
        memory: "Watch",  # noqa: F821  # imports ray
        *,
        growing: bool,
    ) -> None:
        self.plan, self.shared, self.placement, self.events = plan, shared, placement, events
        self.tune_folder, self.memory, self.growing = tune_folder, memory, growing
        self.reasons: dict[str, str] = {}  # why a trial was lost the last time
        self.blind: dict[str, str] = {}  # nodes that joined and do not see the folder, by id: trials avoid them

    def run(self) -> None:
        """Until every trial is finished or recorded as failed, with its reason."""
        from perturbray.nodes import anywhere

        number = again = 0
        while number < ROUNDS:
            keys, anchors = _left(self.plan), self.anchors()
            if not keys and not anchors:
                break
            if again:
                lost = f"{len(keys)} trials" if keys else "anchors"
                self.events.line(f"{lost} were lost with the process that ran or scored them: running them again")
            known = len(self.blind)
            self.round(keys, anchors, self.tune_folder.with_name(f"{self.tune_folder.name}-{again}"))
            again += 1
            number += len(self.blind) == known  # else the trials met a node that the next round avoids
            if len(self.blind) > known and not anywhere(self.placement, avoid=self.blind):
                break
        for key in _left(self.plan):
            reason = self.reasons.get(key, f"its process died {again} times")
            table.write_failure(self.plan.folder, key, name=self.plan.trials[key].name, error=reason)

    def anchors(self) -> dict[str, scoring.Anchor]:
        """What is to be scored beside the trials and is not yet, by its name in the pool, which they are scored in."""
        stored = table.anchored(self.plan.folder) if self.shared.pool is not None else self.plan.anchors
        named = {f"anchor {key}": anchor for key, anchor in self.plan.anchors.items() if key not in stored}
        return {name: anchor for name, anchor in named.items() if name not in self.reasons}

    def round(self, keys: list[str], anchors: dict[str, scoring.Anchor], folder: Path) -> None:
        pool = self.shared.pool
        for turn, (name, anchor) in enumerate(anchors.items()):
            pool.submit(name, anchor, turn=turn)
        if keys:
            try:
                self.tune(keys, folder)
            except (RuntimeError, OSError, EOFError) as error:  # the last two: of a full disk
                self.events.line(f"Ray Tune gave up ({error})")
        if pool is not None:
            failed, _ = pool.drain()
            self.reasons |= {item.name: f"{type(item.error).__name__}: {item.error}" for item in failed}
            pool.revive()
        table.create(self.plan.folder)  # raises where the disk is full: neither results nor reasons could be stored
        check_temporary()

    def ended(self, key: str, result: Mapping[str, Any]) -> None:
        """What a trial said at its end, in the place of a result."""
        if LOST in result or BLIND in result:
            self.events.lost(key)
        if LOST in result:
            self.reasons[key] = str(result[LOST])
        if BLIND in result:
            node, _, name = str(result[BLIND]).partition(" ")
            self.reasons[key] = f"node {name} joined and does not see {self.shared.folder}: mount it there"
            if node not in self.blind:
                self.blind[node] = name
                self.events.line(f"{self.reasons[key]}; trials that came there are run again elsewhere")

    def tell(self, key: str, what: str) -> None:
        """Say what happened to a trial that goes on."""
        self.events.line(f"{self.plan.trials[key].name} ({key}): {what}")

    def died(self, key: str, said: str) -> None:
        """A trial's process died once too often in a round."""
        self.events.lost(key)
        self.reasons[key] = f"its process died; the last time: {said}"

    def tune(self, keys: list[str], folder: Path) -> None:
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C reaches us as KeyboardInterrupt
        from ray import tune

        shared = replace(self.shared, marker=folder.resolve())
        name = f"trial {self.shared.sweep}"
        tuner = tune.Tuner(
            trainable(train, self.placement, name=name, avoid=self.blind, shared=shared),
            param_space={"key": tune.grid_search(keys)},
            tune_config=tune.TuneConfig(
                reuse_actors=True,  # a fresh process a trial costs 2 s of imports
                scheduler=newest_first()(),
                # Where nodes may join, only room is a limit: one that nobody knew of is used too.
                max_concurrent_trials=None if self.growing else self.placement.at_once,
                trial_name_creator=lambda trial: trial.config["key"],
                trial_dirname_creator=lambda trial: trial.config["key"],
            ),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent.resolve()),
                failure_config=tune.FailureConfig(max_failures=2),  # of a process: errors of a trial do not reach Tune
                callbacks=[_callback(self), *keepers(lambda config: self.plan.trials[config["key"]].columns())],
                verbose=0,
            ),
        )
        tuner.fit()


def _callback(rounds: Rounds):
    from ray import tune

    class Callback(tune.Callback):
        def __init__(self, rounds: Rounds | None) -> None:
            self.rounds, self.events = rounds, rounds.events if rounds else Events()

        def __reduce__(self):
            return type(self), (None,)  # Tune pickles its callbacks, and a terminal does not pickle

        def on_trial_start(self, iteration, trials, trial, **info) -> None:
            self.events.started(trial.config["key"])

        def on_step_end(self, iteration, trials, **info) -> None:
            self.rounds.memory.check()

        def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
            self.rounds.memory.moved()
            if ASIDE in result:
                self.rounds.tell(trial.config["key"], result[ASIDE])
            self.events.reported(trial.config["key"], result)

        def on_trial_complete(self, iteration, trials, trial, **info) -> None:
            self.events.stopped(trial.config["key"])
            self.rounds.ended(trial.config["key"], trial.last_result or {})

        def on_trial_error(self, iteration, trials, trial, **info) -> None:
            self.events.stopped(trial.config["key"])
            said = (trial.get_error() or "it said nothing").strip().splitlines()
            why = [line for line in said if line.startswith(OOM)]  # advice that is the same for all comes after it
            self.rounds.died(trial.config["key"], (why or said)[-1])

    return Callback(rounds)


def deliver(
    stores: dict[DatasetSpec, Store], placement: Placement, events: Events, *, nodes: bool
) -> dict[DatasetSpec, "Windows | None"]:  # noqa: F821  # imports ray
    """What streams a dataset to each trial, where it is too large to be mapped."""
    found = {}
    for spec, store in stores.items():
        delivery = Delivery.choose(store)
        events.line(f"{spec.name}: {delivery.reason}")
        found[spec] = delivery.windows(at_once=placement.on_a_node, nodes=nodes)
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
