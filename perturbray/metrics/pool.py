"""The scorer actors: they live as long as a sweep, and work on finished trials while the next ones train."""

import queue
import threading
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from perturbray.prediction import LostCellsError

WAITING = 4  # items that wait in a scorer; a faster trial is held back, so that predictions cannot flood the memory
WAITING_CELLS = 1  # items with cells, which are heavier by some orders of magnitude

Wait = Callable[[list[ray.ObjectRef]], None]


@dataclass(frozen=True)
class Failed:
    """An item that could not be worked on."""

    name: str
    error: Exception
    text: str  # the traceback, since it does not travel with the exception


@dataclass(frozen=True)
class Kept:
    """An array in the object store, which moves it to disk where memory is short. Pickles to its reference."""

    reference: ray.ObjectRef

    def __call__(self) -> Any:
        try:
            return ray.get(self.reference)
        except ObjectLostError as error:
            raise LostCellsError("the scorer that held predicted cells was lost, and the cells with it") from error


def keep_here(array: Any) -> Kept:
    """Into the object store; it is lost with this process."""
    return Kept(ray.put(array))


@ray.remote(max_concurrency=64, max_restarts=-1, max_task_retries=-1)
class Scorer:
    """Takes items into a bounded queue and works on them one by one in a thread of its own.

    Ray starts one again whose process died; what it held is lost, and its trials have no result.
    """

    def __init__(self, work: Callable[..., None], common: bytes, waiting: int) -> None:
        self._work, self._common = work, ray.get(ray.cloudpickle.loads(common))
        self._items: queue.Queue = queue.Queue(maxsize=waiting)
        self._failed: list[Failed] = []
        threading.Thread(target=self._run, daemon=True).start()

    def keep(self, array: Any) -> Kept:
        """Hold a part of an item that is still to come; by the answer it no longer depends on who sent it."""
        return keep_here(array)

    def submit(self, name: str, item: Any) -> None:
        """Return once the item is in the queue; by then it no longer depends on the process that sent it."""
        self._items.put((name, item))

    def drain(self) -> list[Failed]:
        """Wait until the queue is empty; what failed since the last time."""
        self._items.join()
        failed, self._failed = self._failed, []
        return failed

    def _run(self) -> None:
        while True:
            name, item = self._items.get()
            try:
                self._work(item, *self._common)
            except Exception as error:
                self._failed.append(Failed(name, _portable(error), traceback.format_exc()))
            finally:
                del item
                self._items.task_done()


class NoScorerError(RuntimeError):
    """Every scorer was killed for good."""


class Pool:
    """Scorers by number. Pickles to their handles, so that trials hold it."""

    def __init__(
        self, actors: Sequence[Any], make: Callable[[int], Any] | None = None, wait: Wait = lambda answers: None
    ) -> None:
        self.actors = list(actors)
        self._make, self._wait = make, wait

    def __getstate__(self) -> dict:
        return {"actors": self.actors, "_make": None, "_wait": None}

    @classmethod
    def start(
        cls,
        work: Callable[..., None],
        *common: ray.ObjectRef,
        actors: int,
        cpus: float,
        waiting: int = WAITING,
        home: Callable[[int], dict] = lambda number: {},
        wait: Wait = lambda answers: None,
    ) -> "Pool":
        """Start the actors and wait for them: before the trials, or Tune's placement groups would capture them.

        ``work(item, *common)`` is done for each item; ``common`` lies in the object store, once for all actors.
        ``waiting``: items that an actor takes before it has worked on the first. ``home``: Ray's options that say where the
        actor of a number belongs, asked for whenever one is made. ``wait(answers)`` may raise where no scorer will ever
        answer, since Ray starts each again for ever.
        """
        options = {"num_cpus": cpus, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}}}

        # As bytes: Ray warns of every actor that has objects among its arguments and is to be started again, since they
        # might be gone by then. These stay, pinned by being pickled, as long as the caller's Ray.
        references = ray.cloudpickle.dumps(list(common))

        def make(number: int) -> Any:
            # Named for the dashboard; apart from each other, since a name stays taken for a moment after a kill.
            name = f"scorer-{number}-{uuid.uuid4().hex[:8]}"
            return Scorer.options(name=name, **options, **home(number)).remote(work, references, waiting)

        pool = cls([make(number) for number in range(actors)], make, wait)
        try:
            answers = [actor.drain.remote() for actor in pool.actors]
            wait(answers)
            ray.get(answers)
        except BaseException:
            pool.stop()
            raise
        return pool

    def submit(self, name: str, item: Any, *, turn: int) -> None:
        """Hand an item over; waits while the scorer's queue is full. Another scorer takes it where one was killed."""
        self._ask(turn, name, lambda actor: actor.submit.remote(name, item))

    def keep(self, name: str, array: Any, *, turn: int) -> Kept:
        """Let a scorer hold a part of an item that comes later, so that its maker need not."""
        return self._ask(turn, name, lambda actor: actor.keep.remote(array))

    def _ask(self, turn: int, name: str, call: Callable[[Any], ray.ObjectRef]) -> Any:
        for i in range(len(self.actors)):
            try:
                return ray.get(call(self.actors[(turn + i) % len(self.actors)]))
            except RayActorError:
                continue
        raise NoScorerError(f"no scorer is left to take {name}")

    def drain(self) -> tuple[list[Failed], int]:
        """Wait for all work; what failed, and how many actors were killed for good, with what they held."""
        failed, dead = [], 0
        answers = [actor.drain.remote() for actor in self.actors]
        self._wait(answers)
        for answer in answers:
            try:
                failed += ray.get(answer)
            except RayActorError:
                dead += 1
        return failed, dead

    def revive(self) -> None:
        """Put new actors in the place of those that were killed for good."""
        answers = [actor.drain.remote() for actor in self.actors]
        self._wait(answers)
        for i, answer in enumerate(answers):
            try:
                ray.get(answer)
            except RayActorError:
                self.actors[i] = self._make(i)

    def stop(self) -> None:
        """End the actors."""
        for actor in self.actors:
            ray.kill(actor)


def _portable(error: Exception) -> Exception:
    """The exception if it pickles, else one with the same text."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
