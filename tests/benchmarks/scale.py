"""What grows with the number of trials: reading ten thousand results, and running a thousand trials that do nothing.

Parts, each of which can be run alone (--only folder):

  folder    a results folder with 10,000 trials, made of those of one real sweep with other seeds, variants and values:
            seconds and memory of `perturbray report` (reading, summary, page with figures, leaderboard), of reading and
            summary alone, of looking again when nothing is new, and of the whole table, each in a process of its own
  noop      a sweep of 1,000 trials that do next to nothing: seconds a trial, and of the last hundred over the first
            hundred; memory of the driver after 100 trials, half and all; files and bytes in results and in Tune's folder

Ray runs in this process's session, with 2 CPUs. CPU seconds are of whole processes; wall time is noisy on a busy machine.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
from engine import sweep
from harness import Report, parser

import perturbray as pr
from perturbray import synthetic
from perturbray.cluster import connect
from perturbray.engine import Events, run_sweep
from perturbray.plan import Plan
from perturbray.results import table

MODELS = (pr.NoChange, pr.PerturbedMean, pr.MeanShift, pr.LinearAdditive)
LEVELS = (0.0, 0.1, 0.2, 0.3)
VARIANTS = 5
TRIALS = 1000  # that do nothing
SCREEN = synthetic.Screen(perturbations=60, combinations=4, genes=100, cells=10)


def template(place: Path) -> Path:
    """The results folder of a real sweep with a trial of each model at each level."""
    dataset = pr.DatasetSpec(path=str(synthetic.write(place / "screen.h5ad", SCREEN)))
    trials = [
        pr.Trial(dataset=dataset, model=model(), ablation=pr.Imbalance(level=level), training=pr.Training(epochs=1))
        for model in MODELS
        for level in LEVELS
    ]
    baselines = ("no_change", "perturbed_mean", "mean_shift")
    made = pr.Sweep(name="template", trials=trials, x="imbalance", baselines=baselines)
    run_sweep(Plan.of(made, place / "template"))
    return place / "template"


def multiply(source: Path, folder: Path, *, trials: int) -> Path:
    """A folder with so many trials: those of ``source`` again and again, as other seeds and variants, values moved."""
    folder.mkdir()
    plan = table.read_plan(source)
    parts = {trial["key"]: pq.read_table(source / f"{trial['key']}.parquet") for trial in plan["trials"]}
    rng, made = np.random.default_rng(0), []
    for number in range(trials):
        again, place = divmod(number, len(plan["trials"]))
        trial = plan["trials"][place]
        seed, variant = again // VARIANTS, f"v{again % VARIANTS}"
        key, name = f"{number:016x}", f"{trial['columns']['model']} ({variant}), seed {seed}"
        part = parts[trial["key"]]
        changes = {"key": key, "name": name, "seed": seed, "variant": variant}
        changes |= {"split.seed": seed} if "split.seed" in part.column_names else {}
        rows = {column: part[column].to_numpy() for column in part.column_names if table.varies(column)}
        rows["value"] = rows["value"] * (1 + 0.01 * rng.normal(size=len(part)))
        constant = {name: part[name][0].as_py() for name in part.column_names if not table.varies(name)}
        with patch("os.fsync"):  # no power cut here, and twice ten thousand waits for the disk
            table.write_trial(folder, key, columns=constant | changes, rows=rows)
        made.append({"key": key, "name": name, "columns": {**trial["columns"], **changes}})
    table.write_plan(folder, {**plan, "trials": made, "status": {"state": "done"}})
    for path in [source / table.REFERENCE, *(source / table.ANCHORS).glob("*.parquet")]:
        if path.exists():
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def folder(report: Report, *, quick: bool) -> None:
    trials = 320 if quick else 10_000
    with tempfile.TemporaryDirectory() as place:
        many = multiply(template(Path(place)), Path(place) / "many", trials=trials)
        sizes = [path.stat().st_size for path in many.glob("*.parquet")]
        report.figure("result_files", len(sizes), f"{trials}")
        report.figure("kilobytes_a_result", sum(sizes) / len(sizes) / 1000)
        for what in ("table", "summary", "again", "report"):
            done = subprocess.run(
                [sys.executable, __file__, "--measure", what, str(many)], capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            aim = "<= 30" if what == "report" else ""
            report.figure(f"{what}_seconds", found["wall"], aim)
            report.figure(f"{what}_cpu_s", found["cpu"], aim)
            report.figure(f"{what}_peak_gb", found["peak_gb"])
            report.figure(f"{what}_{'bytes' if what == 'report' else 'rows'}", found["found"])


def measure(what: str, folder: str) -> None:
    """Prints what one look at a folder costs: imports and all, but ``again`` only the second look."""
    from perturbray.results.reader import Reader
    from perturbray.results.summary import summary_of

    def report() -> int:
        subprocess.run([sys.executable, "-m", "perturbray", "report", folder], stdout=subprocess.DEVNULL, check=True)
        return (Path(folder) / "report.html").stat().st_size

    reader = Reader(folder)
    work: dict[str, Callable[[], int]] = {
        "table": lambda: len(pr.read(folder)),
        "summary": lambda: len(summary_of(folder).means),
        "again": lambda: len(reader.read().rows),
        "report": report,
    }
    if what == "again":
        reader.read()
    started, before = time.perf_counter(), time.process_time() if what == "again" else 0.0
    found = work[what]()
    spent, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime if what == "report" else time.process_time() - before
    most = used.ru_maxrss * 1024 / 1e9 if what == "report" else peak()
    print(json.dumps({"wall": spent, "cpu": cpu, "peak_gb": most, "found": found}))


def peak() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Ends(Events):
    """When trials ended, what the driver had used by then, and its memory."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.peaks: list[float] = []

    def stopped(self, key: str) -> None:
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.peaks.append(peak())


def noop(report: Report, *, quick: bool) -> None:
    trials, part = (20, 5) if quick else (TRIALS, 100)
    with tempfile.TemporaryDirectory() as place:
        path = synthetic.write(Path(place) / "small.h5ad", synthetic.Screen.small())
        run_sweep(Plan.of(sweep(path, pr.NoChange(), trials=2, first=10_000), Path(place) / "cold"))
        results, ends = Path(place) / "results", Ends()
        plan = Plan.of(sweep(path, pr.NoChange(), trials=trials), results)
        threads = threading.active_count()
        started, cpu = time.perf_counter(), time.process_time()
        assert run_sweep(plan, events=ends) == trials
        report.figure("seconds_a_trial", (time.perf_counter() - started) / trials, "<= 0.3")
        report.figure("driver_cpu_s_a_trial", (time.process_time() - cpu) / trials)
        report.figure("threads_left_over", threading.active_count() - threads, "0")
        for name, at in (("seconds", ends.times), ("driver_cpu_s", ends.cpu)):
            first, last = at[part] - at[1], at[-1] - at[-part]
            report.figure(f"first_{name}_a_trial", first / (part - 1))
            report.figure(f"last_{name}_a_trial", last / (part - 1))
            report.ratio(f"last_over_first_{name}", last / first, "<= 1.5")
        report.figure("driver_peak_gb_early", ends.peaks[part - 1])
        report.figure("driver_peak_gb_half", ends.peaks[trials // 2 - 1])
        report.figure("driver_peak_gb_end", ends.peaks[-1])
        for name, where in (("results", results.glob("*")), ("tune", (results / "tune").rglob("*"))):
            sizes = [file.stat().st_size for file in where if file.is_file()]
            report.figure(f"{name}_files_a_trial", len(sizes) / trials)
            report.figure(f"{name}_kilobytes_a_trial", sum(sizes) / trials / 1000)


PARTS = {"folder": folder, "noop": noop}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    arguments = parser(__doc__, list(PARTS)).parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("PERTURBRAY_CACHE", cache)
        with connect():
            for name in arguments.only:
                PARTS[name](report, quick=arguments.quick)
    report.write(arguments.json)


if __name__ == "__main__":
    main()
