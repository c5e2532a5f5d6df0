"""The split control source, anchors and halves: laws that a wrong implementation breaks."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import screens
from scipy.stats import false_discovery_control, ttest_ind

import perturbray as pr
from perturbray import scoring, synthetic
from perturbray.data.batches import Cells
from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import TEST, TRAIN
from perturbray.data.truth import HALVINGS, digest, observe
from perturbray.metrics import SCORES, cell_metrics, distribution
from perturbray.metrics.cells import shuffled, signatures
from perturbray.metrics.distribution import PCA, energy, fit_pca
from perturbray.metrics.metric import Metric, MetricError
from perturbray.prediction import Here, LazyCells, LostCellsError
from perturbray.results import table
from perturbray.trial import Trial, run

METRICS = (
    *(Metric(score, effect) for score in ("cosine", "pearson") for effect in ("delta_ctrl", "logfc_logmean")),
    Metric("cosine", "logfc"),
)


def opened(path, **spec) -> tuple:
    """A screen file as the spec, its conditions and its normalised cells."""
    spec = DatasetSpec(path=str(path), **spec)
    conditions = spec.conditions()
    return spec, conditions, Cells([screens.rows_of(spec, conditions)])


@pytest.fixture(scope="module")
def without_effects(tmp_path_factory):
    screen = synthetic.Screen.small(perturbations=60, combinations=0, scale=0.0, cells=20, controls=120, seed=5)
    return opened(synthetic.write(tmp_path_factory.mktemp("null") / "null.h5ad", screen))


@pytest.fixture(scope="module")
def screen(small_screen):
    return opened(small_screen)


def rows_of(trial: Trial, conditions, cells, *, source: str, metrics=METRICS) -> dict[str, np.ndarray]:
    truth = observe(cells, conditions, trial.make_split(conditions), linear=True)
    outcome = run(trial, cells, conditions, truth=truth)
    item = scoring.Scorable(
        key="k", name="n", columns={}, truth="", predicted=outcome.predicted, stratum=outcome.stratum
    )
    return scoring._trial_rows(item, truth, metrics, source)


@pytest.mark.parametrize("model", [pr.MeanShift(), pr.PerturbedMean(), pr.NoChange()])
def test_without_effects_split_controls_give_0_and_a_shared_control_does_not(without_effects, model):
    spec, conditions, cells = without_effects
    trial = Trial(dataset=spec, model=model)
    split, shared = (rows_of(trial, conditions, cells, source=source) for source in ("split", "reference"))
    for metric in METRICS:
        values = split["value"][split["metric"] == metric.name]
        # Conditions of a context share its controls, so that contexts, not conditions, are independent: the standard
        # error is that of the means of contexts, over several halvings.
        contexts = np.unique(split["covariate.cell_type"])
        means = np.array([values[split["covariate.cell_type"][: len(values)] == c].mean() for c in contexts])
        assert abs(values.mean()) <= 3 * max(means.std(ddof=1) / np.sqrt(len(means)), 0.03)
        if isinstance(model, pr.PerturbedMean):  # the others' effects do not hold the noise of the tested control
            together = shared["value"][shared["metric"] == metric.name]
            assert together.mean() > values.mean() + 0.1


def test_no_change_has_an_effect_of_exactly_zero_under_both_sources(screen):
    spec, conditions, cells = screen
    for source in scoring.SOURCES:
        rows = rows_of(Trial(dataset=spec, model=pr.NoChange()), conditions, cells, source=source)
        assert (rows["value"] == 0).all()
        assert set(rows["status"]) == {"constant_prediction"}


def test_halves_are_disjoint_cover_the_cells_and_average_to_the_whole(screen):
    spec, conditions, cells = screen
    split = Trial(dataset=spec, model=pr.NoChange()).make_split(conditions)
    truth = observe(cells, conditions, split)
    assert truth.half_cells.shape == (HALVINGS, 2, len(truth))
    assert (truth.half_cells.sum(axis=1) == truth.observed.cells).all()
    assert np.abs(np.diff(truth.half_cells, axis=1)).max() <= 1
    weighted = (truth.observed_halves * truth.half_cells[..., None]).sum(axis=1) / truth.observed.cells[:, None]
    np.testing.assert_allclose(weighted, np.broadcast_to(truth.observed.mean, weighted.shape), rtol=1e-12, atol=1e-14)
    for context, weights in enumerate(truth.control_weights):
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        halves = weights.reshape(HALVINGS, 2, -1)
        assert ((halves > 0).sum(axis=1) == 1).all()  # every control cell in one half of each halving
        controls = cells.dense(truth.control_rows[context]).astype(float)
        np.testing.assert_allclose(halves @ controls, truth.control_halves[:, :, context], rtol=1e-9, atol=1e-12)


def test_the_variance_of_a_half_is_that_of_its_cells(screen):
    spec, conditions, cells = screen
    truth = observe(cells, conditions, Trial(dataset=spec, model=pr.NoChange()).make_split(conditions))
    second = truth.control_weights[0].reshape(HALVINGS, 2, -1)[0, 1] > 0
    chosen = cells.dense(truth.control_rows[0][second]).astype(float)
    np.testing.assert_allclose(truth.control_variance[0, 0], chosen.var(axis=0, ddof=1), rtol=1e-9, atol=1e-12)


def test_the_truth_does_not_depend_on_the_order_of_the_cells(screen):
    spec, conditions, cells = screen
    order = np.random.default_rng(1).permutation(len(conditions.cell_condition))
    shuffled = replace(
        conditions, cell_condition=conditions.cell_condition[order], cell_names=conditions.cell_names[order]
    )
    trial = Trial(dataset=spec, model=pr.NoChange())
    one = observe(cells, conditions, trial.make_split(conditions))
    other = observe(Cells([cells.select(order)]), shuffled, trial.make_split(shuffled))
    np.testing.assert_allclose(one.observed_halves, other.observed_halves, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(one.control_halves, other.control_halves, rtol=1e-12, atol=1e-14)


def test_levels_and_seeds_share_one_truth_and_another_split_has_its_own(screen):
    spec, conditions, _ = screen
    base = Trial(dataset=spec, model=pr.NoChange())
    trials = [
        replace(base, ablation=pr.Imbalance(level=level, highest=0.2), seed=seed)
        for level in (0.0, 0.2)
        for seed in (0, 1)
    ]
    assert len({digest(conditions, trial.make_split(conditions)) for trial in trials}) == 1
    other = replace(base, split=pr.CovariateTransfer(seed=7))
    assert digest(conditions, other.make_split(conditions)) != digest(conditions, base.make_split(conditions))


def test_a_perturbation_that_training_never_showed_has_rows_without_a_value(screen, monkeypatch):
    spec, conditions, cells = screen
    trial = Trial(dataset=spec, model=pr.MeanShift())
    split = trial.make_split(conditions)
    tested = conditions.perturbation[(split.condition == TEST) & ~conditions.is_control]
    gone = (conditions.perturbation == tested[0]) & (split.condition != TEST)
    lost = replace(split, condition=np.where(gone, 0, split.condition).astype(np.int8))
    lost = replace(lost, cell=np.where(gone[conditions.cell_condition], 0, split.cell).astype(np.int8))
    monkeypatch.setattr(Trial, "make_split", lambda self, conditions: lost)  # an ablation by hand
    rows = rows_of(trial, conditions, cells, source="split")
    here = rows["perturbation"] == tested[0]
    assert set(rows["status"][here]) == {"unseen_perturbation"}
    assert np.isnan(rows["value"][here]).all()
    assert not np.isnan(rows["value"][~here]).any()


def test_anchors_stand_between_chance_and_perfect_and_beat_the_mean(tmp_path):
    many = synthetic.Screen.small(cells=200, controls=400, affected=0.4, scale=2.0)
    spec, conditions, cells = opened(synthetic.write(tmp_path / "many.h5ad", many))
    split = Trial(dataset=spec, model=pr.NoChange()).make_split(conditions)
    truth = observe(cells, conditions, split)
    item = scoring.Anchor(key="a", truth="t", stratum=split.stratum[truth.rows], seed=0)
    metrics = (Metric("rmse", "average"), Metric("cosine", "delta_ctrl"), Metric("cosine", "delta_ctrl", rank=True))
    scoring.score(item, {"t": truth}, folder=tmp_path, metrics=metrics)
    anchors = table.read_anchors(tmp_path, keys=["a"]).groupby(["reference", "metric"], observed=True)["value"].mean()
    baseline = rows_of(
        Trial(dataset=spec, model=pr.PerturbedMean()), conditions, cells, source="split", metrics=metrics
    )
    for reference in (scoring.REPLICATE, scoring.INTERPOLATED):
        for metric in metrics:
            level = baseline["value_half"][baseline["metric"] == metric.name].mean()
            value = anchors[reference, metric.name]
            assert value > level if metric.higher_is_better else value < level
            assert (value < metric.best) if metric.higher_is_better else (value >= metric.best)


CELL = tuple(Metric.parse(name) for name in ("energy/pca", "energy/pca/skill", "mmd/genes", "topk_recall/wilcoxon"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A screen with enough cells for metrics of cells: what is observed of it, with a PCA."""
    many = synthetic.Screen.small(cells=60, controls=240, affected=0.4, scale=1.5, seed=3)
    spec, conditions, cells = opened(synthetic.write(tmp_path_factory.mktemp("cells") / "cells.h5ad", many))
    split = Trial(dataset=spec, model=pr.NoChange()).make_split(conditions)
    truth = observe(cells, conditions, split, sample=50, linear=True)
    space = fit_pca(cells.select(np.flatnonzero(split.cell == TRAIN)), 20)
    return spec, conditions, cells, replace(truth, pca_mean=space.mean, pca_loadings=space.loadings), split


def scored(sampled, model, metrics, *, source="split", keep=Here):
    spec, conditions, cells, truth, _ = sampled
    trial = Trial(dataset=spec, model=model, training=pr.Training(epochs=2))
    outcome = run(trial, cells, conditions, truth=truth, sample=50, keep=keep)
    item = scoring.Scorable(
        key="k",
        name="n",
        columns={},
        truth="",
        predicted=outcome.predicted,
        stratum=outcome.stratum,
        baseline=isinstance(model, pr.PerturbedMean),
    )
    return scoring._trial_rows(item, truth, metrics, source), outcome


def of_metric(rows, metric, column="value_half"):
    return rows[column][rows["metric"] == metric.name]


def test_metrics_of_cells_are_held_against_halves_of_the_same_cells(sampled):
    truth = sampled[3]
    rows, outcome = scored(sampled, pr.MeanShift(), CELL)
    space = PCA(mean=truth.pca_mean, loadings=truth.pca_loadings)
    row = 4
    values = []
    for halving in range(HALVINGS):
        x = truth.observed_sample[row][np.flatnonzero(truth.sample_half[row][halving] == 0)]
        y = outcome.predicted.sample[row]
        assert abs(x.shape[0] - 25) <= 8
        # drawn as the metric draws them: with as many predicted as observed cells, and all of the observed ones
        y = y[
            shuffled(signatures(y, truth.genes), "match", *truth.contexts[truth.context[row]], truth.perturbation[row])
        ]
        values.append(energy(space(x), space(y[: x.shape[0]])))
    assert of_metric(rows, CELL[0])[row] == pytest.approx(np.mean(values), rel=1e-9)


def test_metrics_of_cells_have_a_floor_a_ceiling_and_a_scaled_score(sampled, tmp_path):
    truth, split = sampled[3:]
    item = scoring.Anchor(key="a", truth="t", stratum=split.stratum[truth.rows], seed=0)
    scoring.score(item, {"t": truth}, folder=tmp_path, metrics=CELL)
    anchors = table.read_anchors(tmp_path, keys=["a"])
    assert set(anchors["reference"]) == {scoring.REPLICATE}
    replicate = anchors.groupby("metric", observed=True)["value"].mean()
    base, still = (scored(sampled, model, CELL)[0] for model in (pr.PerturbedMean(), pr.NoChange()))
    for metric in CELL:
        b, c = of_metric(base, metric).mean(), of_metric(still, metric).mean()
        r = replicate[metric.name]
        assert (r > b and r > c) if metric.higher_is_better else (r < b and r < c)
    # The mean response has the noise of control cells, without which it would be as far from cells as can be.
    flat = of_metric(base, CELL[0], "value").mean()
    assert of_metric(base, CELL[0]).mean() < 0.5 * flat


def test_the_linear_effect_is_that_of_the_means_of_expm1(sampled):
    conditions, cells, truth, split = sampled[1:]
    metric = Metric("cosine", "logfc")
    rows, outcome = scored(sampled, pr.MeanShift(), [metric], source="reference")
    epsilon = 1e-6 * truth.target_sum
    controls = np.concatenate([cells.dense(part).astype(float) for part in truth.control_rows])
    assert truth.target_sum == pytest.approx(np.median(np.expm1(controls).sum(axis=1)), rel=1e-6)
    model = outcome.model
    for row in (0, 5):
        control = cells.dense(truth.control_rows[truth.context[row]]).astype(float)
        here = (conditions.cell_condition == truth.rows[row]) & (split.cell == TEST)
        observed = cells.dense(np.flatnonzero(here)).astype(float)
        guess = np.maximum(control + model.profile[truth.rows[row]].numpy().astype(float), 0)
        means = [np.log2(np.expm1(part).mean(axis=0) + epsilon) for part in (guess, observed, control)]
        a, b = means[0] - means[2], means[1] - means[2]
        assert rows["value"][row] == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)), rel=1e-4)


def test_no_change_has_a_linear_effect_of_exactly_zero(sampled):
    for source in scoring.SOURCES:
        rows, _ = scored(sampled, pr.NoChange(), [Metric("cosine", "logfc")], source=source)
        assert (rows["value"] == 0).all()
        assert (rows["value_half"] == 0).all()
        assert set(rows["status"]) == {"constant_prediction"}


def test_anchors_of_a_linear_effect_stand_in_order(sampled, tmp_path):
    truth, split = sampled[3:]
    item, metric = (
        scoring.Anchor(key="a", truth="t", stratum=split.stratum[truth.rows], seed=0),
        Metric("cosine", "logfc"),
    )
    scoring.score(item, {"t": truth}, folder=tmp_path, metrics=[metric])
    values = table.read_anchors(tmp_path, keys=["a"]).groupby("reference", observed=True)["value"].mean()
    assert 0.2 < values[scoring.REPLICATE] < 1
    assert values[scoring.INTERPOLATED] > of_metric(scored(sampled, pr.PerturbedMean(), [metric])[0], metric).mean()


def test_anchors_know_how_much_is_observed_of_each_condition(sampled, tmp_path):
    conditions, cells, truth, split = sampled[1:]
    item = scoring.Anchor(key="a", truth="t", stratum=split.stratum[truth.rows], seed=0)
    scoring.score(item, {"t": truth}, folder=tmp_path, metrics=[Metric("rmse", "average")])
    found = table.read_anchors(tmp_path, keys=["a"])
    found = found[found["reference"] == scoring.REPLICATE].set_index("condition").loc[truth.rows]
    for row in (0, 5):
        here = (conditions.cell_condition == truth.rows[row]) & (split.cell == TEST)
        x = cells.dense(np.flatnonzero(here)).astype(float)
        y = cells.dense(truth.control_rows[truth.context[row]]).astype(float)
        parts = [((a[:, None] - b[None]) ** 2).sum(axis=2) for a, b in ((x, y), (x, x), (y, y))]
        unbiased = [part.sum() / (len(part) * (len(part) - 1)) for part in parts[1:]]
        assert found["effect_size"].iloc[row] == pytest.approx(2 * parts[0].mean() - sum(unbiased), rel=1e-9)
        tested = np.expm1(y).mean(axis=0) > 5e-6 * truth.target_sum
        tested &= ~np.isin(truth.genes, truth.perturbation[row].split("+"))
        p = ttest_ind(x[:, tested], y[:, tested], equal_var=False).pvalue
        q = false_discovery_control(np.where(np.isnan(p), 1, p))
        assert found["de_genes"].iloc[row] == (q < 0.05).sum() > 0


def test_what_depends_on_observed_cells_alone_is_computed_for_the_first_trial_only(sampled, monkeypatch):
    metrics = [*CELL, Metric.parse("mmd/pca"), Metric.parse("energy/pca/rank")]
    monkeypatch.setattr(distribution, "_REMEMBERED", {})
    monkeypatch.setattr(cell_metrics, "_TABLES", {})
    scored(sampled, pr.MeanShift(), metrics)
    known = set(distribution._REMEMBERED), set(cell_metrics._TABLES)
    assert min(map(len, known)) > 0
    within, calls = distribution.within, []
    monkeypatch.setattr(distribution, "within", lambda x, *rest: calls.append(len(x)) or within(x, *rest))
    _, outcome = scored(sampled, pr.NoChange(), metrics)
    assert (set(distribution._REMEMBERED), set(cell_metrics._TABLES)) == known
    conditions = len(outcome.predicted.rows)
    # of predicted cells: for each condition energy (value and skill) and two spaces of MMD, and once for the ranks
    assert len(calls) == (1 + HALVINGS) * conditions * 5


def test_parts_of_cells_kept_elsewhere_give_the_values_of_those_kept_here(sampled, monkeypatch, tmp_path):
    monkeypatch.setattr("perturbray.training.predict.PART_BYTES", 50 * 4 * len(sampled[1].genes) * 3)
    parts = []

    def keep(cells):
        parts.append(tmp_path / f"{len(parts)}.npy")
        np.save(parts[-1], cells)
        return partial(np.load, parts[-1], mmap_mode="r")

    here, there = (scored(sampled, pr.MeanShift(), CELL, keep=place)[0] for place in (Here, keep))
    assert len(parts) > 2
    for column in ("value", "value_half"):
        np.testing.assert_array_equal(here[column], there[column])


def test_lost_cells_are_no_failure_of_the_trial(sampled, tmp_path):
    def lose():
        raise LostCellsError("gone")

    _, outcome = scored(sampled, pr.MeanShift(), CELL[:1])
    lost = replace(outcome.predicted, sample=LazyCells((lose,) * len(outcome.predicted.rows)))
    item = scoring.Scorable(key="k", name="n", columns={}, truth="t", predicted=lost, stratum=outcome.stratum)
    with pytest.raises(LostCellsError):
        scoring.score(item, {"t": sampled[3]}, folder=tmp_path, metrics=CELL[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_comes_twice_is_stored_once(sampled, tmp_path, monkeypatch):
    _, outcome = scored(sampled, pr.MeanShift(), [Metric("rmse")])
    item = scoring.Scorable(
        key="k", name="n", columns={}, truth="t", predicted=outcome.predicted, stratum=outcome.stratum
    )
    scoring.score(item, {"t": sampled[3]}, folder=tmp_path, metrics=[Metric("rmse")])
    (before,) = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()]
    other = replace(item, columns={"second": True})
    scoring.score(other, {"t": sampled[3]}, folder=tmp_path, metrics=[Metric("rmse")])
    whole = scoring._trial_rows

    def meanwhile(*arguments):
        """Another scorer stores it while this one scores."""
        rows = whole(*arguments)
        table.write_trial(tmp_path, "m", columns={"first": True}, rows=rows)
        return rows

    monkeypatch.setattr(scoring, "_trial_rows", meanwhile)
    scoring.score(replace(other, key="m"), {"t": sampled[3]}, folder=tmp_path, metrics=[Metric("rmse")])
    assert {path.name for path in tmp_path.iterdir()} == {"k.parquet", "m.parquet"}
    assert before == ((tmp_path / "k.parquet").stat().st_ino, (tmp_path / "k.parquet").stat().st_mtime_ns)
    assert "second" not in table.read(tmp_path, keys=["m"])


def test_an_error_of_a_metric_is_recorded_with_trial_metric_and_condition(sampled, tmp_path, monkeypatch):
    _, outcome = scored(sampled, pr.MeanShift(), [Metric("rmse")])
    item = scoring.Scorable(
        key="k", name="mean_shift, seed 0", columns={}, truth="t", predicted=outcome.predicted, stratum=outcome.stratum
    )
    bad = outcome.predicted.mean[3]

    def broken(predicted, observed):
        if (predicted == bad).all(axis=-1).any():
            raise ZeroDivisionError("no such luck")
        return np.abs(predicted - observed).mean(axis=-1)

    monkeypatch.setitem(SCORES._things, "broken", replace(SCORES["mae"], name="broken", function=broken))
    with pytest.raises(MetricError):
        scoring.score(item, {"t": sampled[3]}, folder=tmp_path, metrics=[Metric("broken")])
    record = table.failed(tmp_path)["k"]
    truth, row = sampled[3], outcome.predicted.rows[3]
    label = ", ".join([*truth.contexts[truth.context[row]], truth.perturbation[row]])
    assert record["name"] == "mean_shift, seed 0"
    assert f"metric broken/average, condition {label}: ZeroDivisionError: no such luck" in record["error"]


@pytest.mark.slow
def test_with_400_cells_a_condition_the_replicate_stands_above_every_model(tmp_path):
    screen = synthetic.Screen(perturbations=24, combinations=0, cells=400, cells_spread=0.1, controls=1200, genes=200)
    spec, conditions, cells = opened(synthetic.write(tmp_path / "deep.h5ad", screen))
    metrics = (Metric("rmse", "average"), Metric("cosine", "logfc_logmean"), Metric("pearson", "delta_ctrl"))
    split = Trial(dataset=spec, model=pr.NoChange()).make_split(conditions)
    truth = observe(cells, conditions, split)
    item = scoring.Anchor(key="a", truth="t", stratum=split.stratum[truth.rows], seed=0)
    scoring.score(item, {"t": truth}, folder=tmp_path, metrics=metrics)
    anchors = table.read_anchors(tmp_path, keys=["a"])
    replicate = anchors[anchors["reference"] == scoring.REPLICATE].groupby("metric", observed=True)["value"].mean()
    own = [name for name, spec in pr.MODELS.items() if spec.__module__.startswith("perturbray.models")]
    for name in own:  # not those that other tests registered
        trial = Trial(dataset=spec, model=screens.default_spec(name), training=pr.Training(epochs=15))
        rows = rows_of(trial, conditions, cells, source="split", metrics=metrics)
        for metric in metrics:
            value = rows["value_half"][rows["metric"] == metric.name].mean()
            better = value > replicate[metric.name] if metric.higher_is_better else value < replicate[metric.name]
            assert not better, f"{name} is above the replicate in {metric.name}"
