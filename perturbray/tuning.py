"""Tuning: runs the searches of a sweep on Tune, each trial reporting what it is worth on the validation conditions.

Tune starts, restarts and stops trials; what to try and what is known is the `Course`'s, whose files are all that a search
which goes on needs: nothing of Tune's own state is read again.
"""

import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import cloudpickle

from perturbray import plugin
from perturbray.cluster import Cluster, check_temporary, connect, settle
from perturbray.course import Course, SearchError, reason
from perturbray.curves import keepers
from perturbray.data.dataset import Conditions, open_screen, target_sum
from perturbray.engine import ROUNDS, deliver
from perturbray.errors import InputError, MemoryShortError
from perturbray.events import Events
from perturbray.placement import Node, Placement, place
from perturbray.plan import Plan
from perturbray.process import (
    ASIDE,
    BLIND,
    CHECKPOINT_SECONDS,
    Checkpoints,
    newest_first,
    node,
    one_thread,
    sees,
    trainable,
)
from perturbray.recorder import recording
from perturbray.results import ledger, table
from perturbray.search import Search, Tuned
from perturbray.space import widen
from perturbray.sweep import Sweep
from perturbray.trial import Trial, run
from perturbray.validation import OBJECTIVE, Judge

__all__ = ["SearchError", "known", "tune"]
TUNED = "tuned"  # the variant of trials with the best configuration
DEATHS = 2  # of its process that a trial survives, from its last checkpoint on
LINE_SECONDS = 10.0  # between two lines about a search
TRACKERS = ("wandb", "mlflow")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every trial of a search is given."""

    search: bytes  # pickled; opened once the plugins that define its specs are installed
    plugins: tuple[plugin.Plugin, ...]
    conditions: Conditions
    blocks: "Blocks"  # noqa: F821  # imports ray
    windows: "Windows | None"  # noqa: F821  # imports ray
    judge: "ray.ObjectRef"  # noqa: F821
    checkpoint_seconds: float
    marker: Path | None = None  # made by this run: who does not see it does not see the folder


def room(search: Search) -> Callable[[Sequence[Node]], Placement]:
    """How nodes are divided between the trials of a search, which score themselves."""
    return partial(
        place,
        trials=search.samples,
        gpus=search.gpus,
        memory=int(search.trial_memory_gb * 2**30),
        most=search.at_once,
        scoring=False,
    )


def tune(
    sweep: Sweep,
    folder: Path,
    *,
    address: str | None = None,
    gpus: float | None = None,
    plugins: tuple[plugin.Plugin, ...] = (),
    events: Events | None = None,
    track: Iterable[str] = (),
) -> Sweep:
    """Run what remains of a sweep's searches; the sweep with trials of what they found. It has no search any more.

    ``gpus``: of each trial, where there are any, instead of what a search says.
    Interrupted, or killed at any time, a search goes on where it was when called again. Raises SearchError where too many
    of its trials failed.
    """
    events, track = events or Events(), tuple(track)
    found: list[Trial] = []
    with table.made(folder):
        for search in sweep.searches:
            search = search if gpus is None else replace(search, gpus=gpus)
            course, best = _search(sweep, search, folder, address, plugins, events, track)
            sides = course.borders()
            for path, side in sides.items():
                events.line(
                    f"search of {search.shown}: the best {path}, {best['values'][path]:g}, lies at the {side} end"
                )
            if search.widen and sides:
                wider = replace(search, space=widen(search.space, sides), first=(best["values"],), widen=False)
                events.line(f"search of {search.shown}: once more, with {', '.join(sides)} widened")
                _, again = _search(sweep, wider, folder, address, plugins, events, track)
                best = min(best, again, key=lambda record: record[OBJECTIVE])
            found += _tuned(search, best, folder, course, events)
    return replace(sweep, trials=(*sweep.trials, *found), searches=())


def known(sweep: Sweep, folder: Path, events: Events) -> Sweep:
    """The sweep with trials of what its searches have found so far, for a plan; runs nothing and writes nothing."""
    trials = list(sweep.trials)
    for search in sweep.searches:
        plan = _plan(sweep, search, folder)
        plan.scan(events.line)
        course = Course(search, folder / ledger.FOLDER, plan.contents[search.base.dataset], keep=False)
        best = "" if course.best is None else f", best {OBJECTIVE} {course.best[OBJECTIVE]:.5g} so far"
        events.line(f"search of {search.shown}: {len(course.records)} of {search.samples} trials done{best}")
        if course.over and course.best:
            trials += _trials(search, course.best)
    return replace(sweep, trials=tuple(trials), searches=())


def _plan(sweep: Sweep, search: Search, folder: Path) -> Plan:
    return Plan.of(replace(sweep, trials=(search.base,), searches=()), folder)


def _search(
    sweep: Sweep,
    search: Search,
    folder: Path,
    address: str | None,
    plugins: tuple[plugin.Plugin, ...],
    events: Events,
    track: tuple[str, ...],
) -> tuple[Course, dict]:
    """Run what remains of one search; its course, and the best record."""
    plan, spec = _plan(sweep, search, folder), search.base.dataset
    with table.made(folder), recording(folder, events) as events:
        store = plan.read(spec, events.line)
        facts = {"dataset": spec.name, "content": plan.contents[spec], "name": sweep.name}
        course = Course(search, folder / ledger.FOLDER, plan.contents[spec], facts=facts)
        if not course.over:
            with connect(address, say=events.line) as cluster:
                _run(course, plan, store, cluster, plugins, events, track)
    return course, course.close()


def _run(
    course: Course,
    plan: Plan,
    store: "Store",  # noqa: F821
    cluster: Cluster,
    plugins: tuple[plugin.Plugin, ...],
    events: Events,
    track: tuple[str, ...],
) -> None:
    """Share what trials need, and have Tune run them until the search is over."""
    import ray

    from perturbray.data import blocks
    from perturbray.nodes import check_sight

    search = course.search
    cluster, placement = settle(cluster, room(search), say=events.line)
    check_sight(plan.folder.resolve(), cluster.there)
    spec = search.base.dataset
    depth = None
    if not plan.normalisation(spec).log1p:
        with open_screen(spec.path) as file:
            depth = target_sum(file)
    judge = Judge.of(search, store.cells(), plan.conditions[spec], target_sum=depth)
    setting = Setting(
        search=cloudpickle.dumps(search),
        plugins=plugins,
        conditions=plan.conditions[spec],
        blocks=blocks.share(store, nodes=cluster.shared),
        windows=deliver({spec: store}, placement, events, nodes=cluster.shared)[spec],
        judge=ray.put(judge),
        checkpoint_seconds=CHECKPOINT_SECONDS,
    )
    events.line(
        f"search of {search.shown} ({search.way}): {len(course.records)} of {search.samples} trials known; {placement}; "
        f"minimises {search.objective.name} on {len(judge.truth)} validation conditions"
    )
    _rounds(course, setting, placement, plan.folder / "tune", events, track)


def _rounds(
    course: Course, setting: Setting, placement: Placement, folder: Path, events: Events, track: tuple[str, ...]
) -> None:
    """Tune's runs of a search: again where Tune gave up, or met a node that trials are to avoid."""
    from perturbray.memory import Watch
    from perturbray.nodes import anywhere

    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    trouble = Trouble(Watch(lambda: len(course.records) - len(course.failed)))
    number = again = 0
    while number < ROUNDS:
        ended, known = len(course.records), len(trouble.blind)
        try:
            tune_folder = folder / f"{course.folder.name}-{stamp}-{again}"
            _fit(course, setting, placement, tune_folder, events, track, trouble)
        except MemoryShortError as error:
            for name, one in list(course.running.items()):
                course.end(name, error=f"out of memory: {error}")
                events.judged(course.folder.name, one.number)
            raise SearchError(f"search of {course.search.shown}: {error}") from None
        except (RuntimeError, OSError, EOFError) as error:  # the last two: of a full disk
            events.line(f"Ray Tune gave up ({error})")
            table.create(folder.parent)
            check_temporary()
        finally:
            for name, one in list(course.running.items()):
                course.lose(name)
                events.judged(course.folder.name, one.number)
        met = len(trouble.blind) > known
        again, number = again + 1, number + (not met)
        if course.over or not (met or len(course.records) > ended) or not anywhere(placement, avoid=trouble.blind):
            return


@dataclass
class Trouble:
    """What a search has met that no trial is to blame for."""

    memory: "Watch"  # noqa: F821  # imports ray
    blind: dict[str, str] = field(default_factory=dict)  # nodes that joined and do not see the folder, by id
    again: bool = False  # such a node came up since this round began, which is to end
    unstored: OSError | None = None  # why a record could not be written in this round, which is to end

    def meet(self, said: str, folder: Path, events: Events) -> None:
        """A trial came to a node that does not see the folder."""
        place, _, name = said.partition(" ")
        self.again = True
        if place not in self.blind:
            self.blind[place] = name
            events.line(
                f"node {name} joined and does not see {folder}: mount it there; trials that came there are run again "
                "elsewhere"
            )


def _fit(
    course: Course,
    setting: Setting,
    placement: Placement,
    tune_folder: Path,
    events: Events,
    track: tuple[str, ...],
    trouble: Trouble,
) -> None:
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C reaches us as KeyboardInterrupt
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # an epoch at which nobody looked has no objective
    from ray import tune

    trouble.again, trouble.unstored = False, None
    searcher, scheduler, callback = _adapters(course, _Lines(course, events), trouble)
    setting = replace(setting, marker=tune_folder.resolve())

    def what(config: dict) -> dict:
        return course.search.trial(config["values"]).columns()

    tuner = tune.Tuner(
        trainable(train, placement, name=f"trial {course.folder.name}", avoid=trouble.blind, setting=setting),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # the course says when it is over
            reuse_actors=True,
            max_concurrent_trials=placement.at_once,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=tune_folder.name,
            storage_path=str(tune_folder.parent.resolve()),
            failure_config=tune.FailureConfig(max_failures=DEATHS),
            callbacks=[callback, *keepers(what), *trackers(track, course)],
            verbose=0,
        ),
    )
    tuner.fit()
    if trouble.unstored:
        raise trouble.unstored


def _adapters(course: Course, lines: "_Lines", trouble: Trouble) -> tuple:
    """What Tune asks and tells, as its own kinds of object. It pickles them, and never needs them back."""
    from ray import tune
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

    class Unstored:
        """Tune pickles what it is given; a course lives in its own files."""

        def __deepcopy__(self, memo):
            return self

        def __reduce__(self):
            return object, ()

    class Proposals(Unstored, Searcher):
        def suggest(self, trial_id):
            if trouble.again or trouble.unstored:
                return Searcher.FINISHED
            values = course.begin(trial_id)
            if values is None:
                return Searcher.FINISHED if course.over != "samples" or not course.running else None
            lines.events.tried(course.folder.name, course.running[trial_id].number, values)
            return {"values": values}

        def on_trial_complete(self, trial_id, result=None, error=False):
            if trial_id not in course.running:
                return
            number = course.running[trial_id].number
            try:
                self._end(trial_id, result or {}, error)
            except OSError as full:  # Tune would take it for an error of the trial's, and go on for ever
                trouble.unstored = full
            lines.events.judged(course.folder.name, number)
            lines.ended()

        def _end(self, trial_id, result, error):
            if error:
                blamed = trouble.memory.blame(time.monotonic() - course.running[trial_id].began)
                course.end(trial_id, error=f"its process died {DEATHS + 1} times{blamed}")
            elif BLIND in result:
                course.lose(trial_id)
                trouble.meet(result[BLIND], course.folder, lines.events)
            elif "failed" in result:
                course.end(trial_id, error=result["failed"])
            elif result.get("final"):
                course.end(trial_id, final=_numbers(result, course.search))
            else:
                course.end(trial_id)

        def save(self, checkpoint_path):
            Path(checkpoint_path).touch()

        def restore(self, checkpoint_path):
            raise NotImplementedError("a search goes on from its own files")

    class Halt(Unstored, newest_first()):
        def on_trial_result(self, tune_controller, trial, result):
            trouble.memory.moved()
            if ASIDE in result and (one := course.running.get(trial.trial_id)):
                lines.events.line(f"search of {course.search.shown}, trial {one.number}: {result[ASIDE]}")
            if "failed" in result or result.get("final") or trial.trial_id not in course.running:
                return TrialScheduler.CONTINUE
            lines.events.learnt(course.folder.name, course.running[trial.trial_id].number, result)
            seconds = float(result.get("time_total_s", 0.0))
            values = _numbers(result, course.search)
            stop = course.report(trial.trial_id, epoch=int(result["epoch"]), values=values, seconds=seconds)
            return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    class Clean(Unstored, tune.Callback):
        def on_step_end(self, iteration, trials, **info):
            trouble.memory.check()

        def on_trial_complete(self, iteration, trials, trial, **info):
            self._remove(trial)

        def on_trial_error(self, iteration, trials, trial, **info):
            self._remove(trial)

        def _remove(self, trial):
            """Its checkpoints, which serve restarts alone: of many large networks they would fill a disk."""
            for stored in Path(trial.storage.trial_fs_path).glob("checkpoint_*"):
                shutil.rmtree(stored, ignore_errors=True)

    return Proposals(), Halt(), Clean()


def _plain(values: dict[str, float]) -> dict[str, float]:
    """Names without slashes: a tracker that keeps files would need rmse/average to be one, and a folder for its rank."""
    return {name.replace("/", "."): value for name, value in values.items()}


def _numbers(result: dict, search: Search) -> dict[str, float]:
    """What a trial said, by the names of metrics."""
    names = {metric.name.replace("/", "."): metric.name for metric in search.objective.metrics}
    return {names.get(name, name): float(value) for name, value in result.items() if isinstance(value, int | float)}


def trackers(names: Iterable[str], course: Course) -> list:
    """Ray's own callbacks for what tracks experiments. Raises InputError where it is not installed."""
    made = []
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"no tracker is named {name!r}: there are {', '.join(TRACKERS)}")
        try:
            __import__(name)
        except ImportError:
            raise InputError(f"{name} is not installed: pip install 'perturbray[{name}]'") from None
        if name == "wandb":
            from ray.air.integrations.wandb import WandbLoggerCallback

            made.append(WandbLoggerCallback(project="perturbray", group=course.folder.name))
        else:
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            made.append(MLflowLoggerCallback(experiment_name=course.folder.name))
    return made


def train(config: dict, *, setting: Setting) -> None:
    """Tune's trainable: one trial, which says after each epoch what it is worth. Leaves no state in its process."""
    import ray
    from ray import tune

    if not sees(setting.marker):
        tune.report({"failed": f"its node does not see {setting.marker}", BLIND: node()})
        return
    plugin.install(setting.plugins)
    search: Search = pickle.loads(setting.search)
    title = f"trial search of {search.shown} {tune.get_context().get_trial_name()}"
    checkpoints = Checkpoints(tune, title=title, seconds=setting.checkpoint_seconds)
    try:
        with one_thread(), _memory(search.trial_memory_gb):
            judge: Judge = ray.get(setting.judge)
            outcome = run(
                search.trial(config["values"]),
                setting.blocks.cells(),
                setting.conditions,
                truth=judge.truth,
                report=lambda values, snapshot: checkpoints.report(_plain(values), snapshot),
                state=checkpoints.restore(),
                windows=setting.windows,
                judge=judge,
                every=search.every,
            )
            final = judge(outcome.predicted)
    except Exception as error:
        # Told and not raised: Tune would run it again, and an error of the trial itself would come again.
        tune.report({"failed": reason(error)})
        return
    tune.report({"final": True, "epochs": outcome.fit.epochs, **_plain(final)})


@contextmanager
def _memory(gigabytes: float) -> Iterator[None]:
    """Within it, this process may take so much more address space: what goes beyond is a MemoryError of this trial alone."""
    if not gigabytes:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class _Lines:
    """Says how far a search is: at each new best, and every so often."""

    def __init__(self, course: Course, events: Events) -> None:
        self.course, self.events, self.last, self.best = course, events, 0.0, None

    def ended(self) -> None:
        course = self.course
        best, now = course.best, time.monotonic()
        key = None if best is None else best["key"]
        if key == self.best and now - self.last < LINE_SECONDS and not course.over:
            return
        self.best, self.last = key, now
        states = [record["state"] for record in course.records.values()]
        text = f"search of {course.search.shown}: {len(states)} of {course.search.samples} trials"
        text += f", {states.count('stopped')} stopped early" + (
            f", {states.count('failed')} failed" * ("failed" in states)
        )
        self.events.line(text + (f"; best {best[OBJECTIVE]:.5g} (trial {best['number']})" if best else ""))


def _tuned(search: Search, best: dict, folder: Path, course: Course, events: Events) -> list[Trial]:
    """Store and show the best configuration; its trials."""
    trials = _trials(search, best)
    origin = {
        "objective": search.objective.name,
        "value": best[OBJECTIVE],
        "trials": len(course.records),
        "search": course.folder.name,
        "dataset": search.base.dataset.name,
        "content": course.fingerprint,
    }
    tuned = Tuned(model=trials[0].model, training=trials[0].training, origin=origin)
    path = folder / f"{TUNED}-{re.sub(r'[^A-Za-z0-9_.]+', '-', search.shown)}.json"
    table.replace_file(path, lambda target: target.write_text(tuned.to_json(), encoding="utf-8"))
    events.line(f"the best of {search.shown}, {OBJECTIVE} {best[OBJECTIVE]:.5g}, in {path} (--model {path} runs it):")
    events.line(str(tuned))
    if replace(trials[0], variant="") == replace(search.base, seed=0):
        events.line("which is the configuration that it comes with: its trials are those of both")
    return trials


def _trials(search: Search, best: dict) -> list[Trial]:
    trial = replace(search.trial(best["values"]), variant=TUNED)
    return [replace(trial, seed=seed) for seed in range(search.seeds)]
