"""The split control source, anchors and halves: laws that a wrong implementation breaks."""

from dataclasses import replace

import numpy as np
import pytest
import screens

import perturbray as pr
from perturbray import scoring, synthetic
from perturbray.data.batches import Cells
from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import TEST
from perturbray.data.truth import HALVINGS, digest, observe
from perturbray.metrics.metric import Metric
from perturbray.results import table
from perturbray.trial import Trial, run

METRICS = tuple(Metric(score, effect) for score in ("cosine", "pearson") for effect in ("delta_ctrl", "logfc_logmean"))


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
    truth = observe(cells, conditions, trial.make_split(conditions))
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


def test_a_perturbation_that_training_never_showed_has_rows_without_a_value(screen):
    spec, conditions, cells = screen
    trial = Trial(dataset=spec, model=pr.MeanShift())
    split = trial.make_split(conditions)
    tested = conditions.perturbation[(split.condition == TEST) & ~conditions.is_control]
    gone = (conditions.perturbation == tested[0]) & (split.condition != TEST)
    lost = replace(split, condition=np.where(gone, 0, split.condition).astype(np.int8))
    lost = replace(lost, cell=np.where(gone[conditions.cell_condition], 0, split.cell).astype(np.int8))
    trial = replace(trial, split=Fixed(lost))
    rows = rows_of(trial, conditions, cells, source="split")
    here = rows["perturbation"] == tested[0]
    assert set(rows["status"][here]) == {"unseen_perturbation"}
    assert np.isnan(rows["value"][here]).all()
    assert not np.isnan(rows["value"][~here]).any()


class Fixed(pr.SplitSpec):
    """A split made by hand."""

    def __init__(self, split) -> None:
        self._split = split

    def split(self, conditions):
        return self._split


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
    own = {name: spec for name, spec in pr.MODELS.items() if spec.__module__.startswith("perturbray.models")}
    for name, spec_of in own.items():  # not those that other tests registered
        trial = Trial(dataset=spec, model=spec_of(), training=pr.Training(epochs=15))
        rows = rows_of(trial, conditions, cells, source="split", metrics=metrics)
        for metric in metrics:
            value = rows["value_half"][rows["metric"] == metric.name].mean()
            better = value > replicate[metric.name] if metric.higher_is_better else value < replicate[metric.name]
            assert not better, f"{name} is above the replicate in {metric.name}"
