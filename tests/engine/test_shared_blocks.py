"""Blocks: the matrix is read once, whatever its layout, and shared without a copy."""

import os
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import ray
from scipy import sparse

from perturbray.data import blocks, matrix
from perturbray.data.dataset import DatasetSpec, open_h5ad
from perturbray.errors import InputError

CELLS, GENES = 9000, 40  # three digests of rows


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    values = rng.poisson(0.3, (CELLS, GENES)).astype(np.float32)
    values[17] = 0  # a cell without counts
    return sparse.csr_matrix(values)


def store(path: Path, x, **layers) -> DatasetSpec:
    label = np.where(np.arange(x.shape[0]) % 3 == 0, "control", "drug")
    data = ad.AnnData(x, layers=layers)
    data.obs["condition"], data.obs["cell_type"] = label, "line"
    data.write_h5ad(path)
    return DatasetSpec(path=str(path))


@pytest.fixture(scope="module")
def screen(counts, tmp_path_factory) -> DatasetSpec:
    return store(tmp_path_factory.mktemp("blocks") / "counts.h5ad", counts)


def dense(found: blocks.Blocks) -> np.ndarray:
    cells = found.cells()
    return cells.dense(np.arange(len(cells)))


def normalised(counts: sparse.csr_matrix) -> np.ndarray:
    total = np.asarray(counts.sum(1, dtype=np.float64))
    scale = np.divide(np.median(total[total > 0]), total, out=np.zeros_like(total), where=total > 0)
    return np.log1p(counts.toarray() * scale).astype(np.float32)


@pytest.fixture(scope="module")
def in_one(ray_session, screen):
    return blocks.read(screen, screen.conditions())


def test_counts_are_scaled_to_the_median_depth_and_logged(in_one, counts):
    found, facts = in_one
    assert len(found.references) == 1
    np.testing.assert_allclose(dense(found), normalised(counts), rtol=1e-6)
    assert facts.whole
    assert facts.depth == np.median(np.asarray(counts.sum(1))[np.diff(counts.indptr) > 0])


def test_many_blocks_hold_the_rows_of_one_in_the_same_order(in_one, screen):
    many, facts = blocks.read(screen, screen.conditions(), rows=matrix.DIGEST_ROWS)
    assert len(many.references) == 3
    np.testing.assert_array_equal(dense(many), dense(in_one[0]))
    assert facts == in_one[1], "what is known of the matrix, its digest included, does not depend on the blocks"
    rows = np.random.default_rng(1).integers(0, CELLS, 500)
    np.testing.assert_array_equal(many.cells().dense(rows), in_one[0].cells().dense(rows))


def test_the_facts_are_those_of_a_scan_in_this_process(in_one, screen, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBRAY_CACHE", str(tmp_path))
    conditions = screen.conditions()
    assert matrix.scan(screen, cell_names=conditions.cell_names, genes=conditions.genes) == in_one[1]


@pytest.mark.parametrize("layout", ["csc", "dense", "layer"])
def test_the_layout_of_the_matrix_does_not_matter(in_one, counts, tmp_path, layout):
    path = tmp_path / "other.h5ad"
    if layout == "layer":
        spec = replace(store(path, sparse.csr_matrix(counts.shape), raw=counts), layer="raw")
    else:
        spec = store(path, sparse.csc_matrix(counts) if layout == "csc" else counts.toarray())
    found, facts = blocks.read(spec, spec.conditions(), rows=matrix.DIGEST_ROWS)
    assert len(found.references) == (1 if layout == "csc" else 3)
    np.testing.assert_array_equal(dense(found), dense(in_one[0]))
    assert facts == in_one[1]


def test_log_normalised_values_are_used_as_they_are(ray_session, counts, tmp_path):
    values = sparse.csr_matrix(normalised(counts))
    spec = store(tmp_path / "log.h5ad", values)
    found, facts = blocks.read(spec, spec.conditions())
    np.testing.assert_array_equal(dense(found), values.toarray())
    assert not facts.whole


def test_a_value_that_is_not_finite_is_named_by_cell_and_gene(ray_session, counts, tmp_path):
    bad = counts.copy()
    row = int(np.flatnonzero(np.diff(bad.indptr))[5000])
    bad.data[bad.indptr[row]] = np.nan
    spec = store(tmp_path / "bad.h5ad", bad)
    gene = bad.indices[bad.indptr[row]]
    with pytest.raises(InputError, match=f"NaN or infinite in 1 cells; the first is cell {row}, gene {gene}$"):
        blocks.read(spec, spec.conditions(), rows=matrix.DIGEST_ROWS)


def test_an_index_beyond_the_genes_is_one_line(ray_session, counts, tmp_path):
    spec = store(tmp_path / "bad.h5ad", counts)
    with h5py.File(spec.path, "a") as file:
        file["X/indices"][5] = GENES
    with pytest.raises(InputError) as caught:
        blocks.read(spec, spec.conditions())
    assert str(caught.value).startswith(f"{spec.path}: rows 0 to {CELLS} of X name gene number {GENES}")
    assert "\n" not in str(caught.value)


def test_processes_share_the_memory_of_a_block(in_one):
    found, _ = in_one
    rows = found.cells().blocks[0]
    assert not rows.data.flags.writeable, "a view of the object store"
    assert not rows.data.flags.owndata
    again = found.cells().blocks[0]
    assert np.shares_memory(rows.data, again.data)
    assert np.shares_memory(rows.indices, again.indices)


def test_references_travel_and_blocks_stay(in_one):
    assert len(ray.cloudpickle.dumps(in_one[0])) < 10_000


def test_reading_all_ranges_reads_the_matrix_once(screen, counts):
    def read_bytes():
        return int(Path("/proc/self/io").read_text().split()[1])  # rchar: bytes asked for, cached or not

    size = counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes
    with open_h5ad(screen.path) as file:
        before = read_bytes()
        for start, stop in matrix.row_ranges(screen, file, rows=matrix.DIGEST_ROWS):
            matrix.read_rows(file, screen, start, stop)
        read = read_bytes() - before
    assert size <= read < 1.2 * size + 50_000, f"{read / size:.2f} times the matrix"
    assert os.path.getsize(screen.path) < 2 * size
