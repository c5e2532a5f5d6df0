"""Windows: the rows of an epoch through Ray's object store, a piece of its plan at a time, read by other processes.

For screens that do not fit into memory, or that CPU nodes read for GPU nodes. The plan says the order; a read task gathers
the rows of one window in that order from the mapped store. Read tasks ask for no CPU: trials may hold them all. What lies
in the object store at once is bounded by ``memory``, whatever the number of cells.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from perturbray.cluster import FREED_OFTEN
from perturbray.data import gather
from perturbray.data.rows import Rows, index_type
from perturbray.data.store import Store
from perturbray.errors import InputError
from perturbray.nodes import here, only

READERS = 2  # read tasks at once
COMPILED = 20_000_000  # stored values from which on a reader loads compiled loops, which takes it 0.4 s
AHEAD = 1  # windows on their way to the consumer beside the one that it works on
IN_FLIGHT = READERS + AHEAD + 2  # windows in the object store at once: being written, waiting, being used
WINDOW_MB = 80.0  # the best size of a window for speed, where memory allows it
MEMORY_MB = 500.0  # what an epoch takes of the object store, where no limit is given


class WindowSource(Datasource):
    """One read task and one block a window: the rows of a plan between two of its cuts."""

    def __init__(self, store: Store, parts: list[np.ndarray]) -> None:
        super().__init__()
        self.store, self.parts = store, parts

    def get_name(self) -> str:
        return "windows"

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        return [_task(self.store, part) for part in self.parts]


def _task(store: Store, rows: np.ndarray) -> ReadTask:
    def read() -> Iterable[pa.Table]:
        yield table(store, rows)

    size = int(len(rows) * row_bytes(store))
    return ReadTask(read, BlockMetadata(num_rows=len(rows), size_bytes=size, exec_stats=None, input_files=None))


def table(store: Store, rows: np.ndarray) -> pa.Table:
    """Rows of a store as an Arrow table, in their order, with their numbers."""
    shards, starts = _shards(store)
    found = gather.collect(shards, starts, rows, compiled=store.stored >= COMPILED)
    offsets = pa.array(found.indptr)
    return pa.table(
        {
            "row": rows,
            "indices": pa.LargeListArray.from_arrays(offsets, pa.array(found.indices)),
            "values": pa.LargeListArray.from_arrays(offsets, pa.array(found.values)),
        }
    )


def row_bytes(store: Store) -> float:
    """Bytes of a row on its way, on average."""
    return max(1.0, store.nbytes / max(1, len(store)) + 16)


@lru_cache(maxsize=2)
def _shards(store: Store) -> tuple[list[Rows], np.ndarray]:
    """Mapped once a process; a store of new content has another key, and so is another."""
    return [store.shard(number) for number in range(len(store.rows))], store.starts


@dataclass(frozen=True)
class Windows:
    """Reads a store through Ray Data. Pickles small.

    Raises InputError, in numbers, where a batch is too large for ``memory_mb``, the object store that an epoch may take.
    """

    store: Store
    memory_mb: float = 0.0  # 0: 500 MB, or this trial's part of half of the object store where that is less
    at_once: int = 1  # trials that share the object store of a node
    readers: tuple[str, ...] = ()  # ids of the nodes that read; (): any
    driver: str = ""  # the node that reads where they are gone: it has the store

    def placed(self) -> "Windows":
        """Read where reading belongs, of the nodes that see the store."""
        from perturbray.data.blocks import readers

        return replace(self, readers=readers(self.store), driver=here())

    def read(self, rows: np.ndarray, cuts: np.ndarray) -> Iterator[tuple[int, int, Rows]]:
        """Batches from one number to another and their rows, window after window, in the order of the plan."""
        ends = list(pairwise(self.edges(cuts)))
        parts = [rows[cuts[first] : cuts[last]] for first, last in ends]
        for (first, last), found in zip(ends, self._stream(parts), strict=True):
            yield first, last, found

    def fetch(self, rows: np.ndarray) -> list[Rows]:
        """Rows that are kept: a copy in this process. Raises InputError where they take more than the limit."""
        need, limit = len(rows) * row_bytes(self.store) / 1e6, self.limit_mb
        if need > limit:
            raise InputError(
                f"streaming holds the {len(rows):,} control cells that pairs are drawn from, which take {_mb(need)} MB, and "
                f"{_mb(limit)} MB are allowed: raise PERTURBRAY_STREAM_MB, or train with training.controls=mean"
            )
        step = max(1, int(self._window_mb * 1e6 / row_bytes(self.store)))
        parts = [rows[start : start + step] for start in range(0, len(rows), step)]
        return [_copied(found) for found in self._stream(parts)] if parts else [_none(self.store.genes)]

    def edges(self, cuts: np.ndarray) -> list[int]:
        """(windows + 1,) numbers of batches: as many whole batches a window as memory allows."""
        most = self._window_mb * 1e6 / row_bytes(self.store)
        if (largest := int(np.diff(cuts).max(initial=0))) > most:
            need = largest * row_bytes(self.store) * IN_FLIGHT / 1e6
            raise InputError(
                f"streaming holds {IN_FLIGHT} windows of at least a batch, of which the largest has {largest:,} cells: "
                f"{_mb(need)} MB are needed and {_mb(self.limit_mb)} MB allowed; raise PERTURBRAY_STREAM_MB or lower "
                "training.batch_size"
            )
        edges = [0]
        while edges[-1] < len(cuts) - 1:
            edges.append(int(np.searchsorted(cuts, cuts[edges[-1]] + most, side="right")) - 1)
        return edges

    @property
    def limit_mb(self) -> float:
        """What an epoch may take of the object store."""
        if self.memory_mb:
            return self.memory_mb
        start_ray()
        lends = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == here()), {})
        room = lends.get("object_store_memory", 1e12) / 1e6
        return min(MEMORY_MB, room / 2 / self.at_once)

    @property
    def _places(self) -> dict:
        """Where read tasks run, as options of Ray's."""
        if not self.readers:
            return {}
        last = {"label_selector": only([self.driver])}
        return {"label_selector": only(self.readers), "fallback_strategy": [last]}

    @property
    def _window_mb(self) -> float:
        return min(WINDOW_MB, self.limit_mb / IN_FLIGHT)

    def _stream(self, parts: list[np.ndarray]) -> Iterator[Rows]:
        """The rows of each part, in order. Raises RuntimeError where what came is not what was asked for."""
        start_ray()
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a line an execution otherwise
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = None  # a window stays one block
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=self.limit_mb * 1e6)
        with ray.data.DataContext.current(context):
            windows = ray.data.read_datasource(
                WindowSource(self.store, parts),
                override_num_blocks=len(parts),
                concurrency=min(READERS, len(parts)),
                num_cpus=0,
                ray_remote_args=self._places,
            )
            blocks = iter(windows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=AHEAD))
        try:
            for asked in parts:
                block = next(blocks)
                if not np.array_equal(block["row"].to_numpy(), asked):
                    raise RuntimeError(f"the window that begins with row {asked[0]} came as another")
                yield _rows(block, self.store.genes)
                del block  # and with it its place in the object store, before the next is waited for
        finally:
            blocks.close()  # an epoch that is left early leaves no windows behind


def start_ray() -> None:
    """A Ray of this process's own, where there is none."""
    if not ray.is_initialized():
        os.environ.setdefault(*FREED_OFTEN)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def _mb(amount: float) -> str:
    """Megabytes for a message, rounded up, so that the number will do."""
    return f"{math.ceil(amount):,}" if amount >= 10 else f"{math.ceil(amount * 100) / 100:g}"


def _rows(block: pa.Table, genes: int) -> Rows:
    """An Arrow table as rows over the same memory."""
    indices, values = (
        column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        for column in (block["indices"], block["values"])
    )
    indptr = indices.offsets.to_numpy()
    low, high = indptr[0], indptr[-1]
    flat = indices.values.to_numpy()[low:high], values.values.to_numpy()[low:high]
    return Rows(indptr - low, flat[0].astype(index_type(genes), copy=False), flat[1], genes)


def _copied(rows: Rows) -> Rows:
    return Rows(rows.indptr.copy(), rows.indices.copy(), rows.values.copy(), rows.genes)


def _none(genes: int) -> Rows:
    return Rows(np.zeros(1, np.int64), np.empty(0, index_type(genes)), np.empty(0, np.float32), genes)
