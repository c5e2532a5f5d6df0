"""The README is true: its example runs, and the commands it shows are understood."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import screens
import torch

import perturbray as pr
from perturbray.cli import sweep_parser
from perturbray.data.dataset import DatasetSpec
from perturbray.plugin import Plugin
from perturbray.trial import Trial, run

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", README, re.DOTALL))


def test_the_example_of_a_model_is_ten_lines_or_a_few_more_and_halves_the_shift(small_screen):
    source = BLOCKS["half_shift.py"]
    assert len([line for line in source.splitlines() if line.strip()]) <= 12
    Plugin(name="perturbray_plugin_of_the_readme", source=source).install()
    lab = screens.lab_of(DatasetSpec(path=str(small_screen)))
    whole = Trial(dataset=DatasetSpec(path=str(small_screen)), model=pr.MeanShift())
    half = replace(whole, model=pr.MODELS["half_shift"]())
    shifts = []
    for trial in (whole, half):
        prediction = run(trial, lab.cells, lab.conditions).prediction
        shifts.append(prediction.predicted.mean - prediction.control.mean[prediction.context])
        clipped = prediction.predicted.mean == 0
        shifts[-1][clipped] = np.nan
    kept = ~np.isnan(shifts[0]) & ~np.isnan(shifts[1])
    assert kept.mean() > 0.5
    np.testing.assert_allclose(shifts[1][kept], shifts[0][kept] / 2, atol=1e-6)


def test_the_loop_over_batches_learns_on_a_screen_of_ones_own(small_screen, tmp_path, monkeypatch, capsys):
    source = BLOCKS["loop.py"]
    assert len([line for line in source.splitlines() if line.strip()]) <= 14
    monkeypatch.chdir(tmp_path)
    Path("screen.h5ad").symlink_to(small_screen)
    torch.manual_seed(0)
    exec(compile(source, "loop.py", "exec"), {})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) >= 3
    assert losses[-1] < 0.75 * losses[0]


COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line
]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python sweeps/imbalance.py")])
def test_the_commands_of_the_readme_are_understood(line):
    arguments = sweep_parser("imbalance", "").parse_args(shlex.split(line)[2:])
    assert arguments.data == "screen.h5ad"


def test_every_folder_that_the_readme_names_is_there():
    root = Path(__file__).parents[1]
    named = re.findall(r"^\| `([^`]+)`", README, re.MULTILINE)
    assert len(named) >= 6
    assert [name for name in named if not (root / name).exists()] == []
    figure = re.search(r"!\[[^\]]*\]\(([^)]+)\)", README).group(1)
    assert (root / figure).exists()
