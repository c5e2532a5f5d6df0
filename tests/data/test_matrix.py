"""Laws of the matrix: rows are the same however they are stored and cut, and values of no known scale are refused."""

import json
import os
from dataclasses import replace

import h5py
import numpy as np
import pytest
import screens
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from perturbray.data import matrix, store
from perturbray.data.dataset import DatasetSpec, open_h5ad
from perturbray.errors import InputError

STORED = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The folder in which facts of a matrix are remembered: this test's alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PERTURBRAY_CACHE", str(folder))
    return folder


def counts(cells=50, genes=12, *, seed=0) -> np.ndarray:
    """Sparse counts; the first cell is empty, the second has a count of every gene."""
    values = np.random.default_rng(seed).poisson(0.6, (cells, genes)).astype(np.float32)
    values[0], values[1] = 0, np.arange(1, genes + 1)
    return values


def screen(path, X, *, layers=None, **fields) -> DatasetSpec:
    obs = {"condition": ["control", "a"] * (X.shape[0] // 2), "line": ["x"] * X.shape[0]}
    return DatasetSpec(path=str(screens.write(path, obs, X=X, layers=layers)), covariates=("line",), **fields)


def read(spec, start, stop) -> sparse.csr_matrix:
    with open_h5ad(spec.path) as file:
        return matrix.read_rows(file, spec, start, stop)


def scan(spec) -> matrix.MatrixFacts:
    return store.ingest(spec, spec.conditions()).facts


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize("layout", STORED.values(), ids=STORED)
def test_rows_are_equal_however_they_are_stored(tmp_path, layout, layer, dtype):
    values = counts()
    stored = layout(values.astype(dtype))
    X = stored if layer is None else np.zeros_like(values)
    spec = screen(tmp_path / "stored.h5ad", X, layers={"counts": stored}, layer=layer)
    for start, stop in [(0, 50), (0, 1), (7, 31), (49, 50), (20, 20)]:
        rows = read(spec, start, stop)
        assert rows.dtype == np.float32
        assert rows.has_sorted_indices
        np.testing.assert_array_equal(rows.toarray(), values[start:stop])


def test_digests_are_equal_however_rows_are_stored(tmp_path, own_cache):
    found = {scan(screen(tmp_path / f"{name}.h5ad", layout(counts()))) for name, layout in STORED.items()}
    assert len(found) == 1


@pytest.mark.parametrize("bad", [12, -1])
def test_a_gene_number_out_of_range_is_refused(tmp_path, bad):
    spec = screen(tmp_path / "bad.h5ad", sparse.csr_matrix(counts()))
    with h5py.File(spec.path, "r+") as file:
        file["X/indices"][30] = bad
    with pytest.raises(InputError, match=rf"bad\.h5ad: rows 0 to 50 of X name gene number {bad}, but there are 12"):
        read(spec, 0, 50)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 6), st.floats(0, 1))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_facts_of_rows_agree_with_dense_numpy(seed, cells, genes, density):
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((cells, genes)) < density, rng.integers(-4, 9, (cells, genes)) / 2, 0)
    dense = dense.astype(np.float32)
    facts = matrix.row_facts(sparse.csr_matrix(dense))
    np.testing.assert_allclose(facts.total, dense.sum(axis=1, dtype=np.float64))
    np.testing.assert_array_equal(facts.minimum, dense.min(axis=1))
    np.testing.assert_array_equal(facts.maximum, dense.max(axis=1))
    np.testing.assert_array_equal(facts.whole, (dense == np.floor(dense)).all(axis=1))
    assert (facts.bad_gene == -1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_facts_name_the_first_gene_of_a_row_that_is_not_finite(bad):
    dense = counts(6)
    dense[2, 5] = dense[2, 9] = dense[4, 0] = bad
    assert matrix.row_facts(sparse.csr_matrix(dense)).bad_gene.tolist() == [-1, -1, 5, -1, 0, -1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layout", STORED.values(), ids=STORED)
def test_a_value_that_is_not_finite_is_refused_with_its_cell_and_gene(tmp_path, own_cache, layout, bad):
    values = counts()
    values[33, 4] = values[40, 2] = bad
    spec = screen(tmp_path / "holes.h5ad", layout(values))
    with pytest.raises(InputError, match=r"holes\.h5ad: .* in 2 cells; the first is cell cell_00033, gene gene_4"):
        scan(spec)
    assert not list(own_cache.rglob("*.json")), "nothing of it is remembered"


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_digests_do_not_depend_on_how_the_rows_are_cut(monkeypatch, step):
    monkeypatch.setattr(matrix, "DIGEST_ROWS", 8)
    rows = sparse.csr_matrix(counts(61))
    parts = [matrix.digests(rows[start : start + 8 * step]) for start in range(0, 61, 8 * step)]
    assert [digest for part in parts for digest in part] == matrix.digests(rows)
    assert len(matrix.digests(rows)) == 8


def test_digests_tell_values_genes_and_rows_apart():
    dense = counts(20)
    changed = {"value": dense.copy(), "gene": dense[:, ::-1].copy(), "rows": dense[::-1].copy(), "cut": dense[:-1]}
    changed["value"][3, 3] += 1
    found = {str(matrix.digests(sparse.csr_matrix(values))) for values in (dense, *changed.values())}
    assert len(found) == 5


# What the values are taken for.


def facts(**fields) -> matrix.MatrixFacts:
    return matrix.MatrixFacts(
        **{"digest": "", "whole": True, "minimum": 0.0, "maximum": 80.0, "depth": 100.0, **fields}
    )


LOGNORM = {"whole": False, "maximum": 7.5}
SCALED = {"whole": False, "maximum": 900.0}


@pytest.mark.parametrize(
    ("normalize", "values", "log1p"),
    [
        ("auto", {}, True),
        ("auto", {"maximum": 3.0}, True),  # integers are counts, however small
        ("auto", LOGNORM, False),
        ("auto", {"whole": False, "maximum": 14.999}, False),
        ("log1p", {}, True),
        ("log1p", LOGNORM, True),
        ("log1p", SCALED, True),
        ("none", LOGNORM, False),
        ("none", SCALED, False),
    ],
)
def test_what_values_are_taken_for(normalize, values, log1p):
    found = matrix.decide(DatasetSpec(path="a.h5ad", normalize=normalize), facts(**values))
    assert found.log1p == log1p
    assert found.depth == (100.0 if log1p else 0.0)
    assert ("scaled to the median depth of 100, then log1p" if log1p else "used as it is") in found.text


@pytest.mark.parametrize(
    ("normalize", "values", "message"),
    [
        (
            "auto",
            SCALED,
            r"a\.h5ad: X is neither counts .* maximum is 900, not below 15\); give --normalize log1p or none",
        ),
        ("auto", {"whole": False, "maximum": 15.0}, "neither counts"),
        ("none", {}, r"a\.h5ad: X holds integers \(counts\), and normalize=none .*: use log1p"),
        *[
            (n, {"minimum": -1.5}, r"a\.h5ad: X has negative values \(down to -1\.5\)")
            for n in ("auto", "log1p", "none")
        ],
        *[(n, {"maximum": 0.0, "depth": 0.0}, r"a\.h5ad: X is zero everywhere") for n in ("auto", "log1p", "none")],
    ],
)
def test_values_that_fit_no_scale_are_refused_with_what_would_be_right(normalize, values, message):
    with pytest.raises(InputError, match=message):
        matrix.decide(DatasetSpec(path="a.h5ad", normalize=normalize), facts(**values))


def test_a_message_names_the_layer_that_was_read():
    with pytest.raises(InputError, match=r"a\.h5ad: layer scaled has negative values"):
        matrix.decide(DatasetSpec(path="a.h5ad", layer="scaled"), facts(minimum=-1.0))


def test_normalisation_scales_to_the_median_depth_and_takes_log1p(tmp_path, own_cache):
    values = counts(200, seed=3)
    values[20:80] = 0
    spec = screen(tmp_path / "counts.h5ad", sparse.csr_matrix(values))
    depth = values.sum(axis=1)
    target = np.median(depth[depth > 0])  # as scanpy's normalize_total has it: empty cells do not count
    expected = np.log1p(values * (target / np.maximum(depth, 1))[:, None])
    assert (depth == 0).any()
    assert scan(spec).depth == target
    np.testing.assert_allclose(screens.rows_of(spec, spec.conditions()).toarray(), expected, rtol=1e-6)


def test_values_that_are_log_normalised_are_used_bit_by_bit(tmp_path, own_cache):
    values = np.log1p(counts() * 1.7).astype(np.float32)
    spec = screen(tmp_path / "log.h5ad", sparse.csr_matrix(values))
    np.testing.assert_array_equal(screens.rows_of(spec, spec.conditions()).toarray(), values)


# What is remembered of a file.


def test_facts_are_remembered_until_the_file_changes(tmp_path, own_cache, monkeypatch):
    spec = screen(tmp_path / "a.h5ad", sparse.csr_matrix(counts()))
    assert matrix.remembered(spec) is None
    first = scan(spec)
    assert matrix.remembered(spec) == first
    with monkeypatch.context() as patch:
        patch.setattr(store, "open_screen", None)
        assert store.ingest(spec, store.conditions(spec)).facts == first, "nothing is read again"

    screen(tmp_path / "a.h5ad", sparse.csr_matrix(counts(seed=1)))
    assert matrix.remembered(spec) is None
    assert scan(spec).digest != first.digest

    stat = os.stat(spec.path)
    assert matrix.remembered(spec) is not None
    os.utime(spec.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert matrix.remembered(spec) is None


def test_facts_of_one_layer_are_not_taken_for_those_of_another(tmp_path, own_cache):
    layers = {"counts": counts(), "other": counts(seed=1)}
    spec = screen(tmp_path / "a.h5ad", np.log1p(counts() + 0.5), layers=layers)
    found = {layer: scan(replace(spec, layer=layer)) for layer in (None, "counts", "other")}
    assert len({f.digest for f in found.values()}) == 3
    assert {layer: matrix.remembered(replace(spec, layer=layer)) for layer in found} == found


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": 3}', "null"])
def test_a_cache_that_makes_no_sense_is_read_as_none(tmp_path, own_cache, content):
    spec = screen(tmp_path / "a.h5ad", sparse.csr_matrix(counts()))
    first = scan(spec)
    (place,) = own_cache.glob("facts/*.json")
    (manifest,) = own_cache.glob("stores/*/manifest.json")
    for path in (place, manifest):
        path.write_text(content)
    assert matrix.remembered(spec) is None
    assert scan(spec) == first
    assert [json.loads(path.read_text())["facts"]["digest"] for path in (place, manifest)] == [first.digest] * 2


@pytest.mark.parametrize("blocked", ["cache", "cache/facts", "cache/stores"])
def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, own_cache, blocked, monkeypatch):
    """A file where the folder should be: a refusal that even root meets."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    place = tmp_path / blocked
    place.parent.mkdir(exist_ok=True)
    place.write_text("in the way")
    spec = screen(tmp_path / "a.h5ad", sparse.csr_matrix(counts()))
    assert scan(spec) == scan(spec)
    assert place.read_text() == "in the way"
