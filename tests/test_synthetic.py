"""Laws of the synthetic screen: what is in the file is what `Truth` says of it, and the seed alone decides it."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest

from perturbray import synthetic
from perturbray.errors import InputError
from perturbray.synthetic import CONTROL, Screen, Truth, expected_mean_shift_error, simulate, write

SMALL = Screen.small()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("screen") / "small.h5ad", SMALL)


@pytest.fixture(scope="module")
def truth(path):
    return Truth.read(path)


@pytest.fixture(scope="module")
def screened(path):
    return ad.read_h5ad(path)


def expression(screened):
    """log1p-normalised as a dataset with normalize="auto" is, (cells, genes)."""
    counts = screened.X.toarray().astype(np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    return np.log1p(counts * np.median(totals) / totals)


def rows_of(screened, condition):
    context, perturbation = condition
    return ((screened.obs["cell_type"] == context) & (screened.obs["condition"] == perturbation)).to_numpy()


def test_default_screen_has_the_structure_of_sci_plex_3():
    screen = Screen()
    names = screen.perturbation_names()
    assert (screen.contexts, len(names), len(set(names))) == (3, 188, 188)
    assert sum("+" in name for name in names) == 6
    assert all(set(name.split("+")) <= set(names) for name in names)
    cells = synthetic._cells(screen)
    assert 12_000 < cells.sum() < 16_000
    assert cells.reshape(3, 189)[:, 1:].std() > 4, "numbers of cells a condition vary, as real ones do"


def test_values_are_counts_and_mostly_zeros():
    screened = simulate(replace(Screen(), perturbations=20, combinations=2))
    assert screened.X.dtype == np.float32
    assert (screened.X.data == np.floor(screened.X.data)).all()
    assert screened.X.data.min() >= 1
    assert 0.75 < 1 - screened.X.nnz / np.prod(screened.shape) < 0.92
    assert (np.asarray(screened.X.sum(axis=1)) > 0).all()


def test_every_condition_is_in_the_file_with_the_cells_that_the_truth_names(truth, screened):
    assert truth.contexts == ("line_a", "line_b", "line_c")
    assert len(truth.conditions) == 3 * (1 + 12)
    assert truth.genes == tuple(screened.var_names)
    found = [int(rows_of(screened, condition).sum()) for condition in truth.conditions]
    assert found == truth.cells.tolist()
    assert sum(found) == screened.n_obs
    assert min(found) >= SMALL.cells_minimum
    for context in truth.contexts:
        assert truth.cells[truth.conditions.index((context, CONTROL))] == SMALL.controls


def test_rows_stand_in_random_order(screened):
    codes = screened.obs["cell_type"].cat.codes.to_numpy()
    assert np.mean(codes[1:] == codes[:-1]) < 0.45, "a third of neighbours would agree by chance"


def test_target_depth_is_the_median_total_count(truth, screened):
    assert truth.target_depth == np.median(np.asarray(screened.X.sum(axis=1)))


def test_same_screen_makes_the_same_bytes_whatever_the_hash_seed(path, tmp_path):
    code = "import sys; from perturbray.synthetic import Screen, write; write(sys.argv[1], Screen.small())"
    other = tmp_path / "other.h5ad"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    subprocess.run([sys.executable, "-c", code, str(other)], check=True, env=environment)
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_another_seed_makes_other_effects_and_a_replicate_only_other_counts():
    first, other, again = simulate(SMALL), simulate(replace(SMALL, seed=1)), simulate(replace(SMALL, replicate=1))
    assert not np.allclose(first.varm["log_effect"], other.varm["log_effect"])
    assert (first.varm["log_effect"] == again.varm["log_effect"]).all()
    assert (first.obs["condition"] == again.obs["condition"]).all()
    assert (first.X != again.X).nnz > 0


def test_numbers_of_cells_do_not_change_the_effects():
    more = synthetic._log_effects(replace(SMALL, cells=100, controls=7))
    assert (more == synthetic._log_effects(SMALL)).all()


def test_effects_are_sparse_and_their_specific_share_is_as_asked():
    screen = Screen(
        perturbations=400, combinations=0, genes=200, common=0.1, specific=0.3, strength_spread=0.0, scale=1
    )
    effects = synthetic._log_effects(screen)[:, 1:]  # (contexts, perturbations, genes)
    everywhere = synthetic._log_effects(replace(screen, common=1.0, specific=0.0))[0, 1]
    own = effects[..., everywhere == 0]  # without the genes of the stress response
    assert np.mean(own != 0) == pytest.approx(screen.affected, rel=0.03)
    within = own.var(axis=0, ddof=1)[own.any(axis=0)].mean()
    assert within == pytest.approx(0.3, rel=0.05)
    assert own[own != 0].var() == pytest.approx(0.9, rel=0.05)


def test_combinations_add_up_in_the_logarithm_unless_there_is_epistasis(truth):
    doubles = [condition for condition in truth.conditions if "+" in condition[1]]
    assert len(doubles) == 3 * SMALL.combinations
    for context, perturbation in doubles:
        parts = [truth.log_effect((context, single)) for single in perturbation.split("+")]
        np.testing.assert_allclose(truth.log_effect((context, perturbation)), sum(parts), atol=1e-12)
    beyond = synthetic._log_effects(replace(SMALL, epistasis=0.5)) - synthetic._log_effects(SMALL)
    assert not beyond[:, : -SMALL.combinations].any()
    assert (beyond[:, -SMALL.combinations :] != 0).mean() == pytest.approx(SMALL.affected, abs=0.01)


def test_a_combination_within_a_pathway_lacks_a_share_of_the_sum_and_nothing_else_changes():
    plain = replace(SMALL, perturbations=40, combinations=30)
    buffered = replace(plain, pathways=3, buffering=0.6)
    within = buffered.within_pathway()
    assert 0 < within.sum() < 30
    assert not plain.within_pathway().any()
    before, after = (synthetic._log_effects(screen) for screen in (plain, buffered))
    np.testing.assert_array_equal(after[:, :11], before[:, :11])
    kept = np.where(within, 0.4, 1.0)[:, None]
    np.testing.assert_allclose(after[:, 11:], kept * before[:, 11:], rtol=1e-12)
    # A pathway is one for all of its members: pairs a+b and b+c within it make a+c one within it.
    names = buffered.perturbation_names()[10:]
    together = {frozenset(name.split("+")): bool(same) for name, same in zip(names, within, strict=True)}
    for first, same in together.items():
        for second, other in together.items():
            third = first ^ second
            if same and other and len(third) == 2 and third in together:
                assert together[third]
    with pytest.raises(InputError, match="pathways must be at most the 10 single perturbations"):
        replace(plain, pathways=11)


def test_non_additivity_is_what_the_true_means_have_beyond_their_sum(truth):
    condition = next(condition for condition in truth.conditions if "+" in condition[1])
    context, label = condition
    first, second = label.split("+")
    mean = {name: truth.mean((context, name)) for name in (CONTROL, first, second, label)}
    expected = mean[label] - mean[first] - mean[second] + mean[CONTROL]
    np.testing.assert_allclose(truth.non_additivity(condition), expected, atol=1e-12)
    assert np.abs(expected).max() > 0.01, "what adds up in the logarithm does not in log1p"


@pytest.mark.parametrize("screen", [Screen.small(), Screen(perturbations=3, combinations=1)], ids=["small", "default"])
def test_true_mean_and_variance_agree_with_five_thousand_cells(screen):
    screened = simulate(replace(screen, perturbations=3, combinations=1, cells=5_000, cells_spread=0, controls=5_000))
    values, target = expression(screened), screened.uns["truth"]["target_depth"]
    assert target == np.median(np.asarray(screened.X.sum(axis=1)))
    conditions = list(zip(*(screened.uns["truth"][key] for key in ("context", "perturbation")), strict=True))
    deviation, observed_variance = [], []
    for condition, mean, variance in zip(conditions, screened.varm["mean"].T, screened.varm["variance"].T, strict=True):
        chosen = values[rows_of(screened, condition)]
        deviation.append((chosen.mean(axis=0) - mean) / np.sqrt(variance / len(chosen)))
        observed_variance.append(chosen.var(axis=0, ddof=1))
    deviation, means = np.array(deviation), screened.varm["mean"].T
    # In units of its standard error the error of a mean is standard normal; 1 % of a mean is 1 to 3 units here.
    assert abs(deviation.mean()) < 0.15
    assert 0.9 < deviation.std() < 1.1
    assert np.abs(deviation).max() < 5
    expressed = means > 0.1
    ratio = np.array(observed_variance)[expressed] / screened.varm["variance"].T[expressed]
    assert abs(ratio.mean() - 1) < 0.01
    assert np.percentile(np.abs(ratio - 1), 95) < 0.06


def test_expected_mean_shift_error_agrees_with_simulated_screens(truth, screened, monkeypatch):
    conditions = [("line_a", "drug_003"), ("line_b", "drug_007"), ("line_c", truth.perturbations[-1])]
    rows = {condition: np.flatnonzero(rows_of(screened, condition)) for condition in truth.conditions}
    used = {}  # a replicate has its cells in the same order
    for context, perturbation in truth.conditions:
        mine = rows[context, perturbation]
        if perturbation == CONTROL:
            used[context, CONTROL, "test"], used[context, CONTROL, "train"] = mine[:30], mine[30:]
        else:
            used[context, perturbation, "test" if (context, perturbation) in conditions else "train"] = mine
    cells = {key: len(mine) for key, mine in used.items()}

    monkeypatch.setattr(synthetic, "_moments", lambda screen, fractions, *_, **__: (fractions, fractions))  # for speed
    errors = {condition: [] for condition in conditions}
    for replicate in range(1, 151):
        values = expression(simulate(replace(SMALL, replicate=replicate)))
        mean = {key: values[mine].mean(axis=0) for key, mine in used.items()}
        for context, perturbation in conditions:
            others = [other for other in truth.contexts if other != context]
            shifts = [mean[other, perturbation, "train"] - mean[other, CONTROL, "train"] for other in others]
            predicted = np.maximum(mean[context, CONTROL, "test"] + np.mean(shifts, axis=0), 0)
            error = np.sqrt(np.mean((predicted - mean[context, perturbation, "test"]) ** 2))
            errors[context, perturbation].append(error)
    for condition in conditions:
        others = [other for other in truth.contexts if other != condition[0]]
        expected = expected_mean_shift_error(truth, condition=condition, training_contexts=others, cells=cells)
        uncertainty = np.std(errors[condition]) / np.sqrt(len(errors[condition]))
        assert uncertainty < 0.015 * expected
        assert abs(np.mean(errors[condition]) - expected) < 3 * uncertainty


def test_expected_mean_shift_error_without_noise_is_the_interaction(truth):
    condition, others = ("line_b", "drug_002"), ["line_a", "line_c"]
    endless = {
        (c, p, s): 10**12 for c in truth.contexts for p in (*truth.perturbations, CONTROL) for s in ("train", "test")
    }

    def effect(context):
        return truth.mean((context, "drug_002")) - truth.mean((context, CONTROL))

    predicted = np.maximum(truth.mean(("line_b", CONTROL)) + (effect("line_a") + effect("line_c")) / 2, 0)
    floor = np.sqrt(np.mean((predicted - truth.mean(condition)) ** 2))
    error = expected_mean_shift_error(truth, condition=condition, training_contexts=others, cells=endless)
    assert error == pytest.approx(floor, rel=1e-4)
    assert floor > 0.02


def test_mean_shift_is_a_better_guess_than_no_change_and_not_a_perfect_one(truth):
    """The default sweep can only show something if its screen has effects that transfer, and some that do not."""
    means = truth.means.reshape(3, 13, -1)
    effect = means[:, 1:] - means[:, :1]
    elsewhere = np.stack([np.delete(effect, context, axis=0).mean(axis=0) for context in range(3)])
    left = np.sqrt(np.mean((effect - elsewhere) ** 2, axis=2)).mean()
    assert 0.2 < left / np.sqrt(np.mean(effect**2, axis=2)).mean() < 0.7


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write(tmp_path / "screen.h5ad", SMALL)
    before = path.read_bytes()

    def fail(self, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(ad.AnnData, "write_h5ad", fail)
    with pytest.raises(OSError, match="no space"):
        write(path, replace(SMALL, seed=1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["screen.h5ad"]


def test_truth_of_a_file_without_one_is_refused_by_name(tmp_path):
    path = tmp_path / "plain.h5ad"
    ad.AnnData(X=np.ones((2, 2), dtype=np.float32)).write_h5ad(path)
    with pytest.raises(InputError, match=r"plain\.h5ad: no ground truth"):
        Truth.read(path)


def test_unknown_condition_is_refused_with_the_nearest(truth):
    with pytest.raises(InputError, match="did you mean 'line_a / drug_001'"):
        truth.mean(("line_a", "drog_001"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contexts": 0}, "must be 1 or more"),
        ({"perturbations": 5, "combinations": 3}, "1 pairs, fewer than combinations"),
        ({"common": 0.6, "specific": 0.6}, "share of variance"),
        ({"affected": 1.5}, "share of genes"),
    ],
)
def test_impossible_screen_is_refused_with_its_reason(fields, message):
    with pytest.raises(InputError, match=message):
        Screen(**fields)
