"""What Ray earns, on two pretend hosts of this machine: a second host, readers on another host, scorers of their own.

Parts, each of which can be run alone (--only hosts):

  hosts      the same sweep on one host and on two: wall time, with the same numbers on both
  readers    cells a second into one trainer (dense float32 batches in a full permutation) whose rows are read by 1, 2 and 4
             processes at once on the other host and come through Ray; and by the trainer itself from mapped files
  scoring    a whole sweep whose trials hand their predicted cells to a scorer of its own, and one whose trials score
             themselves

The hosts are namespaces of one machine, with sshd and a Ray of their own (tests/hosts/pretend.py). They share its memory,
its disk and its two cores: in `hosts` and `scoring` each is pinned to one core and lends one CPU, so that two hosts are two
cores against one; in `readers` nothing is pinned, so that a trainer and more than one reader compete for two cores. What goes
between them never leaves the machine: a real network is slower. Times are wall time, so run this on an idle machine.

Needs root, iproute2, openssh-server and rsync.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import HERE, Contestant, Cost, Report, median, parser
from loader import screen

from perturbray import synthetic

sys.path.append(str(HERE.parent / "hosts"))

import pretend
from started import ROOT, Started

TASKS = (1, 2, 4)
STORE_MB = 600


@dataclass(frozen=True)
class Run:
    """What the parts share."""

    report: Report
    rounds: int
    quick: bool

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@contextmanager
def cluster(*, pinned: bool) -> Iterator[Started]:
    """Two hosts on which nothing runs yet."""
    with tempfile.TemporaryDirectory(prefix="perturbray-") as folder:
        shared = Path(folder) / "shared"
        shared.mkdir()
        with pretend.hosts(Path(folder) / "hosts", visible=[shared, ROOT], pinned=pinned) as pair:
            yield Started(pair, shared, {"OMP_NUM_THREADS": "1"})


def turns(run: Run, started: Started, task: str, **options) -> list[Cost]:
    """What a driver on host a took, each turn."""
    contestant = Contestant("on_cluster.py", task, through=started.through, address=started.address, **options)
    costs = [contestant.turn() for _ in range(run.rounds)]
    contestant.close()
    return costs


def synthetic_screen(run: Run, started: Started) -> Path:
    kind = synthetic.Screen.small() if run.quick else synthetic.Screen()
    return synthetic.write(started.shared / "screen.h5ad", kind)


def hosts(run: Run) -> None:
    """One host, then two."""
    found: dict[str, list[Cost]] = {}
    with cluster(pinned=True) as started:
        options = {
            "path": synthetic_screen(run, started),
            "trials": run.size(8, 2),
            "epochs": run.size(60, 2),
            "metrics": ["rmse/average", "cosine/logfc_logmean"],
        }
        started.head(cpus=1, store_mb=STORE_MB)
        found["one"] = turns(run, started, "sweep", folder=started.shared / "one", **options)
        started.worker(cpus=1, store_mb=STORE_MB)
        found["two"] = turns(run, started, "sweep", folder=started.shared / "two", **options)
    for name, costs in found.items():
        run.report.figure(f"sweep_{name}_wall_s", median(costs).wall)
        run.report.figure(f"sweep_{name}_hosts_that_ran_trials", costs[-1].value["hosts"])
    digests = {cost.value["digest"] for costs in found.values() for cost in costs}
    run.report.figure("sweep_tables_that_differ", len(digests) - 1, "0")
    run.report.ratio("one_host_over_two", median(found["one"]).wall / median(found["two"]).wall, ">= 1.5")


def readers(run: Run) -> None:
    """Mapped, then streamed from the other host."""
    speeds, counts = {}, (TASKS[0], TASKS[-1]) if run.quick else TASKS
    with cluster(pinned=False) as started:
        path = started.shared / "screen.h5ad"
        screen(path, cells=run.size(100_000, 2_000), genes=run.size(5_000, 100))
        options = {"path": path, "batch_size": run.size(1024, 64)}
        started.head(cpus=1, store_mb=STORE_MB)
        started.worker(cpus=max(TASKS), store_mb=STORE_MB)
        for tasks in (0, *counts):
            host = started.hosts.b.hostname if tasks else ""
            cost = median(turns(run, started, "reading", host=host, tasks=max(1, tasks), **options))
            speeds[tasks] = cost.value / cost.wall
            name = f"{tasks}_readers_there" if tasks else "mapped_here"
            run.report.figure(f"cells_a_second_{name}", speeds[tasks])
    for tasks in counts[1:]:
        run.report.ratio(f"readers_{tasks}_over_1", speeds[tasks] / speeds[1], f"{min(2, tasks)} cores at most")


def scoring(run: Run) -> None:
    """Scorers in the pool, and inline."""
    found: dict[str, list[Cost]] = {}
    with cluster(pinned=True) as started:
        options = {
            "path": synthetic_screen(run, started),
            "trials": run.size(8, 4),
            "epochs": run.size(20, 4),
            "metrics": ["rmse/average", "energy/pca"],
            "cells": run.size(200, 20),
        }
        started.head(cpus=1, store_mb=STORE_MB)
        started.worker(cpus=1, store_mb=STORE_MB)
        for name in ("pool", "inline"):
            folder = started.shared / name
            found[name] = turns(run, started, "sweep", folder=folder, inline=name == "inline", **options)
    for name, costs in found.items():
        run.report.figure(f"scoring_{name}_wall_s", median(costs).wall)
    digests = {cost.value["digest"] for costs in found.values() for cost in costs}
    run.report.figure("scoring_tables_that_differ", len(digests) - 1, "0")
    run.report.ratio("inline_over_pool", median(found["inline"]).wall / median(found["pool"]).wall, ">= 1")


PARTS = {"hosts": hosts, "readers": readers, "scoring": scoring}


def main() -> None:
    arguments = parser(__doc__, list(PARTS)).parse_args()
    if reason := pretend.impossible():
        raise SystemExit(f"error: {reason}")
    report = Report()
    run = Run(report=report, rounds=1 if arguments.quick else arguments.rounds, quick=arguments.quick)
    for name in arguments.only:
        PARTS[name](run)
    report.write(arguments.json)


if __name__ == "__main__":
    main()
