"""The page: whole at any time, from one file, and safe with any name."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_sweep import MODELS, anchored_sweep, fake_plan, fake_sweep, finish

from perturbray.errors import InputError
from perturbray.results import plots, scatter, sections, table
from perturbray.results.reader import Reader
from perturbray.results.report import render, write_report
from perturbray.results.summary import summarise

VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """Tags, ids and text of a page; fails where a tag is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def page_of(folder):
    return Page(write_report(folder, png=False).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "s"
    fake_sweep(folder, levels=(0.0, 0.2, 0.3), seeds=2)
    return folder


@pytest.fixture(scope="module")
def whole(whole_folder):
    return page_of(whole_folder)


def test_the_page_answers_the_question_with_an_interval(whole):
    assert "How much does a model lose" in whole.words
    found = r"From imbalance 0\.00 to 0\.30 the cosine of \w+ falls by 0\.\d+ \(95.% interval 0\.\d+ to 0\.\d+; 2 seeds, 162 c"
    assert re.search(found, whole.words)
    assert "48 of 48 trials done" in whole.words


def test_the_page_loads_nothing(whole):
    assert all(link.startswith("#") for link in whole.links)
    assert {tag for tag, _ in whole.tags}.isdisjoint({"link", "iframe", "object", "img", "script"})
    style = " ".join(whole.text)
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", style)


def test_links_lead_somewhere_and_ids_are_used_once(whole):
    assert len(whole.ids) == len(set(whole.ids))
    assert {link.removeprefix("#") for link in whole.links} <= set(whole.ids)


def test_the_page_names_models_metrics_data_notes_versions_and_the_command(whole):
    for text in (*MODELS, "Cosine", "scaled to the median depth", "test conditions are the same", "2.50.0"):
        assert text in whole.words
    assert "python sweeps/imbalance.py --results results" in whole.words
    assert "unseen at the highest level" in whole.words


def test_scrolling_regions_can_be_reached_from_the_keyboard(whole):
    regions = [attributes for _, attributes in whole.tags if attributes.get("class") == "wide"]
    assert regions
    assert all(attributes.get("tabindex") == "0" and attributes.get("aria-label") for attributes in regions)


def test_the_page_prints_what_became_of_claims(whole):
    assert "C10: Imbalance hurts every model. (slides)" in whole.words
    assert "C11: Imbalance hurts latent additive most." in whole.words
    said = r"(✓ holds|\? the data cannot tell) ?: From imbalance 0\.00 to 0\.30, with 500 training conditions at both, the RMSE"
    assert re.search(said, whole.words)
    assert "C1:" not in whole.words, "there are no combinations"
    assert "C7:" not in whole.words, "there are no amounts of data"


def test_series_that_share_no_letter_differ_and_the_page_says_how(whole, whole_folder):
    found = summarise(table.read(whole_folder), table.read_plan(whole_folder)).means
    at = found[(found["metric"] == "rmse/average") & (found["level"] == 0) & (found["stratum"] == "common")]
    letters = at.set_index("series")["letters"]
    assert not set(letters["no_change"]) & set(letters["latent_additive"])
    assert "all pairs of a column are compared on the same conditions" in whole.words
    for text in letters:
        assert text in whole.words


def test_conditions_stand_beside_the_best_baseline_by_name(whole):
    dots = [attributes for _, attributes in whole.tags if attributes.get("class") == "dot"]
    assert len(dots) == 2 * 5 * 162  # a score and a rank of five models
    assert any(re.fullmatch(r"MCF7 · drug0\d\d", text) for text in whole.text)
    assert any(re.fullmatch(r"0\.\d+ against 0\.\d+", text) for text in whole.text)
    reached = [attributes for attributes in dots if attributes.get("tabindex") == "0"]
    assert len(reached) == 2 * 5 * 6
    assert all(attributes["aria-label"] for attributes in reached)


def test_a_dot_stands_where_its_condition_scores(summary):
    (by_rmse, _) = scatter.views(summary)
    plot = by_rmse["open"][0]
    cube, reference = summary.cube, re.match(r"against (\w+)", plot["caption"])[1]
    own, other = (
        cube.values[:, cube.find(metric="rmse/average", level=0.0, series=name)] for name in (plot["series"], reference)
    )
    better = int((own < other).sum())
    assert f"better in {better} of {len(own)} conditions" in plot["caption"]
    dot = r'cx="([\d.]+)" cy="([\d.]+)" r="3"/><text [^>]*>([^<]+)<tspan [^>]*>([\d.]+) against ([\d.]+)<'
    found = re.findall(dot, str(plot["svg"]))
    assert len(found) == len(own)
    value = dict(zip(cube.names, zip(own, other, strict=True), strict=True))
    for _, _, name, mine, its in found:
        assert (float(mine), float(its)) == pytest.approx(value[name], abs=5e-4)
    x, y = np.array([[float(cx), float(cy)] for cx, cy, *_ in found]).T
    assert np.corrcoef(x, [value[name][1] for _, _, name, *_ in found])[0, 1] == pytest.approx(1, abs=1e-4)
    assert np.corrcoef(y, [value[name][0] for _, _, name, *_ in found])[0, 1] == pytest.approx(-1, abs=1e-4)


def test_learning_curves_and_what_a_model_cost_are_on_the_page(whole, summary):
    assert "Learning curves" in whole.words
    assert "in all, min" in whole.words
    figure = plots.curves(summary)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == [name for name in MODELS if name not in summary.baselines]
    best = [line.get_xdata() for line in panels[0].lines if line.get_marker() != "None"]
    assert [int(x[0]) if np.ndim(x) else int(x) for x in best] == [30, 30]  # a line a seed
    cost = sections.cost(summary)
    row = next(row for row in cost["rows"] if row[0] == "decoder")
    spent = summary.trials.loc[
        summary.trials["series"] == "decoder", ["fit_seconds", "predict_seconds", "score_seconds"]
    ]
    assert row[-2] == f"{spent.to_numpy().sum() / 60:.1f}"
    assert row[cost["columns"].index("parameters")] == "51,200"


def test_variants_of_a_model_are_compared_in_pairs(tmp_path):
    plan = fake_plan(models=["no_change", "decoder"], levels=(0.0, 0.3), seeds=2)
    for trial in [trial for trial in plan["trials"] if trial["columns"]["model"] == "decoder"]:
        columns = {**trial["columns"], "model.width": 256}
        plan["trials"].append({"key": f"{trial['key']}w", "name": f"{trial['name']} wide", "columns": columns})
    table.write_plan(tmp_path, plan)
    for trial in plan["trials"]:
        wide = trial["columns"].get("model.width") == 256
        finish(tmp_path, trial, **({"value": lambda rows: rows["value"] + 0.05} if wide else {}))
    found = summarise(table.read(tmp_path), plan)
    low, high = sections.variants(found)
    assert [row[:2] for row in low["rows"]] == [["decoder (width 256)", "decoder (width 128)"]]
    assert low["rows"][0][2].startswith("▼ +0.05")  # RMSE, of which less is better
    assert low["rows"][0][3].startswith("▲ +0.05")
    assert "▼" in high["rows"][0][2]
    assert sections.variants(summarise(table.read(tmp_path, keys=[t["key"] for t in plan["trials"][:8]]), plan)) == []


def test_floor_and_ceiling_stand_on_every_axis(tmp_path):
    anchored_sweep(tmp_path / "s", levels=(0.0, 0.3), seeds=1)
    found = summarise(
        table.read(tmp_path / "s"), table.read_plan(tmp_path / "s"), anchors=table.read_anchors(tmp_path / "s")
    )
    for axes in plots.against_x(found).axes:
        named = " ".join(text.get_text() for text in axes.texts)
        assert "ceiling" in named
        assert "floor" in named or "chance 0.5" in named  # the mean response ranks at chance


def test_known_truth_is_held_against_what_was_measured(finished_sweep, summary):
    words = Page(render(summary, failures={}, figure=None)).words
    assert "mean_shift (analytic)" in words
    assert "measured / known" in words


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", "a & b < c", '"><img src=x onerror=alert(1)>', "$x_1$", "_a"]
)
def test_names_from_data_never_become_markup(tmp_path, evil):
    plan = fake_plan(models=["no_change", evil], levels=(0.0, 0.3), seeds=1)
    plan |= {"question": evil, "notes": [evil], "command": evil, "dataset": {"name": evil}, "x_label": evil}
    table.write_plan(tmp_path, plan)
    for trial in plan["trials"][:-1]:
        finish(tmp_path, trial, perturbation=lambda rows: rows["perturbation"].astype(object) + evil)
    table.write_failure(tmp_path, plan["trials"][-1]["key"], name=evil, error=evil)
    page = page_of(tmp_path)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert page.text.count(evil) >= 4


def test_a_sweep_without_a_finished_trial_has_a_page(tmp_path):
    fake_sweep(tmp_path / "s", trials=0, failing=1, status={"state": "running"})
    page = page_of(tmp_path / "s")
    assert "0 of 96 trials done" in page.words
    assert "1 failed" in page.words
    assert "No trial has finished yet" in page.words
    assert "loss is NaN in epoch 3" in page.words
    assert not (tmp_path / "s" / "figure.svg").exists()


def test_the_page_works_after_each_trial(tmp_path):
    plan = fake_plan(models=["no_change", "decoder"], levels=(0.0, 0.3), seeds=1, status={"state": "running"})
    plan["headline"] = ["cosine/logfc_logmean"]
    table.write_plan(tmp_path, plan)
    reader = Reader(tmp_path)
    for done, trial in enumerate(plan["trials"], start=1):
        finish(tmp_path, trial)
        page = Page(write_report(tmp_path, reader=reader).read_text(encoding="utf-8"))
        assert f"{done} of 4 trials done" in page.words
    assert not (tmp_path / "figure.png").exists()
    table.write_plan(tmp_path, plan | {"status": {"state": "done"}})
    write_report(tmp_path, reader=reader)
    assert (tmp_path / "figure.png").exists()


def test_a_plan_of_trials_alone_is_enough(tmp_path):
    plan = fake_plan(models=["no_change", "decoder"], levels=(0.0,), seeds=1)
    plan = {"name": "bare", "trials": [{"key": trial["key"], "columns": trial["columns"]} for trial in plan["trials"]]}
    table.write_plan(tmp_path, plan)
    for trial in plan["trials"]:
        finish(tmp_path, {**trial, "name": trial["key"]})
    assert "2 of 2 trials done" in page_of(tmp_path).words


def test_failed_trials_are_named_with_their_reason(tmp_path):
    plan = fake_sweep(tmp_path / "s", models=["no_change", "decoder"], seeds=1, failing=2)
    page = page_of(tmp_path / "s")
    assert "2 failed" in page.words
    assert plan["trials"][-1]["name"] in page.words
    assert "RuntimeError: loss is NaN in epoch 3" in page.words


def test_an_empty_folder_gets_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"holds no sweep\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_figure_is_the_same_for_the_same_numbers(summary):
    assert plots.svg(plots.against_x(summary)) == plots.svg(plots.against_x(summary))


def test_the_figure_keeps_its_text_as_text(summary):
    root = ET.fromstring(plots.svg(plots.against_x(summary)))
    text = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {*MODELS, "Cosine ↑", "RMSE ↓", "chance 0.5"} <= text
    assert any(label.startswith("measured imbalance") for label in text)


def test_a_series_keeps_its_look_as_trials_end(tmp_path, summary):
    plan = fake_plan(levels=(0.0, 0.3), seeds=2)
    table.write_plan(tmp_path, plan)
    for trial in plan["trials"][-4:]:
        finish(tmp_path, trial)
    few = plots.looks_of(summarise(table.read(tmp_path), plan, resamples=50))
    assert few == {name: plots.looks_of(summary)[name] for name in few}


def test_looks_differ_in_more_than_colour(summary):
    looks = plots.looks_of(summary)
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(looks)
    models = [look for look in looks.values() if look["color"] != plots.BASELINE]
    assert len({look["marker"] for look in models}) == len(models)
    assert len({look["color"] for look in models}) == len(models)


def test_levels_of_data_are_said_in_their_unit(tmp_path):
    plan = fake_plan(levels=(0.0, 0.3), seeds=1, x="train_conditions")
    table.write_plan(tmp_path, plan)
    for trial in plan["trials"]:
        trial["columns"]["train_conditions"] = 300 if trial["columns"]["ablation.level"] else 1184
        finish(tmp_path, trial)
    words = page_of(tmp_path).words
    assert "Score against training conditions" in words
    assert "At 300 training conditions the best RMSE of a model" in words
    assert "From 300 to 1,184 training conditions the RMSE of" in words
