"""`perturbray evaluate`: files give what cells in memory give, out of core, and bad input is one line."""

import subprocess
import sys
import textwrap

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbray.cli import command
from perturbray.errors import InputError
from perturbray.evaluate import Files, evaluate_files, summarise
from perturbray.metrics.conventions import evaluate

ROLES = {"perturbation_key": "condition", "control": "control", "covariate_keys": ("cell_type",)}


def screen(*, seed: int, cells: int = 12, genes: int = 25, counts: bool = False) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    labels = [
        (line, label) for line in ("a", "b_c") for label in ("control", "x", "y", "x+y", "z") for _ in range(cells)
    ]
    effect = {name: np.random.default_rng(i).normal(0, 0.7, genes) for i, name in enumerate("xyz")}
    none = np.zeros(genes)
    rates = np.array([2 * np.exp(sum((effect.get(p, none) for p in label.split("+")), none)) for _, label in labels])
    X = rng.poisson(rates).astype(np.float32)
    if not counts:
        X = np.log1p(100 * X / np.maximum(X.sum(axis=1, keepdims=True), 1)).astype(np.float32)
    order = rng.permutation(len(labels))
    obs = pd.DataFrame(labels, columns=["cell_type", "condition"]).iloc[order].reset_index(drop=True)
    obs.index = obs.index.astype(str)
    return ad.AnnData(sparse.csr_matrix(X[order]), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]))


FORMS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda X: X.toarray()}


def stored(table: ad.AnnData, path, form: str = "csr") -> str:
    table = table.copy()
    table.X = FORMS[form](table.X)
    table.write_h5ad(path)
    return str(path)


@pytest.fixture(scope="module")
def both():
    return screen(seed=1), screen(seed=2)


@pytest.mark.parametrize("convention", ["perturbray", "perturbench-2026", "cell-eval"])
@pytest.mark.parametrize("form", FORMS)
def test_files_give_what_cells_in_memory_give(both, tmp_path, monkeypatch, convention, form):
    monkeypatch.setattr("perturbray.evaluate.ROW_BYTES", 25 * 4 * 7)  # several chunks
    observed, predicted = both
    files = Files(
        observed=stored(observed, tmp_path / "o.h5ad"), predicted=stored(predicted, tmp_path / "p.h5ad", form), **ROLES
    )
    expected = evaluate(observed, predicted, convention=convention, **ROLES)
    found = evaluate_files(files, convention=convention)
    # The projection of perturbench-2026 runs in float32, in the order of the rows.
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-6, atol=1e-9)
    assert found.drop(columns="value").equals(expected.drop(columns="value"))


def test_genes_in_another_order_are_aligned_and_other_genes_are_refused(both, tmp_path):
    observed, predicted = both
    ours = stored(observed, tmp_path / "o.h5ad")
    shuffled = predicted[:, np.random.default_rng(0).permutation(predicted.n_vars)].copy()
    straight = evaluate_files(Files(observed=ours, predicted=stored(predicted, tmp_path / "p.h5ad"), **ROLES))
    turned = evaluate_files(Files(observed=ours, predicted=stored(shuffled, tmp_path / "q.h5ad"), **ROLES))
    np.testing.assert_allclose(turned["value"], straight["value"], rtol=1e-9, atol=1e-12)
    fewer = stored(predicted[:, 2:].copy(), tmp_path / "r.h5ad")
    with pytest.raises(InputError, match=r"r\.h5ad: its genes are not those.*only there: g0, g1"):
        evaluate_files(Files(observed=ours, predicted=fewer, **ROLES))


def test_counts_are_refused_without_normalize_and_scaled_alike_with_it(tmp_path):
    observed, predicted = screen(seed=1, counts=True), screen(seed=2, counts=True)
    files = {
        "observed": stored(observed, tmp_path / "o.h5ad"),
        "predicted": stored(predicted, tmp_path / "p.h5ad"),
        **ROLES,
    }
    with pytest.raises(InputError, match=r"raw counts.*--normalize"):
        evaluate_files(Files(**files))
    totals = np.asarray(observed.X.sum(axis=1)).ravel()
    depth = np.median(totals[totals > 0])
    for table in (observed, predicted):
        X = table.X.toarray()
        scale = depth / np.maximum(X.sum(axis=1, dtype=float), 1)
        table.X = sparse.csr_matrix(np.log1p(X * scale[:, None]).astype(np.float32))
    found = evaluate_files(Files(**files, normalize=True))
    expected = evaluate(observed, predicted, **ROLES)
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-4, atol=1e-6)
    assert found.attrs["target_depth"] == depth
    lognormed = {**files, "predicted": stored(predicted, tmp_path / "l.h5ad")}
    with pytest.raises(InputError, match=r"l\.h5ad: --normalize takes counts, and X looks log-normalised"):
        evaluate_files(Files(**lognormed, normalize=True))


def test_training_cells_give_the_centre_and_the_space(both, tmp_path):
    observed, predicted = both
    files = {
        "observed": stored(observed, tmp_path / "o.h5ad"),
        "predicted": stored(predicted, tmp_path / "p.h5ad"),
        **ROLES,
    }
    training = screen(seed=9)
    found = evaluate_files(Files(**files, training=stored(training, tmp_path / "t.h5ad")))
    expected = evaluate(observed, predicted, training=training, **ROLES)
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-6, atol=1e-9)
    assert found.attrs["pca_fitted_on"] == "training cells"
    assert evaluate_files(Files(**files)).attrs["pca_fitted_on"] == "observed cells"


@pytest.mark.parametrize(("convention", "mean"), [("perturbray", "macro"), ("perturbench-2026", "pooled")])
def test_the_summary_is_the_conventions_own_mean(both, convention, mean):
    table = evaluate(*both, convention=convention, **ROLES)
    summary = summarise(table, covariate_keys=("cell_type",), convention=convention)
    assert list(summary.columns[:2]) == ["metric", "value"]
    np.testing.assert_array_equal(summary["value"], summary[mean])


def test_the_mean_of_cell_eval_is_nan_where_one_condition_is(both):
    table = evaluate(*both, convention="cell-eval", **ROLES)
    table.loc[table.index[0], "value"] = np.nan
    summary = summarise(table, covariate_keys=("cell_type",), convention="cell-eval").set_index("metric")["value"]
    assert np.isnan(summary[table["metric"].iloc[0]])


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["perturbray", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command()
    return ended.value.code


def test_the_command_writes_its_four_files_and_prints_the_summary(both, tmp_path, monkeypatch, capsys):
    paths = [stored(table, tmp_path / f"{i}.h5ad") for i, table in enumerate(both)]
    out = tmp_path / "out"
    assert run(monkeypatch, *paths, "--covariate-keys", "cell_type", "--out", out) == 0
    assert {p.name for p in out.iterdir()} == {"metrics.parquet", "metrics.csv", "summary.csv", "report.html"}
    columns = ["cell_type", "condition", "metric", "value", "status", "n_obs", "n_pred", "convention"]
    assert list(pd.read_csv(out / "metrics.csv").columns) == columns
    assert list(pd.read_csv(out / "summary.csv").columns) == ["metric", "value"]
    assert "rmse/average" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--control", "contrl"], "'contrl'"),
        (["--perturbation-key", "conditon"], "obs has no column 'conditon'; it has cell_type, condition"),
        (["--convention", "cell_eval"], "did you mean 'cell-eval'"),
        (["--covariate-keys", "line"], "obs has no column 'line'"),
        (["--convention", "cell-eval", "--training", "0.h5ad"], "--training is of use to convention perturbray alone"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(both, tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.chdir(tmp_path)
    paths = [stored(table, tmp_path / f"{i}.h5ad") for i, table in enumerate(both)]
    assert run(monkeypatch, *paths, "--covariate-keys", "cell_type", "--out", "out", *change) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "out").exists()


PEAK = """
    import sys, threading, time, re
    from perturbray.evaluate import Files, evaluate_files
    import perturbray.metrics
    def private():  # pages that are this process's own: a mapped file is the page cache's
        text = open("/proc/self/smaps_rollup").read()
        return int(re.search(r"Anonymous: *(\\d+)", text).group(1))
    before, peak = private(), [0]
    def watch():
        while True:
            peak[0] = max(peak[0], private())
            time.sleep(0.01)
    threading.Thread(target=watch, daemon=True).start()
    evaluate_files(Files(observed=sys.argv[1], predicted=sys.argv[2], perturbation_key="condition", control="control",
                         covariate_keys=("cell_type",)), convention="perturbench-2024")
    print((peak[0] - before) / 1024, "torch" in sys.modules, "ray" in sys.modules)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cells_and_neither_torch_nor_ray_is_imported(tmp_path, monkeypatch):
    peaks = []
    for cells in (2000, 6000):
        paths = [
            stored(screen(seed=i, cells=cells, genes=400), tmp_path / f"{cells}-{i}.h5ad", "dense") for i in (1, 2)
        ]
        answer = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PEAK), *paths], capture_output=True, text=True, check=True
        )
        peak, torch, ray = answer.stdout.split()
        assert (torch, ray) == ("False", "False")
        peaks.append(float(peak))
    # Three times the cells: 64 MB more of dense rows a side, were they held.
    assert peaks[1] < peaks[0] + 40
