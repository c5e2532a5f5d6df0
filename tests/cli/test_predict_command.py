"""`perturbray predict`: from a sweep that keeps its models to a file of cells that `evaluate` reads, and a ranking."""

from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

from perturbray import cli
from perturbray.results import table


def test_models_that_a_sweep_keeps_predict_what_nobody_measured(command, small, small_screen, ray_session):
    words = [*small, "--smoke", "--set", "training.epochs=1", "--model", "latent_additive"]
    folder = Path("results/imbalance-smoke-small")
    assert command(*words).code == 0
    assert not (folder / "models").exists()
    kept = command(*words, "--keep-models")
    assert kept.code == 0
    assert "8 trials: 0 finished before, 8 to run" in kept.out, "a result without its model is not enough"
    assert {path.stem for path in (folder / "models").iterdir()} == table.finished(folder)
    assert "nothing to run" in command(*words, "--keep-models").out

    results = table.read(folder)
    keys = results[results["model"] == "latent_additive"]["key"].unique()
    models = [folder / "models" / f"{key}.pt" for key in keys]
    Path("asked.csv").write_text("condition,cell_type\ndrug_001+drug_002,line_a\ndrug_003,line_c\n")
    common = ["--controls", small_screen, "--cells", "20"]
    ended = command(
        "predict", models[0], *common, "--conditions", "asked.csv", "--out", "p/cells.h5ad", entry=cli.command
    )
    assert (ended.code, ended.err) == (0, "")
    cells = ad.read_h5ad("p/cells.h5ad")
    assert cells.obs.groupby(["cell_type", "condition"], observed=True).size().to_dict() == {
        ("line_a", "control"): 20,
        ("line_a", "drug_001+drug_002"): 20,
        ("line_b", "control"): 20,
        ("line_c", "control"): 20,
        ("line_c", "drug_003"): 20,
    }
    ended = command("predict", *models, *common, "--all-pairs", "--out", "pairs.csv", entry=cli.command)
    assert (ended.code, ended.err) == (0, "")
    pairs = pd.read_csv("pairs.csv")
    assert len(pairs) == 3 * 10 * 9 // 2
    assert f"{len(pairs)} pairs of 2 fitted model(s) in pairs.csv" in ended.out
    assert pairs["spread"].min() > 0
    scored = command(
        "evaluate", "p/cells.h5ad", "p/cells.h5ad", "--covariate-keys", "cell_type", "--out", "e", entry=cli.command
    )
    assert scored.code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.pt", "--conditions", "t.csv", "--out", "x.csv"], r"--out x.csv: name a file that ends in .h5ad"),
        (["a.pt", "--all-pairs", "--out", "x.h5ad"], "--out x.h5ad: name a file that ends in .csv or .parquet"),
        (["a.pt", "b.pt", "--conditions", "t.csv", "--out", "x.h5ad"], "--conditions takes one CHECKPOINT"),
        (["a.pt", "--conditions", "t.csv", "--out", "x.h5ad", "--rank-by", "effect"], "go with --all-pairs"),
        (["a.pt", "--all-pairs", "--cells", "0", "--out", "x.csv"], "--cells 0: at least 1"),
        (["a.pt", "--all-pairs", "--out", "x.csv"], "a.pt: there is no such file"),
        (["a.pt", "--out", "x.csv"], "one of the arguments --conditions --all-pairs is required"),
    ],
)
def test_a_mistake_is_told_in_one_line(command, words, message):
    ended = command("predict", *words, "--controls", "c.h5ad", entry=cli.command)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
