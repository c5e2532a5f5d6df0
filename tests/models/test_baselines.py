"""What the baselines promise beyond the contract: exact where their assumption holds, and wrong where it does not."""

from dataclasses import replace

import numpy as np
import pytest
import screens
import torch
from contract import Subject
from scipy import sparse

from perturbray.data.batches import Cells
from perturbray.data.splits import TEST, TRAIN, Combination, UnseenPerturbation
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError
from perturbray.metrics.metric import Metric, score_prediction
from perturbray.models.baselines import Additive, MatchingMean, MeanShift, NoChange, PerturbedMean, PerturbedMeanGlobal
from perturbray.models.bilinear import BilinearRidge, bilinear
from perturbray.models.linear_plain import LinearPlain
from perturbray.models.neighbours import KnnEmbedding

PAIRS = [(0, 1), (1, 2), (2, 3), (0, 4), (3, 5), (1, 6), (5, 7), (4, 6)]


def predicted(spec, lab):
    subject = Subject.fit("", spec, lab)
    return screens.predicted(subject.model, lab.stream(spec.mode), lab.vocabulary)


def pairs(**fields):
    """Every pair's effect is the sum of its singles'; half of the pairs are held out."""
    return screens.noise_free(pairs=PAIRS, task=Combination(fraction=0.5), **fields)


def without(lab: screens.Lab, gone: np.ndarray) -> screens.Lab:
    """The lab with some conditions unused."""
    condition = np.where(gone, 0, lab.split.condition).astype(np.int8)
    cell = np.where(gone[lab.conditions.cell_condition], 0, lab.split.cell).astype(np.int8)
    return replace(lab, split=replace(lab.split, condition=condition, cell=cell))


def is_single(lab: screens.Lab, name: str, context: int | None = None) -> np.ndarray:
    found = np.array([singles == (name,) for singles in lab.conditions.singles])
    return found if context is None else found & (lab.conditions.context == context)


@pytest.mark.parametrize("contexts", [1, 3])
@pytest.mark.parametrize("spec", [Additive(), Additive(missing="error"), LinearPlain(ridge=1e-9)], ids=repr)
def test_additive_models_are_exact_where_effects_add(spec, contexts):
    lab, means = pairs(contexts=contexts, specific=0.3 if isinstance(spec, Additive) else 0.0)
    prediction, rows, unseen = predicted(spec, lab)
    assert not len(unseen)
    assert len(rows) == 2 * contexts
    error = np.abs(prediction.predicted.mean - means[rows]).max()
    assert error < (1e-9 if isinstance(spec, Additive) else 1e-6)


def test_additive_is_off_by_the_epistasis_where_there_is_some():
    lab, means = pairs()
    extra = np.round(np.random.default_rng(5).uniform(-0.4, 0.4, means.shape) * 256) / 256
    extra[[len(singles) < 2 for singles in lab.conditions.singles]] = 0
    cells = lab.cells.select(np.arange(len(lab.cells))).toarray() + extra[lab.conditions.cell_condition]
    prediction, rows, _ = predicted(
        Additive(), replace(lab, cells=Cells([sparse.csr_matrix(cells.astype(np.float32))]))
    )
    np.testing.assert_allclose(prediction.observed.mean - prediction.predicted.mean, extra[rows], atol=1e-9)


def test_a_single_that_the_context_lacks_is_transferred_left_out_or_refused_as_the_policy_says():
    lab, means = pairs(specific=0.3)
    conditions = lab.conditions
    _, rows, _ = predicted(Additive(), lab)
    row = rows[0]
    single, other = conditions.singles[row]
    less = without(lab, is_single(lab, single, context=conditions.context[row]))
    control = {c: means[conditions.is_control & (conditions.context == c)][0] for c in range(3)}

    def effect(name, context):
        return means[is_single(lab, name, context)][0] - control[context]

    here = conditions.context[row]
    elsewhere = np.mean([effect(single, c) for c in range(3) if c != here], axis=0)
    for policy, expected in (("transfer", elsewhere), ("zero", 0)):
        prediction, found, _ = predicted(Additive(missing=policy), less)
        at = int(np.flatnonzero(found == row)[0])
        whole = control[here] + effect(other, here) + expected
        np.testing.assert_allclose(prediction.predicted.mean[at], whole, atol=1e-6)
    with pytest.raises(InputError, match=r"a single of it is not measured alone in training in its context"):
        predicted(Additive(missing="error"), less)
    nowhere = without(lab, is_single(lab, single))
    _, found, unseen = predicted(Additive(), nowhere)
    assert row in unseen
    assert row not in found


def test_additive_of_a_single_is_the_mean_shift():
    lab, _ = screens.noise_free(specific=0.5)
    ours, rows, _ = predicted(Additive(), lab)
    theirs, other, _ = predicted(MeanShift(), lab)
    assert (rows == other).all()
    np.testing.assert_array_equal(ours.predicted.mean, theirs.predicted.mean)


@pytest.mark.parametrize("weights", ["equal", "cells", "similarity"])
@pytest.mark.parametrize("shrinkage", [0.0, 30.0])
def test_a_mean_shift_weighs_contexts_and_shrinks_effects_as_it_is_told(weights, shrinkage):
    lab, means = screens.noise_free(specific=0.5)
    conditions, train = lab.conditions, (lab.split.condition == TRAIN) & ~lab.conditions.is_control
    few = np.isin(conditions.cell_condition, np.flatnonzero(train & (conditions.context == 0)))
    kept = np.where(few & (np.arange(len(few)) % 3 > 0), 0, lab.split.cell).astype(np.int8)  # a third of one context
    lab = replace(lab, split=replace(lab.split, cell=kept))
    count = np.bincount(conditions.cell_condition[kept == TRAIN], minlength=len(conditions)).astype(float)
    control = np.stack([means[conditions.is_control & (conditions.context == c)][0] for c in range(3)])
    apart = ((control[:, None] - control) ** 2).sum(-1)
    likeness = np.exp(-apart / (2 * apart[~np.eye(3, dtype=bool)].mean()))
    prediction, rows, _ = predicted(MeanShift(weights=weights, shrinkage=shrinkage), lab)
    for row, found in zip(rows, prediction.predicted.mean, strict=True):
        here = conditions.context[row]
        same = np.flatnonzero((conditions.perturbation == conditions.perturbation[row]) & train)
        alike = likeness[here, conditions.context[same]]
        weight = {"equal": np.ones(len(same)), "cells": count[same], "similarity": alike}
        effect = np.average(means[same] - control[conditions.context[same]], axis=0, weights=weight[weights])
        expected = control[here] + effect * count[same].sum() / (count[same].sum() + shrinkage)
        np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"weights": "cell"}, "model.weights='cell': did you mean 'cells'"), ({"shrinkage": -1.0}, "0 or more")],
)
def test_a_mean_shift_refuses_what_is_no_option(fields, message):
    with pytest.raises(InputError, match=message):
        MeanShift(**fields)


def test_matching_mean_is_the_mean_of_the_singles_in_the_context():
    lab, means = pairs(specific=0.5)
    prediction, rows, _ = predicted(MatchingMean(), lab)
    conditions = lab.conditions
    for row, found in zip(rows, prediction.predicted.mean, strict=True):
        parts = [means[is_single(lab, name, conditions.context[row])][0] for name in conditions.singles[row]]
        np.testing.assert_allclose(found, np.mean(parts, axis=0), atol=1e-6)


def test_matching_mean_of_a_single_is_its_mean_over_training_contexts():
    lab, means = screens.noise_free(specific=0.5)
    prediction, rows, _ = predicted(MatchingMean(), lab)
    for row, found in zip(rows, prediction.predicted.mean, strict=True):
        same = lab.conditions.perturbation == lab.conditions.perturbation[row]
        expected = means[same & (lab.split.condition == TRAIN)].mean(axis=0)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("spec", [PerturbedMean(), PerturbedMeanGlobal()])
def test_perturbed_means_rank_a_combination_at_chance(spec):
    lab, _ = pairs()
    prediction, _, _ = predicted(spec, lab)
    ranks = score_prediction(prediction, [Metric(score="rmse", effect="average", rank=True)])["value"]
    np.testing.assert_allclose(np.asarray(ranks, dtype=float).mean(), 0.5)


# Bilinear ridge


def factors(seed=0, genes=60, labels=40, r=4, width=5):
    rng = np.random.default_rng(seed)
    draw = [torch.from_numpy(rng.standard_normal(s)) for s in ((genes, r), (r, width), (width, labels), (genes,))]
    draw[2] = draw[2] - draw[2].mean(1, keepdim=True)
    return draw


def test_bilinear_ridge_recovers_a_bilinear_law():
    A, W, B, b = factors()
    Y = A @ W @ B + b[:, None]
    found = bilinear(Y - Y.mean(1, keepdim=True), A, B, ridge=1e-10)
    assert (found @ B + Y.mean(1, keepdim=True) - Y).abs().max() < 1e-8
    assert (found - A @ W).abs().max() < 1e-8


def test_bilinear_ridge_without_compression_is_ridge_regression_of_each_gene():
    _, _, B, _ = factors()
    Y = torch.from_numpy(np.random.default_rng(1).standard_normal((7, 40)))
    expected = Y @ B.T @ torch.linalg.inv(B @ B.T + 0.3 * torch.eye(5)) / 1.3
    torch.testing.assert_close(bilinear(Y, None, B, ridge=0.3), expected)


def described(tmp_path, *, shift=0.0, random=False, seed=3):
    """A screen of one context whose effects are linear in vectors of the perturbations, some of which training never
    shows; and the file of vectors."""
    lab, means = screens.noise_free(
        contexts=1, perturbations=40, genes=30, task=UnseenPerturbation(fraction=0.4), cells=2, seed=seed
    )
    conditions = lab.conditions
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((40, 4))
    W = rng.standard_normal((4, 30)) / 10
    W -= W.mean(axis=1, keepdims=True)  # loadings of centred profiles cannot shift all genes alike
    drug = np.array([int(label.split("_")[1]) if label != "control" else -1 for label in conditions.perturbation])
    effect = np.where((drug >= 0)[:, None], vectors[drug] @ W + 0.2, 0)
    means = (means[conditions.is_control][0] + effect).astype(np.float32)
    if random:
        vectors = rng.standard_normal(vectors.shape)
    path = tmp_path / "vectors.npz"
    np.savez(path, name=np.array([f"drug_{i:03d}" for i in range(40)]), vector=vectors + shift)
    cells = Cells([sparse.csr_matrix(means[conditions.cell_condition])])
    return replace(lab, cells=cells), means, str(path)


def cosine_of_effects(prediction) -> float:
    """The mean over conditions, against the mean effect, which needs no vector."""
    control = prediction.control.mean[prediction.context]
    found, truth = prediction.predicted.mean - control, prediction.observed.mean - control
    found, truth = found - truth.mean(axis=0), truth - truth.mean(axis=0)
    return float(np.mean((found * truth).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(truth, axis=1)))


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_perturbations_that_training_never_shows_are_predicted_from_their_vectors(tmp_path, shift):
    lab, means, path = described(tmp_path, shift=shift)
    prediction, rows, unseen = predicted(BilinearRidge(vectors=path, ridge=1e-9), lab)
    assert not len(unseen)
    assert len(rows) == 8
    np.testing.assert_allclose(prediction.predicted.mean, means[rows], atol=1e-4)
    # The published form: without centring the intercept is wrong where vectors are not centred.
    uncentred, rows, _ = predicted(BilinearRidge(vectors=path, ridge=1e-9, centre=False), lab)
    assert np.abs(uncentred.predicted.mean - means[rows]).max() > 0.05


@pytest.mark.parametrize("spec", [BilinearRidge, KnnEmbedding])
def test_vectors_that_say_nothing_predict_no_better_than_the_mean_effect(tmp_path, spec):
    lab, _, path = described(tmp_path)
    true, _, _ = predicted(spec(vectors=path), lab)
    lab, _, path = described(tmp_path, random=True)
    random, _, _ = predicted(spec(vectors=path), lab)
    assert cosine_of_effects(true) > 0.6
    assert cosine_of_effects(random) < 0.3


def test_bilinear_ridge_of_genes_uses_their_own_loadings_and_gives_the_mean_effect_to_what_is_no_gene(tmp_path):
    lab, means, _ = described(tmp_path)
    conditions = lab.conditions
    names = [f"drug_{i:03d}" for i in range(20)] + [f"gene_{i}" for i in range(10)]
    lab = replace(lab, conditions=replace(conditions, genes=tuple(names)))
    prediction, rows, unseen = predicted(BilinearRidge(), lab)
    assert not len(unseen)
    train = (lab.split.condition == TRAIN) & ~conditions.is_control
    no_gene = np.array([int(conditions.perturbation[row].split("_")[1]) >= 20 for row in rows])
    assert 0 < no_gene.sum() < len(rows)
    expected = np.broadcast_to(means[train].mean(axis=0), (no_gene.sum(), means.shape[1]))
    np.testing.assert_allclose(prediction.predicted.mean[no_gene], expected, atol=1e-5)
    assert np.abs(prediction.predicted.mean[~no_gene] - expected[0]).max() > 0.01
    _, _, unseen = predicted(BilinearRidge(missing="drop"), lab)
    assert set(unseen) == set(rows[no_gene])
    with pytest.raises(InputError, match=r"20 perturbation\(s\) are no gene of the screen"):
        predicted(BilinearRidge(missing="error"), lab)


def test_a_model_of_vectors_says_what_it_needs(lab):
    with pytest.raises(
        InputError, match=r"none of the 10 training perturbations is among the genes of the screen; give"
    ):
        BilinearRidge().build(lab.vocabulary)


# Nearest neighbours


def test_the_only_neighbour_gives_its_effect_and_a_combination_has_the_sum(tmp_path):
    lab, means = pairs(contexts=1)
    conditions = lab.conditions
    # drug_00k is described as drug_00(k + 1 mod 8) is, but for a little.
    angle = np.array([0, 1, 2, 3, 4, 5, 6, 7]) // 2 * 0.7 + np.array([0, 0.1] * 4)
    np.savez(tmp_path / "v.npz", n=[f"drug_{i:03d}" for i in range(8)], v=np.stack([np.cos(angle), np.sin(angle)], 1))
    partner = {i: i ^ 1 for i in range(8)}
    half = without(lab, np.logical_or.reduce([is_single(lab, f"drug_{i:03d}") for i in range(0, 8, 2)]))
    # Even drugs are still known from combinations; as neighbours only those count that stand alone.
    spec = KnnEmbedding(vectors=str(tmp_path / "v.npz"), neighbours=1)
    prediction, rows, unseen = predicted(spec, half)
    assert not len(unseen)
    control = means[conditions.is_control][0]
    for row, found in zip(rows, prediction.predicted.mean, strict=True):
        numbers = [int(name.split("_")[1]) for name in conditions.singles[row]]
        used = [number if number % 2 else partner[number] for number in numbers]
        effects = [means[is_single(lab, f"drug_{number:03d}")][0] - control for number in used]
        np.testing.assert_allclose(found, np.maximum(control + sum(effects), 0), atol=1e-5)


def test_neighbours_weigh_by_softmax_of_cosine(tmp_path):
    lab, means, path = described(tmp_path)
    prediction, rows, _ = predicted(KnnEmbedding(vectors=path, neighbours=3, temperature=0.2), lab)
    conditions, vectors = lab.conditions, np.load(path)["vector"]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    control = means[conditions.is_control][0]
    train = np.flatnonzero((lab.split.condition == TRAIN) & ~conditions.is_control)
    number = [int(label.split("_")[1]) for label in conditions.perturbation[train]]
    for row, found in zip(rows, prediction.predicted.mean, strict=True):
        likeness = unit[number] @ unit[int(conditions.perturbation[row].split("_")[1])]
        best = np.argsort(-likeness)[:3]
        weight = np.exp(likeness[best] / 0.2)
        expected = control + weight / weight.sum() @ (means[train[best]] - control)
        np.testing.assert_allclose(found, expected, atol=1e-5)


# The plain linear model


def test_the_closed_form_is_where_gradient_descent_ends(lab):
    """Full-batch Adam on the cells themselves, each with the mean control of its context, in float64."""
    spec = LinearPlain(ridge=50.0)
    subject = Subject.fit("", spec, lab)
    conditions, split = lab.conditions, lab.split
    rows = split.cells(TRAIN, conditions=conditions, controls=False)
    controls = split.cells(TRAIN, conditions=conditions, controls=True)
    context = conditions.context[conditions.cell_condition]
    dense = lab.cells.dense(np.arange(len(lab.cells))).astype(np.float64)
    mean = np.stack([dense[controls[context[controls] == c]].mean(axis=0) for c in range(3)])
    target = torch.from_numpy(dense[rows] - mean[context[rows]])
    vocabulary = lab.vocabulary
    code = conditions.cell_condition[rows]
    inputs = torch.from_numpy(np.hstack([vocabulary.multi_hot[code], vocabulary.one_hot[context[rows]]])).double()
    weight = torch.zeros(inputs.shape[1], target.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(target.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=0.05)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.997)
    for _ in range(2000):
        optimiser.zero_grad()
        loss = (target - inputs @ weight - bias).square().sum() + 50 * weight.square().sum()
        loss.backward()
        optimiser.step()
        decay.step()
    design = np.hstack([vocabulary.multi_hot, vocabulary.one_hot[conditions.context]])
    expected = torch.from_numpy(design).double() @ weight.detach() + bias.detach()
    assert (subject.model.profile.double() - expected).abs().max() < 1e-3


def test_without_covariates_the_linear_model_is_the_same_in_every_context():
    lab, _ = screens.noise_free(specific=0.5)
    with_, without_ = (Subject.fit("", LinearPlain(covariates=c), lab).model.profile for c in (True, False))
    first, second = (np.flatnonzero(is_single(lab, "drug_003", context=c))[0] for c in (0, 1))
    torch.testing.assert_close(without_[first], without_[second])
    assert (with_[first] - with_[second]).abs().max() > 0.01


# Conditions that were not there when a model was fitted


@pytest.mark.parametrize("spec", [Additive(), MatchingMean(), LinearPlain(), MeanShift(), PerturbedMean()], ids=repr)
def test_a_fitted_state_serves_conditions_that_come_behind_its_own(spec):
    """As if they had been there, untrained, from the start."""
    lab, _ = pairs(specific=0.3)
    conditions, split = lab.conditions, lab.split
    held = np.flatnonzero(split.condition == TEST)
    order = np.concatenate([np.setdiff1d(np.arange(len(conditions)), held), held])

    def vocabulary(rows):
        part = replace(
            conditions,
            context=conditions.context[rows],
            perturbation=conditions.perturbation[rows],
            singles=tuple(conditions.singles[row] for row in rows),
        )
        return Vocabulary.of(part, replace(split, condition=split.condition[rows]))

    whole, part = spec.build(vocabulary(order)), spec.build(vocabulary(order[: -len(held)]))
    position = torch.from_numpy(np.argsort(order))
    for batch in lab.stream("all").epoch(TRAIN):
        moved = replace(batch, condition=position[batch.condition])
        whole.update(moved)
        part.update(moved)
    whole.finish()
    part.finish()
    restored = spec.build(vocabulary(order))
    restored.restore(part.state_dict())
    torch.testing.assert_close(restored.profile, whole.profile, rtol=0, atol=0)
    assert (restored.predictable == whole.predictable).all()


@pytest.mark.parametrize("spec", [NoChange(), PerturbedMean(), PerturbedMeanGlobal()], ids=repr)
def test_what_says_the_same_of_every_perturbation_says_it_of_unseen_ones(spec):
    """So that models of vectors have something to beat."""
    lab, _ = screens.noise_free(task=UnseenPerturbation(fraction=0.4))
    prediction, rows, unseen = predicted(spec, lab)
    assert not len(unseen)
    assert len(rows) >= 3
    groups = list(prediction.groups())
    assert groups
    for group in groups:
        assert (prediction.predicted.mean[group] == prediction.predicted.mean[group[0]]).all()


def test_a_model_that_knows_perturbations_by_name_leaves_unseen_ones_out():
    lab, _ = screens.noise_free(task=UnseenPerturbation(fraction=0.4))
    for spec in (MeanShift(), Additive(), MatchingMean(), LinearPlain()):
        assert not spec.build(lab.vocabulary).predictable[lab.split.condition == TEST].any()
