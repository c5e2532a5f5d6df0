"""What the engine costs beside the work of its trials: seconds a trial, and memory beside the data.

Parts, each of which can be run alone (--only noop):

  noop      seconds a trial that does next to nothing (the model that predicts no change, on the small screen), warm: what
            40 such trials take more than 8, over 32. Beside it Tune itself, with a fresh process a trial, as a ratio
  memory    private memory of the processes of two concurrent trials at its highest, on a screen with few cells and on one
            with eight times as many, else alike; and what the one takes more than the other, over what its rows take
            more. A copy of the screen in each trial would make it 2

Ray runs in this process's session, with 2 CPUs. Wall time: on a busy machine only the ratio means something.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from harness import Report, parser

import perturbray as pr
from perturbray import synthetic
from perturbray.cluster import connect
from perturbray.data.store import find
from perturbray.engine import run_sweep
from perturbray.plan import Plan

FEW, MANY = 8, 40


def sweep(path: Path, model: pr.ModelSpec, *, trials: int, epochs: int = 1, first: int = 0) -> pr.Sweep:
    """Trials that differ by their seed."""
    base = pr.Trial(dataset=pr.DatasetSpec(path=str(path)), model=model, training=pr.Training(epochs=epochs))
    made = [replace(base, seed=seed) for seed in range(first, first + trials)]
    return pr.Sweep(name="noop", trials=made, metrics=(pr.Metric("rmse", "average"),))


def seconds(path: Path, folder: Path, *, trials: int, first: int) -> float:
    """Wall time of a sweep of trials that do next to nothing."""
    plan = Plan.of(sweep(path, pr.NoChange(), trials=trials, first=first), folder)
    started = time.perf_counter()
    assert run_sweep(plan) == trials
    return time.perf_counter() - started


def noop(report: Report, *, quick: bool, rounds: int) -> None:
    few, many = (2, 4) if quick else (FEW, MANY)
    with tempfile.TemporaryDirectory() as place:
        path = synthetic.write(Path(place) / "small.h5ad", synthetic.Screen.small())
        if not quick:
            seconds(path, Path(place) / "cold", trials=2, first=10_000)
        each, plain = [], []
        for number in range(rounds):
            taken = [
                seconds(path, Path(place) / f"{number}-{n}", trials=n, first=1000 * number + n) for n in (few, many)
            ]
            each.append((taken[1] - taken[0]) / (many - few))
            plain.append(fresh(Path(place) / f"tune-{number}", trials=few))
        ours, theirs = sorted(each)[len(each) // 2], sorted(plain)[len(plain) // 2]
        report.figure("seconds_per_noop_trial", ours, "<= 0.3")
        report.figure("tune_seconds_per_noop_trial", theirs)
        report.ratio("noop_over_tune", ours / theirs, "<= 0.19")


def fresh(folder: Path, *, trials: int) -> float:
    """Seconds a trial of Tune as it comes, a process a trial."""
    from ray import tune

    started = time.perf_counter()
    tune.Tuner(
        tune.with_resources(lambda config: {"done_well": 1}, {"cpu": 0.9}),
        param_space={"x": tune.grid_search(list(range(trials)))},
        run_config=tune.RunConfig(name="noop", storage_path=str(folder), verbose=0),
    ).fit()
    return (time.perf_counter() - started) / trials


@dataclass
class Peak:
    """The most private memory that trials had together, in bytes."""

    most: int = 0
    at_once: int = 0


@contextmanager
def watched() -> Iterator[Peak]:
    """Looks at the processes of trials ten times a second."""
    peak, halt = Peak(), threading.Event()

    def look() -> None:
        while not halt.wait(0.1):
            sizes = [size for size in map(private, trial_processes()) if size]
            peak.most, peak.at_once = max(peak.most, sum(sizes)), max(peak.at_once, len(sizes))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        halt.set()
        thread.join()


def trial_processes() -> list[int]:
    """Numbers of the processes below this one in which Tune runs a trial."""
    parents, trials = {}, []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                if b"ray::trial " in (place / "cmdline").read_bytes():
                    trials.append(int(place.name))
            except OSError:
                continue

    def below(process: int) -> bool:
        while process in parents:
            if process == os.getpid():
                return True
            process = parents[process]
        return False

    return [process for process in trials if below(process)]


def private(process: int) -> int:
    """Bytes that a process has written and shares with no other; pages of mapped files are the system's to take back."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def memory(report: Report, *, quick: bool, rounds: int) -> None:
    shape = {"genes": 60, "perturbations": 24} if quick else {"genes": 1500, "perturbations": 188, "depth": 3000.0}
    cells = {"few": 5, "many": 20} if quick else {"few": 10, "many": 80}
    screens = {name: synthetic.Screen(cells=number, **shape) for name, number in cells.items()}
    peaks, rows = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for name, screen in screens.items():
            path = synthetic.write(Path(place) / f"{name}.h5ad", screen)
            plan = Plan.of(sweep(path, pr.LatentAdditive(), trials=2 if quick else 4, epochs=2), Path(place) / name)
            with watched() as peak:
                run_sweep(plan)
            peaks[name], rows[name] = peak, find(plan.sweep.trials[0].dataset).nbytes
            report.figure(f"trials_seen_at_once_{name}", peak.at_once, "2")
            report.figure(f"memory_of_trials_{name}_gb", peak.most / 1e9, "<= 1.5")
            report.figure(f"rows_{name}_gb", rows[name] / 1e9)
    copies = (peaks["many"].most - peaks["few"].most) / (rows["many"] - rows["few"])
    report.figure("copies_of_the_screen", copies, "<= 0.2")


PARTS = {"noop": noop, "memory": memory}


def main() -> None:
    arguments = parser(__doc__, list(PARTS)).parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("PERTURBRAY_CACHE", folder)
        with connect():
            for name in arguments.only:
                PARTS[name](report, quick=arguments.quick, rounds=1 if arguments.quick else arguments.rounds)
    report.write(arguments.json)


if __name__ == "__main__":
    main()
