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
from perturbray.evaluate import Files, evaluate_files, judge_files, summarise
from perturbray.metrics.calibration import calibrate
from perturbray.metrics.conventions import evaluate, judge
from perturbray.results.calibration import COLUMNS, INTERVALS

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
        judge_files(Files(observed=ours, predicted=fewer, **ROLES))


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
    ours = {"metrics.parquet", "metrics.csv", "summary.csv", "report.html"}
    assert {p.name for p in out.iterdir()} == ours | {"calibration.csv", "strata.csv"}
    columns = ["cell_type", "condition", "metric", "value", "status", "n_obs", "n_pred", "convention"]
    assert list(pd.read_csv(out / "metrics.csv").columns) == columns
    assert list(pd.read_csv(out / "summary.csv").columns) == ["metric", "value"]
    said = capsys.readouterr().out
    assert "rmse/average" in said
    assert "calibration: split 5 of 5" in said
    known = pd.read_csv(out / "calibration.csv")
    assert list(known.columns) == COLUMNS
    assert list(known["metric"]) == list(pd.read_csv(out / "summary.csv")["metric"])
    assert run(monkeypatch, *paths, "--covariate-keys", "cell_type", "--out", out, "--no-calibration") == 0
    assert {p.name for p in out.iterdir()} == ours
    assert "calibration" not in capsys.readouterr().out


def judged(tmp_path, observed, predicted, **options):
    paths = {"observed": observed, "predicted": predicted}
    files = {
        name: stored(table, tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}.h5ad") for name, table in paths.items()
    }
    return judge_files(Files(**files, **ROLES), **options)


@pytest.fixture(scope="module")
def large():
    """Enough conditions for intervals, and enough cells for an effect."""
    return wide(seed=1), wide(seed=2)


def wide(*, seed: int) -> ad.AnnData:
    """Ten perturbations in two contexts; another seed, other cells of the same conditions."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(77)
    labels = [(line, label) for line in "ab" for label in ("control", *(f"p{i}" for i in range(10))) for _ in range(24)]
    base = truth.gamma(2, 2, 30)
    effect = {f"p{i}": np.where(truth.random(30) < 0.4, truth.normal(0, 1, 30), 0) for i in range(10)} | {
        "control": np.zeros(30)
    }
    X = rng.poisson(np.array([base * np.exp(effect[label]) for _, label in labels]))
    X = np.log1p(100 * X / np.maximum(X.sum(axis=1, keepdims=True), 1)).astype(np.float32)
    obs = pd.DataFrame(labels, columns=["cell_type", "condition"], index=[str(i) for i in range(len(labels))])
    return ad.AnnData(sparse.csr_matrix(X), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(30)]))


@pytest.fixture(scope="module")
def calibrated(large, tmp_path_factory):
    return judged(tmp_path_factory.mktemp("large"), *large)


def test_files_are_calibrated_as_cells_in_memory(large, calibrated):
    _, results = judge(*large, **ROLES)
    metrics = [metric for metric in results.metrics if metric.name in ("rmse/average", "cosine/logfc", "energy/pca")]
    expected = calibrate(results.prediction, results.comparison, metrics).set_index("metric")
    found = calibrated.calibration.set_index("metric").loc[expected.index]
    # one context is as large as the other, so that the mean over contexts is that over conditions
    for ours, theirs in (
        ("half", "model"),
        ("mean_response", "baseline"),
        ("split_half", "replicate"),
        ("scaled", "scaled"),
    ):
        np.testing.assert_allclose(found[ours], expected[theirs], rtol=1e-9)
    for name in ("dynamic_range", "better"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9)
    assert (found["weak"].astype(bool) == expected["weak"]).all()


def test_another_sample_of_the_cells_scores_as_a_replicate_and_the_control_as_none(large, calibrated, tmp_path):
    known = calibrated.calibration.set_index("metric")
    for name in ("rmse/average", "cosine/delta_ctrl", "cosine/logfc", "energy/pca", "rmse/average/rank"):
        assert known.loc[name, "scaled"] > 0.9, name
        assert known.loc[name, "verdict"] == "better"
        assert known.loc[name, "low"] <= known.loc[name, "value"] <= known.loc[name, "high"]
    observed, X = large[0], large[0].X.toarray()
    line, label = (observed.obs[name].to_numpy() for name in ("cell_type", "condition"))
    for context, name in set(zip(line, label, strict=True)):
        X[(line == context) & (label == name)] = observed.X[(line == context) & (label == "control")].toarray()
    still = ad.AnnData(sparse.csr_matrix(X), obs=observed.obs, var=observed.var)
    unmoved = judged(tmp_path, observed, still).calibration.set_index("metric")
    for name in ("rmse/average", "cosine/logfc", "energy/pca"):
        assert unmoved.loc[name, "half"] == pytest.approx(unmoved.loc[name, "no_change"], rel=1e-6, abs=1e-9), name
        assert unmoved.loc[name, "scaled"] < 0.1


def test_values_and_calibration_do_not_depend_on_the_order_of_cells(large, calibrated, tmp_path):
    turned = [table[np.random.default_rng(3).permutation(table.n_obs)].copy() for table in large]
    again = judged(tmp_path, *turned)
    for ours, theirs in ((again.calibration, calibrated.calibration), (again.strata, calibrated.strata)):
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-7, atol=1e-9)


def test_other_conventions_have_intervals_and_strata_and_no_anchors(large, tmp_path):
    found = judged(tmp_path, *large, convention="cell-eval")
    assert list(found.calibration.columns) == INTERVALS
    mse = found.values[found.values["metric"] == "mse"]
    row = found.calibration.set_index("metric").loc["mse"]
    assert row["value"] == pytest.approx(mse["value"].mean())
    assert row["low"] < row["value"] < row["high"]
    strata = found.strata[found.strata["metric"] == "mse"]
    assert strata.groupby("by")["conditions"].sum().to_dict() == {"de_genes": 20, "effect": 20}
    thirds = strata[strata["by"] == "effect"]
    assert (thirds["mean"] * thirds["conditions"]).sum() / 20 == pytest.approx(mse["value"].mean())


def test_strata_are_those_of_the_observed_cells_whatever_is_predicted(large, calibrated, tmp_path):
    worse = large[1].copy()
    worse.X = worse.X[np.random.default_rng(0).permutation(worse.n_obs)]
    other = judged(tmp_path, large[0], worse, convention="perturbench-2024").strata
    for by in ("effect", "de_genes"):
        one, two = (
            frame[frame["by"] == by].drop_duplicates("stratum")[["stratum", "low", "high"]].reset_index(drop=True)
            for frame in (calibrated.strata, other)
        )
        pd.testing.assert_frame_equal(one, two)


def test_a_target_sum_that_the_file_records_is_used(large, tmp_path):
    told = large[0].copy()
    told.uns["target_sum"] = 1234.0
    assert judged(tmp_path, told, large[1], calibration=False).values.attrs["target_sum"] == 1234.0
    assert judged(tmp_path, *large, calibration=False).values.attrs["target_sum"] == pytest.approx(100, rel=1e-4)


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
    from perturbray.evaluate import Files, judge_files
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
    judge_files(Files(observed=sys.argv[1], predicted=sys.argv[2], perturbation_key="condition", control="control",
                         covariate_keys=("cell_type",)), convention=sys.argv[3])
    print((peak[0] - before) / 1024, "torch" in sys.modules, "ray" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("convention", ["perturbench-2024", "perturbray"])
def test_memory_does_not_grow_with_the_cells_and_neither_torch_nor_ray_is_imported(tmp_path, convention):
    peaks = []
    for cells in (2000, 6000):
        paths = [
            stored(screen(seed=i, cells=cells, genes=400), tmp_path / f"{cells}-{i}.h5ad", "dense") for i in (1, 2)
        ]
        answer = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PEAK), *paths, convention],
            capture_output=True,
            text=True,
            check=True,
        )
        peak, torch, ray = answer.stdout.split()
        assert (torch, ray) == ("False", "False")
        peaks.append(float(peak))
    # Three times the cells: 64 MB more of dense rows a side, were they held.
    assert peaks[1] < peaks[0] + 40
