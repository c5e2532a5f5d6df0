from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbray.errors import InputError
from perturbray.metrics.cells import Cells, canonical, compare, group_sums, pseudobulk, shuffled, signatures

RNG = np.random.default_rng(6)
GENES = [f"G{i}" for i in range(12)]


def table(labels, contexts=None, *, form=sparse.csr_matrix, genes=GENES, dtype=np.float32):
    X = np.log1p(RNG.poisson(1.0, (len(labels), len(genes)))).astype(dtype) * 0.9
    obs = pd.DataFrame({"perturbation": labels, "cell_type": contexts or ["a"] * len(labels)})
    obs.index = [f"cell {i}" for i in range(len(labels))]
    return anndata.AnnData(X=form(X), obs=obs, var=pd.DataFrame(index=genes))


LABELS = ["control", "G1", "G2+G1", "G1", "control", "G2+G1"]
OPTIONS = {"perturbation_key": "perturbation", "control": "control", "covariate_keys": ["cell_type"]}


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_group_sums_are_those_of_dense_cells_in_float64(form, dtype, monkeypatch):
    monkeypatch.setattr("perturbray.metrics.cells.BLOCK_BYTES", 8 * 7 * 6)
    X = (RNG.random((40, 9)) * (RNG.random((40, 9)) < 0.4)).astype(dtype)
    group = RNG.integers(-1, 4, 40)
    for transform in (None, np.expm1):
        values = X.astype(float) if transform is None else transform(X.astype(float))
        expected = np.stack([values[group == g].sum(axis=0) for g in range(4)])
        np.testing.assert_allclose(group_sums(form(X), group, 4, transform), expected, rtol=1e-13)


def test_a_group_without_cells_has_no_mean():
    cells = Cells(X=RNG.random((5, 3)), group=np.array([0, 0, 2, 2, -1]), groups=3)
    bulk = pseudobulk(cells)
    assert np.isnan(bulk.mean[1]).all()
    assert bulk.cells.tolist() == [2, 0, 2]


def test_one_name_stands_for_a_set_of_perturbations():
    assert canonical("B+A", "control") == canonical("A+B", "control") == "A+B"
    assert canonical("A+control", "control") == "A"
    assert canonical("control+control", "control") == "control"


def test_conditions_are_matched_whatever_the_order_of_cells_genes_and_combinations():
    observed = table(LABELS)
    order = [5, 3, 1, 0, 4, 2]
    predicted = observed[order, GENES[::-1]].copy()
    predicted.obs["perturbation"] = [label.replace("G2+G1", "G1+G2") for label in predicted.obs["perturbation"]]
    both = compare(observed, predicted, **OPTIONS)
    assert both.perturbation.tolist() == ["G1", "G2+G1"]  # as the observed file writes it
    np.testing.assert_allclose(pseudobulk(both.observed).mean, pseudobulk(both.predicted).mean, rtol=1e-7)
    assert both.own_control.all()
    assert both.contexts == (("a",),)


def test_predicted_conditions_that_were_not_observed_are_left_out():
    both = compare(table(LABELS), table([*LABELS, "G9"]), **OPTIONS)
    assert both.perturbation.tolist() == ["G1", "G2+G1"]


def changed(data, **changes):
    data = data.copy()
    for name, value in changes.items():
        setattr(data, name, value)
    return data


def renamed(data, genes):
    return SimpleNamespace(X=data.X, obs=data.obs, var_names=genes)


BAD = {
    "genes differ": (table(LABELS), table(LABELS, genes=[*GENES[:-1], "other"])),
    "gene names occur twice: G1": (table(LABELS), renamed(table(LABELS), [*GENES[:-1], "G1"])),
    "no cells of 1 observed conditions: a, G1": (table(LABELS), table(["control", "G2+G1"])),
    "no control cells": (table(["G1", "G1"]), table(["G1", "G1"])),
    "no condition to score": (table(["control"] * 3), table(["control"] * 3)),
    "reaches 20": (changed(table(LABELS), X=np.full((6, 12), 20.0)), table(LABELS)),
    "negative": (changed(table(LABELS), X=np.full((6, 12), -0.5)), table(LABELS)),
    "integers only": (changed(table(LABELS), X=np.ones((6, 12))), table(LABELS)),
    "NaN": (changed(table(LABELS), X=np.full((6, 12), np.nan)), table(LABELS)),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input_is_refused_with_what_is_wrong(message):
    with pytest.raises(InputError, match=message):
        compare(*BAD[message], **OPTIONS)


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(InputError, match=r"observed: obs has no column 'perturbatoin'.*perturbation"):
        compare(table(LABELS), table(LABELS), **OPTIONS | {"perturbation_key": "perturbatoin"})


def test_a_random_order_of_cells_follows_from_their_content():
    data = table(["G1"] * 40)
    data.X = sparse.csr_matrix(data.X.toarray()[np.r_[np.arange(39), 3]])  # two equal cells
    signature = signatures(data.X, tuple(GENES))
    order, columns = RNG.permutation(40), RNG.permutation(12)
    turned = data[order, columns]
    again = signatures(turned.X.toarray(), tuple(np.array(GENES)[columns]))
    np.testing.assert_array_equal(again, signature[order])
    one, other = shuffled(signature, "here", 1), shuffled(again, "here", 1)
    np.testing.assert_array_equal(data.X[one].toarray(), data.X[order[other]].toarray())
    assert sorted(one) == list(range(40))
    assert (shuffled(signature, "here", 2) != one).any()
    assert len(shuffled(signature[:0], "here")) == 0


def test_random_orders_of_cells_are_uniform():
    signature = signatures(RNG.random((10, 12)), tuple(GENES))
    signature[5:] = signature[5]  # equal cells too
    first = np.array([shuffled(signature, seed)[0] for seed in range(5000)])
    assert np.bincount(first, minlength=10) / 5000 == pytest.approx(np.full(10, 0.1), abs=0.02)


def test_contexts_hold_every_covariate_apart():
    observed = table(["control", "G1", "control", "G1"], ["a_b", "a_b", "a", "a"])
    observed.obs["dose"] = ["c", "c", "b_c", "b_c"]
    both = compare(observed, observed, **OPTIONS | {"covariate_keys": ["cell_type", "dose"]})
    assert both.contexts == (("a", "b_c"), ("a_b", "c"))
