"""The summary: pairing, ties, places, and no gain by failing."""

import io

import numpy as np
import pandas as pd
import pytest
from fake_sweep import MODELS, fake_plan, fake_rows, fake_sweep, finish
from rich.console import Console

from perturbray.errors import InputError
from perturbray.results import intervals, table
from perturbray.results.scales import Scale
from perturbray.results.summary import summarise
from perturbray.results.terminal import terminal
from perturbray.results.wording import answer, interval, number

COSINE = "cosine/logfc_logmean"


def long(values, *, level=0.0, seed=0, metric=COSINE, status="", contexts=3, **columns):
    """A long table of models: name -> (contexts * perturbations,) values."""
    parts = []
    for model, value in values.items():
        value = np.asarray(value, float)
        context, perturbation = np.divmod(np.arange(len(value)), len(value) // contexts)
        parts.append(
            pd.DataFrame(
                {
                    **{"key": f"{model}-{level}-{seed}", "name": model, "model": model, "seed": seed},
                    **{"ablation.level": level, "imbalance": level, "covariate.cell_type": context.astype(str)},
                    **{"perturbation": perturbation.astype(str), "stratum": "common", "metric": metric},
                    **{"condition": np.arange(len(value)), "value": value, "status": status},
                    **columns,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def plan(**entries):
    return {"name": "test", "x": "imbalance", "baselines": ["baseline"], "trials": [], **entries}


def of(frame, **where):
    for name, value in where.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_models_that_predict_the_same_are_tied():
    value = np.random.default_rng(0).normal(size=60)
    found = summarise(long({"baseline": value, "one": value}), plan())
    row = of(found.differences, series="one")
    assert (row["difference_low"], row["difference"], row["difference_high"]) == (0, 0, 0)
    assert row["verdict"] == "tie"
    assert list(found.means["place"]) == [1, 1]
    assert found.means["tied"].all()


def test_a_better_model_is_told_from_the_baseline_though_their_own_intervals_overlap():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 60)
    found = summarise(long({"baseline": hard, "model": hard + 0.1 + rng.normal(0, 0.05, 60)}), plan())
    means = found.means.set_index("series")
    assert means.loc["model", "low"] < means.loc["baseline", "high"]
    row = of(found.differences, series="model")
    assert row["difference_low"] > 0
    assert row["verdict"] == "better"
    assert list(means.loc[["model", "baseline"], "place"]) == [1, 2]


def test_the_difference_is_the_slow_one():
    rng = np.random.default_rng(3)
    values = {"baseline": rng.normal(size=24), "model": rng.normal(size=24)}
    found = of(summarise(long(values), plan(), resamples=200, seed=9).differences, series="model")
    gap = values["model"] - values["baseline"]
    context, perturbation = np.divmod(np.arange(24), 8)
    draws = []
    for weights in intervals.draw(context, perturbation, resamples=200, seed=9):
        for times in weights:
            inside = [np.average(gap[context == code], weights=times[context == code]) for code in range(3)]
            draws.append(np.mean(inside))
    assert found["difference"] == pytest.approx(gap.mean())
    assert found["difference_low"] == pytest.approx(np.quantile(draws, 0.025))
    assert found["difference_high"] == pytest.approx(np.quantile(draws, 0.975))


def test_lower_is_better_where_the_scale_says_so():
    worse = np.random.default_rng(0).normal(2, 0.1, 60)
    found = summarise(long({"baseline": worse, "model": worse - 1}, metric="rmse/average"), plan())
    assert of(found.differences, series="model")["verdict"] == "better"
    assert of(found.means, series="model")["place"] == 1
    turned = plan(metrics=[{"name": "rmse/average", "higher_is_better": True}])
    found = summarise(long({"baseline": worse, "model": worse - 1}, metric="rmse/average"), turned)
    assert of(found.differences, series="model")["verdict"] == "worse"


def test_the_reference_is_the_best_baseline_of_each_metric_unless_one_is_named():
    rng = np.random.default_rng(0)
    values = {"first": rng.normal(0, 0.1, 60), "second": rng.normal(1, 0.1, 60), "model": rng.normal(2, 0.1, 60)}
    table_ = pd.concat([long(values), long(values, metric="rmse/average")])
    baselines = plan(baselines=["first", "second"])
    found = summarise(table_, baselines).differences.set_index(["metric", "series"])["reference"]
    assert found[(COSINE, "model")] == "second"
    assert found[("rmse/average", "model")] == "first"
    named = summarise(table_, baselines, reference="first").differences
    assert set(named["reference"]) == {"first"}
    with pytest.raises(InputError, match="did you mean 'first'"):
        summarise(table_, baselines, reference="frist")


def test_seeds_are_averaged_before_conditions_are_drawn():
    rng = np.random.default_rng(0)
    base, noise = rng.normal(size=60), rng.normal(size=60)
    seeds = [long({"model": base + noise}, seed=0), long({"model": base - noise}, seed=1)]
    found = of(summarise(pd.concat(seeds), plan()).means, series="model")
    alone = of(summarise(long({"model": base}), plan()).means, series="model")
    assert found["seeds"] == 2
    assert found["mean"] == pytest.approx(alone["mean"])
    assert found["low"] < alone["low"] < alone["high"] < found["high"]  # what seeds do comes on top
    assert found["sd_seeds"] == pytest.approx(np.std([(base + noise).mean(), (base - noise).mean()], ddof=1))
    assert np.isnan(alone["sd_seeds"])


def test_fewer_than_ten_conditions_have_no_interval_and_say_so():
    rng = np.random.default_rng(0)
    found = summarise(long({"baseline": rng.normal(size=9), "model": rng.normal(5, 1, 9)}), plan())
    assert set(found.means["status"]) == {"few_conditions"}
    assert found.means["low"].isna().all()
    row = of(found.differences, series="model")
    assert np.isnan(row["difference_low"])
    assert row["verdict"] == ""
    assert "cannot be told" in answer(found)[0]


def test_what_the_truth_leaves_undefined_is_left_out_for_every_model():
    value = np.linspace(0, 1, 60)
    undefined, status = value.copy(), np.full(60, "", dtype=object)
    undefined[5], status[5] = np.nan, "constant_truth"
    mixed = pd.concat([long({"baseline": value}), long({"model": undefined}, status=status)])
    found = summarise(mixed, plan())
    assert list(found.means["conditions"]) == [59, 59]
    assert list(found.means["undefined"]) == [1, 1]
    assert found.means["mean"].iloc[0] == found.means["mean"].iloc[1]


@pytest.mark.parametrize("how", ["nan", "missing", "inf"])
def test_a_model_never_gains_by_failing(how):
    value = np.linspace(1, 2, 60)
    better = value - 0.5
    table_ = long({"baseline": value, "model": better}, metric="rmse/average")
    broken = table_.index[(table_["model"] == "model") & (table_["condition"] == 59)]
    if how == "missing":
        table_ = table_.drop(broken)
    else:
        table_.loc[broken, ["value", "status"]] = [np.nan if how == "nan" else np.inf, "failed_prediction"]
    found = summarise(table_, plan())
    row = of(found.means, series="model")
    assert row["status"] == "failed_prediction"
    assert row["mean"] == np.inf if how == "inf" else np.isnan(row["mean"])
    assert np.isnan(row["low"])
    assert row["failed"] == (0 if how == "inf" else 1)
    assert of(found.means, series="baseline")["place"] == 1
    assert not found.means["tied"].eq(True).any()
    assert of(found.differences, series="model")["verdict"] == ""


@pytest.mark.parametrize("categorical", [True, False])
def test_a_sweep_whose_values_are_all_undefined_is_summarised(categorical):
    rows = long({"baseline": np.full(60, np.nan), "model": np.full(60, np.nan)}, status="constant_truth")
    found = summarise(rows.astype({"status": "category"}) if categorical else rows, plan())
    assert set(found.means["status"]) == {"undefined"}
    assert found.means["mean"].isna().all()
    assert set(found.statuses["effect"]) == {"left out"}


def test_a_flagged_value_counts():
    value = np.linspace(0, 1, 60)
    found = of(summarise(long({"model": value}, status="constant_prediction"), plan()).means, series="model")
    assert found["conditions"] == found["flagged"] == 60
    assert found["mean"] == pytest.approx(0.5)


def test_the_change_between_levels_is_paired_over_conditions():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 60)
    parts = [long({"model": hard}), long({"model": hard - 0.1 + rng.normal(0, 0.02, 60)}, level=0.3)]
    found = summarise(pd.concat(parts), plan())
    row = of(found.changes, series="model")
    assert row["change"] == pytest.approx(-0.1, abs=0.01)
    assert row["high"] < 0
    assert row["verdict"] == "worse"
    assert "From imbalance 0.00 to 0.30 the cosine of model falls by 0." in answer(found)[0]


def test_a_change_that_the_data_do_not_show_is_not_told():
    rng = np.random.default_rng(0)
    parts = [long({"model": rng.normal(0, 1, 60)}), long({"model": rng.normal(0, 1, 60)}, level=0.3)]
    assert "cannot be told from no change" in answer(summarise(pd.concat(parts), plan()))[0]


def test_other_strata_are_kept_out_of_the_headline():
    value = np.random.default_rng(0).normal(size=60)
    apart = long({"baseline": value + 5, "model": value + 9}).assign(stratum="unseen")
    apart["perturbation"] = apart["perturbation"] + "-unseen"
    alone = summarise(long({"baseline": value, "model": value + 1}), plan())
    both = summarise(pd.concat([long({"baseline": value, "model": value + 1}), apart]), plan())
    common = both.means[both.means["stratum"] == "common"].reset_index(drop=True)
    pd.testing.assert_frame_equal(common, alone.means)
    assert set(both.means["stratum"]) == {"common", "unseen"}


def test_models_that_differ_in_a_field_are_series_of_their_own():
    value = np.linspace(0, 1, 60)
    wide = long({"model": value}, **{"model.width": 128}).assign(key="wide")
    narrow = long({"model": value}, **{"model.width": 64}).assign(key="narrow")
    found = summarise(pd.concat([wide, narrow]), plan())
    assert sorted(found.means["series"]) == ["model (width 128)", "model (width 64)"]


def test_the_summary_does_not_depend_on_the_order_of_rows(finished_sweep):
    rows = table.read(finished_sweep)
    mixed = rows.sample(frac=1, random_state=1)
    one, other = (summarise(frame, table.read_plan(finished_sweep), resamples=100) for frame in (rows, mixed))
    for name in ("means", "differences", "changes"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))


def test_the_analytic_value_is_compared_on_the_same_conditions(summary):
    row = of(summary.truth, reference="mean_shift (analytic)")
    assert row["level"] == 0.0
    assert row["ratio"] == pytest.approx(1.02, abs=0.02)
    assert row["conditions"] == 162  # the common ones


def test_the_csv_holds_every_mean_and_difference(summary, tmp_path):
    summary.write(tmp_path / "summary.csv")
    frame = pd.read_csv(tmp_path / "summary.csv")
    assert len(frame) == len(summary.means)
    assert {"mean", "sd_seeds", "difference", "difference_low", "verdict", "place"} <= set(frame.columns)


def test_a_rank_is_lower_better_with_chance_a_half():
    scale = Scale.of("cosine/logfc_logmean/rank")
    assert (scale.higher_is_better, scale.best, scale.chance) == (False, 0.0, 0.5)
    assert Scale.of("pds", {"higher_is_better": True, "chance": 0.5}).higher_is_better


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_leaderboard_fits_its_terminal_and_names_every_model(summary, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal(summary))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    for name in MODELS:
        assert sum(line.split()[:1] == [name] for line in lines) == 2  # the lowest level and the highest


def test_baselines_stand_apart_after_the_models(summary):
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(terminal(summary))
    lines = [line.split()[0] for line in console.export_text().splitlines() if line.strip()]
    start = lines.index("baselines")
    assert set(lines[start : start + 6]) >= {"no_change", "perturbed_mean", "mean_shift"}
    assert {"decoder", "latent_additive"} <= set(lines[:start])


def test_a_leaderboard_of_nothing_says_so(tmp_path):
    fake_sweep(tmp_path / "s", trials=0)
    found = summarise(table.read(tmp_path / "s"), table.read_plan(tmp_path / "s"))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(terminal(found))
    assert "No trial has finished" in console.export_text()


def test_a_sweep_in_progress_has_a_leaderboard(tmp_path):
    plan_ = fake_plan(seeds=2)
    table.write_plan(tmp_path, plan_)
    for trial in plan_["trials"][16:18]:
        finish(tmp_path, trial)
    found = summarise(table.read(tmp_path), plan_, resamples=100)
    assert len(found.means)
    assert found.changes.empty


def test_conditions_of_seeds_still_to_run_are_compared_where_both_have_them():
    value = np.linspace(0, 1, 60)
    half = long({"model": value + 1}, seed=1)
    half = half[half["condition"] % 2 == 0]
    row = of(summarise(pd.concat([long({"baseline": value}), half]), plan()).differences, series="model")
    assert row["difference_conditions"] == 30
    assert row["difference"] == pytest.approx(1)
    assert row["difference_low"] == pytest.approx(1)


def test_numbers_are_printed_with_a_true_minus_and_no_negative_zero():
    assert number(-0.1234, 2) == "−0.12"
    assert number(-0.0001, 3, sign=True) == "0.000"
    assert number(float("nan"), 3) == "–"
    assert interval(-0.00004, 0.2, 3) == "[0.000, +0.200]"
    assert interval(0.00006, 0.2, 3) == "[+0.0001, +0.2000]"  # an end that excludes 0 is not rounded onto it


def test_fake_rows_have_the_columns_of_a_trial():
    assert set(table.ROWS) <= set(fake_rows("decoder", 0.0, 0))
