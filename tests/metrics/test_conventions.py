import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbray.errors import InputError
from perturbray.metrics import CONVENTIONS, aggregate, evaluate
from perturbray.metrics.cells import compare
from perturbray.metrics.standard import prediction_of
from perturbray.metrics.upstream import against_baseline
from perturbray.metrics.weights import gene_weights, pooled

everything = pytest.mark.parametrize("name", list(CONVENTIONS))


def scored(case, convention: str, **options) -> pd.DataFrame:
    return evaluate(
        case.observed,
        case.predicted,
        perturbation_key="condition",
        control="control",
        covariate_keys=case.covariates,
        convention=convention,
        **options,
    )


PERTURBENCH = {
    ("average", "rmse"): (1e-9, 1e-6),
    ("logfc", "cosine"): (1e-9, 1e-6),
    ("pca_average", "cosine"): (1e-5, 1e-5),
    ("pca", "mmd"): (2e-4, 2e-4),
    ("none", "mmd"): (2e-4, 2e-4),
    ("scores", "r2_score"): (1e-5, 1e-5),
    ("scores", "top_k_recall"): (0.1 + 1e-9, 1e-9),
}


def test_perturbench_2026_is_reproduced(case):
    got = scored(case, "perturbench-2026")
    got["context"] = got[case.covariates].agg("_".join, axis=1)
    got = got.set_index(["metric", "context", "condition"])["value"]
    expected = case.expected("expected_perturbench_2026.csv").set_index(["context", "condition"])
    for (aggregation, score), tolerance in PERTURBENCH.items():
        part = expected[(expected["aggregation"] == aggregation) & (expected["metric"] == score)]
        value = got[f"{score}_{aggregation}"].loc[part.index]
        np.testing.assert_allclose(value, part["value"], atol=tolerance[0 if case.exact else 1], err_msg=score)
        if score in ("r2_score", "top_k_recall"):  # noise of float32 scores, and many ties
            assert value.mean() == pytest.approx(part["value"].mean(), abs=0.05)
            continue
        allowed = 1 / (part["n_candidates"] - 1) if score == "mmd" else 1e-12
        for form in ("rank", "rank_transpose"):
            rank = got[f"{score}_{form}_{aggregation}"].loc[part.index]
            assert ((rank - part[f"{form}_half_ties"]).abs() <= allowed + 1e-12).all(), (score, form)


def test_the_matrix_behind_every_perturbench_rank_is_reproduced(case):
    pairs = case.expected("expected_perturbench_2026_pairwise.csv.gz")
    prediction = case.prediction()
    names = {"_".join(context): code for code, context in enumerate(prediction.contexts)}
    row = {(c, p): i for i, (c, p) in enumerate(zip(prediction.context, prediction.perturbation, strict=True))}
    part = pairs[(pairs["aggregation"] == "average") & (pairs["metric"] == "rmse")]
    columns = [c for c in part.columns if c not in ("context", "aggregation", "metric")]
    predicted, observed, value = columns[:3]
    codes = [names[context] for context in part["context"]]
    i = [row[pair] for pair in zip(codes, part[predicted].astype(str), strict=True)]
    j = [row[pair] for pair in zip(codes, part[observed].astype(str), strict=True)]
    difference = prediction.predicted.mean[i] - prediction.observed.mean[j]
    np.testing.assert_allclose(np.sqrt((difference**2).mean(axis=1)), part[value], atol=1e-9 if case.exact else 1e-6)


def test_perturbench_2024_divides_by_n(case):
    old, new = (
        scored(case, name).set_index(["metric", *case.covariates, "condition"]).sort_index()
        for name in ("perturbench-2024", "perturbench-2026")
    )
    for score, aggregation in (("rmse", "average"), ("cosine", "logfc")):
        n = old.loc[f"{score}_{aggregation}"].groupby(case.covariates)["value"].transform("size")
        rank = new.loc[f"{score}_rank_{aggregation}", "value"]
        np.testing.assert_allclose(old.loc[f"{score}_rank_{aggregation}", "value"], rank * (n - 1) / n, atol=1e-12)
    assert not any("transpose" in metric for metric in old.index.unique("metric"))


def test_cell_eval_is_reproduced_with_its_undefined_cells(case):
    expected = case.expected("expected_cell_eval.csv").rename(columns={"perturbation": "condition"})
    keys = [*(key for key in case.covariates if key in expected), "condition"]
    got = scored(case, "cell-eval").set_index(["metric", *keys])["value"]
    expected = expected.set_index(keys).drop(columns="clustering_agreement")
    for column in expected:
        tolerance = 1e-9 if case.exact else 1e-5 if column == "pearson_edistance" else 1e-6
        if column.startswith("discrimination"):
            tolerance = 1e-12
        np.testing.assert_allclose(
            got[column].loc[expected.index], expected[column], atol=tolerance, equal_nan=True, err_msg=column
        )
    assert set(expected) <= set(got.index.unique("metric"))


@everything
def test_every_convention_returns_the_same_columns(shuffled, name):
    table = scored(shuffled, name)
    columns = ["cell_type", "condition", "metric", "value", "status", "n_obs", "n_pred", "convention"]
    assert list(table.columns) == columns
    assert (table["convention"] == name).all()
    assert table.attrs["version"] == CONVENTIONS[name].version
    assert table.groupby("metric").size().eq(10).all()
    undefined = table["value"].isna()
    assert (table["status"][undefined] != "").all()
    assert table.groupby(["condition"])["n_obs"].first().sum() + 81 == 1000


def small(seed: int = 0, *, genes: int = 40, form=sparse.csr_matrix, contexts=("a", "b")):
    rng = np.random.default_rng(seed)
    names = ["control", "G1", "G2", "G1+G2", "G3", "drug"]
    labels = np.repeat(names, 25).tolist() * len(contexts)
    base = np.random.default_rng(99).gamma(1.0, 1.0, genes)
    shift = {name: np.where(np.random.default_rng(i).random(genes) < 0.3, 2.5, 1.0) for i, name in enumerate(names)}
    shift["control"] = np.ones(genes)
    X = np.log1p(np.stack([rng.poisson(base * shift[label]) for label in labels]) * 1.3)
    obs = pd.DataFrame({"perturbation": labels, "cell_type": np.repeat(contexts, 150)})
    obs.index = [f"cell {i}" for i in range(len(obs))]
    return anndata.AnnData(X=form(X), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(genes)]))


OPTIONS = {"perturbation_key": "perturbation", "control": "control", "covariate_keys": ["cell_type"]}
KEYS = ["metric", "cell_type", "perturbation"]


def both(name, observed, predicted, **options) -> pd.Series:
    return evaluate(observed, predicted, convention=name, **OPTIONS, **options).set_index(KEYS)["value"]


@everything
def test_sparse_and_dense_cells_get_equal_values(name):
    expected = both(name, small(0), small(1))
    got = both(name, small(0, form=np.asarray), small(1, form=np.asarray))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@everything
def test_the_order_of_cells_and_genes_does_not_matter(name):
    observed, predicted = small(0), small(1)
    expected = both(name, observed, predicted)
    rng = np.random.default_rng(0)
    order, columns = rng.permutation(observed.n_obs), rng.permutation(observed.n_vars)
    turned = predicted[order][:, columns].copy()
    got = both(name, observed[:, columns].copy(), turned).loc[expected.index]
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9)


@everything
def test_other_conditions_do_not_change_a_score(name):
    """Ranks aside, which are about the others, and numbers that a convention repeats in all rows of a context."""
    observed, predicted = small(0), small(1)
    kept = np.asarray(observed.obs["perturbation"] != "G3")
    options = {"cells": False} if name == "perturbray" else {}  # the PCA is that of all observed cells
    expected, got = both(name, observed, predicted, **options), both(name, observed[kept], predicted[kept], **options)
    shared = ("rank", "discrimination", "pds", "pearson_edistance", "de_spearman_sig", "pca", "delta_mean", "wmse")
    metrics = [m for m in expected.index.unique("metric") if not any(word in m for word in shared)]
    expected = expected.loc[metrics].drop("G3", level="perturbation")
    np.testing.assert_allclose(got.loc[expected.index], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["perturbench-2024", "perturbench-2026"])
def test_conditions_that_perturbench_drops_are_reported(name):
    observed, predicted = small(0), small(1)
    predicted = predicted[predicted.obs["perturbation"] != "G3"]
    table = evaluate(observed, predicted, convention=name, **OPTIONS)
    lost = table[table["perturbation"] == "G3"]
    assert (lost["status"] == "missing_prediction").all()
    assert lost["value"].isna().all()
    kept = both(name, observed[observed.obs["perturbation"] != "G3"], predicted)
    same = [m for m in kept.index.unique("metric") if "pca" not in m]
    got = table.set_index(KEYS)["value"]
    np.testing.assert_allclose(got.loc[kept.loc[same].index], kept.loc[same], rtol=1e-9, atol=1e-12)


def test_control_noise_gives_flat_predictions_the_variance_of_cells():
    observed, predicted = small(0), small(1)
    X = predicted.X.toarray()
    for label in set(predicted.obs["perturbation"]):
        rows = np.asarray(predicted.obs["perturbation"] == label)
        X[rows] = X[rows].mean(axis=0)
    predicted.X = X
    flat, noisy = (
        evaluate(observed, predicted, noise=noise, controls="reference", **OPTIONS).set_index("metric")
        for noise in ("none", "control_residual")
    )
    assert (flat.loc["energy/pca", "status"] == "degenerate_variance").all()
    assert (noisy.loc["energy/pca", "status"] == "").all()
    assert (noisy.loc["energy/pca", "value"] < flat.loc["energy/pca", "value"]).all()
    np.testing.assert_array_equal(noisy.loc["rmse/average", "value"], flat.loc["rmse/average", "value"])
    with pytest.raises(InputError, match="control_residual"):
        evaluate(observed, predicted, noise="some", **OPTIONS)


def test_a_missing_condition_is_an_error_unless_it_may_fail():
    observed, predicted = small(0), small(1)
    predicted = predicted[predicted.obs["perturbation"] != "G3"].copy()
    with pytest.raises(InputError, match="a, G3"):
        evaluate(observed, predicted, **OPTIONS)
    table = evaluate(observed, predicted, failed="worst", **OPTIONS)
    lost = table[table["perturbation"] == "G3"].set_index("metric")
    assert lost.loc["cosine/delta_ctrl", "value"].tolist() == [-1, -1]
    assert lost.loc["rmse/average/rank", "value"].tolist() == [1, 1]
    assert lost.loc["rmse/average", "value"].tolist() == [np.inf, np.inf]
    assert lost.loc["energy/pca", "value"].tolist() == [np.inf, np.inf]
    assert (lost.loc["pr_auc/wilcoxon", "status"] == "failed_prediction").all()


def test_a_condition_predicted_with_nan_is_an_error_unless_it_may_fail():
    observed, predicted = small(0), small(1)
    X = predicted.X.toarray()
    X[np.flatnonzero(predicted.obs["perturbation"] == "G2")[3], 5] = np.nan
    predicted.X = X
    with pytest.raises(InputError, match="NaN or infinity in 1 conditions: a, G2"):
        evaluate(observed, predicted, **OPTIONS)
    table = evaluate(observed, predicted, failed="worst", **OPTIONS).set_index(["metric", "perturbation"]).sort_index()
    clean = evaluate(observed, small(1), **OPTIONS).set_index(["metric", "perturbation"]).sort_index()
    lost = table.loc[("cosine/delta_ctrl", "G2")]
    assert lost["status"].tolist() == ["failed_prediction", ""]
    assert lost["value"].tolist()[0] == -1
    for metric in ("cosine/delta_ctrl", "energy/genes", "pr_auc/wilcoxon"):
        kept = [(metric, name) for name in ("G1", "G3", "G1+G2", "drug")]
        np.testing.assert_allclose(table.loc[kept, "value"], clean.loc[kept, "value"], rtol=1e-12)


def test_own_controls_are_needed_where_a_convention_subtracts_them():
    predicted = small(1)
    predicted = predicted[predicted.obs["perturbation"] != "control"].copy()
    with pytest.raises(InputError, match="own control"):
        evaluate(small(0), predicted, convention="cell-eval", **OPTIONS)
    assert evaluate(small(0), predicted, **OPTIONS).attrs["controls"] == "reference"


def test_own_controls_are_used_where_they_are_other_cells():
    observed = small(0)
    assert evaluate(observed, small(1), cells=False, **OPTIONS).attrs["controls"] == "own"
    predicted = small(1)
    rows = np.asarray(predicted.obs["perturbation"] == "control")
    X = predicted.X.toarray()
    X[rows] = observed.X.toarray()[rows]
    predicted.X = X
    table = evaluate(observed, predicted, cells=False, **OPTIONS)
    assert table.attrs["controls"] == "reference"
    assert table.attrs["shared_control_cosine"] == pytest.approx(0.5)


def test_an_unknown_convention_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match="perturbench-2026"):
        evaluate(small(0), small(1), convention="perturbench-2025", **OPTIONS)


def test_an_option_that_a_convention_does_not_have_is_refused():
    with pytest.raises(InputError, match="'cell-eval' has no option 'training'"):
        evaluate(small(0), small(1), convention="cell-eval", training=small(2), **OPTIONS)
    with pytest.raises(InputError, match="did you mean 'training'"):
        evaluate(small(0), small(1), trainin=small(2), **OPTIONS)


def test_training_cells_give_the_centre_and_the_space():
    observed, predicted, training = small(0), small(1), small(2)
    table = evaluate(observed, predicted, training=training, training_control="control", **OPTIONS)
    assert table.attrs["pca_fitted_on"] == "training cells"
    other = evaluate(observed, predicted, **OPTIONS)
    changed = table.set_index(KEYS)["value"] - other.set_index(KEYS)["value"]
    assert changed.loc["pearson/delta_mean"].abs().min() > 0
    assert changed.loc["pearson/delta_ctrl"].abs().max() == 0


def test_the_mean_over_contexts_and_the_mean_over_conditions_are_both_given():
    table = pd.DataFrame(
        {
            "cell_type": ["a", "a", "a", "b", "b"],
            "metric": "m",
            "value": [1.0, 2.0, 3.0, 10.0, np.nan],
            "status": ["", "", "", "failed_prediction", "constant_truth"],
        }
    )
    row = aggregate(table, ["cell_type"]).iloc[0]
    assert row["macro"] == 6
    assert row["pooled"] == 4
    assert (row["median"], row["n_scored"], row["n_undefined"], row["n_failed"]) == (2.5, 4, 1, 1)
    table.loc[0, "value"] = np.inf
    assert aggregate(table, ["cell_type"])["macro"][0] == np.inf


def test_scores_against_a_baseline_are_clipped_at_it():
    assert against_baseline(0.5, 1.0, best=0) == 0.5
    assert against_baseline(2.0, 1.0, best=0) == 0
    assert against_baseline(0.75, 0.5, best=1) == 0.5
    assert against_baseline(np.nan, 0.5, best=1) == 0
    assert against_baseline(0.1, 0.0, best=0) == 0


def test_gene_weights_are_the_squared_scaled_t_against_the_other_perturbations():
    comparison = compare(small(0), small(1), **OPTIONS)
    weights = gene_weights(comparison)
    assert weights.shape == (10, 40)
    assert (weights.max(axis=1) == 1).all()
    assert (weights.min(axis=1) == 0).all()
    parts = [comparison.observed.of(row) for row in (1, 2, 3, 4)]
    together = np.concatenate(parts)
    mean, variance, _ = pooled(
        np.stack([x.mean(0) for x in parts]), np.stack([x.var(0, ddof=1) for x in parts]), np.array([25] * 4)
    )
    np.testing.assert_allclose(mean, together.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, together.var(0, ddof=1), rtol=1e-12)
    x = comparison.observed.of(0)
    spread = np.sqrt(x.var(0, ddof=1) / 25 + variance / 25)
    t = np.abs(x.mean(0) - mean) / np.where(spread > 0, spread, 1)  # a silent gene has t = 0
    np.testing.assert_allclose(weights[0], ((t - t.min()) / (t.max() - t.min())) ** 2, rtol=1e-9)


def test_a_prediction_of_two_files_holds_their_means():
    comparison = compare(small(0), small(1), **OPTIONS)
    prediction = prediction_of(comparison)
    np.testing.assert_allclose(prediction.predicted.mean[3], comparison.predicted.of(3).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        prediction.predicted.linear[3], np.expm1(comparison.predicted.of(3)).mean(axis=0), rtol=1e-12
    )
    assert prediction.cells.predicted[3].shape == (25, 40)
