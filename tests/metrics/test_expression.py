import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from perturbray.errors import InputError
from perturbray.metrics import AGREEMENTS
from perturbray.metrics.cells import Cells, dense, moments
from perturbray.metrics.expression import (
    Genes,
    area_under_roc,
    average_precision,
    benjamini_hochberg,
    rank_sum,
    rank_sum_table,
    t_table,
    welch,
)

RNG = np.random.default_rng(4)
MWU = ("mwu_ties", "mwu_no_ties", "mwu_all_tied", "mwu_zeros_one_side", "mwu_constant_pred")


@pytest.fixture(scope="module")
def oracle(golden_cases):
    values = pd.read_csv(golden_cases / "dist_oracle.csv", keep_default_na=False)
    inputs = pd.read_csv(golden_cases / "dist_oracle_inputs.csv")

    def side(case: str, name: str) -> np.ndarray:
        rows = inputs[(inputs["case"] == case) & (inputs["side"] == name)].sort_values("row")
        return rows[["v0"]].to_numpy(dtype=float)

    return values, side


def test_tests_agree_with_the_oracle(oracle):
    values, side = oracle
    checked = 0
    for row in values[values["case"].str.startswith("mwu_")].itertuples():
        x, y = side(row.case, "x"), side(row.case, "y")
        continuity = "continuity=True" in row.params
        both = ((*moments(x), len(x)), (*moments(y), len(y)))
        if row.metric == "mannwhitney_p":
            got = rank_sum(x, y, continuity=continuity)[1][0]
        elif row.metric == "welch_t":
            got = welch(*both)[0][0]
        elif row.metric == "welch_p":
            got = welch(*both)[1][0]
        elif row.metric == "welch_t_overestim":
            got = welch(*both, overestimate=True)[0][0]
        else:
            continue
        checked += 1
        assert got == pytest.approx(float(row.value), rel=1e-12), (row.case, row.metric)
    assert checked > 20


def test_q_values_agree_with_the_oracle(oracle):
    values, _ = oracle
    family = values[(values["metric"] == "mannwhitney_p") & (values["params"] == "continuity=True")]
    expected = values[values["metric"] == "bh_q"]
    got = dict(zip(family["case"], benjamini_hochberg(family["value"].astype(float).to_numpy()), strict=True))
    assert len(expected) == len(got) == 8
    for row in expected.itertuples():
        assert got[row.case] == pytest.approx(float(row.value), rel=1e-12)


def test_q_values_are_those_of_scipy_by_row():
    p = RNG.random((6, 40)) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p, axis=1), rtol=1e-12)
    assert benjamini_hochberg(np.array([0.01, np.nan]))[1] == 1


def cells(form=np.asarray) -> Cells:
    counts = RNG.poisson(0.7, (90, 25)).astype(float)
    counts[:30] += RNG.poisson(0.5, (30, 25))
    counts[:, 3], counts[:30, 4], counts[30:, 5] = 0, 2, 2
    return Cells(X=form(np.log1p(counts)), group=np.repeat([0, 1, 2], [30, 20, 40]), groups=3)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("engine", ["scipy", "illico"])
def test_a_table_of_rank_sums_is_that_of_each_pair(form, engine):
    if engine == "illico":
        pytest.importorskip("illico")
    side = cells(form)
    z, p = rank_sum_table(side, [0, 1], side, 2, engine=engine)
    for row in range(2):
        expected_z, expected_p = rank_sum(side.of(row), side.of(2))
        np.testing.assert_allclose(p[row], expected_p, rtol=1e-9)
        np.testing.assert_allclose(z[row], expected_z, rtol=1e-9, atol=1e-12)
    assert p[0, 3] == 1


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("engine", ["scipy", "illico"])
def test_a_table_of_rank_sums_takes_the_cells_of_its_groups_wherever_they_stand(form, engine):
    """In any order, among cells of no group, of one group twice, and with the control in a file of its own."""
    if engine == "illico":
        pytest.importorskip("illico")
    side = cells(form)
    expected = rank_sum_table(side, [0, 1], side, 2, engine=engine)
    order = RNG.permutation(90)
    mixed = Cells(X=side.X[order], group=side.group[order], groups=3)
    more = Cells(X=form(dense(side.X)[np.append(order, order[:9])]), group=np.append(mixed.group, [-1] * 9), groups=3)
    apart = Cells(X=side.X[:50], group=side.group[:50], groups=3), Cells(X=side.X[50:], group=side.group[50:], groups=3)
    for own, reference in ((mixed, mixed), (more, more), apart, (mixed, more)):
        got = rank_sum_table(own, [0, 1], reference, 2, engine=engine)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    for group in (0, 1):
        alone = rank_sum_table(mixed, [group, group], mixed, 2, engine=engine)
        np.testing.assert_allclose(alone, np.array(expected)[:, [group, group]], rtol=1e-12, atol=1e-13)


def test_an_unknown_engine_is_refused():
    with pytest.raises(InputError, match="scipy"):
        rank_sum_table(cells(), [0], cells(), 2, engine="scip")


def test_constant_genes_have_no_variance_exactly_and_no_score():
    x = np.full((37, 3), 0.1)
    mean, variance = moments(x)
    assert (mean == 0.1).all()
    assert (variance == 0).all()
    t, p = welch((mean, variance, 37), (mean, variance, 50))
    assert (t == 0).all()
    assert (p == 1).all()
    t, p = welch((mean + 1, variance, 37), (mean, variance, 50))
    assert np.isinf(t).all()
    assert (p == 0).all()


@pytest.mark.parametrize("overestimate", [False, True])
def test_t_tests_agree_with_scipy(overestimate):
    side = cells()
    against = (*moments(side.of(2)), 40)
    t, p = t_table(side, [0, 1], against, overestimate=overestimate)
    for row in range(2):
        x = side.of(row)
        with np.errstate(all="ignore"):
            expected = stats.ttest_ind_from_stats(
                x.mean(0),
                x.std(0, ddof=1),
                len(x),
                against[0],
                np.sqrt(against[1]),
                len(x) if overestimate else 40,
                False,
            )
        kept = against[1] > 0
        np.testing.assert_allclose(t[row][kept], expected.statistic[kept], rtol=1e-10)
        np.testing.assert_allclose(p[row][kept], expected.pvalue[kept], rtol=1e-9)


def genes(q=None, logfc=None, *, n: int = 40, seed: int = 0) -> Genes:
    rng = np.random.default_rng(seed)
    q = rng.random(n) if q is None else np.asarray(q, dtype=float)
    logfc = rng.normal(0, 1, n) if logfc is None else np.asarray(logfc, dtype=float)
    names = np.array([f"G{i:03d}" for i in range(n)])
    return Genes(names=names, score=np.sign(logfc) * -np.log(q + 1e-12), p=q / 2, q=q, logfc=logfc)


TRUE = genes(np.r_[np.full(12, 0.001), np.full(28, 0.6)] + np.linspace(0, 1e-4, 40))
NOTHING = genes(np.full(40, 0.8))
EVERYTHING = genes(np.full(40, 0.001))


@pytest.mark.parametrize("name", list(AGREEMENTS))
def test_the_same_table_agrees_perfectly(name):
    value, status = AGREEMENTS[name](TRUE, TRUE)
    assert value == AGREEMENTS[name].best
    assert status == ""


@pytest.mark.parametrize("name", list(AGREEMENTS))
def test_an_unrelated_table_agrees_less(name, monkeypatch):
    monkeypatch.setattr("perturbray.metrics.expression.TOP", 10)  # of 40 genes
    values = [AGREEMENTS[name](genes(seed=seed), TRUE)[0] for seed in range(1, 9)]
    assert (np.mean(values) < 1) == AGREEMENTS[name].higher_is_better


@pytest.mark.parametrize("name", list(AGREEMENTS))
def test_without_a_true_gene_only_set_sizes_are_defined(name):
    value, status = AGREEMENTS[name](TRUE, NOTHING)
    defined = {"jaccard": 0.0, "fidelity": None, "topk_recall": None}
    if name in defined:
        assert np.isfinite(value)
        assert defined[name] is None or value == defined[name]
    else:
        assert np.isnan(value)
        assert status == "no_true_de"


def test_two_empty_sets_are_equal():
    assert AGREEMENTS["jaccard"](NOTHING, NOTHING)[0] == 1
    assert AGREEMENTS["fidelity"](NOTHING, NOTHING)[1] == "no_true_de"


@pytest.mark.parametrize("name", ["des", "recall", "fidelity", "jaccard"])
def test_calling_nothing_gets_nothing(name):
    assert AGREEMENTS[name](NOTHING, TRUE)[0] == 0


def test_when_every_gene_is_true_the_roc_has_one_class():
    assert AGREEMENTS["pr_auc"](TRUE, EVERYTHING)[0] == 1
    assert AGREEMENTS["roc_auc"](TRUE, EVERYTHING) == (pytest.approx(np.nan, nan_ok=True), "one_class")


def test_few_tested_genes_are_not_scored():
    few = genes(n=9)
    assert all(thing(few, few)[1] == "too_few_genes" for thing in AGREEMENTS.values())


def test_counts_of_a_small_example():
    logfc = np.r_[4, 3, 2, 1, np.zeros(8)]
    truth = genes(np.r_[np.full(4, 0.01), np.full(8, 0.9)], logfc, n=12)
    guess = genes(np.r_[0.01, 0.9, 0.02, 0.9, 0.03, np.full(7, 0.9)], np.r_[3, 1, -2, 1, 5, np.zeros(7)], n=12)
    assert AGREEMENTS["recall"](guess, truth)[0] == 2 / 4
    assert AGREEMENTS["jaccard"](guess, truth)[0] == 2 / 5
    assert AGREEMENTS["des"](guess, truth)[0] == 2 / 4
    assert AGREEMENTS["fidelity"](guess, truth)[0] == 1 / 4  # G004 has no observed sign
    assert AGREEMENTS["direction_match"](guess, truth)[0] == 3 / 4
    assert AGREEMENTS["reach"](guess, truth)[0] == 1 / 4  # right, wrong, ...
    assert AGREEMENTS["lfc_nmae"](guess, truth)[1] == "no_true_de"


def test_predicting_no_change_has_a_fold_change_error_of_one():
    still = genes(np.full(40, 0.9), np.zeros(40))
    assert AGREEMENTS["lfc_nmae"](still, TRUE)[0] == 1
    assert AGREEMENTS["lfc_spearman"](still, TRUE) == (0.0, "constant_prediction")


def test_areas_agree_with_direct_counts_under_ties():
    label, score = RNG.random(60) < 0.3, RNG.integers(0, 6, 60).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in score[label] for b in score[~label]]
    assert area_under_roc(label, score) == pytest.approx(np.mean(pairs), rel=1e-12)
    area, before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        called = score >= threshold
        recall = label[called].sum() / label.sum()
        area, before = area + (recall - before) * label[called].mean(), recall
    assert average_precision(label, score) == pytest.approx(area, rel=1e-12)


def test_ties_in_an_order_do_not_depend_on_the_order_of_genes():
    order = RNG.permutation(40)
    tied = genes(np.full(40, 0.01), np.ones(40))
    turned = Genes(**{name: getattr(tied, name)[order] for name in ("names", "score", "p", "q", "logfc")})
    turned_truth = Genes(**{name: getattr(TRUE, name)[order] for name in ("names", "score", "p", "q", "logfc")})
    for thing in AGREEMENTS.values():
        assert thing(turned, turned_truth)[0] == pytest.approx(thing(tied, TRUE)[0], rel=1e-12)
