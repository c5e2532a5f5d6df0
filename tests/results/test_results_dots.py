"""The figure of a sweep with one level: a row a series, where the numbers say that it belongs."""

import numpy as np
import pytest
from fake_sweep import anchored_sweep

from perturbray.results import dots, plots, table
from perturbray.results.report import write_report
from perturbray.results.summary import COMMON, summarise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("alone")
    anchored_sweep(place, levels=(0.0,), seeds=2)
    return place


@pytest.fixture(scope="module")
def alone(folder):
    return summarise(table.read(folder), table.read_plan(folder), anchors=table.read_anchors(folder))


def marks(axes, names: list[str]) -> dict[str, float]:
    """Where the point of each row stands, by the row's name."""
    points = [line.get_xydata() for line in axes.lines if line.get_marker() != "None"]
    return {names[round(y)]: x for ((x, y),) in points}


def ordered(summary) -> list[str]:
    """Metrics in the order of panels."""
    return [name for column in plots.columns(summary.headline) for name in column]


def test_every_panel_has_every_series_at_its_mean_in_one_order(alone):
    figure = dots.board(alone)
    assert len(figure.axes) == len(alone.headline)
    rmse = alone.means[(alone.means["metric"] == "rmse/average") & (alone.means["stratum"] == COMMON)]
    best_first = list(rmse.sort_values("mean")["series"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == best_first
    for axes, name in zip(figure.axes, ordered(alone), strict=True):
        means = alone.means[(alone.means["metric"] == name) & (alone.means["stratum"] == COMMON)]
        assert marks(axes, best_first) == pytest.approx(dict(zip(means["series"], means["mean"], strict=True)))
    bars = [path.vertices for collection in figure.axes[0].collections for path in collection.get_paths()]
    assert {round(float(x), 9) for bar in bars for x in bar[:, 0]} == {
        round(float(x), 9) for x in np.concatenate([rmse["low"], rmse["high"]])
    }


def test_the_best_stands_at_the_top(alone):
    axes = dots.board(alone).axes[0]
    bottom, top = axes.get_ylim()
    assert top < 0 < bottom


def test_scaled_scores_stand_between_the_mean_response_and_a_replicate(alone):
    rmse = alone.means[(alone.means["metric"] == "rmse/average") & (alone.means["stratum"] == COMMON)]
    best_first = list(rmse.sort_values("mean")["series"])
    names = [name for column in plots.columns(plots.scalable(alone)) for name in column]
    assert names
    for axes, name in zip(dots.scaled(alone).axes, names, strict=True):
        assert {0.0, 1.0} == {line.get_xdata()[0] for line in axes.lines if line.get_marker() == "None"}
        known = alone.anchors.scaled[alone.anchors.scaled["metric"] == name].dropna(subset=["scaled"])
        shown = np.clip(known["scaled"], *plots.SHOWN)
        assert marks(axes, best_first) == pytest.approx(dict(zip(known["series"], shown, strict=True)))


def test_the_page_of_one_level_has_rows_and_that_of_several_has_lines(folder, tmp_path):
    one = write_report(folder).read_text(encoding="utf-8")
    assert "Each row is a model" in one
    anchored_sweep(tmp_path, levels=(0.0, 0.3), seeds=1)
    assert "Each line is a model" in write_report(tmp_path).read_text(encoding="utf-8")
