"""Loading: a screen as a stream of batches in one call, and whether its rows are mapped or streamed."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from perturbray.data import store as stores
from perturbray.data.batches import BatchStream, Cells, Mode
from perturbray.data.dataset import Conditions, DatasetSpec
from perturbray.data.sampling import Sampling
from perturbray.data.splits import TRAIN, Split, SplitSpec
from perturbray.data.store import Say, Store
from perturbray.errors import InputError, nearest

DELIVERIES = ("auto", "resident", "streaming")
SHARE = 0.5  # of the memory that is available, which mapped rows may fill before they are streamed instead


@dataclass(frozen=True)
class Delivery:
    """How the rows of a store reach a trial. The batches are the same either way: a trial's key does not hold it.

    Resident: every process maps the store, and all of a machine share one page cache. Streaming: windows of an epoch come
    through Ray's object store, read by other processes; $PERTURBRAY_STREAM_MB bounds what is there at once.
    """

    store: Store
    streaming: bool
    reason: str  # for the log

    @classmethod
    def choose(cls, store: Store, how: str = "") -> "Delivery":
        """By ``how``, else by $PERTURBRAY_DELIVERY, else by size: streaming where the rows take more than half of the
        available memory, or more than $PERTURBRAY_RESIDENT_MB."""
        how = how or os.environ.get("PERTURBRAY_DELIVERY") or "auto"
        if how not in DELIVERIES:
            raise InputError(f"delivery {how!r}: {nearest(how, DELIVERIES)}")
        limit = _megabytes("PERTURBRAY_RESIDENT_MB") or SHARE * available_mb()
        size = f"{store.nbytes / 1e6:,.0f} MB of rows, {limit:,.0f} MB may be mapped"
        if how != "auto":
            return cls(store, how == "streaming", f"{size}: {how}, as asked for")
        streaming = store.nbytes / 1e6 > limit
        return cls(store, streaming, f"{size}: {'streaming' if streaming else 'resident'}")

    def cells(self) -> Cells:
        return self.store.cells()

    def windows(self, *, at_once: int = 1, nodes: bool = False) -> "Windows | None":  # noqa: F821  # imports ray
        """What streams the rows, if they are streamed, to this many trials of a node at once. ``nodes``: read by those of
        the cluster where reading belongs."""
        if not self.streaming:
            return None
        from perturbray.data.windows import Windows

        windows = Windows(self.store, memory_mb=_megabytes("PERTURBRAY_STREAM_MB"), at_once=at_once)
        return windows.placed() if nodes else windows


def load(
    dataset: DatasetSpec | str | os.PathLike[str],
    *,
    batch_size: int = 1024,
    split: SplitSpec | None = None,
    seed: int = 0,
    mode: Mode = "paired",
    device: torch.device | str = "cpu",
    sampling: Sampling | None = None,
    embedding: str | None = None,
    delivery: str = "",
    say: Say = lambda _: None,
) -> BatchStream:
    """The cells of a screen as batches for any PyTorch loop: ``for batch in load("screen.h5ad").epoch(number=epoch)``.

    The first call on a file reads it once into a store in the cache folder; later calls map that. Without ``split`` every
    cell is a training cell; with one, ``epoch(VAL)`` and ``epoch(TEST)`` give the others. ``delivery`` as in
    ``Delivery.choose``; streaming starts a Ray on this machine where none runs.
    """
    spec = dataset if isinstance(dataset, DatasetSpec) else DatasetSpec(path=str(Path(dataset)))
    conditions = stores.conditions(spec)
    chosen = Delivery.choose(stores.ingest(spec, conditions, say=say), delivery)
    say(f"{spec.name}: {chosen.reason}")
    pa.default_memory_pool().release_unused()  # 200 bytes a cell that reading obs took; they would be kept for ever
    return BatchStream(
        chosen.cells(),
        conditions,
        _everything(conditions) if split is None else split.split(conditions),
        batch_size=batch_size,
        seed=seed,
        mode=mode,
        device=device,
        sampling=sampling,
        embedding=embedding,
        windows=chosen.windows(),
    )


def available_mb() -> float:
    """Memory that a new page cache may fill: what the machine has available, or the limit of this process's group."""
    found = [float("inf")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e3)
    except (OSError, StopIteration):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6)
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(place).read_text()) / 1e6)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(found)


def _everything(conditions: Conditions) -> Split:
    return Split(
        condition=np.full(len(conditions), TRAIN, dtype=np.int8),
        cell=np.full(len(conditions.cell_condition), TRAIN, dtype=np.int8),
        stratum=np.full(len(conditions), "common"),
    )


def _megabytes(name: str) -> float:
    """A limit from the environment, 0 where none is set."""
    text = os.environ.get(name, "")
    try:
        return float(text or 0)
    except ValueError:
        raise InputError(f"{name}={text!r}: a number of megabytes is needed") from None
