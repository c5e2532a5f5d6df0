"""How many epochs a search spends until it has a configuration of a given worth, as ratios over other ways to search.

Ways, each of which can be run alone beside `perturbench` (--only ours):

  perturbench   as PerturBench tunes: Optuna's TPE; trials end by their own early stopping on the loss; without Optuna
                (--no-peers) our TPE in its place
  tpe           our TPE alone; trials end by themselves
  asha          halving alone, on configurations drawn at random
  ours          TPE and halving, the default of a Search
  optuna        Optuna's multivariate TPE with its median pruner

All run the same trial function in this process: LatentAdditive on the synthetic screen, the objective of the paper on the
validation conditions after each epoch, one seed of training. A repeat is a seed of the search. What is to be reached is
the same for all ways and repeats: the median over the repeats of the best that `perturbench` has after 30 (`half`) and
after 60 (`whole`) trials. Every way, `perturbench` too, goes on until it is there; one that is not when it has spent
twice what 60 trials of `perturbench` take counts with these. (Were a repeat held to what `perturbench` itself found in
it, that way would be there by construction, and the same way with another seed would need more.) Ratios are of the sums
over repeats. Epochs are counted and not seconds, so a busy machine does not matter.
"""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
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
    """Counts epochs, and knows the best value after each."""

    last: float = -float("inf")  # the value at which a search has nothing left to reach
    limit: float = float("inf")
    epochs: int = 0
    best: float = float("inf")
    steps: list[tuple[int, float]] = field(default_factory=list)  # epochs spent, and the best from then on

    def needed(self, target: float, limit: int) -> int:
        """The epochs that it took to a target."""
        return next((epochs for epochs, best in self.steps if best <= target and epochs <= limit), limit)

    def over(self) -> bool:
        return self.best <= self.last or self.epochs >= self.limit

    def epoch(self, value: float) -> None:
        self.epochs += 1
        if value < self.best:
            self.best = value
            self.steps.append((self.epochs, value))
        if self.over():
            raise Reached


@dataclass(frozen=True)
class Bench:
    """The trial function, on one screen."""

    search: Search
    judge: Judge
    work: Callable

    @classmethod
    def of(cls, path: Path, *, epochs: int, samples: int) -> "Bench":
        spec = pr.DatasetSpec(path=str(path))
        training = pr.Training(epochs=epochs, patience=8)
        base = pr.Trial(dataset=spec, model=pr.LatentAdditive(), training=training)
        search = Search(base=base, space=base.model.space("small"), samples=samples)
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


def own(bench: Bench, meter: Meter, **fields) -> Iterator[None]:
    """A search of ours, trial by trial."""
    with tempfile.TemporaryDirectory() as folder:
        course = Course(replace(bench.search, **fields), Path(folder), "")
        work = bench.metered(meter)
        while (values := course.begin("here")) is not None:
            final = work(values, lambda epoch, found: course.report("here", epoch=epoch, values=found))
            course.end("here", final=final)
            yield


def optuna(bench: Bench, meter: Meter, python: str, *, multivariate: bool, pruning: bool) -> Iterator[None]:
    """A search of Optuna's, trial by trial."""
    space = {path: ledger.describe(part) for path, part in bench.search.space.items()}
    script = HERE / "contestants" / "with_optuna.py"
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
                yield
        finally:
            process.stdin.close()


def trials(way: str, bench: Bench, meter: Meter, python: str | None) -> Iterator[None]:
    """One way to search, trial by trial."""
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


@dataclass
class Repeat:
    """One seed: how `perturbench` began, which goes on later, and what each way spent."""

    number: int
    bench: Bench
    python: str | None
    meter: Meter = field(default_factory=Meter)
    after: list[float] = field(default_factory=list)  # its best after each trial

    def begin(self, samples: int) -> None:
        """Its trials up to a number."""
        self.way = trials("perturbench", self.bench, self.meter, self.python)
        for _ in range(samples):
            next(self.way)
            self.after.append(self.meter.best)
        print(f"  seed {self.number}: {self.meter.epochs} epochs, best {self.after[-1]:.5f}", flush=True)

    def needed(self, way: str, targets: dict[str, float], limit: int) -> dict[str, int]:
        """The epochs that a way spends until each target."""
        if way == "perturbench":
            meter, run = self.meter, self.way
        else:
            meter = Meter()
            run = trials(way, self.bench, meter, self.python)
        meter.last, meter.limit = min(targets.values()), limit
        with closing(run), suppress(Reached):
            while not meter.over() and next(run, run) is None:
                pass
        spent = {name: meter.needed(target, limit) for name, target in targets.items()}
        print(f"  seed {self.number}: {way:<12} {spent}", flush=True)
        return spent


def main() -> None:
    flags = parser(__doc__, list(WAYS))
    flags.add_argument("--repeats", type=int, default=10, help="each with its own seed (default: 10)")
    flags.add_argument(
        "--targets",
        metavar="HALF,WHOLE,LIMIT",
        help="objectives and epochs as an earlier run printed them: `perturbench`, most of the work, is not run again",
    )
    flags.add_argument("--screen", choices=SCREENS, default="default", help="small: 2,000 cells instead of 12,000")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    python = None if arguments.no_peers else OPTUNA.interpreter()
    others = [way for way in WAYS[1:] if way in arguments.only and (way != "optuna" or python is not None)]
    ways = others if arguments.targets else ["perturbench", *others]
    quick = arguments.quick
    count, samples, epochs = (1, 6, 4) if quick else (arguments.repeats, 60, 60)
    report, spent = Report(), {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        screen = "small" if quick else arguments.screen
        path = synthetic.write(Path(folder) / "screen.h5ad", SCREENS[screen]())
        bench = Bench.of(path, epochs=epochs, samples=20 * samples)
        repeats = [
            Repeat(number, replace(bench, search=replace(bench.search, seed=number)), python) for number in range(count)
        ]
        if arguments.targets:
            half, whole, most = arguments.targets.split(",")
            targets, limit = {"half": float(half), "whole": float(whole)}, int(most)
        else:
            for one in repeats:
                one.begin(samples)
            targets = {
                "half": statistics.median(one.after[samples // 2 - 1] for one in repeats),
                "whole": statistics.median(one.after[-1] for one in repeats),
            }
            limit = 2 * sum(one.meter.epochs for one in repeats) // count
        for name, target in targets.items():
            report.figure(f"target_{name}", target)
        report.figure("limit_epochs", limit)
        for one in repeats:
            for way in ways:
                spent[way].append(one.needed(way, targets, limit))
    totals = {way: {t: sum(one[t] for one in found) for t in TARGETS} for way, found in spent.items()}
    for way, found in spent.items():
        for target in TARGETS:
            report.figure(f"{way}_{target}_epochs", totals[way][target] / count)
            report.figure(f"{way}_{target}_median", statistics.median(one[target] for one in found))
            report.figure(f"{way}_{target}_missed", sum(one[target] >= limit for one in found))
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
