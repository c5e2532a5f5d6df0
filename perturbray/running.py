"""Running: a sweep in one call, searches first, as a notebook or a program of one's own wants it."""

from pathlib import Path

import pandas as pd

from perturbray.display import Terminal
from perturbray.engine import run_sweep
from perturbray.events import Events
from perturbray.plan import Plan
from perturbray.plugin import Plugin
from perturbray.results import table
from perturbray.results.report import write_report
from perturbray.sweep import Sweep
from perturbray.tuning import tune


def run(
    sweep: Sweep,
    *,
    results: str | Path = "results",
    address: str | None = None,
    gpus: float | None = None,
    plugins: tuple[Plugin, ...] = (),
    events: Events | None = None,
) -> pd.DataFrame:
    """Run what remains of a sweep and of its searches; the table of its results, as ``pr.read(folder)`` gives it.

    ``gpus``: of each trial, where there are any (1, or what a search says). The folder is ``results/<name of the sweep>``;
    ``report.html`` lies there. Raises what a script would say: InputError, SearchError, and an ExceptionGroup of the trials
    that failed, after all others are stored.
    """
    folder, events = Path(results) / sweep.name, events or Terminal()
    if sweep.searches:
        sweep = tune(sweep, folder, address=address, gpus=gpus, plugins=plugins, events=events, track=sweep.track)
    run_sweep(
        Plan.of(sweep, folder),
        address=address,
        gpus=gpus or 1.0,
        plugins=plugins,
        command=f"pr.run({sweep.name!r})",
        events=events,
    )
    write_report(folder)
    return table.read(folder)
