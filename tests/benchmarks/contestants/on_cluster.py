"""What a driver does on a cluster that runs: a whole sweep, or epochs of batches that another node reads."""

import os

os.environ.update(RAY_AIR_NEW_OUTPUT="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")

import hashlib
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pandas as pd
from serve import serve

import perturbray as pr
from perturbray import engine
from perturbray.plan import Plan
from perturbray.results import table


def sweep(path, folder, address, trials, epochs, metrics, inline=False, cells=0):
    """LatentAdditive from as many seeds; how many hosts ran trials, and a digest of the numbers. ``inline``: no scorers."""
    base = pr.Trial(
        dataset=pr.DatasetSpec(path=path),
        model=pr.LatentAdditive(),
        training=pr.Training(epochs=epochs, patience=epochs),
    )
    made = pr.Sweep(
        name="hosts",
        trials=[replace(base, seed=seed) for seed in range(trials)],
        metrics=[pr.Metric.parse(name) for name in metrics],
        **({"cells": cells} if cells else {}),
    )
    if inline:
        engine.place = partial(engine.place, scoring=False)
    numbers = count()

    def run():
        place = Path(folder) / str(next(numbers))
        assert engine.run_sweep(Plan.of(made, place), address=address) == trials
        found = table.read(place)
        stable = found.drop(columns=[name for name in table.VOLATILE if name in found])
        digest = hashlib.sha256(pd.util.hash_pandas_object(stable, index=False).to_numpy().tobytes()).hexdigest()
        return {"hosts": found["host"].nunique(), "digest": digest}

    return run


def reading(path, address, host, tasks, batch_size):
    """Epochs into this process, read by so many processes of a host at once; ``host`` "": this process maps the rows."""
    import ray
    import torch

    from perturbray.nodes import here, there

    torch.set_num_threads(1)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    stream = pr.load(path, batch_size=batch_size, mode="all", delivery="streaming" if host else "resident")
    if host:
        (node,) = [node.id for node in there() if node.name == host]
        stream.windows = replace(stream.windows, readers=(node,), driver=here(), tasks=tasks)
    numbers = count()

    def epoch():
        return sum(len(batch) for batch in stream.epoch(number=next(numbers)))

    epoch()
    return epoch


serve({"sweep": sweep, "reading": reading})
