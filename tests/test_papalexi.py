"""A real screen, through the project's own reader, baselines, truth and metrics, against values computed elsewhere."""

import numpy as np
import pytest

import perturbray as pr
from perturbray import scoring
from perturbray.data import matrix
from perturbray.data.batches import BatchStream, Cells
from perturbray.data.dataset import DatasetSpec, open_h5ad
from perturbray.data.splits import TEST, TRAIN, Split
from perturbray.data.truth import observe
from perturbray.data.vocabulary import Vocabulary
from perturbray.metrics.metric import Metric, score_prediction
from perturbray.training.fit import Training, fit
from perturbray.training.predict import predict

RMSE = Metric("rmse", "average")
COSINE = Metric("cosine", "delta_ctrl")
RANK = Metric("cosine", "delta_ctrl", rank=True, exclude="none")
# Counts a cell are scaled to: RMSE, median cosine and rank of the mean shift, RMSE of no change.
EXPECTED = {186.0: (0.041, 0.28, 0.155, 0.056), 10_000.0: (0.163, 0.217, 0.193, 0.191)}


@pytest.fixture(scope="module")
def screen(shared_data):
    spec = DatasetSpec(path=str(shared_data / "papalexi_eccite.h5ad"), covariates=("bio_rep",))
    conditions = spec.conditions()
    with open_h5ad(spec.path) as file:
        return conditions, matrix.read_rows(file, spec, 0, len(conditions.cell_condition))


@pytest.fixture(scope="module")
def last_replicate(screen):
    """Replicate 3 is tested, its control cells with it; replicates 1 and 2 are trained on."""
    conditions, _ = screen
    held = conditions.context == len(conditions.contexts) - 1
    return Split(
        condition=np.where(held & ~conditions.is_control, TEST, TRAIN).astype(np.int8),
        cell=np.where(held[conditions.cell_condition], TEST, TRAIN).astype(np.int8),
        stratum=np.full(len(conditions), "common"),
    )


def cells_at(rows, depth: float) -> Cells:
    normalisation = matrix.Normalisation(log1p=True, depth=depth, text="")
    scaled = rows.copy()
    totals = np.asarray(rows.sum(axis=1, dtype=float)).ravel()
    scaled.data = normalisation.apply(rows.data, np.diff(rows.indptr), totals)
    return Cells([scaled])


def predicted(spec, conditions, cells, split, truth):
    stream = BatchStream(cells, conditions, split, batch_size=1024, seed=0, mode=spec.mode)
    model = spec.build(Vocabulary.of(conditions, split))
    fit(model, stream, Training())
    return scoring.assemble(truth, predict(model, stream, truth), split.stratum[truth.rows])


@pytest.mark.parametrize("depth", EXPECTED)
def test_replicate_3_of_papalexi_from_1_and_2_gives_the_reference_values(screen, last_replicate, depth, monkeypatch):
    monkeypatch.setattr("perturbray.data.truth.MAX_CONTROLS", 10**6)  # the reference took all control cells
    conditions, rows = screen
    cells = cells_at(rows, depth)
    truth = observe(cells, conditions, last_replicate)
    assert len(truth) == 25
    rmse, cosine, rank, unchanged = EXPECTED[depth]
    table = score_prediction(predicted(pr.MeanShift(), conditions, cells, last_replicate, truth), [RMSE, COSINE, RANK])
    values = {metric.name: table["value"][table["metric"] == metric.name] for metric in (RMSE, COSINE, RANK)}
    assert values[RMSE.name].mean() == pytest.approx(rmse, abs=0.005)
    assert np.median(values[COSINE.name]) == pytest.approx(cosine, abs=0.02)
    assert values[RANK.name].mean() == pytest.approx(rank, abs=0.02)
    table = score_prediction(predicted(pr.NoChange(), conditions, cells, last_replicate, truth), [RMSE])
    assert table["value"].mean() == pytest.approx(unchanged, abs=0.005)


def test_the_four_knock_outs_of_the_interferon_gamma_pathway_retrieve_one_another(screen, last_replicate):
    conditions, rows = screen
    truth = observe(cells_at(rows, 186.0), conditions, last_replicate)
    last = len(truth.contexts) - 1
    effect = truth.observed.mean - truth.control_halves[0].mean(axis=0)[last]
    effect /= np.linalg.norm(effect, axis=1, keepdims=True)
    similarity = effect @ effect.T
    names = truth.perturbation.tolist()
    four = [names.index(name) for name in ("IFNGR1", "IFNGR2", "JAK2", "STAT1")]
    for row in four:
        nearest = np.argsort(-similarity[row])[1:4]
        assert set(nearest) | {row} == set(four)
    others = np.setdiff1d(np.arange(len(names)), four)
    assert similarity[np.ix_(four, four)].min() > 0.8
    assert similarity[np.ix_(four, others)].max() < 0.55
