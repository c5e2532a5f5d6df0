"""The command line: `main(sweep)` for the scripts in sweeps/, and `perturbray report | list`."""

import argparse
import inspect
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from perturbray.clusterfile import command as cluster_file
from perturbray.counterfactual.command import add_predict
from perturbray.errors import InputError
from perturbray.watch import command as watch

if TYPE_CHECKING:
    from perturbray.data.dataset import DatasetSpec
    from perturbray.search import Tuned
    from perturbray.sweep import Sweep

BAD_INPUT = 2  # exit codes
FAILED = 1
INTERRUPTED = 130

LISTS = ("models", "metrics", "conventions", "splits", "ablations")


def main(
    make: "Callable[..., Sweep]",
    *,
    models: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
    options: Mapping[str, tuple[int | float | str, str]] | None = None,
    screen: Mapping[str, int | float] | None = None,
) -> None:
    """The command line of a script: ``make(dataset, models, **flags, **options)`` is its sweep, explained by its module.

    ``models`` are the names that it compares unless --model says otherwise; models of a plugin come beside them.
    ``flags`` are switches of the script's own, by name, with their help; ``options`` have a value of the type of their
    default. ``screen`` are fields of the synthetic screen that it runs on without --data. Bad input is one line and exit
    code 2.
    """
    module = inspect.getdoc(inspect.getmodule(make)) or ""
    parser = sweep_parser(make.__name__, module)
    own = parser.add_argument_group("this sweep")
    own.add_argument(
        "--model",
        metavar="NAME",
        action="append",
        help="compare this model, or what a search found (a tuned-*.json), with the baselines; may be repeated "
        f"(default: {', '.join(models)}, and a plugin's)",
    )
    for name, text in (flags or {}).items():
        own.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    for name, (default, text) in (options or {}).items():
        word = f"--{name.replace('_', '-')}"
        shown = f" (default: {default})" if default else ""
        own.add_argument(word, metavar="VALUE", type=type(default), default=default, help=text + shown)
    arguments = parser.parse_args()
    own_flags = [*(flags or {}), *(options or {})]
    _end(_guard(lambda: _run_script(make, arguments, models, own_flags, screen or {}, module)))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for any other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}; see {self.prog} --help\n")


def sweep_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The flags that every script has."""
    parser = Parser(
        prog=f"sweeps/{name}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without --data it runs on a synthetic screen with known effects. Run the same command again after an\n"
        "interruption, or with other values: what has finished is not run again.",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="FILE.h5ad", help="the screen; CSR, CSC or dense, counts or log-normalised")
    data.add_argument("--perturbation-key", metavar="K", help="obs column with the perturbation (default: condition)")
    data.add_argument("--control", metavar="C", help="label of unperturbed cells in that column (default: control)")
    data.add_argument(
        "--covariate-keys", metavar="A,B", help="obs columns that make up the context, by comma (default: cell_type)"
    )
    data.add_argument("--delimiter", metavar="D", help="joins perturbations to a combination (default: +; none: never)")
    data.add_argument("--layer", metavar="NAME", help="a layer of the file instead of X")
    data.add_argument(
        "--normalize",
        choices=("auto", "log1p", "none"),
        help="auto: integers are counts, scaled to the median depth and log1p; non-negative values below 15 are taken as "
        "log-normalised; log1p and none force it (default: auto)",
    )
    score = parser.add_argument_group("scores")
    score.add_argument(
        "--convention",
        metavar="NAME",
        help="perturbray: effects from split controls (default); perturbench: its metrics, one control on both sides",
    )
    score.add_argument(
        "--metric",
        metavar="NAME",
        action="append",
        default=[],
        help="a further metric, e.g. energy/pca or des/wilcoxon; may be repeated; see `perturbray list metrics`",
    )
    run = parser.add_argument_group("running")
    run.add_argument("--plugin", metavar="FILE.py", action="append", default=[], help="registers models of your own")
    run.add_argument("--results", metavar="DIR", default="results", help="where results go (default: results)")
    run.add_argument(
        "--address",
        metavar="ADDRESS",
        help="a Ray cluster that this machine belongs to, e.g. auto (default: this machine alone; within `ray job submit`, "
        "which is the way from elsewhere, its cluster)",
    )
    run.add_argument(
        "--gpus-per-trial",
        metavar="G",
        type=float,
        help="of one GPU, where there are any: 0.25 runs four small models on each (default: 1)",
    )
    run.add_argument(
        "--keep-models",
        action="store_true",
        help="store every fitted model in RESULTS/<sweep>/models, for `perturbray predict`",
    )
    run.add_argument(
        "--watch", action="store_true", help="a live page while it runs, as `perturbray watch` shows of any sweep"
    )
    run.add_argument("--smoke", action="store_true", help="a minute's work: few epochs, one seed, two levels")
    run.add_argument("--dry-run", action="store_true", help="print the plan, done and to run, and stop")
    change = parser.add_argument_group("changing the sweep")
    change.add_argument(
        "--set",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help="a field of every trial, e.g. training.epochs=20",
    )
    change.add_argument(
        "--grid", metavar="PATH=V1,V2", action="append", default=[], help="several values, e.g. model.width=64,128"
    )
    return parser


def command() -> None:
    """The `perturbray` command."""
    parser = Parser(
        prog="perturbray", description="Benchmarks of perturbation-response models; sweeps are the scripts in sweeps/."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="print a sweep's leaderboard and write its page again")
    report.add_argument("folder", metavar="RESULTS/SWEEP")
    judge = commands.add_parser(
        "evaluate",
        help="score predicted cells, whatever model made them",
        description="Scores PREDICTED.h5ad against OBSERVED.h5ad, condition by condition. X of both is log1p of normalised "
        "counts (see --normalize), genes are matched by name. Writes metrics.parquet and metrics.csv (a row a condition "
        "and metric), summary.csv (metric, value: the convention's own mean), calibration.csv (95 % intervals over "
        "conditions; for convention perturbray also no change, mean response, replicate and interpolated duplicate, each "
        "against halves of the observed cells, the scaled score, dynamic range and better share), strata.csv (means by size "
        "of effect, by number of responding genes, and by what the mean response solves) and report.html.",
    )
    judge.add_argument("observed", metavar="OBSERVED.h5ad")
    judge.add_argument("predicted", metavar="PREDICTED.h5ad")
    judge.add_argument("--perturbation-key", metavar="K", default="condition", help="obs column (default: condition)")
    judge.add_argument(
        "--control", metavar="C", default="control", help="label of unperturbed cells (default: control)"
    )
    judge.add_argument("--covariate-keys", metavar="A,B", default="", help="obs columns that make up the context")
    judge.add_argument(
        "--delimiter", metavar="D", default="+", help="joins perturbations to a combination (default: +)"
    )
    judge.add_argument(
        "--convention",
        metavar="NAME",
        default="perturbray",
        help="see `perturbray list conventions` (default: perturbray)",
    )
    judge.add_argument("--training", metavar="TRAIN.h5ad", help="cells that the PCA and the mean response come from")
    judge.add_argument(
        "--normalize", action="store_true", help="X holds counts: scale both to the observed side's median depth, log1p"
    )
    judge.add_argument(
        "--no-calibration",
        action="store_true",
        help="leave out anchors, intervals and strata, which take some fifteen times as long as the scores",
    )
    judge.add_argument("--out", metavar="DIR", default="evaluation", help="where results go (default: evaluation)")
    add_predict(commands)
    watch.add_watch(commands)
    cluster_file.add_cluster(commands)
    listing = commands.add_parser("list", help="what there is to choose from")
    listing.add_argument("kind", choices=LISTS)
    listing.add_argument(
        "--plugin", metavar="FILE.py", action="append", default=[], help="registers models of your own"
    )
    arguments = parser.parse_args()
    own = {"report": _report, "evaluate": _evaluate, "predict": _predict, "cluster": cluster_file.run, "list": _list}
    own["watch"] = watch.run
    run = own[arguments.command]
    _end(_guard(lambda: run(arguments)))


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.exit(code)


def _guard(run: Callable[[], int]) -> int:
    """Run; bad input becomes one line and code 2, Ctrl-C a line that says how to go on."""
    try:
        return run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted: finished trials are kept; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _run_script(
    make: "Callable[..., Sweep]",
    arguments: argparse.Namespace,
    models: Sequence[str],
    flags: list[str],
    screen: Mapping[str, int | float],
    module: str,
) -> int:
    print(f"perturbray: {make.__name__}: {module.strip().splitlines()[0]}", flush=True)
    changes = [_assignment(text, "--set") for text in arguments.set]
    axes = {path: values.split(",") for path, values in (_assignment(text, "--grid") for text in arguments.grid)}
    _check_folder(Path(arguments.results))
    _check_run(arguments)
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))

    from perturbray import plugin
    from perturbray.data.dataset import open_screen
    from perturbray.data.store import known

    if arguments.data and not known(arguments.data):  # before the imports that take seconds
        with open_screen(arguments.data):
            pass
    plugins = tuple(plugin.Plugin.read(path) for path in arguments.plugin)
    from perturbray.models import MODELS

    own = set(MODELS)
    plugin.install(plugins)
    names = dict.fromkeys(arguments.model or [*models, *(name for name in MODELS if name not in own)])
    tuned = {name: _tuned(name) for name in names if name.endswith(".json")}
    specs = [tuned[name].model if name in tuned else _default(name, MODELS[name]) for name in names]
    dataset = _dataset(arguments, screen)
    sweep = make(dataset, specs, **{name: getattr(arguments, name) for name in flags})
    sweep = sweep.trained(tuned.values())
    sweep = sweep.judge(arguments.convention, arguments.metric)
    if arguments.smoke:  # before --set, which a user means
        sweep = sweep.smoke()
    sweep = sweep.override(dict(changes)).grid(axes)
    suffix = f"-{Path(arguments.data).stem}" if arguments.data else ""
    folder = Path(arguments.results) / f"{sweep.name}{suffix}"
    if arguments.watch and not arguments.dry_run:
        with watch.beside(folder, partial(print, flush=True)):
            return _run(sweep, folder, arguments, plugins)
    return _run(sweep, folder, arguments, plugins)


def _tuned(path: str) -> "Tuned":
    from perturbray.search import Tuned

    return Tuned.read(path)


def _default(name: str, spec: type) -> object:
    try:
        return spec()
    except TypeError as error:
        raise InputError(
            f"model {name!r} cannot be made without arguments ({error}); give its fields defaults"
        ) from None


def _run(sweep: "Sweep", folder: Path, arguments: argparse.Namespace, plugins: tuple) -> int:
    from perturbray.display import Terminal, show_results
    from perturbray.engine import run_sweep
    from perturbray.plan import Plan

    terminal = Terminal()
    if sweep.searches:
        from perturbray import tuning

        if arguments.dry_run:
            sweep = tuning.known(sweep, folder, terminal)
        else:
            running = {"address": arguments.address, "plugins": plugins, "events": terminal}
            running["gpus"] = arguments.gpus_per_trial
            try:
                sweep = tuning.tune(sweep, folder, track=sweep.track, **running)
            except tuning.SearchError as error:
                print(f"error: {error}", file=sys.stderr)
                return FAILED
    plan = Plan.of(sweep, folder, keep_models=arguments.keep_models)
    if arguments.dry_run:
        plan.scan(terminal.line)
        _print_plan(plan, terminal)
        return 0
    failures: ExceptionGroup | None = None
    words = [sys.executable.rsplit("/", 1)[-1], *sys.argv]
    try:
        running = {"address": arguments.address, "gpus": arguments.gpus_per_trial or 1.0, "plugins": plugins}
        ran = run_sweep(plan, command=shlex.join(words), events=terminal, **running)
        if not ran:
            from perturbray.results.report import write_report

            terminal.line(f"nothing to run: all {len(plan.trials)} trials are finished in {folder}")
            write_report(folder)
    except ExceptionGroup as group:
        failures = group
    show_results(folder, terminal.console)
    if failures is not None:
        first = failures.exceptions[0]
        print("\n".join(getattr(first, "__notes__", [])).rstrip(), file=sys.stderr)
        print(f"error: {failures.message}; the first: {first}", file=sys.stderr)
        print(
            f"the reasons of all are in {folder}/*.failed.json and on the page; the same command tries them again",
            file=sys.stderr,
        )
        return FAILED
    return 0


MOST_TASKS = 8  # whose sizes a dry run says beside the table of the first


def _tasks(plan) -> list[str]:
    """What is held out: the first split of every dataset as a table, the others in a line each."""
    from perturbray.data.splits.summary import summary, title, totals
    from perturbray.plan import task_of

    tasks: dict[tuple, tuple[dict, str]] = {}
    for trial in plan.trials.values():
        taken = f"{trial.taken}, seed {trial.seed}" if trial.taken else ""
        tasks.setdefault((trial.dataset, trial.split, taken), (plan.splits[task_of(trial)].record, taken))
    lines: list[str] = []
    for spec in plan.conditions:
        first, *others = [found for (dataset, _, _), found in tasks.items() if dataset == spec]
        lines += summary(first[0], taken=first[1]).splitlines()
        lines += [f"{title(record, taken=taken)}: {totals(record)}" for record, taken in others[:MOST_TASKS]]
        if len(others) > MOST_TASKS:
            lines.append(f"... and {len(others) - MOST_TASKS} further splits")
    return lines


def _print_plan(plan, terminal) -> None:
    from rich.text import Text

    from perturbray.results.table import failed as failures

    done = plan.finished()
    failed = failures(plan.folder) if plan.folder.is_dir() else {}
    for spec, conditions in plan.conditions.items():
        terminal.line(
            f"{spec.name}: {len(conditions.cell_condition):,} cells, {len(conditions.genes):,} genes, "
            f"{len(conditions.perturbations)} perturbations, {len(conditions.contexts)} contexts; "
            f"{plan.normalisation(spec).text}"
        )
    for text in _tasks(plan):
        terminal.line(text)
    width = max(len(trial.name) for trial in plan.trials.values())
    rows = [(f"{'key':16}  {'trial':{width}}  state", "bold")]
    for key, trial in plan.trials.items():
        state = "done" if key in done else "failed before, to run" if key in failed else "to run"
        rows.append((f"{key}  {trial.name:{width}}  {state}", "dim" if key in done else ""))
    for row, style in rows:  # not a table, which would cut keys and names where the output is narrow
        terminal.console.print(Text(f"  {row}", style=style), soft_wrap=True)
    terminal.line(
        f"{len(plan.trials)} trials: {len(done)} done, {len(plan.trials) - len(done)} to run, in {plan.folder}"
    )


def _dataset(arguments: argparse.Namespace, screen: Mapping[str, int | float]) -> "DatasetSpec":
    from perturbray.data.dataset import DatasetSpec

    given = {
        "perturbation": arguments.perturbation_key,
        "control": arguments.control,
        "covariates": tuple(c.strip() for c in arguments.covariate_keys.split(","))
        if arguments.covariate_keys
        else None,
        "layer": arguments.layer,
        "normalize": arguments.normalize,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.delimiter is not None:
        given["delimiter"] = None if arguments.delimiter.lower() == "none" else arguments.delimiter
    if not arguments.data:
        return DatasetSpec(path=str(_synthetic(screen)), name="synthetic", **given)
    return DatasetSpec(path=arguments.data, **given)


def _synthetic(fields: Mapping[str, int | float]) -> Path:
    """The screen of a script, written once to the cache; to a temporary folder where the cache cannot be written."""
    import hashlib

    from perturbray import synthetic
    from perturbray.data.matrix import cache_folder

    screen = synthetic.Screen(**fields)
    # Named by what draws it, so that another version of the simulator never finds this file.
    name = hashlib.blake2b(repr(screen).encode() + Path(synthetic.__file__).read_bytes(), digest_size=6).hexdigest()
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        folder = Path(tempfile.mkdtemp(prefix="perturbray-"))
    place = folder / f"synthetic-{name}.h5ad"
    if not place.exists():
        print(f"writing the synthetic screen to {place}", flush=True)
        synthetic.write(place, screen)
    return place


def _assignment(text: str, flag: str) -> tuple[str, str]:
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise InputError(f"{flag} {text}: write it as PATH=VALUE, e.g. training.epochs=20")
    return path.strip(), value.strip()


def _check_folder(folder: Path, *, flag: str = "--results") -> None:
    """Raise InputError where results cannot be written, without making anything."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{flag} {folder}: {place} is a file; name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: {place} cannot be written; name another folder")


def _check_run(arguments: argparse.Namespace) -> None:
    """Raise InputError for what no cluster could run, before anything is read."""
    from perturbray.cluster import chosen, in_job

    chosen(arguments.address)
    share = arguments.gpus_per_trial
    if share is not None and not 0 < share <= 1:
        raise InputError(f"--gpus-per-trial {share:g}: above 0, at most 1; a trial runs on one GPU or a part of one")
    if in_job() and not Path(arguments.results).is_absolute():
        raise InputError(
            f"--results {arguments.results}: a job runs in a copy of its working directory, which Ray deletes, and the "
            "results with it; give an absolute path that every node sees"
        )


def _report(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from perturbray.display import show_results
    from perturbray.results.report import write_report
    from perturbray.results.summary import summary_of

    folder = Path(arguments.folder)
    summary = summary_of(folder)
    write_report(folder, summary=summary)
    show_results(folder, Console(highlight=False), summary=summary)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from perturbray.evaluate import Files, judge_files, summarise
    from perturbray.results import table
    from perturbray.results.evaluation import terminal_evaluation, write_evaluation

    out = Path(arguments.out)
    _check_folder(out, flag="--out")
    keys = tuple(key.strip() for key in arguments.covariate_keys.split(",") if key.strip())
    files = Files(
        observed=arguments.observed,
        predicted=arguments.predicted,
        perturbation_key=arguments.perturbation_key,
        control=arguments.control,
        covariate_keys=keys,
        delimiter=arguments.delimiter,
        training=arguments.training,
        normalize=arguments.normalize,
    )
    with table.made(out):
        judged = judge_files(
            files,
            convention=arguments.convention,
            folder=out,
            calibration=not arguments.no_calibration,
            progress=lambda text: print(text, flush=True),
        )
        summary = summarise(judged.values, covariate_keys=keys, convention=arguments.convention)
        notes = {"command": shlex.join(["perturbray", *sys.argv[1:]]), **judged.values.attrs}
        further = {"calibration": judged.calibration, "strata": judged.strata}
        write_evaluation(out, judged.values, summary, notes=notes, **further)
    Console(highlight=False).print(terminal_evaluation(summary, notes, judged.calibration))
    print(f"page:   {out / 'report.html'}\ntable:  {out / 'metrics.csv'}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from perturbray.counterfactual import command

    _check_folder(Path(arguments.out).parent, flag="--out")
    return command.run(arguments)


def _list(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from perturbray import plugin
    from perturbray.data.ablations import ABLATIONS
    from perturbray.data.splits import SPLITS
    from perturbray.metrics import CELL_METRICS, CONVENTIONS, METRICS
    from perturbray.models import MODELS

    plugin.install(tuple(plugin.Plugin.read(path) for path in arguments.plugin))
    board = Table(box=None, padding=(0, 2), show_header=False)
    board.add_column(no_wrap=True)
    board.add_column()
    registries = {
        "models": MODELS,
        "metrics": {**METRICS, **CELL_METRICS},
        "conventions": CONVENTIONS,
        "splits": SPLITS,
        "ablations": ABLATIONS,
    }
    for name, thing in registries[arguments.kind].items():
        board.add_row(name, Text(_says(thing)))  # as text: brackets are no markup
        if arguments.kind == "models":
            board.add_row("", Text(_abilities(thing), style="dim"))
    Console(highlight=False).print(board)
    return 0


TRAINS_ON = {
    "paired": "perturbed cells with matched controls",
    "perturbed": "perturbed cells",
    "all": "all cells, controls among them",
}


def _abilities(spec: type) -> str:
    """How a model learns, what its predictions need, and what they extend to."""
    how = "" if spec.learning == "gradient" else ", in one pass"
    learns = "learns nothing" if spec.learning == "nothing" else f"trains on {TRAINS_ON.get(spec.mode, spec.mode)}{how}"
    needs = [*spec.needs, *(["an embedding of cells if asked"] if "embedding" in spec.__annotations__ else [])]
    parts = [learns, f"needs {', '.join(needs) or 'nothing but labels'}"]
    parts.append(f"unseen: {', '.join(f'{kind}s' for kind in spec.unseen) or 'nothing'}")
    return "; ".join([*parts, "draws cells" if spec.samples else ""]).removesuffix("; ")


def _says(thing: object) -> str:
    if hasattr(thing, "function"):  # a convention
        return " ".join((inspect.getdoc(thing.function) or "").split("\n\n")[0].split())
    if not isinstance(thing, type):  # a metric
        better = "higher" if thing.higher_is_better else "lower"
        chance = "" if thing.chance is None else f", chance {thing.chance:g}"
        return f"{better} is better, best {thing.best:g}{chance}"
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
