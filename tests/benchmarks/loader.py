"""How fast and in how much memory cells reach a model, as ratios over other ways to load the same screen.

Parts, each of which can be run alone (--only speed,controls):

  speed      shuffled epochs of dense float32 batches from 200,000 cells x 5,000 genes, 8 % stored, sorted by cell type and
             perturbation: resident and streaming (in the same full permutation, and by chunks of 64 rows); over the
             ceiling, a bare loop of one core that fills one buffer from random rows; over scipy slices of the matrix in
             memory, AnnLoader, scDataset, and annbatch from zarr and in memory. AnnLoader and scDataset load a tenth of
             an epoch
  controls   an epoch with a matched control cell for each cell, over one without
  memory     the peak of a process that streams epochs of 250,000, 500,000 and 1,000,000 such cells, with Ray, its
             workers and the object store: proportional shares of what is no file's page. Takes 6 GB of disk for a while
  trials     what each of two and four processes adds that train LatentAdditive on the same mapped screen with the default
             batch; 210 MB of it are torch and what its optimisers import

A ratio is of medians of cells a second, of wall time, or of CPU-seconds of all processes of a contestant (`_cpu`).
Contestants take turns, each in a process of its own on one thread; streaming has two read workers besides. The screen is
made once and kept, as peers are, in the cache folder (PERTURBRAY_CACHE moves it). annbatch needs a python3.12; it is left
out where there is none.
"""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from contestants.serve import descendants
from harness import Contestant, Peer, Report, cache, parser, race
from scipy.optimize import brentq

ANNBATCH = Peer("annbatch", "0.3.1", python="python3.12", beside=("zarrs==0.2.3", "numba"))
SCDATASET = Peer("scdataset", "0.3.0", borrows=True)
PART = 0.1  # of an epoch that slow loaders load
CELL_BYTES = 6000  # on disk, of a cell in an h5ad file and a store
CHUNK = 8192  # cells that are drawn at once


@dataclass(frozen=True)
class Run:
    """What the parts share."""

    report: Report
    rounds: int
    quick: bool
    peers: bool

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @property
    def reference(self) -> Path:
        """The reference screen, made now if it is not there."""
        cells, genes = self.size(200_000, 2_000), self.size(5_000, 100)
        folder = cache() / "benchmarks" / "screens" / f"{cells}x{genes}"
        if not (folder / "screen.h5ad").exists():
            print(f"  making {folder} (once)", flush=True)
            screen(folder / "screen.h5ad", cells=cells, genes=genes)
        return folder / "screen.h5ad"


def speed(run: Run) -> None:
    """Shuffled epochs."""
    path, size = run.reference, {"batch_size": run.size(1024, 64)}
    stream = {"path": path, "delivery": "streaming", **size}
    contestants = {
        "resident": Contestant("loaders.py", "ours", path=path, delivery="resident", **size),
        "streaming": Contestant("loaders.py", "ours", chunk=1, **stream),
        "streaming_chunks": Contestant("loaders.py", "ours", chunk=64, **stream),
        "scipy": Contestant("loaders.py", "scipy", path=path, **size),
        "annloader": Contestant("loaders.py", "annloader", path=path, part=PART, **size),
    }
    contestants["ceiling"] = Contestant("loaders.py", "ceiling", path=path, **size)  # after the store is made
    if run.peers and (python := ANNBATCH.interpreter()):
        own = {"python": python, "path": path, **size}
        contestants["annbatch_zarr"] = Contestant("with_annbatch.py", "zarr", folder=path.parent, **own)
        contestants["annbatch_memory"] = Contestant("with_annbatch.py", "memory", **own)
    if run.peers and (python := SCDATASET.interpreter()):
        contestants["scdataset"] = Contestant("with_scdataset.py", "epoch", python=python, path=path, part=PART, **size)
    costs = race(contestants, rounds=run.rounds)
    run.report.costs("speed", costs)
    for name, cost in costs.items():
        run.report.figure(f"{name}_cells_a_second", cost.value / cost.wall)
        run.report.figure(f"{name}_cells_a_cpu_second", cost.value / cost.cpu)

    whole = [costs[name].value for name in costs if name not in ("annloader", "scdataset")]
    run.report.figure("speed_cells_that_differ", max(whole) - min(whole), "0: every loader delivers every cell")

    def over(first: str, second: str, unit: str) -> float:
        mine, other = costs[first], costs[second]
        return mine.value / getattr(mine, unit) / (other.value / getattr(other, unit))

    run.report.ratio("resident_over_ceiling", over("resident", "ceiling", "wall"), ">= 0.8")
    run.report.ratio("streaming_over_resident", over("streaming", "resident", "wall"), ">= 0.5")
    run.report.ratio("resident_over_ceiling_cpu", over("resident", "ceiling", "cpu"), ">= 0.8")
    if "annbatch_zarr" in costs:
        for name, mine, other, unit, aim in (
            ("resident_over_annbatch_memory", "resident", "annbatch_memory", "wall", ">= 2"),
            ("resident_over_annbatch_memory_cpu", "resident", "annbatch_memory", "cpu", ">= 2"),
            ("streaming_over_annbatch_zarr", "streaming", "annbatch_zarr", "wall", ">= 1.7"),
            ("streaming_over_annbatch_zarr_cpu", "streaming", "annbatch_zarr", "cpu", ">= 1.3"),
            ("streaming_chunks_over_annbatch_zarr", "streaming_chunks", "annbatch_zarr", "wall", ">= 1.7"),
            ("streaming_chunks_over_annbatch_zarr_cpu", "streaming_chunks", "annbatch_zarr", "cpu", ">= 1.3"),
        ):
            run.report.ratio(name, over(mine, other, unit), aim)


def controls(run: Run) -> None:
    """The cost of matched controls."""
    options = {"path": run.reference, "delivery": "resident", "batch_size": run.size(1024, 64)}
    costs = race(
        {mode: Contestant("loaders.py", "ours", mode=mode, **options) for mode in ("perturbed", "paired")},
        rounds=run.rounds,
    )
    run.report.costs("controls", costs)
    run.report.ratio("controls_cost", costs["paired"].wall / costs["perturbed"].wall, "<= 2.1")
    run.report.ratio("controls_cost_cpu", costs["paired"].cpu / costs["perturbed"].cpu, "<= 2.1")


def memory(run: Run) -> None:
    """The peak of streaming by the number of cells."""
    largest = run.size(1_000_000, 4_000)
    place = cache() / "benchmarks"
    place.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(place).free) < largest * CELL_BYTES * 1.2:
        print(f"  left out: {largest * CELL_BYTES * 1.2 / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB free")
        return
    peaks = {}
    for cells in (largest // 4, largest) if run.quick else (largest // 4, largest // 2, largest):
        with tempfile.TemporaryDirectory(prefix="streamed-", dir=place) as folder:
            path = Path(folder) / "screen.h5ad"
            screen(path, cells=cells, genes=run.size(5_000, 100))
            # The store is made by another process: what reading a file takes is no part of streaming it.
            make = [sys.executable, "-c", "import sys, perturbray as pr; pr.load(sys.argv[1])", str(path)]
            subprocess.run(make, check=True, env=os.environ | {"PERTURBRAY_CACHE": folder})
            options = {"path": path, "batch_size": run.size(1024, 64), "seconds": run.size(10, 1)}
            contestant = Contestant("loaders.py", "slow", cache=folder, delivery="streaming", **options)
            with Watch(contestant.number) as watch:
                cost = contestant.turn()
            contestant.close()
        peaks[cells] = watch.peak
        run.report.figure(f"streaming_{cells}_peak_gb", watch.peak / 1e9, "<= 2.5")
        run.report.figure(f"streaming_{cells}_cells_a_second", cost.value / cost.wall)
    run.report.ratio("streaming_memory_of_four_times_the_cells", peaks[largest] / peaks[largest // 4], "<= 1.1")


def trials(run: Run) -> None:
    """Memory that concurrent trials add on one mapped screen."""
    import perturbray as pr
    from perturbray.data import store
    from perturbray.data.dataset import DatasetSpec

    together, held = {}, []
    with tempfile.TemporaryDirectory() as folder:
        loaded = pr.load(run.reference)
        given = Path(folder) / "given.pickle"
        found = store.find(DatasetSpec(path=str(run.reference)))
        given.write_bytes(pickle.dumps((found, loaded.conditions, loaded.split)))
        for number in range(1, 5):
            held.append(Contestant("loaders.py", "held", given=given))
            held[-1].turn()
            together[number] = sum(shares(contestant.number) for contestant in held)
    for contestant in held:
        contestant.close()
    for few, many in ((1, 2), (2, 4)):
        added = (together[many] - together[few]) / (many - few) / 1e6
        run.report.figure(f"added_a_trial_{few}_to_{many}_mb", added, "<= 400")


class Watch:
    """The largest sum of memory of a process and its descendants while it is watched."""

    def __init__(self, process: int, *, every: float = 0.2) -> None:
        self.process, self.every, self.peak = process, every, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self.every):
            self.peak = max(self.peak, sum(map(shares, [self.process, *descendants(self.process)])))


def shares(process: int) -> int:
    """Bytes of a process that are no file's page: its own, and its share of what lies in shared memory."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def screen(path: Path, *, cells: int, genes: int) -> None:
    """An h5ad file of random log1p counts, CSR, 8 % stored, sorted by cell type and perturbation; in bounded memory."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.7, size=genes)
    rate *= brentq(lambda scale: (1 - np.exp(-scale * rate)).mean() - 0.081, 1e-6, 1e6)
    share = (1 - np.exp(-rate)).astype(np.float32)
    own = cells // 10
    label = np.concatenate([np.zeros(own // 20, dtype=int), np.arange(own - own // 20) * 500 // (own - own // 20) + 1])
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type_{i}" for i in np.repeat(np.arange(10), own)]),
            "condition": pd.Categorical(
                np.where(label == 0, "control", np.char.add("p", label.astype(str))).tolist() * 10
            ),
        },
        index=[f"cell_{i:07d}" for i in range(10 * own)],
    )
    var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    anndata.AnnData(obs=obs, var=var).write_h5ad(part)
    with h5py.File(part, "a") as file:
        if "X" in file:
            del file["X"]
        X = file.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (len(obs), genes)})
        data = X.create_dataset("data", shape=(0,), maxshape=(None,), dtype=np.float32, chunks=(2**20,))
        indices = X.create_dataset("indices", shape=(0,), maxshape=(None,), dtype=np.int32, chunks=(2**20,))
        ends = [np.zeros(1, dtype=np.int64)]
        for start in range(0, len(obs), CHUNK):
            stored = rng.random((min(CHUNK, len(obs) - start), genes), dtype=np.float32) < share
            row, gene = np.nonzero(stored)
            ends.append(ends[-1][-1] + np.cumsum(np.bincount(row, minlength=len(stored))))
            for dataset, values in (
                (indices, gene),
                (data, np.log1p(rng.geometric(0.5, size=len(gene)).astype(np.float32))),
            ):
                dataset.resize((ends[-1][-1],))
                dataset[ends[-2][-1] :] = values
        # As wide as the indices: scipy copies the whole matrix for every slice of one that mixes widths.
        X.create_dataset("indptr", data=np.concatenate(ends).astype(np.int32 if ends[-1][-1] < 2**31 else np.int64))
    part.rename(path)


PARTS: dict[str, Callable[[Run], None]] = {"speed": speed, "controls": controls, "memory": memory, "trials": trials}


def main() -> None:
    flags = parser(__doc__, list(PARTS)).parse_args()
    report = Report()
    run = Run(report, 1 if flags.quick else flags.rounds, quick=flags.quick, peers=not flags.no_peers)
    for part in flags.only:
        print(part, flush=True)
        PARTS[part](run)
        report.write(flags.json)  # after each part: a long run that is cut short leaves what it found


if __name__ == "__main__":
    main()
