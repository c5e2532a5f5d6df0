"""Memory: what Ray's monitor killed since anything last came of a sweep, and when waiting on is no use.

The monitor counts the memory of a whole node, also of other programs, and kills what was started last. Where a node is above
its threshold whatever a sweep does, everything that starts is killed, and Ray starts it again for ever.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.core.generated import common_pb2, gcs_pb2

from perturbray.errors import MemoryShortError

KILLS = 30  # in a row, without an epoch or a result in between, after which a sweep gives up
SECONDS = 2.0  # between two looks at what was killed


@dataclass(frozen=True)
class Kill:
    """A process that the monitor killed, as Ray notes it."""

    process: int
    took: int  # bytes
    time: float  # of its end, in seconds since 1970
    detail: str

    @property
    def name(self) -> str:
        """Of its task or actor."""
        found = re.search(rf"task name=([^,]+),[^)]*pid={self.process}\b", self.detail)
        return found[1].partition(":")[0].removesuffix(".__init__") if found else "a process"

    def __str__(self) -> str:
        who = f"{self.name} (process {self.process}, {self.took / 1e9:.2f} GB)"
        node = re.search(r"\(IP: ([^,]+), ID: \w+\)", self.detail)
        usage = re.search(r"usage (\d+)B exceeded threshold of (\d+)B \(([\d.]+)% of (\d+)B", self.detail)
        if not node or not usage:  # another release of Ray's says it in its own way
            return f"{who}: {' '.join(self.detail.split())[:200]}"
        used, threshold, whole = (int(usage[i]) / 1e9 for i in (1, 2, 4))
        return (
            f"{who} on node {node[1]}, of whose {whole:.1f} GB {used:.1f} GB are in use and the threshold is "
            f"{threshold:.2f} GB ({usage[3]}%)"
        )


class Watch:
    """Counts the processes of this driver that the monitor killed since something last came of them."""

    def __init__(self, stored: Callable[[], int]) -> None:
        """``stored``: a number that grows with what is finished."""
        self._stored, self._epochs = stored, 0
        self._looked = 0.0
        self._known, self._since = -1, 0  # what had come, and how many were killed by then
        self.kills: list[Kill] = []  # the latest last

    def moved(self) -> None:
        """An epoch, or anything else, came of a trial."""
        self._epochs += 1

    def check(self) -> None:
        """Raise MemoryShortError where too many were killed, and nothing came of any."""
        if time.monotonic() - self._looked < SECONDS:
            return
        self._looked = time.monotonic()
        self.kills = killed()
        came = self._stored() + self._epochs
        if came > self._known:
            self._known, self._since = came, len(self.kills)
        if (count := len(self.kills) - self._since) >= KILLS:
            raise MemoryShortError(
                f"Ray's memory monitor killed {count} processes in a row and nothing came of any; the last was "
                f"{self.kills[-1]}: free memory there, or start Ray with a higher RAY_memory_usage_threshold; the same "
                "command goes on"
            )

    def blame(self, seconds: float) -> str:
        """Of something that died: what the monitor killed last in so many seconds, as the end of a sentence; or nothing."""
        found = [kill for kill in killed() if kill.time > time.time() - seconds]
        return f"; Ray's memory monitor killed {len(found)} meanwhile, the last was {found[-1]}" if found else ""

    def wait(self, answers: list[ray.ObjectRef]) -> None:
        """Until all answers are there, whatever they are; raises as ``check`` does."""
        while ray.wait(answers, num_returns=len(answers), timeout=SECONDS, fetch_local=False)[1]:
            self.check()


def killed() -> list[Kill]:
    """The processes of this driver that Ray's memory monitor killed, the latest last."""
    import ray._private.state

    accessor = ray._private.state.state._connect_and_get_accessor()
    job = ray.get_runtime_context().get_job_id()
    found = []
    for text in accessor.get_worker_table():
        worker = gcs_pb2.WorkerTableData.FromString(text)
        if worker.exit_type == common_pb2.NODE_OUT_OF_MEMORY and not worker.is_alive and worker.job_id.hex() == job:
            at = worker.end_time_ms / 1000
            found.append(Kill(worker.pid, worker.memory_used_bytes_at_death, at, worker.exit_detail))
    return sorted(found, key=lambda kill: kill.time)
