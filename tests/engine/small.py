"""Small sweeps: seconds of work on the small screen."""

from pathlib import Path

import pandas as pd

import perturbray as pr
from perturbray.data.dataset import DatasetSpec
from perturbray.engine import run_sweep
from perturbray.events import Events
from perturbray.metrics.metric import Metric
from perturbray.plan import Plan
from perturbray.plugin import Plugin
from perturbray.results import table

METRICS = (Metric("rmse", "average"), Metric("cosine", "logfc_logmean", rank=True))
MODELS = (pr.NoChange(), pr.MeanShift(), pr.LatentAdditive(width=8, latent_dim=4))


def sweep(path: Path, models=MODELS, *, seeds: int = 1, epochs: int = 2, metrics=METRICS, **fields) -> pr.Sweep:
    spec = DatasetSpec(path=str(path))
    training = pr.Training(epochs=epochs)
    trials = [pr.Trial(dataset=spec, model=m, seed=s, training=training) for s in range(seeds) for m in models]
    return pr.Sweep(name="small", trials=trials, metrics=metrics, **fields)


class Record(Events):
    """What the engine told, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.began: list[str] = []
        self.ended: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def started(self, key: str) -> None:
        self.began.append(key)

    def stopped(self, key: str) -> None:
        self.ended.append(key)


def run(sweep: pr.Sweep, folder: Path, *, plugins=(), events: Events | None = None) -> tuple[int, Plan]:
    plan = Plan.of(sweep, folder)
    return run_sweep(plan, plugins=tuple(plugins), events=events), plan


def plugin(source: str, name: str = "mine") -> Plugin:
    """A plugin from its text, installed here as `--plugin` does it."""
    found = Plugin(name=f"perturbray_plugin_{name}", source=source)
    found.install()
    return found


def stable(folder: Path, *, keys=None) -> pd.DataFrame:
    """The table of a sweep without the columns that no two runs share."""
    found = table.read(folder, keys=keys)
    return found.drop(columns=[name for name in table.VOLATILE if name in found])


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished trial's file: a file that was written again has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.parquet")}
