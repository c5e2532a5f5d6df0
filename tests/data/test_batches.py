"""Laws of batches: every cell once, a control of its own context and subset, and an order that only the seed decides."""

from dataclasses import replace

import numpy as np
import pytest
import screens
import torch
from scipy import sparse

from perturbray.data.batches import BatchStream, Cells
from perturbray.data.splits import TEST, TRAIN, UNUSED, VAL
from perturbray.data.truth import MAX_CONTROLS, control_rows
from perturbray.errors import InputError

SUBSETS = (TRAIN, VAL, TEST)
MODES = ("paired", "perturbed", "all")


@pytest.fixture(scope="module")
def numbered(lab) -> screens.Lab:
    """The small screen, the expression of a cell its row number: a batch says which cells it holds."""
    rows = np.arange(1, len(lab.cells) + 1, dtype=np.float32)[:, None]
    return replace(lab, cells=Cells([sparse.csr_matrix(rows)]))


def epoch(lab, mode="paired", subset=TRAIN, *, batch_size=64, **options):
    """Rows of the cells and of their controls, as the batches of an epoch hold them."""
    batches = list(lab.stream(mode, batch_size=batch_size).epoch(subset, **options))
    rows = torch.cat([batch.expression[:, 0] for batch in batches]).numpy().astype(int) - 1
    if batches[0].control is None:
        return rows, None
    return rows, torch.cat([batch.control[:, 0] for batch in batches]).numpy().astype(int) - 1


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("mode", MODES)
def test_an_epoch_visits_each_selected_cell_once(numbered, mode, subset, shuffle):
    rows, controls = epoch(numbered, mode, subset, shuffle=shuffle)
    is_control = numbered.conditions.is_control[numbered.conditions.cell_condition]
    selected = (numbered.split.cell == subset) & (~is_control if mode != "all" else True)
    assert sorted(rows) == np.flatnonzero(selected).tolist()
    assert (controls is not None) == (mode == "paired")
    assert shuffle == (sorted(rows) != rows.tolist())


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_control_is_of_its_cells_context_and_subset(numbered, subset):
    conditions, split = numbered.conditions, numbered.split
    context = conditions.context[conditions.cell_condition]
    used = set()
    for number in range(5):
        rows, controls = epoch(numbered, subset=subset, number=number)
        assert (context[rows] == context[controls]).all()
        assert conditions.is_control[conditions.cell_condition[controls]].all()
        assert (split.cell[controls] == subset).all()
        used |= set(controls.tolist())
    there = split.cells(subset, conditions=conditions, controls=True)
    assert len(used) > 0.9 * len(there), "all are drawn from, uniformly"


def test_codes_of_a_batch_are_those_of_its_cells(numbered):
    conditions = numbered.conditions
    for batch in numbered.stream("all").epoch(TRAIN):
        rows = batch.expression[:, 0].numpy().astype(int) - 1
        assert (batch.condition.numpy() == conditions.cell_condition[rows]).all()
        assert (batch.context.numpy() == conditions.context[batch.condition.numpy()]).all()
        assert batch.condition.dtype == batch.context.dtype == torch.int64
        assert len(batch) == len(rows)


def test_every_batch_has_the_size_and_the_last_may_hold_one_cell(lab):
    cells = len(lab.stream().rows(TRAIN))
    size = next(size for size in range(50, 500) if cells % size == 1)
    batches = list(lab.stream(batch_size=size).epoch(TRAIN))
    assert [len(batch) for batch in batches] == [size] * (cells // size) + [1]
    for batch in batches:
        assert batch.expression.shape == batch.control.shape == (len(batch), 60)
        assert batch.expression.dtype == batch.control.dtype == torch.float32
        assert batch.condition.shape == batch.context.shape == (len(batch),)


def test_epochs_differ_in_order_and_in_pairs_and_the_seed_decides_both(numbered):
    first, again, later, other = (
        epoch(replace(numbered, seed=seed), number=number) for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    np.testing.assert_array_equal(first, again)
    for changed in (later, other):
        assert (changed[0] != first[0]).any()
        pairs = [dict(zip(*part, strict=True)) for part in (first, changed)]
        assert np.mean([pairs[0][row] == pairs[1][row] for row in pairs[0]]) < 0.2


def test_neither_order_nor_pairs_depend_on_the_batch_size(numbered):
    np.testing.assert_array_equal(epoch(numbered, batch_size=7), epoch(numbered, batch_size=300))


def test_a_cell_keeps_its_control_when_the_order_is_another(numbered):
    shuffled, plain = (dict(zip(*epoch(numbered, number=3, shuffle=shuffle), strict=True)) for shuffle in (True, False))
    assert shuffled == plain


def test_validation_pairs_are_fixed(numbered):
    first, later = (epoch(numbered, subset=VAL, number=n, shuffle=False, fixed=True) for n in (0, 7))
    np.testing.assert_array_equal(first, later)
    drawn = epoch(numbered, subset=VAL, number=7, shuffle=False)
    assert (drawn[1] != first[1]).any()


@pytest.mark.parametrize("mode", MODES)
def test_batches_do_not_depend_on_the_number_of_blocks(lab, mode):
    whole = lab.cells.blocks[0].csr()
    one, five = (replace(lab, cells=screens.in_blocks(whole, blocks)).stream(mode) for blocks in (1, 5))
    assert len(five.cells.blocks) == 5
    for a, b in zip(one.epoch(TRAIN), five.epoch(TRAIN), strict=True):
        for name in ("expression", "control", "condition", "context"):
            if getattr(a, name) is None:
                assert getattr(b, name) is None
            else:
                assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_dense_rows_and_group_sums_agree_with_numpy(lab, blocks):
    dense = lab.cells.blocks[0].csr().toarray()
    cells = screens.in_blocks(lab.cells.blocks[0].csr(), blocks)
    rng = np.random.default_rng(blocks)
    assert len(cells) == len(dense)
    for rows in (rng.integers(len(dense), size=300), np.arange(0), np.array([len(dense) - 1, 0])):
        np.testing.assert_array_equal(cells.dense(rows), dense[rows])
        code = rng.integers(4, size=len(rows))
        expected = np.zeros((6, dense.shape[1]))
        np.add.at(expected, code, dense[rows].astype(np.float64))
        np.testing.assert_allclose(cells.group_sums(rows, code, groups=6), expected, rtol=1e-12)


def test_controls_to_predict_from_are_capped_and_the_same_for_every_trial(lab, monkeypatch):
    everything = control_rows(lab.conditions, lab.split, 1)
    context = lab.conditions.context[lab.conditions.cell_condition]
    assert (context[everything] == 1).all()
    assert (lab.split.cell[everything] == TEST).all()
    assert len(everything) < MAX_CONTROLS
    monkeypatch.setattr("perturbray.data.truth.MAX_CONTROLS", 10)
    few = control_rows(lab.conditions, lab.split, 1)
    assert len(few) == len(set(few)) == 10
    assert set(few) < set(everything)
    np.testing.assert_array_equal(few, control_rows(lab.conditions, lab.split, 1))


def test_a_cell_without_a_control_in_its_subset_is_an_error_and_not_anothers_control(lab):
    conditions, split = lab.conditions, lab.split
    cell = split.cell.copy()
    control = conditions.is_control[conditions.cell_condition]
    cell[control & (conditions.context[conditions.cell_condition] == 1) & (cell == VAL)] = UNUSED
    stream = BatchStream(
        lab.cells, conditions, replace(split, cell=cell), batch_size=64, seed=0, mode="paired", device="cpu"
    )
    with pytest.raises(InputError, match="context line_b has no control cells in val"):
        list(stream.epoch(VAL))
    assert len(list(stream.epoch(TRAIN)))
