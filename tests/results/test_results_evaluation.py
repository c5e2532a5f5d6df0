"""The record of an evaluation: files that others read, and a page that stands alone."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_results_report import Page

from perturbray.metrics import Metric
from perturbray.metrics.conventions import aggregate
from perturbray.results.calibration import frames
from perturbray.results.evaluation import DOTS, terminal_evaluation, write_evaluation

NOTES = {
    "command": "perturbray evaluate observed.h5ad predicted.h5ad --out evaluation",
    "controls": "reference",
    "target_sum": 10_000.0,
    "shared_control_cosine": 0.0912,
    "pca_fitted_on": "observed cells",
    "rank_error": {("A549",): 0.02, ("K562",): 0.03},
    "note_of_a_new_convention": np.float64(2.5),
}


def values_of(metrics=("cosine/delta_ctrl", "rmse/average"), *, conditions=12, evil=""):
    rng = np.random.default_rng(0)
    parts = []
    for metric in metrics:
        for context in ("A549", "K562"):
            part = {
                "cell_type": context,
                "condition": [f"drug{number:03d}{evil}" for number in range(conditions)],
                **{"metric": metric, "value": rng.gamma(2, 0.1, conditions), "status": ""},
                **{"n_obs": 50, "n_pred": 40, "convention": "perturbray"},
            }
            parts.append(pd.DataFrame(part))
    values = pd.concat(parts, ignore_index=True)
    values.loc[3, ["value", "status"]] = np.nan, "constant_truth"
    values.loc[5, ["value", "status"]] = np.inf, "failed_prediction"
    values.attrs = {name: note for name, note in NOTES.items() if name != "command"}
    return values


def summary_of(values):
    frame = aggregate(values, ["cell_type"])
    return frame.assign(value=frame["macro"])


def written(folder, values, **options):
    path = write_evaluation(folder, values, summary_of(values), notes=NOTES, **options)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_files_hold_every_value_to_the_last_digit(tmp_path):
    values = values_of()
    written(tmp_path / "out", values)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("metrics.parquet", "metrics.csv", "summary.csv", "report.html"),
    }
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "metrics.parquet"), values)
    text = pd.read_csv(
        tmp_path / "out" / "metrics.csv", keep_default_na=False, na_values={"value": [""]}, float_precision="round_trip"
    )
    pd.testing.assert_frame_equal(text, values, check_exact=True)
    assert values.attrs["rank_error"] == NOTES["rank_error"], "the caller's table is left as it was"


def test_the_summary_is_two_columns(tmp_path):
    values = values_of()
    written(tmp_path, values)
    found = pd.read_csv(tmp_path / "summary.csv", float_precision="round_trip")
    assert list(found.columns) == ["metric", "value"]
    assert found["value"].tolist() == summary_of(values)["macro"].tolist()


def test_a_dot_names_its_condition_and_undefined_ones_have_none(tmp_path):
    page = written(tmp_path, values_of())
    circles = [attributes for tag, attributes in page.tags if tag == "circle"]
    assert len(circles) == 2 * 2 * 12 - 1
    assert len([attributes for attributes in circles if attributes.get("class") == "edge"]) == 1
    assert "A549 · drug002: 0." in page.words
    assert "A549 · drug003: nan" not in page.words


def test_the_page_says_how_it_was_scored_and_what_was_flagged(tmp_path):
    page = written(tmp_path, values_of(), title="Is my model any good?")
    for text in (
        *(
            "Is my model any good?",
            "24 conditions (2 of cell_type, 12 of condition)",
            "constant truth",
            "failed prediction",
        ),
        *("n/(n + n₀) = 0.09", "10,000", "observed cells", "A549 0.02, K562 0.03", "note of a new convention 2.5"),
        *(NOTES["command"], "1 infinite, hollow at the edge"),
    ):
        assert text in page.words
    assert all(link.startswith("#") for link in page.links)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object", "img", "script"})


def test_own_controls_are_not_called_shared(tmp_path):
    values = values_of()
    path = write_evaluation(tmp_path, values, summary_of(values), notes=NOTES | {"shared_control_cosine": 0.0})
    assert "counts as agreement" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 1 }}", "a & b"])
def test_names_from_data_never_become_markup(tmp_path, evil):
    page = written(tmp_path, values_of(("rmse/average", evil), evil=evil), title=evil)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert page.words.count(evil) >= 24


def test_many_conditions_are_thinned_and_the_page_says_so(tmp_path):
    page = written(tmp_path, values_of(("rmse/average",), conditions=1000))
    assert len([tag for tag, _ in page.tags if tag == "circle"]) == DOTS
    assert f"{DOTS} of them drawn" in page.words


@pytest.mark.parametrize("value", [0.25, np.nan])
def test_one_condition_without_covariates_is_enough(tmp_path, value):
    values = values_of().iloc[:1].drop(columns="cell_type").assign(value=value)
    frame = aggregate(values)
    path = write_evaluation(tmp_path, values, frame.assign(value=frame["pooled"]), notes={})
    words = Page(path.read_text(encoding="utf-8")).words
    assert "1 conditions" not in words
    assert "1 condition" in words
    assert ("has no value" in words) == np.isnan(value)


def test_a_second_evaluation_replaces_the_first(tmp_path):
    written(tmp_path, values_of(("rmse/average", "old")))
    written(tmp_path, values_of(("rmse/average",)))
    assert "old" not in (tmp_path / "summary.csv").read_text()
    assert len(list(tmp_path.iterdir())) == 4


def test_the_terminal_prints_every_metric_its_value_and_the_notes():
    summary, out = summary_of(values_of()), io.StringIO()
    Console(file=out, width=100, highlight=False).print(terminal_evaluation(summary, NOTES))
    text = " ".join(out.getvalue().split())
    assert "cosine/delta_ctrl ∞" in text
    assert f"rmse/average {summary['value'].iloc[1]:.3f}" in text
    assert "PCA fitted on: observed cells" in text
    assert "= 0.09" in text
    assert json.dumps(NOTES["command"]) not in text


def calibration_of(values):
    """Frames of a prediction between its anchors: half as far from the truth as the mean response, in every condition."""
    names = list(dict.fromkeys(values["metric"]))
    count = int((values["metric"] == names[0]).sum())
    rng = np.random.default_rng(5)
    base, found = rng.uniform(0.5, 0.6, count), {}
    for anchor, share in (
        ("no_change", 1.0),
        ("baseline", 0.9),
        ("model", 0.5),
        ("replicate", 0.1),
        ("interpolated", 0.1),
    ):
        found[anchor] = {"rmse/average": share * base, "cosine/delta_ctrl": 1 - share * base}
    metrics = [Metric.parse(name) for name in names]
    sizes = SimpleNamespace(effect=np.linspace(-0.1, 5, count), de_genes=np.repeat([-1, 0, 9, 500], count // 4))
    return frames(values, found, metrics, sizes=sizes, macro=True)


def test_the_page_shows_where_the_prediction_stands_between_its_anchors(tmp_path):
    values = values_of()
    values.loc[values["status"] == "failed_prediction", ["value", "status"]] = 0.3, ""
    calibration, strata = calibration_of(values)
    known = calibration.set_index("metric")
    for metric in known.index:
        assert known.loc[metric, "scaled"] == pytest.approx(0.5)
        assert known.loc[metric, "verdict"] == "better"
        assert known.loc[metric, "dynamic_range"] == pytest.approx(0.8 / 0.9)
        assert known.loc[metric, "better"] == 1
        assert known.loc[metric, "saturated"] == 0
    page = written(tmp_path / "out", values, calibration=calibration, strata=strata)
    for text in ("Floor and ceiling", "95 % interval", "against the mean response", "By size of effect", "≥ 100 genes"):
        assert text in page.words
    assert "◆ reaches the replicate" not in page.words
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    stored = pd.read_csv(tmp_path / "out" / "calibration.csv")
    np.testing.assert_array_equal(stored["scaled"], calibration["scaled"])
    assert len(pd.read_csv(tmp_path / "out" / "strata.csv")) == len(strata)
    console = Console(file=io.StringIO(), width=80)
    console.print(terminal_evaluation(summary_of(values), NOTES, calibration))
    assert "0.50" in console.file.getvalue()
    assert "scaled: 0 as good as the mean response" in console.file.getvalue()


def test_a_failed_prediction_gets_no_scaled_score(tmp_path):
    values = values_of()  # one failed prediction, of the first metric
    known = calibration_of(values)[0].set_index("metric")
    failed = values.loc[values["status"] == "failed_prediction", "metric"].item()
    assert np.isnan(known.loc[failed, "scaled"])
    assert known.loc[failed, "scaled_status"] == "failed_prediction"
    assert np.isnan(known.loc[failed, "low"])
    assert known.drop(failed)["scaled"].notna().all()


def test_without_a_calibration_the_page_has_none_and_an_older_one_goes(tmp_path):
    values = values_of()
    written(tmp_path / "out", values, calibration=calibration_of(values)[0])
    page = written(tmp_path / "out", values)
    assert not (tmp_path / "out" / "calibration.csv").exists()
    for text in ("Floor and ceiling", "By size of effect", "calibration.csv"):
        assert text not in page.words
