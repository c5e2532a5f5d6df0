"""Laws of sampling: what balance, units, chunks and controls change in an epoch, and what they do not."""

from dataclasses import replace

import numpy as np
import pytest
import screens
import torch
from scipy import sparse

from perturbray.data import sampling
from perturbray.data.batches import Cells
from perturbray.data.sampling import Pools, Sampling
from perturbray.data.splits import TRAIN, VAL
from perturbray.errors import InputError


@pytest.fixture(scope="module")
def numbered(lab) -> screens.Lab:
    """The small screen, the expression of a cell its row number, and its embedding that number and its negative."""
    rows = np.arange(len(lab.cells), dtype=np.float32)[:, None]
    cells = Cells([sparse.csr_matrix(rows)], {"X_pca": np.hstack([rows, -rows])})
    return replace(lab, cells=cells)


def drawn(lab, *, subset=TRAIN, mode="paired", batch_size=64, embedding=None, epoch=None, **how):
    stream = lab.stream(mode, batch_size=batch_size, sampling=Sampling(**how), embedding=embedding)
    return list(stream.epoch(subset, **epoch or {}))


def rows_of(batches, name="expression") -> np.ndarray:
    return torch.cat([getattr(batch, name)[:, 0] for batch in batches]).numpy().astype(int)


# Balance.


@pytest.mark.parametrize("mode", ["paired", "all"])
def test_balance_shows_contexts_equally_often_and_cells_of_a_context_equally_often(numbered, mode):
    conditions = numbered.conditions
    context = conditions.context[conditions.cell_condition]
    whole = rows_of(drawn(numbered, mode=mode))
    found = rows_of(drawn(numbered, mode=mode, balance=True))
    assert len(found) == len(whole), "an epoch keeps its length"
    assert np.ptp(np.bincount(context[whole])) > 20, "the screen has something to balance"
    assert np.ptp(np.bincount(context[found])) <= 1
    times = np.bincount(found, minlength=len(context))
    for code in range(len(conditions.contexts)):
        own = times[whole[context[whole] == code]]
        assert np.ptp(own) <= 1
        assert own.sum() == (context[found] == code).sum()
    assert times.sum() == times[whole].sum(), "no other cells"


def test_balance_draws_anew_each_epoch_and_leaves_validation_alone(numbered):
    first, later = (rows_of(drawn(numbered, balance=True, epoch={"number": number})) for number in (0, 1))
    assert (np.bincount(first, minlength=3000) != np.bincount(later, minlength=3000)).any()
    plain = {"shuffle": False, "fixed": True}
    for subset in (TRAIN, VAL):
        np.testing.assert_array_equal(
            rows_of(drawn(numbered, subset=subset, balance=True, epoch=plain)),
            rows_of(drawn(numbered, subset=subset, epoch=plain)),
        )


# Controls.


def test_fixed_controls_stay_with_their_cells(numbered):
    pairs = []
    for number in (0, 5):
        batches = drawn(numbered, controls="fixed", epoch={"number": number})
        pairs.append(dict(zip(rows_of(batches), rows_of(batches, "control"), strict=True)))
    assert pairs[0] == pairs[1]
    assert list(pairs[0]) != list(pairs[1]), "while the order changes"


def test_mean_controls_are_the_means_of_a_contexts_controls_of_the_subset(lab):
    conditions, split = lab.conditions, lab.split
    dense = lab.cells.dense(np.arange(len(lab.cells)))
    context = conditions.context[conditions.cell_condition]
    for subset in (TRAIN, VAL):
        for batch in drawn(lab, subset=subset, controls="mean"):
            for code in batch.context.unique().tolist():
                controls = split.cells(subset, conditions=conditions, controls=True)
                expected = dense[controls[context[controls] == code]].astype(np.float64).mean(axis=0)
                found = batch.control[batch.context == code].numpy()
                np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-6)


def test_pairs_come_from_a_capped_pool_where_there_are_many_controls(monkeypatch):
    monkeypatch.setattr(sampling, "POOL", 50)
    context = np.repeat([0, 1, 2], [400, 50, 7])
    rows = np.arange(1000, 1457)
    pool = Pools.of(rows, context, contexts=4, rng=np.random.default_rng(0))
    assert pool.size.tolist() == [50, 50, 7, 0]
    assert len(set(pool.rows)) == 107
    assert (context[pool.rows - 1000] == np.repeat([0, 1, 2], [50, 50, 7])).all()
    other = Pools.of(rows, context, contexts=4, rng=np.random.default_rng(1))
    assert len(set(pool.rows[:50]) & set(other.rows[:50])) < 25, "a draw, not the first"
    drawn_from = pool.for_cells(np.arange(5000), np.arange(5000) % 3, np.random.default_rng(2))
    assert set(drawn_from) == set(pool.rows)


# Units.


@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_by_condition_share_one_and_hold_every_cell_once(numbered, size, shuffle):
    batches = drawn(numbered, unit="condition", batch_size=size, epoch={"shuffle": shuffle})
    assert all(len(batch.condition.unique()) == 1 for batch in batches)
    assert sorted(rows_of(batches)) == numbered.stream().rows(TRAIN).tolist()
    of = [int(batch.condition[0]) for batch in batches]
    cells = numbered.conditions.cells
    assert all(of.count(code) == -(-cells[code] // size) for code in set(of)), "as few batches as the size allows"
    assert max(map(len, batches)) <= size
    assert shuffle == (of != sorted(of))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [4, 16, 100])
def test_sets_hold_cells_of_one_condition_each_cell_as_often_as_filling_up_needs(numbered, size, shuffle):
    batches = drawn(numbered, unit="set", set_size=size, batch_size=200, epoch={"shuffle": shuffle})
    assert all(len(batch) == 200 // size * size for batch in batches[:-1])
    rows, condition = rows_of(batches), np.concatenate([batch.condition for batch in batches])
    sets = rows.reshape(-1, size)
    assert (condition.reshape(-1, size) == condition[::size, None]).all()
    times = np.bincount(rows)
    selected = numbered.stream().rows(TRAIN)
    assert (times[selected] > 0).all()
    assert times.sum() == times[selected].sum()
    cells = np.bincount(numbered.conditions.cell_condition[selected])
    for code in np.unique(condition):
        own = times[selected[numbered.conditions.cell_condition[selected] == code]]
        assert own.sum() == -(-cells[code] // size) * size, "no more sets than the cells need"
        assert np.ptp(own) <= 1
    enough = cells[condition[::size]] >= size
    assert all(len(set(row)) == size for row in sets[enough]), "no cell twice in a set where there are enough"
    assert shuffle == (condition.tolist() != sorted(condition.tolist()))


def test_controls_of_sets_are_of_their_context_and_seldom_twice_in_one(numbered):
    conditions = numbered.conditions
    context = conditions.context[conditions.cell_condition]
    batches = drawn(numbered, unit="set", set_size=8, batch_size=64)
    rows, controls = rows_of(batches), rows_of(batches, "control")
    assert (context[rows] == context[controls]).all()
    assert conditions.is_control[conditions.cell_condition[controls]].all()
    assert (numbered.split.cell[controls] == TRAIN).all()
    repeats = [8 - len(set(part)) for part in controls.reshape(-1, 8)]
    assert np.mean([n > 0 for n in repeats]) < 0.1
    for code in range(len(conditions.contexts)):
        used = np.bincount(controls[context[controls] == code], minlength=len(context))
        pool = numbered.split.cells(TRAIN, conditions=conditions, controls=True)
        assert np.ptp(used[pool[context[pool] == code]]) <= 1, "each before one comes again"
    later = rows_of(drawn(numbered, unit="set", set_size=8, batch_size=64, epoch={"number": 1}), "control")
    assert (later != controls).any()


@pytest.mark.parametrize("how", [{"unit": "set", "set_size": 8}, {"balance": True, "chunk": 16}, {"unit": "condition"}])
def test_statistics_see_every_cell_once_however_an_epoch_is_drawn(numbered, how):
    stream = numbered.stream("paired", sampling=Sampling(**how), embedding="X_pca")
    batches = list(stream.every_cell(TRAIN))
    assert rows_of(batches).tolist() == np.flatnonzero(numbered.split.cell == TRAIN).tolist()
    assert all(batch.control is None and batch.embedding is not None for batch in batches)
    assert (stream.mode, stream.sampling) == ("paired", Sampling(**how))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": "rnadom"}, "controls='rnadom': did you mean 'random'"),
        ({"unit": "sets"}, "unit='sets': did you mean 'set'"),
        ({"unit": "set"}, "set_size=0: above 0"),
        ({"set_size": 5}, "set_size=5: above 0 where the unit is a set"),
        ({"chunk": -1}, "chunk=-1: 0 or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def test_a_set_larger_than_a_batch_is_refused(lab):
    with pytest.raises(InputError, match="a set of 65 cells is larger than a batch of 64"):
        lab.stream(sampling=Sampling(unit="set", set_size=65))


# Chunks.


def test_a_shuffle_by_chunks_visits_each_row_once_and_the_seed_decides():
    rows = np.arange(0, 3 * 70_001, 3)
    first, again, other = (sampling.shuffled(rows, np.random.default_rng(seed), chunk=64) for seed in (0, 0, 1))
    np.testing.assert_array_equal(np.sort(first), rows)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.99


def test_large_epochs_are_shuffled_by_chunks_and_small_ones_wholly(monkeypatch):
    rows = np.arange(5000)
    whole = sampling.shuffled(rows, np.random.default_rng(0), chunk=1)
    np.testing.assert_array_equal(sampling.shuffled(rows, np.random.default_rng(0), chunk=0), whole)
    monkeypatch.setattr(sampling, "LARGE", 4999)
    chunks = sampling.shuffled(rows, np.random.default_rng(0), chunk=0)
    np.testing.assert_array_equal(chunks, sampling.shuffled(rows, np.random.default_rng(0), chunk=sampling.CHUNK))


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_the_mixing_of_a_shuffle_is_what_cluster_sampling_predicts(chunk):
    """A file sorted by condition. The share of a condition in batches of B cells varies as in draws from windows of W
    cells made of W / c places of a file of N: 1 + (B - 1)(c - 1) / (W - 1) * (1 - W / N) times as much as in a full
    permutation. At B = 1,024 that is 2.5 for chunks of 64, 1.3 for 16, and 1 for a full permutation."""
    size, conditions, cells = 1024, 100, 2**17
    label = np.arange(cells) // (cells // conditions + 1)
    ratio = []
    for seed in range(4):
        order = sampling.shuffled(np.arange(cells), np.random.default_rng(seed), chunk=chunk)
        counts = np.stack([np.bincount(part, minlength=conditions) for part in label[order].reshape(-1, size)])
        share = counts.mean(axis=0) / size
        ratio.append((counts.var(axis=0) / (size * share * (1 - share))).mean())
    part = 1 - sampling.WINDOW / cells
    expected = 1 + part * (size - 1) * (chunk - 1) / (sampling.WINDOW - 1)
    assert np.mean(ratio) == pytest.approx(expected, rel=0.1)


# Embeddings.


@pytest.mark.parametrize("how", [{}, {"balance": True}, {"unit": "condition"}, {"unit": "set", "set_size": 8}])
def test_embeddings_are_rows_of_the_cells_that_travel_beside_them(numbered, how):
    for batch in drawn(numbered, embedding="X_pca", **how):
        for rows, embedding in ((batch.expression, batch.embedding), (batch.control, batch.control_embedding)):
            assert embedding.dtype == torch.float32
            assert torch.equal(embedding, torch.cat([rows, -rows], dim=1))
        assert torch.equal(batch.expression[:, 0].long(), batch.cell)
    batch = numbered.stream(embedding="X_pca").batch(np.array([5, 3]), np.array([8, 8]))
    assert batch.embedding.tolist() == [[5, -5], [3, -3]]
    assert batch.control_embedding.tolist() == [[8, -8], [8, -8]]


def test_mean_controls_have_the_mean_of_their_embeddings(numbered):
    for batch in drawn(numbered, embedding="X_pca", controls="mean"):
        torch.testing.assert_close(batch.control_embedding[:, :1], batch.control)
        torch.testing.assert_close(batch.control_embedding[:, 1:], -batch.control)


def test_an_embedding_that_is_not_there_is_named_before_anything_is_drawn(numbered):
    with pytest.raises(InputError, match="no obsm matrix 'X_pac': did you mean 'X_pca'"):
        numbered.stream(embedding="X_pac")
