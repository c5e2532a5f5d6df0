from dataclasses import replace

import numpy as np
import pytest

from perturbray.errors import InputError
from perturbray.metrics import EFFECTS, METRICS, SCORES, Metric, score_prediction
from perturbray.metrics.metric import score_split
from perturbray.metrics.ranks import TIES
from perturbray.prediction import Prediction, Pseudobulk

PAIRS = [
    *((score, "delta_ctrl") for score in SCORES),
    *((score, effect) for score in ("rmse", "cosine") for effect in EFFECTS),
]
PAIRS = list(dict.fromkeys(PAIRS))
ALL = [Metric(*pair) for pair in PAIRS] + [
    Metric(*pair, rank=True, direction=direction)
    for pair in PAIRS
    for direction in ("obs", "pred")
    if not SCORES[pair[0]].weighted
]
every = pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
scores_only = pytest.mark.parametrize("metric", [m for m in ALL if not m.rank], ids=lambda metric: metric.name)
ranks_only = pytest.mark.parametrize("metric", [m for m in ALL if m.rank], ids=lambda metric: metric.name)


def rows_of(prediction: Prediction, rows, **changes) -> Prediction:
    return replace(
        prediction,
        context=prediction.context[rows],
        perturbation=prediction.perturbation[rows],
        stratum=prediction.stratum[rows],
        predicted=prediction.predicted.rows(rows),
        observed=prediction.observed.rows(rows),
        weights=prediction.weights[rows],
        **changes,
    )


def genes_of(bulk: Pseudobulk, genes) -> Pseudobulk:
    return Pseudobulk(
        mean=bulk.mean[:, genes], cells=bulk.cells, linear=bulk.linear[:, genes], variance=bulk.variance[:, genes]
    )


def predicting(prediction: Prediction, mean: np.ndarray) -> Prediction:
    bulk = Pseudobulk(mean=mean, cells=prediction.predicted.cells, linear=np.expm1(mean) * 1.1, variance=mean * 0.5)
    return replace(prediction, predicted=bulk)


@every
def test_a_perfect_prediction_gets_the_best_value(metric, make_screen):
    values, status = metric.evaluate(make_screen())
    assert (values == metric.best).all()
    assert (status == "").all()


@every
def test_noise_moves_away_from_the_best_value(metric, make_screen):
    distances = [np.abs(metric.evaluate(make_screen(error=error))[0].mean() - metric.best) for error in (0, 0.3, 3.0)]
    assert distances[0] < distances[1] + 1e-12
    assert distances[1] < distances[2]


@every
def test_the_order_of_conditions_does_not_matter(metric, make_screen):
    prediction, order = make_screen(error=0.5), np.random.default_rng(1).permutation(12)
    values, status = metric.evaluate(prediction)
    again, status_again = metric.evaluate(rows_of(prediction, order))
    np.testing.assert_allclose(again, values[order], rtol=1e-12)
    assert (status_again == status[order]).all()


@every
def test_the_order_of_genes_does_not_matter(metric, make_screen):
    prediction, order = make_screen(error=0.5), np.random.default_rng(1).permutation(60)
    parts = {name: genes_of(getattr(prediction, name), order) for name in ("predicted", "observed", "control")}
    genes = tuple(np.array(prediction.genes)[order])
    turned = replace(prediction, genes=genes, weights=prediction.weights[:, order], **parts)
    np.testing.assert_allclose(metric.evaluate(turned)[0], metric.evaluate(prediction)[0], rtol=1e-9, atol=1e-12)


@every
def test_contexts_and_strata_are_scored_apart(metric, make_screen):
    prediction = make_screen(error=0.5, contexts=1)
    stratum = np.array(["a", "b"])[np.arange(12) % 2]
    if EFFECTS[metric.effect].centred:  # the centre of a context is over all of its conditions
        prediction = replace(prediction, training_mean=prediction.observed.mean.mean(axis=0, keepdims=True))
    together = metric.evaluate(replace(prediction, stratum=stratum))[0]
    for name in "ab":
        alone = metric.evaluate(rows_of(replace(prediction, stratum=stratum), stratum == name))[0]
        np.testing.assert_allclose(alone, together[stratum == name], rtol=1e-12)


@every
def test_a_failed_prediction_gets_the_worst_value_and_leaves_the_others_alone(metric, make_screen):
    prediction = make_screen()
    mean = prediction.predicted.mean.copy()
    mean[4, 2], mean[7, 0] = np.nan, np.inf
    values, status = metric.evaluate(replace(prediction, predicted=replace(prediction.predicted, mean=mean)))
    failed = np.isin(np.arange(12), [4, 7])
    assert (status[failed] == "failed_prediction").all()
    assert (values[failed] == metric.worst).all()
    assert (values[~failed] == metric.best).all()
    assert (status[~failed] == "").all()


@ranks_only
def test_under_half_ties_one_vector_for_all_conditions_ranks_at_chance(metric, make_screen):
    prediction = make_screen(contexts=1)
    constant = predicting(prediction, np.repeat(prediction.control.mean + 0.3, 12, axis=0))
    values = metric.evaluate(constant)[0]
    assert values.mean() == pytest.approx(0.5, abs=1e-12)
    if metric.direction == "obs":
        assert (values == 0.5).all()


@ranks_only
def test_a_permuted_prediction_ranks_at_chance_on_average(metric, make_screen):
    prediction = make_screen(contexts=1, conditions=24)
    means = []
    for shift in range(1, 24):  # all derangements that shift: each prediction meets each other observation once
        mean = np.roll(prediction.observed.mean, shift, axis=0)
        means.append(metric.evaluate(predicting(prediction, mean))[0].mean())
    assert np.mean(means) == pytest.approx(24 / (2 * 23), abs=1e-9)


@ranks_only
def test_a_single_candidate_is_undefined(metric, make_screen):
    values, status = metric.evaluate(make_screen(conditions=1, contexts=1))
    assert np.isnan(values).all()
    assert (status == "single_candidate").all()


@pytest.mark.parametrize("effect", ["delta_ctrl", "logfc_logmean", "logfc"])
def test_predicting_no_change_is_no_direction(effect, make_screen):
    prediction = make_screen()
    rounding = 1 + 1e-12 * np.random.default_rng(0).normal(size=prediction.predicted.mean.shape)
    control = prediction.control.rows(prediction.context)
    bulk = replace(control, mean=control.mean * rounding, linear=control.linear * rounding)
    for score in ("cosine", "pearson", "spearman"):
        values, status = Metric(score, effect).evaluate(replace(prediction, predicted=bulk))
        assert (values == 0).all()
        assert (status == "constant_prediction").all()
    assert (Metric("cosine", effect, rank=True).evaluate(replace(prediction, predicted=bulk))[0] == 0.5).all()


def test_an_observed_effect_of_zero_is_undefined_for_all_models(make_screen):
    prediction = make_screen(error=0.5)
    still = replace(prediction.observed, mean=prediction.control.mean[prediction.context])
    values, status = Metric("cosine", "delta_ctrl").evaluate(replace(prediction, observed=still))
    assert np.isnan(values).all()
    assert (status == "constant_truth").all()
    failed = np.full_like(prediction.predicted.mean, np.nan)
    broken = replace(prediction, observed=still, predicted=replace(prediction.predicted, mean=failed))
    assert (Metric("cosine", "delta_ctrl").evaluate(broken)[1] == "constant_truth").all()


def test_zero_predictions_and_no_predictions_at_all_raise_no_warning(make_screen):
    prediction = make_screen()
    for metric in ALL:
        values, _ = metric.evaluate(predicting(prediction, np.zeros_like(prediction.predicted.mean)))
        assert np.isfinite(values).all()
        assert len(metric.evaluate(rows_of(prediction, np.arange(0)))[0]) == 0


@every
def test_every_name_parses_back_to_its_metric(metric):
    assert Metric.parse(metric.name) == metric
    for ties in TIES:
        option = replace(metric, ties=ties, exclude="none") if metric.rank else replace(metric, genes="top_expressed")
        assert Metric.parse(option.name) == option


def test_names_are_the_published_form():
    assert Metric("cosine", "logfc_logmean").name == "cosine/logfc_logmean"
    assert Metric("rmse").name == "rmse/average"
    assert Metric("cosine", "logfc_logmean", rank=True).name == "cosine/logfc_logmean/rank"
    assert Metric("rmse", rank=True, direction="pred").name == "rmse/average/rank_pred"
    assert Metric("rmse", rank=True, ties="strict").name == "rmse/average/rank[ties=strict]"
    assert all(name == metric.name for name, metric in METRICS.items())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cosin/average", "cosine"),
        ("rmse/avrage", "average"),
        ("rmse/average/rang", "rmse/average/rank"),
        ("rmse", "rmse"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, hint):
    with pytest.raises(InputError, match=hint):
        Metric.parse(name)


def test_directions_best_and_chance_values_stand_on_the_metric():
    assert Metric("cosine", "delta_mean").chance == 0
    assert Metric("cosine", "delta_ctrl").chance is None  # about n/(n + n₀) with a shared control
    assert Metric("rmse").chance is None
    rank = Metric("cosine", "delta_ctrl", rank=True)
    assert (rank.best, rank.chance, rank.worst, rank.higher_is_better) == (0, 0.5, 1, False)


def test_target_genes_stay_out_of_ranks(make_screen):
    prediction = make_screen(contexts=1, conditions=4)
    mean = prediction.control.mean.repeat(4, axis=0)
    knocked = mean.copy()
    for row, name in enumerate(prediction.perturbation):
        knocked[row, [prediction.genes.index(gene) for gene in name.split("+")]] = 0
    observed = replace(prediction.observed, mean=mean + np.random.default_rng(0).normal(0, 0.01, mean.shape))
    known = replace(
        predicting(prediction, knocked), observed=replace(observed, mean=np.where(knocked == 0, 0, observed.mean))
    )
    assert (Metric("rmse", rank=True, exclude="none").evaluate(known)[0] == 0).all()
    assert (Metric("rmse", rank=True).evaluate(known)[0] == 0.5).all()


@pytest.mark.parametrize("direction", ["obs", "pred"])
def test_own_targets_stay_out_of_the_rank_of_their_condition_only(direction, make_screen):
    prediction = make_screen(error=0.5, contexts=1)
    rank = Metric("cosine", "delta_ctrl", rank=True, direction=direction, exclude="own")
    values = rank.evaluate(prediction)[0]
    for row, name in enumerate(prediction.perturbation):
        kept = [index for index, gene in enumerate(prediction.genes) if gene not in name.split("+")]
        parts = {side: genes_of(getattr(prediction, side), kept) for side in ("predicted", "observed", "control")}
        genes = tuple(np.array(prediction.genes)[kept])
        fewer = replace(prediction, genes=genes, weights=prediction.weights[:, kept], **parts)
        assert values[row] == replace(rank, exclude="none").evaluate(fewer)[0][row]


def test_split_controls_give_no_skill_to_noise(make_screen):
    """No effect at all: a shift model and no change score about 0, where one shared control gives n/(n + n₀)."""
    rng, genes, conditions, n, n0 = np.random.default_rng(1), 300, 40, 60, 80

    def noise(rows: int, cells: int) -> Pseudobulk:
        return Pseudobulk(mean=5 + rng.normal(0, cells**-0.5, (rows, genes)), cells=np.full(rows, cells))

    truth, halves, shift = noise(conditions, n), [noise(1, n0 // 2) for _ in range(2)], noise(conditions, n).mean - 5
    metrics = [Metric("cosine", "delta_ctrl"), Metric("pearson", "delta_ctrl")]
    for strength in (1.0, 0.0):
        pair = []
        for a, b in ((0, 1), (1, 0)):
            guess = Pseudobulk(mean=halves[b].mean + strength * shift, cells=np.full(conditions, n))
            base = make_screen(contexts=1, conditions=conditions, genes=genes)
            pair.append(replace(base, observed=truth, predicted=guess, control=halves[b], observed_control=halves[a]))
        value = score_split(*pair, metrics)["value"]
        assert abs(value.mean()) <= 3 * value.std() / np.sqrt(conditions) + 1e-12
    with pytest.raises(ValueError, match="split"):
        score_split(pair[0], pair[0], metrics)


def test_weights_are_asked_for_where_missing(make_screen):
    with pytest.raises(InputError, match="weights"):
        Metric("wmse").evaluate(replace(make_screen(), weights=None))


def test_a_scored_prediction_is_a_long_table(make_screen):
    metrics = list(METRICS.values())
    table = score_prediction(make_screen(error=0.1), metrics)
    assert set(table) == {"condition", "metric", "value", "status"}
    assert {len(column) for column in table.values()} == {12 * len(metrics)}
    assert table["value"].dtype == np.float64
    expected = Metric("rmse").evaluate(make_screen(error=0.1))[0]
    np.testing.assert_array_equal(table["value"][table["metric"] == "rmse/average"], expected)


def test_a_shared_control_makes_noise_look_like_skill(make_screen):
    """Two noisy means of one population: cosine about n/(n + n₀) through one control, about 0 through two."""
    rng, genes, conditions, n, n0 = np.random.default_rng(0), 400, 30, 50, 50

    def noise(rows: int, cells: int) -> Pseudobulk:
        return Pseudobulk(mean=5 + rng.normal(0, cells**-0.5, (rows, genes)), cells=np.full(rows, cells))

    prediction = replace(
        make_screen(contexts=1, conditions=conditions, genes=genes),
        predicted=noise(conditions, n),
        observed=noise(conditions, n),
        control=noise(1, n0),
    )
    cosine = Metric("cosine", "delta_ctrl")
    assert cosine.evaluate(prediction)[0].mean() == pytest.approx(n / (n + n0), abs=0.05)
    apart = replace(prediction, observed_control=noise(1, n0))
    assert cosine.evaluate(apart)[0].mean() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(
    ("aggregation", "metric"), [("average", Metric("rmse")), ("logfc", Metric("cosine", "logfc_logmean"))]
)
def test_perturbench_values_and_ranks_are_reproduced(case, aggregation, metric):
    prediction = case.prediction()
    expected = case.expected("expected_perturbench_2026.csv").query(
        "aggregation == @aggregation and metric == @metric.score"
    )
    keys = [
        ("_".join(prediction.contexts[c]), p) for c, p in zip(prediction.context, prediction.perturbation, strict=True)
    ]
    expected = expected.set_index(["context", "condition"]).loc[keys]
    values, status = metric.evaluate(prediction)
    np.testing.assert_allclose(values, expected["value"], atol=1e-9 if case.exact else 1e-6)
    assert (status == "").all()
    for direction, column in (("obs", "rank_half_ties"), ("pred", "rank_transpose_half_ties")):
        rank = replace(metric, rank=True, direction=direction, exclude="none")
        np.testing.assert_allclose(rank.evaluate(prediction)[0], expected[column], atol=1e-12)


def test_an_error_names_the_metric_and_the_condition_and_keeps_its_kind(make_screen):
    prediction = make_screen()
    bare = replace(prediction, predicted=replace(prediction.predicted, linear=None))
    with pytest.raises(
        InputError, match=r"metric cosine/logfc, condition type 0, G0\+G1: InputError: effect 'logfc' needs"
    ):
        score_prediction(bare, [Metric("rmse"), Metric("cosine", "logfc")])


def test_linear_means_that_overflow_are_a_failed_prediction(make_screen):
    prediction = make_screen()
    linear = prediction.predicted.linear.copy()
    linear[3, 1] = np.inf
    broken = replace(prediction, predicted=replace(prediction.predicted, linear=linear))
    values, status = Metric("cosine", "logfc").evaluate(broken)
    assert (status[3], values[3]) == ("failed_prediction", -1)
    assert (np.delete(values, 3) == 1).all()
    assert (Metric("rmse").evaluate(broken)[1] == "").all()
