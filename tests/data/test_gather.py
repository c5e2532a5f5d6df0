"""Laws of gathering: compiled or not, in one block or many, on a device or in a buffer, rows are the rows of the matrix."""

import numpy as np
import pytest
import screens
import torch
from scipy import sparse

from perturbray.data.batches import Cells
from perturbray.data.buffers import KEPT, Buffers
from perturbray.data.device import densify, on_device
from perturbray.data.kernels import MOST
from perturbray.data.rows import Rows
from perturbray.errors import InputError

CELLS, GENES = 700, 90


@pytest.fixture(scope="module")
def matrix() -> sparse.csr_matrix:
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((CELLS, GENES)) < 0.1, rng.random((CELLS, GENES)), 0).astype(np.float32)
    dense[[0, 13, CELLS - 1]] = 0  # cells without a value
    dense[5] = 1  # and one with all of them
    return sparse.csr_matrix(dense)


def wide(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """The first cells, their values among so many genes that an index takes four bytes."""
    few = matrix[:40]
    return sparse.csr_matrix((few.data, few.indices * 800, few.indptr), shape=(few.shape[0], GENES * 800))


@pytest.mark.parametrize("genes", ["few", "many"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
def test_rows_are_those_of_the_matrix(matrix, blocks, compiled, genes):
    matrix = matrix if genes == "few" else wide(matrix)
    cells = Cells(screens.in_blocks(matrix, blocks).blocks, compiled=compiled)
    assert cells.blocks[0].indices.dtype == (np.uint16 if genes == "few" else np.int32)
    rng, n = np.random.default_rng(blocks), matrix.shape[0]
    for rows in (rng.integers(n, size=n), np.arange(0), np.array([n - 1, 0, 0]), np.arange(n)):
        expected = matrix[rows].toarray()
        np.testing.assert_array_equal(cells.dense(rows), expected)
        np.testing.assert_array_equal(cells.select(rows).toarray(), expected)
        out = np.full((len(rows), cells.genes), np.nan, dtype=np.float32)
        assert cells.dense(rows, out=out) is out
        np.testing.assert_array_equal(out, expected)
        code = rng.integers(3, size=len(rows))
        for power in (1, 2):
            sums = np.zeros((4, cells.genes))
            np.add.at(sums, code, expected.astype(np.float64) ** power)
            found = cells.group_sums(rows, code, groups=4, power=power)
            np.testing.assert_allclose(found, sums, rtol=1e-12, atol=1e-12)


def test_more_blocks_than_one_call_takes_are_the_rows_of_the_matrix(matrix):
    cells = Cells([matrix[row : row + 20] for row in range(0, CELLS, 20)], compiled=True)
    assert len(cells.blocks) > 2 * MOST
    rows = np.random.default_rng(0).integers(CELLS, size=500)
    np.testing.assert_array_equal(cells.dense(rows), matrix[rows].toarray())


@pytest.mark.parametrize("compiled", [False, True])
def test_sums_do_not_depend_on_the_blocks_to_the_bit(matrix, compiled):
    rows = np.random.default_rng(3).permutation(CELLS)
    code = rows % 5
    one, four = (
        Cells(screens.in_blocks(matrix, n).blocks, compiled=compiled).group_sums(rows, code, groups=5) for n in (1, 4)
    )
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize("row", [-1, CELLS])
def test_a_row_that_is_not_there_is_refused(matrix, row):
    cells = Cells([matrix])
    for use in (cells.dense, cells.select, lambda rows: cells.group_sums(rows, rows * 0, groups=1)):
        with pytest.raises(IndexError, match=f"row {row} of {CELLS}"):
            use(np.array([3, row]))


def test_rows_made_by_hand_are_checked_before_a_kernel_sees_them(matrix):
    whole = Rows.of(matrix)
    beyond, cut, descending = whole.indices.copy(), whole.indptr.copy(), whole.indptr.copy()
    beyond[7] = GENES
    cut[-1] += 1
    descending[3] = descending[4] + 1
    for broken, message in (
        (Rows(whole.indptr, beyond, whole.values, GENES), f"gene number {GENES}, but there are {GENES}"),
        (Rows(whole.indptr, np.where(beyond == GENES, -1, beyond.astype(np.int32)), whole.values, GENES), "number -1"),
        (Rows(cut, whole.indices, whole.values, GENES), f"at most {len(whole.values)}"),
        (Rows(whole.indptr + 1, whole.indices, whole.values, GENES), "from 0"),
        (Rows(descending, whole.indices, whole.values, GENES), "must ascend"),
    ):
        with pytest.raises(InputError, match=message):
            Cells([whole, broken])
    with pytest.raises(InputError, match=f"block 1 has {GENES - 1} genes, and the first has {GENES}"):
        Cells([whole, matrix[:, 1:]])
    with pytest.raises(InputError, match=r"obsm matrix 'X_pca' is \(699, 4\), and there are 700 cells"):
        Cells([whole], {"X_pca": np.zeros((CELLS - 1, 4))})


def test_memory_is_used_again_when_nobody_holds_it_and_never_before():
    buffers = Buffers()
    held, places = [], set()
    for number in range(KEPT + 4):
        array = buffers.take(3, 5)
        array.fill(number)
        held.append(torch.from_numpy(array)[1:].T)  # a view of a view of a tensor
        places.add(array.ctypes.data)
    del array
    assert len(places) == len(held)
    assert [set(part.unique().tolist()) for part in held] == [{float(number)} for number in range(KEPT + 4)]
    first = held.pop(2).data_ptr()
    again = buffers.take(2, 5).ctypes.data
    assert abs(again - first) < 64, "the place of the one that was let go"
    held.clear()
    assert {buffers.take(3, 5).ctypes.data for _ in range(20)} <= places


def test_what_autograd_keeps_is_not_written_again():
    buffers = Buffers()
    weight = torch.ones(4, requires_grad=True)
    batch = torch.from_numpy(_filled(buffers, 2.0))
    loss = (batch * weight).sum()  # the gradient of weight is what batch holds
    del batch
    _filled(buffers, 7.0)
    loss.backward()
    assert weight.grad.tolist() == [6.0] * 4


def _filled(buffers: Buffers, value: float) -> np.ndarray:
    array = buffers.take(3, 4)
    array.fill(value)
    return array


def test_memory_grows_with_the_batches():
    buffers = Buffers()
    for rows in (2, 100, 7, 1000):
        assert buffers.take(rows, 30).shape == (rows, 30)
        assert buffers.take(rows, 30).flags.c_contiguous


@pytest.mark.parametrize("genes", ["few", "many", "above 32767"])
def test_csr_on_a_device_becomes_the_dense_rows(matrix, genes):
    if genes != "few":
        matrix = wide(matrix)
    if genes == "above 32767":  # two bytes whose highest bit is set
        matrix = matrix[:, : 2**16]
    rows = Rows.of(matrix)
    np.testing.assert_array_equal(on_device(rows, "cpu").numpy(), matrix.toarray())
    empty = Rows.of(matrix[:0])
    assert on_device(empty, "cpu").shape == (0, rows.genes)


def test_the_dense_rows_of_a_device_take_lengths_indices_and_values():
    found = densify(torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0]), torch.tensor([5.0, 6.0, 7.0]), genes=4)
    assert found.tolist() == [[0, 5, 0, 6], [0, 0, 0, 0], [7, 0, 0, 0]]


@pytest.mark.gpu
def test_a_gpu_delivers_what_a_cpu_does(lab):
    for a, b in zip(lab.stream("paired").epoch(), lab.stream("paired", device="cuda").epoch(), strict=True):
        for name in ("expression", "control", "condition", "context", "cell"):
            assert getattr(b, name).device.type == "cuda"
            assert torch.equal(getattr(a, name), getattr(b, name).cpu())
