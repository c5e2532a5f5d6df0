"""Fitted models from their files: what they predicted where they were fitted, they predict elsewhere, for any condition."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import screens
import torch
from scipy import sparse

from perturbray import synthetic
from perturbray.counterfactual.cells import CONDITIONS, check, effects, predicted, read_conditions, write_cells
from perturbray.counterfactual.controls import Controls
from perturbray.counterfactual.ranking import enrichment, rank, read_signature
from perturbray.data import store
from perturbray.data.batches import Batch
from perturbray.data.dataset import DatasetSpec
from perturbray.data.splits import TEST, TRAIN, Combination, CovariateTransfer
from perturbray.errors import InputError
from perturbray.evaluate import Files, evaluate_files
from perturbray.models.base import MODELS, ModelSpec
from perturbray.models.baselines import Additive, MeanShift, NoChange
from perturbray.models.latent_additive import LatentAdditive
from perturbray.training.fitted import Fitted


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """A screen of two contexts with combinations."""
    shape = {"contexts": 2, "perturbations": 14, "combinations": 6, "cells": 12, "controls": 60, "genes": 30}
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    return DatasetSpec(path=str(synthetic.write(path, synthetic.Screen.small(**shape))))


@pytest.fixture(scope="module")
def lab(screen):
    return screens.lab_of(screen, task=Combination(fraction=0.5))


def fitted(spec: ModelSpec, lab: screens.Lab, dataset: DatasetSpec, *, seed: int = 0, **training) -> Fitted:
    torch.manual_seed(seed)
    model = lab.fitted(spec, **training)
    normalisation = store.ingest(dataset, lab.conditions).normalisation
    bare = replace(lab.conditions, cell_condition=np.empty(0, np.int32), cell_names=np.empty(0, object))
    return Fitted(
        spec=spec,
        state=model.state_dict(),
        conditions=bare,
        subset=lab.split.condition,
        train_cells=lab.vocabulary.train_cells,
        roles={"perturbation": dataset.perturbation, "delimiter": dataset.delimiter, "layer": None},
        embedding_width=0,
        depth=normalisation.depth if normalisation.log1p else None,
        seed=seed,
        name="a model",
        path="a.pt",
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_its_file_predicts_as_the_one_that_was_fitted(name, lab, screen, tmp_path):
    spec = screens.default_spec(name)
    one = fitted(spec, lab, screen)
    one.save(tmp_path / "m.pt")
    again = Fitted.load(str(tmp_path / "m.pt"))
    assert again.spec == spec
    assert (again.subset == one.subset).all()
    torch.manual_seed(0)
    model = lab.fitted(spec).eval()
    rows = np.flatnonzero((lab.split.condition == TEST) & lab.vocabulary.known)
    asked = [(int(lab.conditions.context[row]), lab.conditions.singles[row]) for row in rows]
    other, codes = again.with_conditions([*asked, (0, ("drug_001", "drug_002")), (1, ("drug_003", "drug_008"))])
    assert codes[: len(rows)].tolist() == rows.tolist()
    control = torch.from_numpy(lab.cells.dense(np.arange(len(rows))))
    contexts = torch.from_numpy(lab.conditions.context[rows])
    batch = Batch(expression=None, control=control, condition=torch.from_numpy(rows), context=contexts)
    with torch.no_grad():
        torch.testing.assert_close(other.predict(batch), model.predict(batch), rtol=0, atol=0)
        new = replace(batch, condition=torch.full_like(batch.condition, int(codes[-1])), context=contexts * 0 + 1)
        assert torch.isfinite(other.predict(new)).all()


def test_the_file_holds_no_cell(lab, screen, tmp_path):
    fitted(NoChange(), lab, screen).save(tmp_path / "m.pt")
    table = torch.load(tmp_path / "m.pt", weights_only=True)
    assert table["state"] == {}
    assert len(table["perturbation"]) == len(lab.conditions)
    assert (tmp_path / "m.pt").stat().st_size < 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "this is no fitted model; sweeps write them"),
        (None, "there is no such file"),
        (b"", "no fitted model"),
    ],
)
def test_what_is_no_fitted_model_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        Fitted.load(str(tmp_path / "m.pt"))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"fitted": torch.zeros(3)}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="no fitted model"):
        Fitted.load(str(tmp_path / "m.pt"))


def test_predicted_cells_are_those_of_training_and_are_scored_by_evaluate(lab, screen, tmp_path):
    """The additive baseline, exact on a screen without noise, is exact through files as well."""
    table = tmp_path / "table.csv"
    asked = [label for label in sorted(set(lab.conditions.perturbation)) if "+" in label]
    table.write_text("condition\n" + "\n".join(asked) + "\n")
    one = fitted(Additive(), lab, screen)
    controls = Controls.read(screen.path, one, most=40)
    found = read_conditions(str(table), one, controls)
    assert found == [(context, tuple(label.split("+"))) for label in asked for context in (0, 1)]
    out = tmp_path / "predicted.h5ad"
    number = write_cells(one, controls, found, out)
    assert number == (2 * 6 + 2) * 40
    assert [p.name for p in tmp_path.glob("*.partial")] == []
    cells = ad.read_h5ad(out)
    assert list(cells.var_names) == list(lab.conditions.genes)
    assert cells.X.min() >= 0
    rows = screens.rows_of(screen, lab.conditions).toarray()
    position = {name: row for row, name in enumerate(lab.conditions.cell_names)}
    source = rows[[position[name] for name in cells.obs["control_cell"]]]
    is_control = (cells.obs["condition"] == "control").to_numpy()
    np.testing.assert_allclose(cells.X[is_control], source[is_control], rtol=1e-6)
    for label in asked[:2]:
        for context in (0, 1):
            name = lab.conditions.contexts[context][0]
            here = (cells.obs["condition"] == label).to_numpy() & (cells.obs["cell_type"] == name).to_numpy()
            shift = sum(_effect(lab, context, single) for single in label.split("+"))
            np.testing.assert_allclose(cells.X[here], np.maximum(source[here] + shift, 0), atol=1e-5)
    files = Files(
        observed=str(_lognormalised(lab, screen, tmp_path)),
        predicted=str(out),
        perturbation_key="condition",
        control="control",
        covariate_keys=("cell_type",),
    )
    scores = evaluate_files(files, folder=tmp_path)
    assert {"rmse/average"} <= set(scores["metric"])
    assert scores[scores["metric"] == "rmse/average"]["value"].notna().sum() == 12


def _effect(lab, context, single):
    conditions, split = lab.conditions, lab.split

    def mean(wanted):
        row = np.flatnonzero(wanted & (conditions.context == context))
        cells = np.flatnonzero(np.isin(conditions.cell_condition, row) & (split.cell == TRAIN))
        return lab.cells.dense(cells).astype(float).mean(axis=0)

    return mean(conditions.perturbation == single) - mean(conditions.is_control)


def _lognormalised(lab, screen, folder):
    """The combinations and controls of the screen as `evaluate` takes them."""
    rows = screens.rows_of(screen, lab.conditions)
    cells = ad.read_h5ad(screen.path)
    keep = cells.obs["condition"].astype(str).str.contains(r"\+|control").to_numpy()
    obs = cells.obs[keep].astype(str)
    ad.AnnData(X=sparse.csr_matrix(rows[keep]), obs=obs, var=pd.DataFrame(index=cells.var_names)).write_h5ad(
        folder / "observed.h5ad"
    )
    return folder / "observed.h5ad"


def test_a_prediction_does_not_depend_on_what_else_is_asked_for(lab, screen):
    one = fitted(LatentAdditive(), lab, screen)
    controls = Controls.read(screen.path, one, most=10)
    names = lab.vocabulary.perturbations
    pairs = [(0, (a, b)) for i, a in enumerate(names) for b in names[i + 1 :]]
    assert len(pairs) < CONDITIONS
    whole = list(predicted(one, controls, pairs))
    alone = [next(predicted(one, controls, [pair])) for pair in pairs[::7]]
    for first, second in zip(whole[::7], alone, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_controls_take_the_form_that_training_had(lab, screen, tmp_path):
    one = fitted(NoChange(), lab, screen)
    expected = Controls.read(screen.path, one, most=30)
    cells = ad.read_h5ad(screen.path)
    rows = screens.rows_of(screen, lab.conditions)
    order = np.random.default_rng(0).permutation(cells.n_vars)
    logged = ad.AnnData(X=rows[:, order], obs=cells.obs, var=pd.DataFrame(index=cells.var_names[order]))
    logged.write_h5ad(tmp_path / "log.h5ad")
    found = Controls.read(str(tmp_path / "log.h5ad"), one, most=30)
    for first, second, names, others in zip(expected.cells, found.cells, expected.names, found.names, strict=True):
        torch.testing.assert_close(first, second)
        assert (names == others).all()
        assert len(first) == 30
    logged.X = logged.X * 0.8
    logged.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(InputError, match=r"counts a cell, log-normalised; the model was fitted on"):
        Controls.read(str(tmp_path / "other.h5ad"), one)
    with pytest.raises(InputError, match="these are counts, but the model was fitted on log-normalised values"):
        Controls.read(screen.path, replace(one, depth=None))


def test_controls_that_do_not_fit_the_model_are_refused(lab, screen, tmp_path):
    one = fitted(NoChange(), lab, screen)
    cells = ad.read_h5ad(screen.path)
    cells[:, :-2].copy().write_h5ad(tmp_path / "genes.h5ad")
    with pytest.raises(InputError, match=r"2 of the model's 30 genes are not there: gene_029, gene_030"):
        Controls.read(str(tmp_path / "genes.h5ad"), one)
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).replace("line_b", "line_c")
    cells.write_h5ad(tmp_path / "context.h5ad")
    with pytest.raises(InputError, match="the model knows no context line_c: did you mean"):
        Controls.read(str(tmp_path / "context.h5ad"), one)
    with pytest.raises(InputError, match=r"no cell has obs.*'dmso'"):
        Controls.read(screen.path, one, control="dmso")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("drug\nA\n", "no column 'condition' with perturbations; it has drug"),
        ("condition\n", "it asks for no condition"),
        ("condition\ncontrol\n", "row 1 asks for 'control', which is no perturbation"),
        ("condition,cell_type\ndrug_001,line_x\n", "row 1: the controls have no context line_x; did you mean"),
        (None, "there is no such file"),
    ],
)
def test_a_table_that_asks_for_nothing_is_refused(lab, screen, tmp_path, content, message):
    one = fitted(NoChange(), lab, screen)
    controls = Controls.read(screen.path, one, most=5)
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_conditions(str(tmp_path / "t.csv"), one, controls)


def test_a_perturbation_that_training_never_showed_is_named(lab, screen):
    one = fitted(LatentAdditive(), lab, screen)
    controls = Controls.read(screen.path, one, most=5)
    with pytest.raises(InputError, match=r"cannot predict 1 of 2 conditions; it never saw drug_01 \(did you mean"):
        check(one, controls, [(0, ("drug_001",)), (0, ("drug_001", "drug_01"))])


# Rankings


def test_what_adds_up_deviates_by_nothing(lab, screen):
    one = fitted(Additive(), lab, screen)
    controls = Controls.read(screen.path, one, most=50)
    controls = replace(controls, cells=tuple(cells + 5 for cells in controls.cells))  # nothing is clipped
    table = rank([one], controls)
    singles = len(lab.vocabulary.perturbations)
    assert len(table) == 2 * singles * (singles - 1) // 2
    assert table["deviation"].max() < 1e-6
    assert np.abs(table["interaction"]).max() < 1e-5
    assert table["spread"].isna().all()
    row = table[(table["condition"] == "drug_001+drug_004") & (table["cell_type"] == "line_b")].iloc[0]
    effect = _effect(lab, 1, "drug_001") + _effect(lab, 1, "drug_004")
    assert row["effect"] == pytest.approx(np.sqrt(np.mean(effect**2)), rel=1e-4)
    measured = {(c, p) for (c,), p in lab.conditions}
    held = {(c, p) for ((c,), p), s in zip(lab.conditions, lab.split.condition, strict=True) if s != TRAIN}
    for _, row in table.iterrows():
        pair = row["cell_type"], row["condition"]
        assert row["measured"] == (pair in measured)
        assert row["trained"] == (pair in measured - held)


def test_deviation_and_spread_are_those_of_the_predicted_profiles(lab, screen):
    """Against the profiles themselves, pair by pair."""
    fits = [fitted(LatentAdditive(width=16, latent_dim=4), lab, screen, seed=seed) for seed in (0, 1, 2)]
    controls = Controls.read(screen.path, fits[0], most=20)
    table = rank(fits, controls)
    assert (np.diff(table["deviation"]) <= 0).all()
    signature = np.linspace(-1, 1, 30)
    similar = rank(fits, controls, signature=signature)
    assert (np.diff(similar["similarity"]) <= 0).all()
    for _, row in similar.iloc[[0, 11, -1]].iterrows():
        context = lab.conditions.contexts.index((row["cell_type"],))
        singles = tuple(row["condition"].split("+"))
        found = np.stack(
            [list(effects(f, controls, [(context, singles), *[(context, (s,)) for s in singles]])) for f in fits]
        )
        pair, parts = found[:, 0], found[:, 1:].sum(axis=1)
        mean = pair.mean(axis=0)
        assert row["effect"] == pytest.approx(np.sqrt((mean**2).mean()))
        assert row["deviation"] == pytest.approx(np.sqrt(((pair - parts).mean(axis=0) ** 2).mean()))
        assert row["spread"] == pytest.approx(np.sqrt(pair.var(axis=0, ddof=1).mean()))
        assert row["similarity"] == pytest.approx(mean @ signature / np.linalg.norm(mean) / np.linalg.norm(signature))


def test_perturbations_are_ranked_in_the_contexts_where_they_were_not_measured(tmp_path):
    shape = {"contexts": 3, "perturbations": 8, "combinations": 0, "cells": 10, "controls": 30, "genes": 20}
    path = synthetic.write(tmp_path / "s.h5ad", synthetic.Screen.small(**shape))
    cells = ad.read_h5ad(path)
    gone = (cells.obs["cell_type"] == "line_b").to_numpy() & cells.obs["condition"].isin(
        ["drug_002", "drug_005"]
    ).to_numpy()
    cells[~gone].copy().write_h5ad(path)
    spec = DatasetSpec(path=str(path))
    lab = screens.lab_of(spec, task=CovariateTransfer())
    one = fitted(MeanShift(), lab, spec)
    controls = Controls.read(spec.path, one, most=30)
    controls = replace(controls, cells=tuple(cells + 5 for cells in controls.cells))
    table = rank([one], controls, kind="contexts")
    assert set(zip(table["cell_type"], table["condition"], strict=True)) == {
        ("line_b", "drug_002"),
        ("line_b", "drug_005"),
    }
    assert not table["measured"].any()
    assert table["deviation"].max() < 1e-6, "the mean shift says the same of every context"
    whole = screens.lab_of(DatasetSpec(path=str(synthetic.write(tmp_path / "w.h5ad", synthetic.Screen.small(**shape)))))
    with pytest.raises(InputError, match="every perturbation was measured in every context"):
        rank(
            [
                replace(
                    one,
                    conditions=replace(whole.conditions),
                    subset=whole.split.condition,
                    train_cells=whole.vocabulary.train_cells,
                )
            ],
            controls,
            kind="contexts",
        )


def test_a_ranking_that_cannot_be_made_says_why(lab, screen):
    one = fitted(NoChange(), lab, screen)
    controls = Controls.read(screen.path, one, most=5)
    with pytest.raises(InputError, match="ranking by 'similarity': it needs a signature"):
        rank([one], controls, by="similarity")
    with pytest.raises(InputError, match="ranking by 'spread': it needs two fitted models"):
        rank([one], controls, by="spread")
    with pytest.raises(InputError, match="did you mean 'deviation'"):
        rank([one], controls, by="deviaton")
    other = replace(one, conditions=replace(one.conditions, genes=one.conditions.genes[::-1]), path="b.pt")
    with pytest.raises(
        InputError, match=r"b\.pt: this is a .*LatentAdditive.*, and a\.pt a .*NoChange.*differ in their seed"
    ):
        rank([one, replace(one, spec=LatentAdditive(), path="b.pt")], controls)
    with pytest.raises(InputError, match=r"b\.pt: it was fitted on other genes or contexts than a\.pt"):
        rank([one, other], controls)


def test_a_signature_is_matched_by_gene(tmp_path):
    (tmp_path / "s.csv").write_text("gene,value\ngene_3,2.5\ngene_1,-1\nother,9\n")
    genes = ["gene_1", "gene_2", "gene_3"]
    assert read_signature(str(tmp_path / "s.csv"), genes).tolist() == [-1, 0, 2.5]
    (tmp_path / "s.csv").write_text("gene,value\nENSG1,2.5\n")
    with pytest.raises(InputError, match=r"none of its 1 genes is a gene of the model, e\.g\. 'ENSG1'"):
        read_signature(str(tmp_path / "s.csv"), genes)
    (tmp_path / "s.csv").write_text("gene,value,sd\ngene_1,2.5,1\n")
    with pytest.raises(InputError, match="a signature has two columns, gene and value; it has 3"):
        read_signature(str(tmp_path / "s.csv"), genes)


def test_enrichment_is_one_by_chance_and_its_most_when_the_ranking_is_right():
    true = np.random.default_rng(0).standard_normal(100)
    value, low, high = enrichment(true, true)
    assert value == high == 5
    assert low > 4  # a condition drawn twice at the edge of the top ties with itself
    assert enrichment(-true, true)[0] == 0
    assert enrichment(np.zeros(100), true)[0] == pytest.approx(1)
    random = [enrichment(np.random.default_rng([1, i]).standard_normal(100), true, resamples=2)[0] for i in range(400)]
    assert np.mean(random) == pytest.approx(1, abs=0.1)
    noisy = true + np.random.default_rng(2).standard_normal(100)
    value, low, high = enrichment(noisy, true)
    assert 1 < low < value < high <= 5
    assert enrichment(noisy, true, share=0.1, resamples=2)[0] <= 10
