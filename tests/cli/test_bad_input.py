"""Bad input: one line that says what is wrong and what would be right, code 2, no traceback, nothing half-written."""

import os
import re
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest

BROKEN_PLUGINS = {
    "raises.py": ("x = 1\ny = x / 0\n", "line 2.*division by zero"),
    "syntax.py": ("x = 1\n\ndef f(:\n", "line 3.*SyntaxError"),
    "imports.py": ("import no_such_package\n", "line 1.*no_such_package"),
}


@pytest.fixture
def refused(command):
    """Runs a command that must be refused; its one line."""

    def run(*words: object) -> str:
        ended = command(*words)
        assert ended.code == 2, ended.err
        lines = ended.err.splitlines()
        assert len(lines) == 1, ended.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in ended.out + ended.err
        assert list(Path.cwd().rglob("*")) == [], "something was written"
        return lines[0]

    return run


def test_a_missing_file_and_the_nearest_there_is(refused, own_screen):
    line = refused("--data", own_screen.with_name("owm.h5ad"))
    assert line.endswith("owm.h5ad: there is no such file; did you mean 'own.h5ad'?")
    assert "no such file" in refused("--data", own_screen.with_name("nowhere") / "x.h5ad")


@pytest.mark.parametrize("kind", ["text", "empty", "folder", "hdf5"])
def test_a_file_that_is_not_h5ad(refused, tmp_path, kind):
    path = tmp_path / "table.h5ad"
    if kind == "folder":
        path.mkdir()
    elif kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["counts"] = np.zeros(3)
    else:
        path.write_text("a,b\n1,2\n" if kind == "text" else "")
    line = refused("--data", path)
    assert ("nor an h5ad" if kind == "folder" else "not an h5ad") in line
    if kind == "hdf5":
        assert "it has counts" in line


@pytest.mark.parametrize("flag", ["--perturbation-key", "--covariate-keys"])
def test_a_missing_obs_column_and_those_there_are(refused, small, flag):
    assert "obs has no column 'dose'; it has condition, cell_type" in refused(*small, flag, "dose")


def test_a_control_label_that_does_not_occur_and_the_nearest(refused, small):
    line = refused(*small, "--control", "Control")
    assert "no cell has obs['condition'] == 'Control'" in line
    assert "did you mean 'control'?" in line


def test_a_context_without_control_cells(refused, small, own_screen):
    data = ad.read_h5ad(own_screen)
    bare = (data.obs["cell_type"] == "line_b") & (data.obs["condition"] == "control")
    data[~bare].write_h5ad(own_screen)
    line = refused(*small, "--data", own_screen)
    assert "cell_type = line_b has no control cells" in line


def test_a_missing_label(refused, small, own_screen):
    data = ad.read_h5ad(own_screen)
    data.obs["condition"] = data.obs["condition"].astype(object)
    data.obs.loc[data.obs_names[7], "condition"] = np.nan
    data.write_h5ad(own_screen)
    assert f"missing in 1 cells (the first is {data.obs_names[7]})" in refused(*small, "--data", own_screen)


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "run"])
def test_nan_in_x_names_cell_and_gene(refused, small, own_screen, dry, request):
    if not dry:
        request.getfixturevalue("ray_session")  # found while blocks are read, after everything else was checked
    data = ad.read_h5ad(own_screen)
    data.X.data[data.X.indptr[5]] = np.nan
    gene = data.var_names[data.X.indices[data.X.indptr[5]]]
    data.write_h5ad(own_screen)
    line = refused(*small, "--data", own_screen, *["--dry-run"] * dry)
    assert f"NaN or infinite in 1 cells; the first is cell {data.obs_names[5]}, gene {gene}" in line


@pytest.mark.parametrize("flag", ["--set", "--grid"])
def test_an_unknown_path_and_the_nearest(refused, small, flag):
    line = refused(*small, flag, "training.epoch=3")
    assert "unknown path 'training.epoch': did you mean 'training.epochs'" in line
    assert "write it as PATH=VALUE" in refused(*small, flag, "training.epochs")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("training.epochs=many", "training.epochs='many': a whole number is needed"),
        ("training.epochs=0", "training.epochs=0: at least 1"),
        ("training.lr=-1", "training.lr=-1.0: above 0"),
        ("split.fraction=2", "split.fraction=2.0: a share between 0 and 1"),
        ("model.covariates=perhaps", "true or false"),
        ("dataset.normalize=log", "normalize='log': did you mean 'log1p'"),
    ],
)
def test_a_value_that_does_not_fit(refused, small, change, told):
    assert told in refused(*small, "--set", change)


def test_a_level_that_the_screen_cannot_reach_names_the_range(refused, small):
    line = refused(*small, "--set", "ablation.highest=0.2", "--grid", "ablation.level=0.9")
    assert "ablation.level=0.9: this screen reaches imbalance 0.000 to 0.2" in line
    assert "nearest" in line


def test_an_unknown_layer(refused, small):
    assert "no layer 'counts'" in refused(*small, "--layer", "counts")


def test_counts_that_are_to_be_used_as_they_are(refused, small):
    assert "use log1p" in refused(*small, "--normalize", "none", "--dry-run")


def test_a_results_folder_that_is_a_file(refused, small, tmp_path):
    place = tmp_path / "results"
    place.write_text("mine")
    assert f"--results {place}: {place} is a file" in refused(*small, "--results", place)
    assert place.read_text() == "mine"


def test_a_results_folder_that_cannot_be_written(refused, small):
    place = Path("/proc/self/results")  # root cannot write there either
    assert "cannot be written" in refused(*small, "--results", place)


def test_a_sweeps_own_folder_that_cannot_be_made(refused, small, tmp_path, ray_session):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "imbalance-small").write_text("mine")
    assert "cannot be written" in refused(*small, "--results", tmp_path / "out")


def test_a_plugin_that_is_not_there(refused, small):
    assert "--plugin mine.py: cannot be read (No such file" in refused(*small, "--plugin", "mine.py")


@pytest.mark.parametrize("name", BROKEN_PLUGINS)
def test_a_plugin_with_an_error_names_the_line(refused, small, tmp_path, name):
    source, told = BROKEN_PLUGINS[name]
    (tmp_path / name).write_text(source)
    line = refused(*small, "--plugin", tmp_path / name)
    assert re.search(told, line), line


def test_an_unknown_model_and_the_nearest(refused, small):
    assert "did you mean 'latent_additive'" in refused(*small, "--model", "latent_aditive")


def test_a_report_of_a_folder_that_is_no_sweep(command, tmp_path):
    from perturbray import cli

    def report():
        cli.command()

    ended = command("report", tmp_path, entry=report)
    assert ended.code == 2
    assert "holds no sweep.json" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["work"]
