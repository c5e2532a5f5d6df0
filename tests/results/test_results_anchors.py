"""Floor, ceiling and scaled scores: the formulas, and that nothing is claimed where the data do not carry it."""

import numpy as np
import pandas as pd
import pytest
from fake_sweep import MODELS, anchored_sweep, fake_sweep
from test_results_report import Page

from perturbray.metrics import calibration
from perturbray.results import anchors, plots, table
from perturbray.results.cube import texts
from perturbray.results.report import write_report
from perturbray.results.sections import controls
from perturbray.results.summary import summarise

RMSE, COSINE = "rmse/average", "cosine/logfc_logmean"


def long(values, *, metric=COSINE, contexts=1, level=0.0, seed=0, status="", **columns):
    """Rows of models: name -> (contexts * perturbations,) values, which stand as ``value_half`` too."""
    parts = []
    for model, value in values.items():
        value = np.asarray(value, float)
        context, perturbation = np.divmod(np.arange(len(value)), len(value) // contexts)
        parts.append(
            pd.DataFrame(
                {
                    **{"key": f"{model}-{level}-{seed}-{metric}", "name": model, "model": model, "seed": seed},
                    **{"ablation.level": level, "covariate.cell_type": context.astype(str), "stratum": "common"},
                    **{"perturbation": perturbation.astype(str), "metric": metric, "condition": np.arange(len(value))},
                    **{"value": value, "value_half": value, "status": status, **columns},
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def beside(values, **options):
    """Anchors: reference -> values."""
    names = ["reference", "covariate.cell_type", "perturbation", "stratum", "metric", "condition", "value", "seed"]
    return long(values, **options).rename(columns={"model": "reference"})[names]


def summary_of(rows, found):
    plan = {"name": "test", "baselines": ["perturbed_mean"], "trials": [], "metrics": METRICS}
    return summarise(rows, plan, anchors=found, resamples=50)


METRICS = [
    {"name": COSINE, "higher_is_better": True, "best": 1.0, "chance": None},
    {"name": RMSE, "higher_is_better": False, "best": 0.0, "chance": None},
]


def drawn(number=40, seed=0):
    rng = np.random.default_rng(seed)
    b = rng.normal(0.2, 0.05, number)
    return b + rng.normal(0.2, 0.05, number), b, b + rng.normal(0.4, 0.1, number), b + rng.normal(0.45, 0.1, number)


@pytest.mark.parametrize("metric", [COSINE, RMSE])
def test_the_formulas_are_those_of_the_calibration_on_arrays(metric):
    u, b, r, positive = drawn()
    if metric == RMSE:
        u, b, r, positive = (1 - values for values in (u, b, r, positive))
    rows = long({"model": u, "perturbed_mean": b}, metric=metric)
    found = summary_of(rows, beside({"split_half": r, "interpolated_duplicate": positive}, metric=metric)).anchors
    higher = metric == COSINE
    expected, status = calibration.scaled_score(u, b, r, higher_is_better=higher)
    row = found.scaled.set_index("series").loc["model"]
    assert status == row["scaled_status"] == ""
    assert row["scaled"] == pytest.approx(expected, abs=1e-12)
    assert row[["half", "baseline_half", "replicate_half"]].to_list() == pytest.approx([u.mean(), b.mean(), r.mean()])
    bounds = found.bounds.iloc[0]
    assert bounds["dynamic_range"] == pytest.approx(
        calibration.dynamic_range_fraction(positive, b, best=1.0 if higher else 0.0)[1]
    )
    assert bounds["better"] == calibration.better_share(positive, b, higher_is_better=higher)
    assert (anchors.WEAK_RANGE, anchors.WEAK_BETTER) == (calibration.WEAK_RANGE, calibration.WEAK_BETTER)
    assert anchors.FEWEST == calibration.FEWEST


def test_the_baseline_scores_zero_the_replicate_one_and_nothing_is_clipped():
    _, b, r, positive = drawn()
    models = {"perturbed_mean": b, "as_replicate": r, "beyond": b + 3 * (r - b), "below": b - (r - b)}
    found = summary_of(long(models), beside({"split_half": r, "interpolated_duplicate": positive})).anchors.scaled
    scores = found.set_index("series")["scaled"]
    assert scores.to_dict() == pytest.approx({"perturbed_mean": 0, "as_replicate": 1, "beyond": 3, "below": -1})
    assert found.set_index("series")["reaches"].to_dict() == {
        **{"perturbed_mean": False, "below": False},
        **{"as_replicate": True, "beyond": True},
    }


def test_no_score_where_the_replicate_is_not_surely_better_than_the_mean_response():
    u, b, _, positive = drawn()
    noise = np.random.default_rng(1).normal(0, 1, len(b))
    for close in (b + noise - noise.mean() + 0.1, b - 0.1):
        found = summary_of(
            long({"model": u, "perturbed_mean": b}), beside({"split_half": close, "interpolated_duplicate": positive})
        ).anchors
        assert found.scaled["scaled"].isna().all()
        assert set(found.scaled["scaled_status"]) == {"uncalibrated"}
        assert not found.bounds["calibrated"].any()


def test_contexts_weigh_alike_whatever_their_number_of_conditions():
    kept = np.array([[True]] * 5)
    weights = anchors.macro_weights(kept, np.array([0, 0, 0, 0, 1]))[:, 0]
    assert weights.tolist() == [0.125] * 4 + [0.5]
    gain = np.array([1.0, 1.1, 0.9, 1.0, 1.0])[:, None]
    assert anchors.calibrated(gain, weights[:, None]).tolist() == [True]
    assert not anchors.calibrated(gain[:1], np.ones((1, 1)))[0], "one condition has no standard error"


def test_seeds_are_held_against_the_baseline_of_their_own_seed():
    u, b, r, positive = drawn()
    rows = [long({"model": u, "perturbed_mean": b}), long({"perturbed_mean": b + 0.1}, seed=1)]
    found = summary_of(
        pd.concat(rows, ignore_index=True), beside({"split_half": r, "interpolated_duplicate": positive})
    ).anchors.scaled.set_index("series")
    assert found.loc["model", "baseline_half"] == pytest.approx(b.mean())
    assert found.loc["perturbed_mean", "baseline_half"] == pytest.approx(b.mean() + 0.05)


@pytest.mark.parametrize("how", ["infinite", "missing", "absent"])
def test_a_failed_prediction_has_no_scaled_score_and_reaches_nothing(how):
    _, b, r, positive = drawn()
    rows = long({"model": r + 1, "perturbed_mean": b})
    bad = rows.index[(rows["model"] == "model") & (rows["condition"] == 3)]
    if how == "absent":
        rows = rows.drop(bad)
    else:
        rows.loc[bad, ["value", "value_half"]] = -np.inf if how == "infinite" else np.nan
        rows.loc[bad, "status"] = "failed_prediction"
    summary = summary_of(rows, beside({"split_half": r, "interpolated_duplicate": positive}))
    row = summary.anchors.scaled.set_index("series").loc["model"]
    assert np.isnan(row["scaled"])
    assert row["scaled_status"] == "failed_prediction"
    assert not row["reaches"]


def test_a_metric_that_says_little_is_marked():
    u, b, _, _ = drawn()
    rng = np.random.default_rng(2)
    found = beside({"split_half": b + 0.01, "interpolated_duplicate": b + rng.normal(0, 0.02, len(b))})
    bounds = summary_of(long({"model": u, "perturbed_mean": b}), found).anchors.bounds.iloc[0]
    assert bounds["weak"]
    assert bounds["dynamic_range"] < 0.2
    assert 0.2 < bounds["better"] < 0.8


def test_thirds_are_cut_by_the_distance_of_the_truth_from_control():
    effect = np.random.default_rng(0).permutation(np.linspace(0.1, 1.0, 30))
    rows = [long({"no_change": effect, "model": effect / 2}, metric=RMSE), long({"model": np.sign(effect - 0.4)})]
    found = summary_of(pd.concat(rows, ignore_index=True), None).anchors
    assert found.scaled.empty
    assert found.bounds.empty
    assert set(found.effects["by"]) == {"effect"}
    means = found.effects.set_index(["stratum", "metric", "series"])
    assert (found.effects["conditions"] == 10).all()
    ordered = np.sort(effect).reshape(3, 10)
    for third, values in zip(anchors.TERTILES, ordered, strict=True):
        assert means.loc[(third, RMSE, "model"), "mean"] == pytest.approx(values.mean() / 2)
        assert means.loc[(third, RMSE, "no_change"), ["low", "high"]].to_list() == [values[0], values[-1]]
    assert means.loc[("weak", COSINE, "model"), "mean"] == pytest.approx(-1)
    assert means.loc[("strong", COSINE, "model"), "mean"] == pytest.approx(1)


def test_strata_are_cut_by_what_anchors_say_of_the_observed_cells():
    rng = np.random.default_rng(3)
    effect, genes = rng.permutation(np.linspace(-0.1, 9, 30)), np.repeat([0, 5, 50, 500, -1], 6)
    u, b, r, positive = drawn(30)
    rows = long({"no_change": b - 0.1, "perturbed_mean": b, "model": u})
    found = beside({"split_half": r, "interpolated_duplicate": positive})
    at = found["condition"].to_numpy()
    means = summary_of(rows, found.assign(effect_size=effect[at], de_genes=genes[at])).anchors.effects
    model = means[(means["series"] == "model")].set_index(["by", "stratum"])
    for name, number in zip(anchors.DE_GENES, (0, 5, 50, 500), strict=True):
        row = model.loc[("de_genes", name)]
        assert row["mean"] == pytest.approx(u[genes == number].mean())
        assert (row["conditions"], row["low"], row["high"]) == (6, number, number)
    strong = np.argsort(effect)[20:]
    assert model.loc[("effect", "strong"), "mean"] == pytest.approx(u[strong].mean())
    assert model.loc[("effect", "strong"), "low"] == pytest.approx(effect[strong].min())


@pytest.mark.parametrize("metric", [COSINE, RMSE])
def test_a_condition_that_the_mean_response_solves_is_saturated(metric):
    share = np.array([0.0, 0.5, 0.89, 0.91, 1.0, 1.5] * 5)
    c, r = (
        np.full(30, 0.1),
        np.r_[np.full(24, 0.8), np.full(6, 0.05)],
    )  # the last replicates are no better than no change
    b, u = c + share * (0.8 - 0.1), np.arange(30.0) / 30
    values = {"no_change": c, "perturbed_mean": b, "model": u}
    if metric == RMSE:
        values, r = {name: 1 - value for name, value in values.items()}, 1 - r
    found = summary_of(long(values, metric=metric), beside({"split_half": r}, metric=metric)).anchors
    solved = (share > 0.9) & (np.arange(30) < 24)
    assert found.bounds["saturated"].item() == solved.sum() == 12
    means = found.effects[(found.effects["by"] == "saturated") & (found.effects["series"] == "model")]
    means = means.set_index("stratum")
    rest = ~solved & (np.arange(30) < 24)
    for name, inside in (("saturated", solved), ("not saturated", rest)):
        assert means.loc[name, "conditions"] == inside.sum()
        assert means.loc[name, "mean"] == pytest.approx(values["model"][inside].mean())


def test_without_an_interpolated_duplicate_the_replicate_is_the_positive_control():
    u, b, r, _ = drawn()
    bounds = summary_of(long({"perturbed_mean": b, "model": u}), beside({"split_half": r})).anchors.bounds.iloc[0]
    assert bounds["dynamic_range"] == pytest.approx(calibration.dynamic_range_fraction(r, b, best=1.0)[1])
    assert np.isnan(bounds["interpolated_duplicate"])
    assert bounds["calibrated"]


def test_the_order_of_rows_does_not_matter():
    u, b, r, positive = drawn()
    rows = pd.concat([long({"model": u, "perturbed_mean": b}), long({"no_change": u + 1}, metric=RMSE)])
    found = beside({"split_half": r, "interpolated_duplicate": positive})
    one = summary_of(rows.reset_index(drop=True), found).anchors
    two = summary_of(
        rows.sample(frac=1, random_state=1).reset_index(drop=True), found.sample(frac=1, random_state=2)
    ).anchors
    for name in ("scaled", "bounds", "effects"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_categorical=False)


def test_anchors_of_several_datasets_are_not_mixed():
    u, b, r, positive = drawn()
    rows = [long({"model": u, "perturbed_mean": b}, dataset="one"), long({"perturbed_mean": b}, seed=1, dataset="two")]
    found = summary_of(pd.concat(rows), beside({"split_half": r, "interpolated_duplicate": positive})).anchors
    assert found.scaled.empty


@pytest.fixture(scope="module")
def anchored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchored") / "s"
    anchored_sweep(folder, levels=(0.0, 0.3), seeds=2, replicate=0.58)
    return folder


@pytest.fixture(scope="module")
def page(anchored):
    return Page(write_report(anchored, png=False).read_text(encoding="utf-8"))


def test_the_page_says_how_far_models_are_between_floor_and_ceiling(page):
    assert "Floor and ceiling" in page.words
    assert "scaled 0.00" in page.words
    assert "◆ reaches the replicate" in page.words  # latent_additive 0.62 against 0.58
    assert "A half has n/2 cells" in page.words
    assert "Control cells: split." in page.words
    for text in ("dynamic range", "better", "interpolated", "Strong effects", "Weak effects"):
        assert text in page.words


def test_two_figures_on_a_page_share_no_id(page):
    assert len([tag for tag, _ in page.tags if tag == "svg"]) > 2
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_the_csv_holds_scaled_scores(anchored, page):
    frame = pd.read_csv(anchored / "summary.csv")
    common = frame[(frame["stratum"] == "common") & (frame["metric"] == COSINE)]
    assert set(common["series"]) == set(MODELS)
    assert common["scaled"].notna().all()
    assert common.loc[common["series"] == "perturbed_mean", "scaled"].abs().max() == 0
    assert frame.loc[frame["stratum"] != "common", "scaled"].isna().all()


def test_the_scaled_figure_stays_within_its_limits(anchored):
    summary = summarise(
        table.read(anchored), table.read_plan(anchored), anchors=table.read_anchors(anchored), resamples=50
    )
    summary.anchors.scaled.loc[0, "scaled"] = 40.0
    figure = plots.scaled(summary)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert -1.1 <= low < 0
        assert 1 < high <= 1.6


def test_a_folder_without_anchors_has_a_page_without_them(tmp_path):
    fake_sweep(tmp_path / "s", models=["no_change", "decoder"], levels=(0.0, 0.3), seeds=1, controls="reference")
    page = Page(write_report(tmp_path / "s", png=False).read_text(encoding="utf-8"))
    assert "Floor and ceiling" not in page.words
    assert "replicate" not in page.words
    assert "Control cells: reference." in page.words
    assert not (tmp_path / "s" / "scaled.svg").exists()


def test_anchors_before_their_trials_have_a_page(tmp_path):
    plan = anchored_sweep(tmp_path / "s", models=["perturbed_mean", "decoder"], levels=(0.0,), seeds=1)
    for trial in plan["trials"][:1]:
        (tmp_path / "s" / f"{trial['key']}.parquet").unlink()
    assert "1 of 2 trials done" in Page(write_report(tmp_path / "s", png=False).read_text(encoding="utf-8")).words
    (tmp_path / "s" / f"{plan['trials'][1]['key']}.parquet").unlink()
    assert "0 of 2 trials done" in Page(write_report(tmp_path / "s", png=False).read_text(encoding="utf-8")).words


def test_the_cosine_expected_of_shared_controls_is_printed_from_the_counts():
    value = np.linspace(0, 1, 20)
    rows = long({"perturbed_mean": value}, n_observed=100, n_control=300, controls="reference")
    summary = summary_of(rows, None)
    assert summary.controls == {"source": "reference", "share": 0.25, "low": 0.25, "high": 0.25}
    assert "n/(n + n₀) = 0.25" in controls(summary.controls)
    assert "expected score is 0" in controls({"source": "split"})
    assert controls({"source": ""}) == ""


def test_half_values_are_no_constant_of_a_trial(anchored):
    assert "value_half" not in table.trials(table.read(anchored))


@pytest.mark.parametrize(
    "values",
    [
        pd.Series(["b", "a", None, "b", "nan"], dtype="category"),
        pd.Series(["b", "a", "b"], dtype="category").iloc[:1],
        pd.Series([2, 10, 1, 2]),
        pd.Series([0.5, np.nan, 10.0, 0.5]),
        pd.Series([1, "1", 2, 1], dtype=object),
    ],
)
def test_texts_are_those_of_each_value_in_the_order_of_text(values):
    found, expected = texts(values), [str(value) for value in values.astype(object)]
    assert list(found) == expected
    assert list(found.categories) == sorted(set(expected))
