"""An epoch of dense float32 batches in a random order: by perturbray, and by what its own environment has beside it."""

import os

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_AUTH_MODE="disabled")

import pickle
import time
from itertools import count

import anndata
import numba
import numpy as np
import torch
from serve import serve

import perturbray as pr
from perturbray.data import store as stores
from perturbray.data.dataset import DatasetSpec


def ours(path, batch_size, delivery, mode="all", controls="random", chunk=0):
    """``delivery`` as in ``perturbray.data.loading``; the first epoch, which starts workers and compiles, is not measured."""
    torch.set_num_threads(1)
    sampling = pr.Sampling(controls=controls, chunk=chunk)
    stream = pr.load(path, batch_size=batch_size, mode=mode, delivery=delivery, sampling=sampling)
    numbers = count()

    def epoch():
        return sum(len(batch) for batch in stream.epoch(number=next(numbers)))

    epoch()
    return epoch


def ceiling(path, batch_size):
    """A bare loop over random rows of mapped CSR arrays into one buffer that is written again: no loader can be faster."""
    store = stores.find(DatasetSpec(path=path))
    rows = [store.shard(number) for number in range(len(store.rows))]
    folder = os.path.dirname(path)
    arrays = []
    for name, parts in (("values", [part.values for part in rows]), ("indices", [part.indices for part in rows])):
        np.save(os.path.join(folder, f"{name}.npy"), np.concatenate(parts))
        arrays.append(np.asarray(np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r")))
    ends = np.cumsum([0] + [part.indptr[-1] for part in rows])
    indptr = np.concatenate([[0], *(part.indptr[1:] + end for part, end in zip(rows, ends, strict=False))])

    @numba.njit
    def fill(indptr, indices, values, rows, out):
        for i in range(len(rows)):
            line = out[i]
            line[:] = 0
            for j in range(indptr[rows[i]], indptr[rows[i] + 1]):
                line[indices[j]] = values[j]

    out = np.empty((batch_size, store.genes), dtype=np.float32)
    rng = np.random.default_rng(0)
    fill(indptr, arrays[1], arrays[0], np.arange(2), out)

    def epoch():
        order = rng.permutation(len(store))
        for start in range(0, len(order), batch_size):
            fill(indptr, arrays[1], arrays[0], order[start : start + batch_size], out)
        return len(order)

    return epoch


def scipy(path, batch_size):
    """The whole matrix in memory, sliced by scipy."""
    X, rng = anndata.read_h5ad(path).X, np.random.default_rng(0)

    def epoch():
        order = rng.permutation(X.shape[0])
        parts = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
        return sum(len(torch.from_numpy(X[part].toarray())) for part in parts)

    return epoch


def annloader(path, batch_size, part=1.0):
    """AnnLoader over the whole file in memory; ``part`` of the batches of an epoch."""
    from anndata.experimental import AnnLoader

    torch.set_num_threads(1)
    loader = AnnLoader(anndata.read_h5ad(path), batch_size=batch_size, shuffle=True)
    batches = max(1, round(len(loader) * part))
    return lambda: sum(len(batch.X) for _, batch in zip(range(batches), loader, strict=False))


def held(given):
    """A trial that trains on the mapped screen for some batches and then waits, for who looks at its memory.

    Store, conditions and split come pickled, as trials of a sweep get them.
    """
    import perturbray.engine  # noqa: F401  # what a trial's process has imported

    torch.set_num_threads(1)
    training = pr.Training()

    def train():
        with open(given, "rb") as file:
            store, conditions, split = pickle.load(file)
        options = {"batch_size": training.batch_size, "seed": 0, "mode": "paired"}
        stream = pr.BatchStream(store.cells(), conditions, split, **options)
        model = pr.LatentAdditive().build(pr.Vocabulary.of(conditions, split))
        optimiser = torch.optim.Adam(model.parameters())
        for batch, _ in zip(stream.epoch(), range(40), strict=False):
            optimiser.zero_grad()
            model.loss(batch).backward()
            optimiser.step()
        held.kept = stream, model, optimiser, batch
        return int(batch.cell[0])

    return train


def slow(path, batch_size, delivery, seconds):
    """Epochs until so much time is over, for who watches the memory; and the cells."""
    epoch = ours(path, batch_size, delivery)

    def run():
        begun, cells = time.perf_counter(), 0
        while not cells or time.perf_counter() - begun < seconds:
            cells += epoch()
        return cells

    return run


if __name__ == "__main__":
    serve({"ours": ours, "ceiling": ceiling, "scipy": scipy, "annloader": annloader, "held": held, "slow": slow})
