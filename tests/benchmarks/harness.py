"""Harness: contestants are processes that measure one thing each time they are asked; they take turns.

Machines are noisy, so a benchmark of this project states ratios against a baseline of the same run: contestants take
turns, medians of the turns count, and costs are CPU-seconds of whole processes, which move less than wall time. Packages
to compare with live in virtual environments of their own, made on demand. A new benchmark is a script beside this file
that builds ``Contestant``s, has them ``race`` and keeps what it finds in a ``Report``.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

HERE = Path(__file__).parent
LIBRARIES = ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON")
ONE_THREAD = {"POLARS_MAX_THREADS": "1"} | {f"{library}_NUM_THREADS": "1" for library in LIBRARIES}


@dataclass(frozen=True)
class Cost:
    """What one turn took, or the medians of several."""

    wall: float  # seconds
    cpu: float  # seconds, of all threads and of child processes that ended
    peak: float  # MiB above what imports had taken
    value: Any = None  # what the task returned


class Contestant:
    """A process that runs one task of a script in ``contestants/`` on one thread, once a turn.

    Imports, reading of small inputs and compilation come before the first turn. ``share`` is the part of the work that the
    task does, where its cost is proportional to the work and the whole would take minutes: costs are divided by it.
    ``through`` makes a command one that runs elsewhere, as on another host.
    """

    def __init__(
        self,
        script: str,
        task: str,
        *,
        python: str = sys.executable,
        share: float = 1.0,
        cache: str | None = None,
        through: Callable[[list[str]], list[str]] = list,
        **options: Any,
    ):
        self._share = share
        own = {"PERTURBRAY_CACHE": str(cache)} if cache else {}
        self._process = subprocess.Popen(
            through([python, str(HERE / "contestants" / script), task, json.dumps(options, default=str)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ONE_THREAD | {"TQDM_DISABLE": "1"} | own,
        )
        self._answer()

    @property
    def number(self) -> int:
        """Of its process."""
        return self._process.pid

    def turn(self) -> Cost:
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        cost = Cost(**self._answer())
        return Cost(cost.wall / self._share, cost.cpu / self._share, cost.peak, cost.value)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._process.args[1:])} ended with code {self._process.wait()}")
        return json.loads(line)


def race(contestants: Mapping[str, Contestant], *, rounds: int) -> dict[str, Cost]:
    """Median costs of some turns each, taken alternately; ends the contestants."""
    turns: dict[str, list[Cost]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            turns[name].append(contestant.turn())
    for contestant in contestants.values():
        contestant.close()
    return {name: median(costs) for name, costs in turns.items()}


def median(costs: list[Cost]) -> Cost:
    parts = {part: statistics.median(getattr(cost, part) for cost in costs) for part in ("wall", "cpu", "peak")}
    return Cost(**parts, value=costs[-1].value)


@dataclass
class Report:
    """Ratios and figures by name, printed as they are found."""

    ratios: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def costs(self, part: str, costs: Mapping[str, Cost]) -> None:
        for name, cost in costs.items():
            print(f"  {name:<24} {cost.cpu:9.3f} CPU-s {cost.wall:9.3f} s wall {cost.peak:8.0f} MiB", flush=True)
            for unit, amount in (("cpu_s", cost.cpu), ("wall_s", cost.wall), ("peak_mib", cost.peak)):
                self.figures[f"{part}_{name}_{unit}"] = amount

    def ratio(self, name: str, value: float, aim: str) -> None:
        self.ratios[name] = value
        print(f"  {name:<40} {value:8.2f}   (aim {aim})", flush=True)

    def figure(self, name: str, value: float, aim: str = "") -> None:
        self.figures[name] = value
        print(f"  {name:<40} {value:8.3g}   {f'(aim {aim})' if aim else ''}".rstrip(), flush=True)

    def write(self, path: str | None) -> None:
        if path:
            Path(path).write_text(json.dumps({"ratios": self.ratios, "figures": self.figures}, indent=1) + "\n")


@dataclass(frozen=True)
class Peer:
    """A package to compare with, in a virtual environment of its own below the cache folder."""

    name: str
    version: str
    python: str = "python3.11"  # the interpreter that its own requirements were measured with
    beside: tuple[str, ...] = ()  # further requirements
    borrows: bool = False  # sees this environment's packages, and brings none that it requires: no second torch

    def interpreter(self) -> str | None:
        """Its Python, installed now if it is not there; None, with a message, where that is impossible."""
        requirement = f"{self.name}=={self.version}"
        folder = cache() / "benchmarks" / f"{self.name}-{self.version}"
        python, done = folder / "bin" / "python", folder / "installed"
        if done.exists():
            return str(python)
        print(f"  installing {requirement} in {folder} (once)", flush=True)
        maker = sys.executable if self.borrows else shutil.which(self.python) or sys.executable
        try:
            subprocess.run([maker, "-m", "venv", "--clear", str(folder)], check=True, capture_output=True, text=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
            install += ["--no-deps"] if self.borrows else self.beside
            subprocess.run(install, check=True, capture_output=True, text=True)
            if self.borrows:
                (own,) = folder.glob("lib/python*/site-packages")
                (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or error.stdout).strip().splitlines()[-1:]
            print(f"  no {requirement}: {' '.join(reason)}; its ratios are left out", flush=True)
            return None
        done.touch()
        return str(python)


def cache() -> Path:
    """Where peers are kept: PERTURBRAY_CACHE, or the user's cache folder."""
    return Path(os.environ.get("PERTURBRAY_CACHE") or platformdirs.user_cache_dir("perturbray"))


def parser(description: str, parts: list[str]) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def chosen(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in parts]:
            raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(parts)}")
        return names

    flags.add_argument("--only", metavar="A,B", type=chosen, default=parts, help=f"some of {', '.join(parts)}")
    flags.add_argument("--json", metavar="FILE", help='also write {"ratios": {...}, "figures": {...}} there')
    flags.add_argument("--rounds", type=int, default=3, help="turns of each contestant (default: 3); medians count")
    flags.add_argument(
        "--quick", action="store_true", help="tiny sizes, one turn: shows that it runs, measures nothing"
    )
    flags.add_argument(
        "--no-peers", action="store_true", help="install no other package; ratios over them are left out"
    )
    return flags
