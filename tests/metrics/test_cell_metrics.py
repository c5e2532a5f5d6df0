import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from perturbray.errors import InputError
from perturbray.metrics import CELL_METRICS, CellMetric, ExpressionMetric, Metric
from perturbray.metrics.distribution import BANDWIDTHS
from perturbray.prediction import CellSample, Prediction, Pseudobulk

every = pytest.mark.parametrize("name", list(CELL_METRICS))
no_ranks = pytest.mark.parametrize("name", [name for name in CELL_METRICS if "rank" not in name])
alone = pytest.mark.parametrize(  # no space, bandwidth or candidates of the context
    "name", [name for name in CELL_METRICS if not any(word in name for word in ("rank", "pca", "mmd"))]
)
MEMOS = {}  # what the metrics of one prediction share, so that the laws stay quick
MORE_CELLS = 60


@lru_cache
def sample(*, conditions=6, genes=50, seed=0, error=0.0, effect=1.0, copy=False, form=sparse.csr_matrix) -> Prediction:
    """Poisson cells with known effects on a quarter of the genes; ``error`` shifts predicted effects."""
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(99)
    base = truth.gamma(2.0, 1.0, genes)
    shifts = np.where(truth.random((conditions, genes)) < 0.25, truth.normal(0, effect, (conditions, genes)), 0)
    wrong = error * truth.normal(0, 1, (conditions, genes))

    def cells(log_shift, count, generator):
        return np.log1p(generator.poisson(base * np.exp(log_shift), (count, genes)) * 2.0)

    observed = [cells(shift, MORE_CELLS, np.random.default_rng([7, i])) for i, shift in enumerate(shifts)]
    predicted = (
        observed if copy else [cells(shift + w, MORE_CELLS, rng) for shift, w in zip(shifts, wrong, strict=True)]
    )
    control = cells(np.zeros(genes), 80, np.random.default_rng(5))

    def bulk(parts):
        return Pseudobulk(mean=np.stack([x.mean(0) for x in parts]), cells=np.array([len(x) for x in parts]))

    return Prediction(
        genes=tuple(f"G{i}" for i in range(genes)),
        covariates=("cell_type",),
        contexts=(("a",),),
        context=np.zeros(conditions, dtype=int),
        perturbation=np.array([f"p{i}" for i in range(conditions)]),
        stratum=np.full(conditions, ""),
        predicted=bulk(predicted),
        observed=bulk(observed),
        control=bulk([control]),
        cells=CellSample(
            predicted=tuple(map(form, predicted)), observed=tuple(map(form, observed)), control=(form(control),)
        ),
    )


def predicting(prediction: Prediction, **cells) -> Prediction:
    """With some predicted cells replaced, by row number."""
    sides = list(prediction.cells.predicted)
    for row, X in cells.items():
        sides[int(row[1:])] = X
    return replace(prediction, cells=replace(prediction.cells, predicted=tuple(sides)))


def evaluated(name: str, prediction: Prediction):
    return CELL_METRICS[name].evaluate(prediction, MEMOS.setdefault(id(prediction), {}))


@lru_cache
def flat_sample() -> Prediction:
    flat = np.repeat(sample().predicted.mean[2:3], MORE_CELLS, axis=0)
    return predicting(sample(), _2=sparse.csr_matrix(flat))


@lru_cache
def failed_sample() -> Prediction:
    broken = sample().cells.predicted[1].toarray()
    broken[3, 2] = np.nan
    return predicting(sample(), _1=broken, _4=sample().cells.predicted[4][:0])


@lru_cache
def rows_of_sample(*rows: int) -> Prediction:
    return sample(error=0.5).rows(np.array(rows))


@every
def test_a_perfect_prediction_gets_the_best_value_or_better(name):
    metric = CELL_METRICS[name]
    values, status = evaluated(name, sample(copy=True))
    defined = ~np.isnan(values)
    assert (status[~defined] != "").all()
    sign = 1 if metric.higher_is_better else -1
    assert (sign * values[defined] >= sign * metric.best - 1e-12).all()


@every
def test_error_moves_away_from_the_best_value(name):
    metric = CELL_METRICS[name]
    values = [np.nanmean(evaluated(name, sample(error=error, conditions=8))[0]) for error in (0.0, 2.0)]
    if name in ("topk_recall/wilcoxon", "recall/wilcoxon"):  # 50 genes, so all are the top; calling more recalls more
        assert values[0] >= values[1] - 0.2
    elif metric.higher_is_better:
        assert values[0] > values[1]
    else:
        assert values[0] < values[1]


@every
def test_dense_cells_get_the_values_of_sparse_ones(name):
    dense = evaluated(name, sample(error=0.5, form=np.asarray))[0]
    np.testing.assert_allclose(dense, evaluated(name, sample(error=0.5))[0], rtol=1e-8, atol=1e-12)


@alone
def test_other_conditions_do_not_change_a_score(name):
    values = evaluated(name, sample(error=0.5))[0]
    np.testing.assert_allclose(evaluated(name, rows_of_sample(4, 1, 2))[0], values[[4, 1, 2]], rtol=1e-12)


@every
def test_the_order_of_conditions_does_not_matter(name):
    order = [3, 0, 5, 2, 1, 4]
    values, again = evaluated(name, sample(error=0.5))[0], evaluated(name, rows_of_sample(*order))[0]
    np.testing.assert_allclose(again, values[order], rtol=1e-7, atol=1e-10)


@every
def test_the_order_of_cells_does_not_matter(name):
    values, again = evaluated(name, sample(error=0.5))[0], evaluated(name, turned())[0]
    np.testing.assert_allclose(again, values, rtol=1e-7, atol=1e-10)


@lru_cache
def turned() -> Prediction:
    """The same cells in another order."""
    cells, rng = sample(error=0.5).cells, np.random.default_rng(4)
    sides = {
        side: tuple(X[rng.permutation(X.shape[0])] for X in getattr(cells, side))
        for side in ("predicted", "observed", "control")
    }
    return replace(sample(error=0.5), cells=replace(cells, **sides))


def test_neither_hash_seed_nor_threads_change_a_value(tmp_path):
    """Cell metrics, metrics of means and a calibration in processes of their own, at the same time."""
    processes = []
    for seed, threads in (("0", "1"), ("1", "2"), ("42", "4")):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
        }
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
        run = [sys.executable, "-c", EVERYTHING]
        processes.append(subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, text=True))
    found = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    assert len(found[0].split()) > 100
    assert len(set(found)) == 1


HERE = Path(__file__).parent
EVERYTHING = """
from test_cell_metrics import CELL_METRICS, sample
from test_conventions import OPTIONS, small
from perturbray.metrics import METRICS, evaluate
from perturbray.metrics.calibration import calibrate
from perturbray.metrics.cells import compare
from perturbray.metrics.standard import prediction_of

memo, prediction = {}, sample(error=0.5)
for metric in CELL_METRICS.values():
    print(metric.name, *map(repr, metric.evaluate(prediction, memo)[0].tolist()))
comparison = compare(small(0), small(1), **OPTIONS)
chosen = [METRICS["cosine/delta_ctrl"], METRICS["rmse/average/rank"], CELL_METRICS["energy/pca"]]
print(calibrate(prediction_of(comparison), comparison, chosen, splits=2).to_csv())
"""


def test_a_shared_memo_changes_nothing():
    memo, prediction = {}, sample(error=0.5)
    for metric in [*CELL_METRICS.values(), *reversed(list(CELL_METRICS.values()))]:
        shared, alone = metric.evaluate(prediction, memo), metric.evaluate(prediction)
        np.testing.assert_array_equal(shared[0], alone[0])
        np.testing.assert_array_equal(shared[1], alone[1])


@every
def test_failed_cells_get_the_worst_value_and_leave_the_others_alone(name):
    metric = CELL_METRICS[name]
    values, status = evaluated(name, failed_sample())
    failed = np.isin(np.arange(6), [1, 4])
    undefined = np.isnan(values)
    assert (status[failed & ~undefined] == "failed_prediction").all()
    assert (values[failed & ~undefined] == metric.worst).all()
    if "rank" not in name:
        np.testing.assert_array_equal(values[~failed], evaluated(name, sample())[0][~failed])


@every
def test_every_name_parses_back_to_its_metric(name):
    assert Metric.parse(name) == CELL_METRICS[name]
    assert CELL_METRICS[name].name == name


def test_single_bandwidths_average_to_the_whole():
    prediction = sample(error=0.5)
    each = [CellMetric("mmd", "pca", f"x{factor:g}").evaluate(prediction)[0] for factor in BANDWIDTHS]
    np.testing.assert_allclose(np.mean(each, axis=0), CellMetric("mmd").evaluate(prediction)[0], rtol=1e-12)


@pytest.mark.parametrize("wrong", ["energy/pcs", "enrgy/pca", "energy/pca/rang", "des/wilcoxn", "mmd/pca/rank"])
def test_an_unknown_name_is_refused(wrong):
    with pytest.raises(InputError):
        Metric.parse(wrong)


@every
def test_a_prediction_without_cells_is_refused(name):
    with pytest.raises(InputError, match="cells"):
        CELL_METRICS[name].evaluate(replace(sample(), cells=None))


@no_ranks
def test_cells_without_variance_are_flagged(name):
    values, status = evaluated(name, flat_sample())
    assert status[2] == "degenerate_variance" or np.isnan(values[2])


def test_copies_of_the_observed_cells_are_flagged():
    assert (CellMetric("energy").evaluate(sample(copy=True))[1] == "copied_cells").all()
    assert (CellMetric("energy").evaluate(sample())[1] == "").all()


def test_a_replicate_has_skill_and_control_cells_have_none():
    replicate = CellMetric("energy", "pca", "skill").evaluate(sample(effect=1.5))[0]
    assert np.nanmean(replicate) == pytest.approx(1, abs=0.1)
    prediction = sample(effect=1.5)
    control = predicting(prediction, **{f"_{i}": prediction.cells.control[0] for i in range(6)})
    assert np.nanmean(CellMetric("energy", "pca", "skill").evaluate(control)[0]) == pytest.approx(0, abs=0.1)


def test_without_an_effect_skill_is_undefined():
    values, status = CellMetric("energy", "pca", "skill").evaluate(sample(effect=0.0, conditions=8))
    assert (status[np.isnan(values)] == "no_detectable_effect").all()
    assert np.isnan(values).mean() > 0.5


def test_target_genes_and_genes_below_the_gate_are_not_tested():
    prediction = sample()
    named = replace(prediction, perturbation=np.array([f"G{i}+G9" for i in range(6)]))
    from perturbray.metrics.cell_metrics import expression_tables, failed_rows

    tested = expression_tables(named, "wilcoxon", failed_rows(named))[2]
    for row in range(6):
        assert not tested[row][[row, 9]].any()
        assert tested[row].sum() == 48 + (row == 9)


@pytest.mark.parametrize("test", ["t_test", "t_test_overestim_var"])
def test_other_tests_have_names_of_their_own(test):
    metric = ExpressionMetric("roc_auc", test)
    values = metric.evaluate(sample())[0]
    assert np.nanmin(values) > 0.8
    assert Metric.parse(f"roc_auc/{test}") == metric
