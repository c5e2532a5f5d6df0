"""Every script of sweeps/ plans on its own screen and on files, and a minute's work of each runs."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from perturbray.results import table

SCRIPTS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.py"))
BASELINES = {
    "transfer": {"no_change", "perturbed_mean", "perturbed_mean_global", "matching_mean", "mean_shift", "linear_plain"},
    "combination": {"no_change", "perturbed_mean", "matching_mean", "additive", "linear_plain"},
}


def script(path: Path):
    return lambda: runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_plans_on_its_own_screen(command, monkeypatch, path):
    ended = command("--dry-run", "--smoke", entry=script(path))
    assert (ended.code, ended.err) == (0, "")
    keys = re.findall(r"^  ([0-9a-f]{16})  ", ended.out, re.MULTILINE)
    assert len(set(keys)) == len(keys) > 3  # three baselines and a model
    assert sys.argv[0].endswith(".py")


@pytest.mark.parametrize("name", BASELINES)
def test_seeds_and_baselines_of_a_script(command, name):
    path = next(path for path in SCRIPTS if path.stem == name)
    ended = command("--dry-run", entry=script(path))
    assert ended.code == 0
    rows = re.findall(r"^  [0-9a-f]{16}  (\w+), seed (\d)", ended.out, re.MULTILINE)
    assert {seed for _, seed in rows} == set("01234")
    models = {model for model, _ in rows}
    assert models > BASELINES[name]
    assert len(rows) == 5 * len(models)


def test_combinations_of_k562_are_planned(command, shared_data):
    path = next(path for path in SCRIPTS if path.stem == "combination")
    ended = command("--data", shared_data / "perturbench_devel.h5ad", "--dry-run", "--smoke", entry=script(path))
    assert (ended.code, ended.err) == (0, "")


TRANSFER = Path(__file__).parents[2] / "sweeps" / "transfer.py"


def test_a_dry_run_says_what_is_held_out(command, small_screen):
    data = "--data", small_screen, "--dry-run"
    out = command(*data, entry=script(TRANSFER)).out
    assert "split transfer (" in out
    assert re.search(r"^ +line_a +8 \(\d+\) +2 \(\d+\) +2 \(\d+\) +\d+ \+ \d+ \+ \d+$", out, re.MULTILINE)
    assert out.count("conditions (their cells)") == 1, "one split for all seeds and models is shown once"
    grid = command(*data, "--grid", "split.seed=1,2,3", entry=script(TRANSFER)).out
    assert (
        len(re.findall(r"^split transfer \(.*seed [23]\): 24 train, 6 val, 6 test conditions$", grid, re.MULTILINE))
        == 2
    )
    many = command(*data, "--grid", f"split.seed={','.join(map(str, range(12)))}", entry=script(TRANSFER)).out
    assert "... and 3 further splits" in many


def test_another_task_is_a_name_and_its_fields(command, small_screen):
    words = "--data", small_screen, "--dry-run", "--model", "linear_additive", "--split"
    out = command(*words, "held_out_contexts", "--set", "split.test=line_b", entry=script(TRANSFER)).out
    assert "held out: line_b for test, none for validation" in out
    assert "in results/held_out_contexts-small" in out
    names = "split.test=line_a: drug_001;line_b: drug_002;line_b: drug_003"
    out = command(*words, "manual", "--set", names, entry=script(TRANSFER)).out
    assert re.search(r"^  all +33 \([\d,]+\) +0 \(0\) +3 \(\d+\) ", out, re.MULTILINE)
    ended = command(*words, "manual", entry=script(TRANSFER))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "split.test names no condition" in ended.err
    ended = command(*words, "held_out_context", entry=script(TRANSFER))
    assert "did you mean 'held_out_contexts'" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("transfer", ()), ("combination", ("--model", "latent_additive"))])
def test_a_minute_of_a_script_runs(command, name, words, ray_session):
    """The one with every model, the other with one of them."""
    path = next(path for path in SCRIPTS if path.stem == name)
    ended = command("--smoke", "--set", "training.epochs=1", *words, entry=script(path))
    assert (ended.code, ended.err) == (0, "")
    folder = Path(f"results/{name}-smoke")
    found = table.read(folder)
    assert set(found["model"]) > BASELINES[name]
    assert found[found["metric"] == "rmse/average"]["value"].notna().all()
    assert (folder / "report.html").stat().st_size > 0
    assert "at level" not in ended.out, "a sweep along no axis has no levels"
