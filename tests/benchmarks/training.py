"""How fast models train, as ratios over a plain PyTorch loop.

Parts, each of which can be run alone (--only linear):

  linear   LinearAdditive, covariates and all
  latent   LatentAdditive of width 512, one hidden layer, latent 64

Both on a synthetic screen of 500 genes, 3 contexts x 60 perturbations, batches of 256: training cells per CPU-second of
whole epochs, each with its validation, over a loop as one writes it first: a `Dataset` that looks up a control of each
cell's context, a `DataLoader`, the same network and optimiser. One thread; imports and reading are excluded, and the
validation losses of both are among the figures, since a loop that learns less is not faster. For PerturBench about 22,700
and 7,400 cells per CPU-second were measured at this size.
"""

import tempfile
from pathlib import Path

from harness import Contestant, Report, parser, race

from perturbray.synthetic import Screen, write

PARTS = {"linear": 5.0, "latent": 1.5}  # and the ratio that each should reach


def main() -> None:
    flags = parser(__doc__, list(PARTS)).parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="perturbray-benchmark-") as folder:
        size = {"genes": 40, "perturbations": 8, "cells": 8} if flags.quick else {"genes": 500, "perturbations": 60}
        path = write(Path(folder) / "screen.h5ad", Screen(**{"cells": 35, "combinations": 0, "controls": 300, **size}))
        for part in flags.only:
            print(part, flush=True)
            task = {"path": path, "model": part, "batch_size": 256, "epochs": 1 if flags.quick else 5}
            contestants = {name: Contestant("epochs.py", name, cache=folder, **task) for name in ("ours", "plain")}
            costs = race(contestants, rounds=1 if flags.quick else flags.rounds)
            report.costs(part, costs)
            for name, cost in costs.items():
                report.figure(f"{part}_{name}_cells_per_cpu_s", cost.value["cells"] / cost.cpu)
                report.figure(f"{part}_{name}_val_loss", cost.value["loss"])
            report.ratio(f"{part}_over_plain", costs["plain"].cpu / costs["ours"].cpu, f">= {PARTS[part]:g}")
            report.write(flags.json)  # after each part: a long run that is cut short leaves what it found


if __name__ == "__main__":
    main()
