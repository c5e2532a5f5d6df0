"""How many epochs a search spends until it has a configuration of a given worth, as ratios over other ways to search.

Ways, each of which can be run alone beside `perturbench` (--only ours):

  perturbench   as PerturBench tunes: Optuna's TPE, 60 trials, which end by their own early stopping on the loss; without
                Optuna (--no-peers) our TPE in its place
  tpe           our TPE alone; trials end by themselves
  asha          halving alone, on configurations drawn at random
  ours          TPE and halving, the default of a Search
  optuna        Optuna's multivariate TPE with its median pruner

All run the same trial function in this process: LatentAdditive on the synthetic screen, the objective of the paper on the
validation conditions after each epoch. `perturbench` goes first, through all its trials; the target of a repeat is what
it found after a half (`half`) or all (`whole`) of them. The others stop when they are there; one that is not there when
it has spent twice its epochs counts with these. Ratios are of the sums over repeats. A repeat has its own seed of search
and training. Epochs are counted and not seconds, so a busy machine does not matter.
"""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from harness import HERE, Peer, Report, parser

import perturbray as pr
from perturbray import synthetic
from perturbray.course import Course
from perturbray.data.store import ingest
from perturbray.results import ledger
from perturbray.search import Halving, Search
from perturbray.validation import OBJECTIVE, Judge, alone

OPTUNA = Peer("optuna", "4.5.0")
WAYS = ("perturbench", "tpe", "asha", "ours", "optuna")
TARGETS = ("half", "whole")
SCREENS = {"default": synthetic.Screen, "small": synthetic.Screen.small}


class Reached(BaseException):
    """All targets are met, or the epochs are spent; no error of a trial, which a search would go on after."""


@dataclass
class Meter:
    """Counts epochs, and when each target was met."""

    targets: Mapping[str, float] = field(default_factory=dict)
    limit: float = float("inf")
    epochs: int = 0
    best: float = float("inf")
    met: dict[str, int] = field(default_factory=dict)
    steps: list[tuple[int, float]] = field(default_factory=list)  # epochs spent, and the best from then on

    def needed(self, target: float) -> int:
        """The epochs that it took to a target that was met."""
        return next(epochs for epochs, best in self.steps if best <= target)

    def epoch(self, value: float) -> None:
        self.epochs += 1
        if value < self.best:
            self.best = value
            self.steps.append((self.epochs, value))
        for name, target in self.targets.items():
            if self.best <= target:
                self.met.setdefault(name, self.epochs)
        if (self.targets and len(self.met) == len(self.targets)) or self.epochs >= self.limit:
            raise Reached


@dataclass(frozen=True)
class Bench:
    """The trial function, on one screen."""

    search: Search
    judge: Judge
    work: Callable

    @classmethod
    def of(cls, path: Path, *, epochs: int, seed: int, samples: int) -> "Bench":
        spec = pr.DatasetSpec(path=str(path))
        training = pr.Training(epochs=epochs, patience=8)
        base = pr.Trial(dataset=spec, model=pr.LatentAdditive(), training=training, seed=seed)
        search = Search(base=base, space=base.model.space("small"), samples=samples, seed=seed)
        conditions = spec.conditions()
        cells = ingest(spec, conditions).cells()
        judge = Judge.of(search, cells, conditions)
        return cls(search, judge, alone(search, judge, cells, conditions))

    def metered(self, meter: Meter) -> Callable:
        """The trial function, counted."""

        def work(values, report):
            def tell(epoch, found):
                meter.epoch(found[OBJECTIVE])
                return report(epoch, found)

            return self.work(values, tell)

        return work


def own(bench: Bench, meter: Meter, **fields) -> list[float]:
    """A search of ours; the best value after each trial."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        course = Course(replace(bench.search, **fields), Path(folder), "")
        work = bench.metered(meter)

        def one(values, report):
            try:
                return work(values, report)
            finally:
                found.append(meter.best)

        with suppress(Reached):
            course.run(one)
    return found


def optuna(bench: Bench, meter: Meter, python: str, *, multivariate: bool, pruning: bool) -> list[float]:
    """A search of Optuna's; the best value after each trial."""
    space = {path: ledger.describe(part) for path, part in bench.search.space.items()}
    script, found = HERE / "contestants" / "with_optuna.py", []
    with subprocess.Popen([python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(*words):
            process.stdin.write(json.dumps(words if isinstance(words[0], str) else words[0]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        first = {"space": space, "seed": bench.search.seed, "multivariate": multivariate, "pruning": pruning}
        process.stdin.write(json.dumps(first) + "\n")
        work = bench.metered(meter)
        try:
            for _ in range(bench.search.samples):
                values = ask("ask")
                final = work(values, lambda epoch, found: ask("report", epoch, found[OBJECTIVE]))
                ask("tell", None if final is None else final[OBJECTIVE])
                found.append(meter.best)
        except Reached:
            pass
        process.stdin.close()
    return found


def run(way: str, bench: Bench, meter: Meter, python: str | None) -> list[float]:
    """One way to search."""
    ours = {
        "tpe": {"halving": None},
        "asha": {"way": "random", "halving": Halving()},
        "ours": {"halving": Halving()},
    }
    if way == "perturbench" and python is not None:
        return optuna(bench, meter, python, multivariate=False, pruning=False)
    if way == "optuna":
        return optuna(bench, meter, python, multivariate=True, pruning=True)
    return own(bench, meter, **ours.get(way, ours["tpe"]))


def repeat(number: int, path: Path, ways: list[str], python: str | None, *, epochs: int, samples: int) -> dict:
    """Epochs that each way spent until each target."""
    bench, meter = Bench.of(path, epochs=epochs, seed=number, samples=samples), Meter()
    trace = run("perturbench", bench, meter, python)
    targets = {"half": trace[len(trace) // 2 - 1], "whole": trace[-1]}
    whole = meter.epochs
    spent = {"perturbench": {name: meter.needed(target) for name, target in targets.items()}}
    more = replace(bench, search=replace(bench.search, samples=20 * samples))
    for way in ways:
        if way != "perturbench":
            meter = Meter(targets=targets, limit=2 * whole)
            run(way, more, meter, python)
            spent[way] = {name: meter.met.get(name, 2 * whole) for name in TARGETS}
        print(f"  repeat {number}: {way:<12} {spent[way]} of {whole} epochs", flush=True)
    return spent


def main() -> None:
    flags = parser(__doc__, list(WAYS))
    flags.add_argument("--repeats", type=int, default=10, help="each with its own seed (default: 10)")
    flags.add_argument("--from", dest="first", type=int, default=0, help="the first of the seeds, to share out repeats")
    flags.add_argument("--screen", choices=SCREENS, default="default", help="small: 2,000 cells instead of 12,000")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    python = None if arguments.no_peers else OPTUNA.interpreter()
    ways = [way for way in arguments.only if way != "optuna" or python is not None]
    quick = arguments.quick
    repeats, samples, epochs = (1, 6, 4) if quick else (arguments.repeats, 60, 60)
    report, found = Report(), []
    with tempfile.TemporaryDirectory() as folder:
        screen = "small" if quick else arguments.screen
        path = synthetic.write(Path(folder) / "screen.h5ad", SCREENS[screen]())
        for number in range(arguments.first, arguments.first + repeats):
            found.append(repeat(number, path, ways, python, epochs=epochs, samples=samples))
    totals = {way: {t: sum(one[way][t] for one in found) for t in TARGETS} for way in found[0]}
    for way, spent in totals.items():
        for target in TARGETS:
            report.figure(f"{way}_{target}_epochs", spent[target] / repeats)
            report.figure(f"{way}_{target}_median", statistics.median(one[way][target] for one in found))
    aims = {("ours", "perturbench"): "<= 0.33", ("ours", "optuna"): "<= 0.9"}
    for way in totals:
        for other in ("perturbench", "optuna"):
            if way != other and other in totals and (other == "perturbench" or way == "ours"):
                for target in TARGETS:
                    ratio = totals[way][target] / totals[other][target]
                    report.ratio(f"{way}_over_{other}_{target}", ratio, aims.get((way, other), "none"))
    report.write(arguments.json)


if __name__ == "__main__":
    main()
