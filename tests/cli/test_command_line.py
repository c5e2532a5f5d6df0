"""The command line: its frozen flags, its help, the dry run, exit codes, and that it speaks before it loads anything."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from perturbray import cli
from perturbray.results import table

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "sweeps" / "imbalance.py"
SEARCH = ROOT / "sweeps" / "search.py"
HEAVY = ("torch", "ray", "pandas", "anndata", "scipy", "pyarrow", "h5py", "matplotlib")

FROZEN = {
    "--data",
    "--perturbation-key",
    "--control",
    "--covariate-keys",
    "--delimiter",
    "--layer",
    "--normalize",
    "--convention",
    "--metric",
    "--plugin",
    "--results",
    "--address",
    "--gpus-per-trial",
    "--keep-models",
    "--watch",
    "--smoke",
    "--dry-run",
    "--set",
    "--grid",
}

LISTED = {
    "models": "mean_shift",
    "metrics": "rmse/average",
    "splits": "transfer",
    "ablations": "imbalance",
    "conventions": "perturbench-2026",
}

# Says on stdout when the first heavy package is looked for, then runs the script as `python SCRIPT WORDS` does.
WATCHED = """
import runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {heavy}:
            print("LOADS", name, flush=True)
        return None

sys.meta_path.insert(0, Watch())
script = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""

PLUGIN = """
from dataclasses import dataclass

import perturbray as pr


@pr.MODELS.register("own")
@dataclass(frozen=True, kw_only=True)
class Own(pr.ModelSpec):
    scale: float = 1.0

    def build(self, vocabulary):
        return OwnNet(vocabulary)


class OwnNet(pr.Model):
    def predict(self, batch):
        raise RuntimeError("not written yet")
"""


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}


def watched(*words: object, folder: Path) -> subprocess.CompletedProcess:
    """The script in a process of its own."""
    source = WATCHED.format(heavy=set(HEAVY))
    return subprocess.run(
        [sys.executable, "-c", source, str(SCRIPT), *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_flags_that_every_script_has_are_frozen():
    assert flags(cli.sweep_parser("any", "")) == FROZEN


def test_help_mentions_every_flag_and_loads_nothing(tmp_path):
    ended = watched("--help", folder=tmp_path)
    assert ended.returncode == 0
    assert "LOADS" not in ended.stdout
    for flag in {*FROZEN, "--published", "--model"}:
        assert re.search(rf"^  {flag}\b", ended.stdout, re.MULTILINE), flag
    assert "What does it cost a model" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 120


def test_the_first_line_appears_before_anything_is_loaded_and_bad_input_loads_little(tmp_path):
    ended = watched("--data", "nowhere.h5ad", folder=tmp_path)
    assert ended.returncode == 2
    first, *loads = ended.stdout.splitlines()
    assert first.startswith("perturbray: imbalance: What does it cost")
    assert not {"LOADS torch", "LOADS ray"} & set(loads), "a mistyped path need not wait for these"
    assert ended.stderr.count("\n") == 1


def test_a_dry_run_prints_the_plan_and_writes_nothing_but_the_store(command, small, own_cache):
    before = {path for path in own_cache.rglob("*") if path.suffix != ".json"}
    ended = command(*small, "--dry-run", "--set", "training.epochs=2")
    assert (ended.code, ended.err) == (0, "")
    rows = re.findall(r"^ +([0-9a-f]{16}) +(\S.*\S) +to run *$", ended.out, re.MULTILINE)
    assert len(rows) == len(dict(rows)) > 8
    assert {"latent_additive, imbalance 0.2, seed 0", "mean_shift, imbalance 0.0, seed 2"} <= {name for _, name in rows}
    assert f"{len(rows)} trials: 0 done, {len(rows)} to run, in results/imbalance-small" in ended.out
    assert "taken as counts" in ended.out
    assert list(Path.cwd().iterdir()) == []
    made = {path for path in own_cache.rglob("*") if path.is_file() and path.suffix != ".json"} - before
    assert all("stores" in path.parts for path in made)


def test_a_dry_run_says_what_is_done(command, small):
    keys = re.findall(r"\b[0-9a-f]{16}\b", command(*small, "--dry-run", "--smoke").out)
    folder = Path("results/imbalance-smoke-small")
    folder.mkdir(parents=True)
    (folder / f"{keys[0]}.parquet").touch()
    table.write_failure(folder, keys[1], name="", error="no luck")
    out = command(*small, "--dry-run", "--smoke").out
    assert re.search(rf"{keys[0]}.* done", out)
    assert re.search(rf"{keys[1]}.* failed before, to run", out)
    assert f"{len(keys)} trials: 1 done, {len(keys) - 1} to run" in out


def test_smoke_is_one_seed_two_levels_few_epochs_and_a_folder_of_its_own(command, small):
    out = command(*small, "--dry-run", "--smoke").out
    assert "in results/imbalance-smoke-small" in out
    assert set(re.findall(r"seed (\d+) +to run", out)) == {"0"}
    assert set(re.findall(r"imbalance (0\.\d+),", out)) == {"0.0", "0.2"}


def test_without_a_file_it_runs_on_the_synthetic_screen_and_keeps_it(command, own_cache):
    first, second = command("--dry-run", "--smoke"), command("--dry-run", "--smoke")
    assert (first.code, second.code) == (0, 0)
    assert "writing the synthetic screen to" in first.out
    assert "writing" not in second.out
    assert "188 perturbations, 3 contexts" in second.out
    assert len(list(own_cache.glob("synthetic-*.h5ad"))) == 1


def test_the_set_of_one_command_is_the_key_of_the_next(command, small):
    def keys(*words):
        return re.findall(r"\b[0-9a-f]{16}\b", command(*small, "--dry-run", "--smoke", *words).out)

    assert keys() == keys()
    assert not set(keys("--set", "training.batch_size=64")) & set(keys())


@pytest.mark.parametrize("kind", cli.LISTS)
def test_list_says_what_there_is(command, kind):
    ended = command("list", kind, entry=cli.command)
    assert ended.code == 0
    assert LISTED[kind] in ended.out


def test_a_sweep_from_the_command_line(command, small, tmp_path, ray_session):
    own = tmp_path / "own.py"
    own.write_text(PLUGIN)
    words = [*small, "--plugin", own, "--model", "own", "--smoke"]
    folder = Path("results/imbalance-smoke-small")

    failed = command(*words)
    assert failed.code == 1
    assert "error: 2 of 8 trials failed; the first: own, imbalance" in failed.err
    assert 'raise RuntimeError("not written yet")' in failed.err, "the traceback of the worker"
    assert "mean_shift" in failed.out
    assert len(table.finished(folder)) == 6

    own.write_text(PLUGIN.replace('raise RuntimeError("not written yet")', "return batch.control"))
    mended = command(*words)
    assert (mended.code, mended.err) == (0, "")
    assert "8 trials: 6 finished before, 2 to run; 2 failed before and run again" in mended.out
    assert len(table.finished(folder)) == 8
    for name in ("report.html", "figure.png", "summary.csv"):
        assert (folder / name).stat().st_size > 0
        assert str(folder / name) in mended.out

    again = command(*words)
    assert again.code == 0
    assert "nothing to run: all 8 trials are finished in results/imbalance-smoke-small" in again.out
    assert table.read_plan(folder)["status"]["state"] == "done"
    assert "own.py --model own --smoke" in table.read_plan(folder)["command"]

    (folder / "report.html").unlink()
    report = command("report", folder, entry=cli.command)
    assert (report.code, report.err) == (0, "")
    assert (folder / "report.html").exists()


def test_a_search_from_the_command_line(command, small, ray_session):
    words = [*small[:2], "--samples", "3", "--seeds", "1", "--at-once", "1", "--set", "training.epochs=2"]
    ended = command(*words, script=SEARCH)
    assert (ended.code, ended.err) == (0, "")
    folder = Path("results/search-small")
    path = folder / "tuned-latent_additive.json"
    assert f"--model {path} runs it" in ended.out
    assert "pr.Trial(" in ended.out
    assert "What the search learnt" in (folder / "report.html").read_text()
    again = command(*words, script=SEARCH)
    assert "nothing to run" in again.out

    plain, tuned = (command(*small, "--dry-run", "--smoke", "--model", name) for name in ("latent_additive", path))
    assert (tuned.code, tuned.err) == (0, "")
    keys = [set(re.findall(r"\b([0-9a-f]{16})\b.*latent_additive", ended.out)) for ended in (plain, tuned)]
    assert len(keys[0]) == len(keys[1]) == 2
    assert not keys[0] & keys[1], "it is trained as it was found"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "many"], "argument --samples: invalid int value"),
        (["--space", "large"], "no search space is named 'large'"),
        (["--objective", "rmse/averge"], "no metric is named 'rmse/averge'"),
        (["--set", "model.widht=3"], "did you mean 'model.width'"),
        (["--model", "mean_shift"], "model 'mean_shift' has no search space"),
        (["--model", "nowhere.json"], "nowhere.json: holds no tuned configuration"),
        (["--way", "grid"], "training.lr: .* has no steps"),
    ],
)
def test_what_cannot_be_searched_is_one_line(words, message, command, small):
    ended = command(*small[:2], *words, script=SEARCH)
    assert ended.code == 2, ended.err
    assert ended.err.count("\n") == 1
    assert re.search(message, ended.err)
