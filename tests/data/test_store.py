"""Laws of the store: it holds the rows of its file however they are stored, and only what is whole is taken for one."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import screens
from scipy import sparse

from perturbray.data import ingest as made
from perturbray.data import matrix, store
from perturbray.data.dataset import DatasetSpec, fingerprint, open_screen
from perturbray.data.rows import Rows
from perturbray.errors import InputError

CELLS, GENES = 10_000, 30  # three digests of rows
LAYOUTS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda m: m.toarray()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """The folder of this test's stores."""
    monkeypatch.setenv("PERTURBRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    """Counts with empty cells: the first, the last, one between, and a whole range that shares a digest."""
    values = np.random.default_rng(0).poisson(0.4, (CELLS, GENES)).astype(np.float32)
    values[[0, 17, -1]] = values[4096:8192] = 0
    return sparse.csr_matrix(values)


def normalised(counts) -> np.ndarray:
    """log1p of counts scaled to the median depth of cells with any, written anew."""
    dense = np.asarray(counts.todense() if sparse.issparse(counts) else counts, dtype=np.float64)
    depth = dense.sum(axis=1, keepdims=True)
    scale = np.divide(np.median(depth[depth > 0]), depth, out=np.zeros_like(depth), where=depth > 0)
    return np.log1p(dense * scale).astype(np.float32)


def frame(cells: int) -> pd.DataFrame:
    label = np.where(np.arange(cells) % 3 == 0, "control", "drug")
    return pd.DataFrame({"condition": label, "cell_type": "line"}, index=[f"c{i}" for i in range(cells)])


def write(path: Path, x, *, layers=None, obsm=None, obs=None) -> DatasetSpec:
    data = ad.AnnData(x, obs=frame(x.shape[0]) if obs is None else obs, layers=layers, obsm=obsm)
    if path.suffix == ".h5ad":
        data.write_h5ad(path)
    else:
        with warnings.catch_warnings(action="ignore"), ad.settings.override(zarr_write_format=int(path.suffix[-1])):
            data.write_zarr(path)
    return DatasetSpec(path=str(path))


def take_in(spec: DatasetSpec, **options) -> store.Store:
    return store.ingest(spec, spec.conditions(), **options)


def dense(found: store.Store) -> np.ndarray:
    return found.cells().dense(np.arange(len(found)))


# The rows of the file.


@pytest.mark.parametrize("kind", ["h5ad", "zarr2", "zarr3"])
@pytest.mark.parametrize("layer", [None, "raw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_store_holds_the_normalised_rows_of_its_file_however_they_are_stored(tmp_path, counts, layout, layer, kind):
    x = LAYOUTS[layout](counts)
    if layer is None:
        spec = write(tmp_path / f"a.{kind}", x)
    else:
        spec = replace(write(tmp_path / f"a.{kind}", sparse.csr_matrix(counts.shape), layers={"raw": x}), layer="raw")
    found = take_in(spec)
    np.testing.assert_allclose(dense(found), normalised(counts), rtol=1e-6)
    assert len(found) == CELLS
    assert found.facts == screens.facts_of(counts, spec, spec.conditions())
    assert found.stored == counts.nnz


@pytest.mark.parametrize("memory_mb", [1, 256])
@pytest.mark.parametrize("rows", [4096, 8192, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_shards_nor_memory_change_a_bit(tmp_path, counts, layout, rows, memory_mb, monkeypatch):
    monkeypatch.setattr(made, "COPY", 600)  # 1 MB is pieces of 1,747 values at most: no piece ends where a shard does
    monkeypatch.setattr(made, "SPILL", 900)
    monkeypatch.setattr(made, "SORT", 20)  # a digest of rows by columns is sorted at once
    monkeypatch.setattr(made, "EXAMINE", 900)  # windows of fewer rows than a digest
    spec = write(tmp_path / "a.h5ad", x := LAYOUTS[layout](counts))
    if layout != "dense":
        rewrite(spec.path, indices=x.indices, data=x.data, indptr=x.indptr)  # without chunks
    found = take_in(spec, shard_rows=rows, memory_mb=memory_mb)
    assert found.rows == {4096: (4096, 4096, 1808), 8192: (8192, 1808), None: (CELLS,)}[rows]
    np.testing.assert_array_equal(dense(found), screens.rows_of(*spec_and_conditions(tmp_path / "a.h5ad")).toarray())
    assert found.facts == screens.facts_of(counts, *spec_and_conditions(tmp_path / "a.h5ad"))


def spec_and_conditions(path: Path):
    spec = DatasetSpec(path=str(path))
    return spec, spec.conditions()


def test_values_on_a_log_scale_are_kept_bit_by_bit(tmp_path, counts):
    values = sparse.csr_matrix(normalised(counts))
    found = take_in(write(tmp_path / "a.h5ad", values))
    np.testing.assert_array_equal(dense(found), values.toarray())
    assert not found.normalisation.log1p


def rewrite(path: Path, *, indices=None, data=None, indptr=None) -> None:
    with h5py.File(path, "r+") as file:
        for name, values in (("indices", indices), ("data", data), ("indptr", indptr)):
            if values is not None:
                del file[f"X/{name}"]
                file[f"X/{name}"] = values


@pytest.mark.parametrize("rows", [4096, None])
def test_rows_out_of_order_are_put_in_order_and_their_digest_stays_that_of_the_file(tmp_path, counts, rows):
    spec = write(tmp_path / "a.h5ad", counts)
    flipped = counts.copy()
    for low, high in zip(flipped.indptr[:-1], flipped.indptr[1:], strict=True):
        flipped.indices[low:high] = flipped.indices[low:high][::-1].copy()
        flipped.data[low:high] = flipped.data[low:high][::-1].copy()
    rewrite(spec.path, indices=flipped.indices, data=flipped.data)
    found = take_in(spec, shard_rows=rows)
    np.testing.assert_allclose(dense(found), normalised(counts), rtol=1e-6)
    for number in range(len(found.rows)):
        shard = found.shard(number)
        inside = np.ones(len(shard.indices), dtype=bool)
        inside[shard.indptr[:-1][np.diff(shard.indptr) > 0]] = False  # the first of a row follows nothing
        assert (np.diff(shard.indices.astype(int), prepend=-1)[inside] > 0).all()
    assert found.facts.digest == matrix_digest(flipped)


def matrix_digest(rows: sparse.csr_matrix) -> str:
    return matrix.gather([matrix.row_facts(rows)], matrix.digests(rows), spec=None, cell_names=(), genes=()).digest


def test_a_gene_that_stands_twice_in_a_row_is_added_up_before_the_logarithm(tmp_path, counts):
    spec = write(tmp_path / "a.h5ad", counts)
    row = int(np.flatnonzero(np.diff(counts.indptr) > 1)[0])
    indices = counts.indices.copy()
    indices[counts.indptr[row] + 1] = indices[counts.indptr[row]]
    rewrite(spec.path, indices=indices)
    summed = sparse.csr_matrix((counts.data, indices, counts.indptr), shape=counts.shape).toarray()
    found = take_in(spec)
    np.testing.assert_allclose(dense(found), normalised(summed), rtol=1e-6)
    assert found.stored == counts.nnz - 1


@pytest.mark.parametrize("genes", [65_536, 65_537])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_bytes_number_genes_up_to_65536_and_not_one_more(tmp_path, layout, genes):
    values = sparse.random(12, genes, density=0.001, format="lil", random_state=0, dtype=np.float32)
    values[3, genes - 1], values[4, 0] = 0.5, 0.25
    spec = write(tmp_path / "a.h5ad", LAYOUTS[layout](values.tocsr()))
    found = take_in(spec)
    assert found.shard(0).indices.dtype == (np.uint16 if genes == 65_536 else np.int32)
    np.testing.assert_array_equal(dense(found), values.toarray())
    assert found.shard(0).indices.max() == genes - 1


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint64])
def test_indices_and_bounds_of_any_width_are_read(tmp_path, counts, dtype):
    spec = write(tmp_path / "a.h5ad", counts)
    rewrite(spec.path, indices=counts.indices.astype(dtype), indptr=counts.indptr.astype(dtype))
    np.testing.assert_allclose(dense(take_in(spec)), normalised(counts), rtol=1e-6)


# What is wrong with a file.


@pytest.mark.parametrize("wrong", [GENES, 2**16 + 3, -1])
@pytest.mark.parametrize("at", [0, 30_000, -1])
def test_a_gene_number_out_of_range_is_one_line_that_names_the_row(tmp_path, own_cache, counts, wrong, at):
    """2^16 + 3 in two bytes would be gene 3."""
    spec = write(tmp_path / "a.h5ad", counts)
    with h5py.File(spec.path, "r+") as file:
        file["X/indices"][at] = wrong
    row = np.searchsorted(counts.indptr, at % counts.nnz, side="right") - 1
    with pytest.raises(InputError) as caught:
        take_in(spec, shard_rows=4096)
    assert str(caught.value) == f"{spec.path}: X: row {row} names gene number {wrong}, but there are {GENES}"
    assert not stores(own_cache)
    assert not list(own_cache.rglob("*.tmp"))


@pytest.mark.parametrize("wrong", [CELLS, -1])
def test_a_cell_number_out_of_range_is_one_line_that_names_the_gene(tmp_path, counts, wrong):
    columns = counts.tocsc()
    spec = write(tmp_path / "a.h5ad", columns)
    with h5py.File(spec.path, "r+") as file:
        file["X/indices"][20_000] = wrong
    gene = np.searchsorted(columns.indptr, 20_000, side="right") - 1
    with pytest.raises(InputError, match=f"X: gene {gene} names cell number {wrong}, but there are {CELLS}$"):
        take_in(spec)


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("harm", ["descends", "starts late", "ends late", "short", "values missing"])
def test_bounds_that_do_not_fit_the_values_are_refused(tmp_path, counts, layout, harm):
    x = LAYOUTS[layout](counts)
    spec, indptr, data = write(tmp_path / "a.h5ad", x), x.indptr.copy(), None
    if harm == "descends":
        indptr[5] = indptr[7] + 1
    elif harm == "starts late":
        indptr[0] = 1
    elif harm == "ends late":
        indptr[-1] += 1
    elif harm == "short":
        indptr = indptr[:-1]
    else:
        data = x.data[:-1]
    rewrite(spec.path, indptr=indptr, data=data)
    with pytest.raises(InputError, match=r"a\.h5ad: X is damaged: "):
        take_in(spec)


def test_a_file_that_changes_while_it_is_read_gives_no_store(tmp_path, own_cache, counts):
    spec = write(tmp_path / "a.h5ad", counts)
    with pytest.raises(InputError, match="the file was changed while it was read"):
        take_in(spec, progress=lambda _: os.utime(spec.path))
    assert not stores(own_cache)


# What else a store holds.


def test_embeddings_lie_row_by_row_beside_the_cells(tmp_path, counts):
    rng = np.random.default_rng(1)
    obsm = {
        "X_pca": rng.normal(size=(CELLS, 5)),
        "scGPT/large é": rng.normal(size=(CELLS, 3)).astype(np.float16),
        "codes": rng.integers(0, 9, (CELLS, 2)),
        "sparse": counts,
        "frame": pd.DataFrame({"a": np.arange(CELLS)}, index=frame(CELLS).index),
    }
    del obsm["scGPT/large é"]  # HDF5 reads a slash as a folder; zarr too
    spec = write(tmp_path / "a.h5ad", counts, obsm={**obsm, "scGPT large é": obsm["codes"] / 7})
    found = take_in(spec, memory_mb=1)
    assert found.embeddings == (("X_pca", 5), ("codes", 2), ("scGPT large é", 2))
    for key, expected in (("X_pca", obsm["X_pca"]), ("codes", obsm["codes"]), ("scGPT large é", obsm["codes"] / 7)):
        assert found.embedding(key).dtype == np.float32
        np.testing.assert_array_equal(found.embedding(key), expected.astype(np.float32))
    rows = rng.integers(0, CELLS, 50)
    np.testing.assert_array_equal(found.cells().embedding("X_pca", rows), obsm["X_pca"][rows].astype(np.float32))
    with pytest.raises(InputError, match="no numeric matrix 'X_pcs': did you mean 'X_pca'"):
        found.embedding("X_pcs")


@pytest.mark.parametrize("kind", ["h5ad", "zarr3"])
def test_conditions_come_from_the_store_as_from_the_file(tmp_path, counts, kind):
    rng = np.random.default_rng(2)
    obs = frame(CELLS).assign(
        batch=rng.integers(0, 3, CELLS),
        flag=rng.random(CELLS) < 0.5,
        dose=rng.choice([0.1, 1.0, 2.5], CELLS).astype(np.float32),
        level=pd.Categorical.from_codes(rng.integers(0, 3, CELLS), ["b", "a", "c d"]),
        depth=rng.random(CELLS),
        gap=np.where(rng.random(CELLS) < 0.5, "there", None),
    )
    obs["condition"] = np.where(rng.random(CELLS) < 0.2, "control", rng.choice(["x+y", "y+x", "x"], CELLS))
    spec = write(tmp_path / f"a.{kind}", counts, obs=obs)
    take_in(replace(spec, covariates=("dose",)))
    for covariates in [("dose",), ("batch", "flag"), ("level", "dose", "cell_type")]:
        asked = replace(spec, covariates=covariates)
        before, after = asked.conditions(), store.conditions(asked)
        assert fingerprint(after, "x") == fingerprint(before, "x")
        assert (after.contexts, after.genes, after.singles) == (before.contexts, before.genes, before.singles)
        assert after.cell_condition.dtype == before.cell_condition.dtype
        np.testing.assert_array_equal(after.cell_names, before.cell_names)
    with pytest.raises(InputError, match=r"obs\['gap'\] is missing in"):
        store.conditions(replace(spec, covariates=("gap",)))
    with pytest.raises(InputError, match="obs has no column 'nowhere'"):
        store.conditions(replace(spec, covariates=("nowhere",)))


def test_a_store_pickles_small_and_is_mapped_and_not_copied(tmp_path, counts):
    found = take_in(write(tmp_path / "a.h5ad", counts), shard_rows=4096)
    assert len(pickle.dumps(found)) < 2000
    again = pickle.loads(pickle.dumps(found))
    assert again == found == store.Store.open(found.folder)
    assert again.visible
    for block in again.cells().blocks:
        for array in (block.indptr, block.indices, block.values):
            assert not array.size or not (array.flags.owndata or array.flags.writeable)
    assert not found.shard(1).indices.size, "empty cells alone are mapped as well"
    assert found.nbytes == sum(found.shard(number).nbytes for number in range(3))
    assert found.gene_names() == tuple(map(str, range(GENES)))


# When it is used again, and when it is made again.


def stores(cache: Path) -> list[Path]:
    return [path for path in cache.glob("stores/*") if path.is_dir() and not path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["h5ad", "zarr3"])
def test_a_file_that_was_not_changed_is_not_opened_again(tmp_path, counts, kind, monkeypatch):
    spec = write(tmp_path / f"a.{kind}", counts)
    first = take_in(spec)
    monkeypatch.setattr(store, "open_screen", lambda _: pytest.fail("opened"))
    monkeypatch.setattr("perturbray.data.dataset.open_screen", lambda _: pytest.fail("opened"))
    assert store.ingest(spec, store.conditions(spec)) == first == store.find(spec)
    assert store.known(spec.path)


def test_the_scale_that_is_asked_for_decides_which_store_is_meant(tmp_path, own_cache, counts):
    spec = write(tmp_path / "a.h5ad", sparse.csr_matrix(normalised(counts)))
    kept, scaled = take_in(spec), take_in(replace(spec, normalize="log1p"))
    assert kept.key != scaled.key
    assert store.find(spec) == store.find(replace(spec, normalize="none")) == kept
    assert store.find(replace(spec, normalize="log1p")) == scaled
    assert len(stores(own_cache)) == 2
    integers = write(tmp_path / "b.h5ad", counts)
    take_in(integers)
    with pytest.raises(InputError, match="holds integers"):
        store.find(replace(integers, normalize="none"))


def test_a_changed_file_gets_a_store_of_its_own_and_the_old_one_goes_when_it_is_not_used(tmp_path, own_cache, counts):
    spec = write(tmp_path / "a.h5ad", counts)
    old = take_in(spec)
    write(tmp_path / "a.h5ad", counts * 2)
    assert store.find(spec) is None
    assert not store.known(spec.path)
    new = take_in(spec)
    assert {Path(found.folder) for found in (old, new)} == set(stores(own_cache)), "a sweep may run on the old one"
    assert old.visible
    long_ago = time.time() - 2 * 86_400 * store.UNUSED_DAYS
    os.utime(Path(old.folder) / store.MANIFEST, (long_ago, long_ago))
    write(tmp_path / "a.h5ad", counts * 3)
    take_in(spec)
    assert not Path(old.folder).exists()
    assert Path(new.folder).exists()


def test_a_file_with_another_time_and_the_same_content_keeps_its_store(tmp_path, own_cache, counts):
    spec = write(tmp_path / "a.h5ad", counts)
    first = take_in(spec)
    mapped = first.shard(0)
    os.utime(spec.path)
    assert take_in(spec) == first == store.find(spec)
    assert len(stores(own_cache)) == 1
    np.testing.assert_array_equal(mapped.values, first.shard(0).values)  # who had it mapped goes on


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


HARMS = {
    "values": lambda place: flip(place / "00000.values.npy"),
    "obs": lambda place: flip(place / store.OBS),
    "cut": lambda place: os.truncate(place / "00000.indices.npy", 3000),
    "gone": lambda place: (place / "00000.indptr.npy").unlink(),
    "manifest": lambda place: (place / store.MANIFEST).write_text('{"version": 1}'),
    "no manifest": lambda place: (place / store.MANIFEST).unlink(),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_store_that_was_damaged_is_made_again_and_that_is_said(tmp_path, own_cache, counts, harm):
    spec = write(tmp_path / "a.h5ad", counts)
    first = take_in(spec)
    expected = dense(first)
    HARMS[harm](Path(first.folder))
    said: list[str] = []
    again = take_in(spec, say=said.append)
    assert again == first
    np.testing.assert_array_equal(dense(again), expected)
    assert stores(own_cache) == [Path(first.folder)]
    if "manifest" not in harm:
        assert "is damaged (" in said[0]
        assert ": making it again" in said[0]
    assert store.find(spec, say=lambda text: pytest.fail(text)) == first


def test_a_store_that_was_copied_is_whole(tmp_path, counts):
    """Other times, the same checksums."""
    spec = write(tmp_path / "a.h5ad", counts)
    place = Path(take_in(spec).folder)
    for path in place.iterdir():
        os.utime(path, (1, 1))
    assert store.find(spec, say=lambda text: pytest.fail(text)) is not None


def test_opening_what_is_no_store_or_no_longer_one_is_refused(tmp_path, counts):
    with pytest.raises(InputError, match="this is no store"):
        store.Store.open(tmp_path)
    found = take_in(write(tmp_path / "a.h5ad", counts))
    flip(Path(found.folder) / "00000.values.npy")
    with pytest.raises(InputError, match=r"damaged: 00000\.values\.npy was changed"):
        store.Store.open(found.folder)


WAITING_INGEST = """
    import sys, time
    from pathlib import Path
    from perturbray.data import store
    from perturbray.data.dataset import DatasetSpec
    spec = DatasetSpec(path=sys.argv[1])
    def until(share):
        print("at work", flush=True)
        while not Path(sys.argv[2]).exists():
            time.sleep(0.01)
    found = store.ingest(spec, spec.conditions(), progress=until, say=lambda text: print(text, flush=True))
    print("made", found.key, flush=True)
"""


class Reader:
    """Another process that reads a file; it stops in the middle until ``go`` is there."""

    def __init__(self, spec: DatasetSpec, go: Path) -> None:
        command = [sys.executable, "-c", textwrap.dedent(WAITING_INGEST), spec.path, str(go)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.lines: list[str] = []

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def until(self, text: str) -> str:
        """Wait for a line with this text."""
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if text in line:
                return line.strip()
        raise AssertionError(f"it ended without {text!r}: {self.lines}")


def test_what_a_kill_leaves_is_no_store_and_is_gone_after_the_next_run(tmp_path, own_cache, counts):
    spec = write(tmp_path / "a.h5ad", counts)
    with Reader(spec, tmp_path / "go") as reader:
        reader.until("at work")
        reader.process.send_signal(signal.SIGKILL)
        reader.process.wait()
    assert len(list(own_cache.glob("stores/.*.tmp"))) == 1
    assert not stores(own_cache)
    assert store.find(spec) is None
    other = take_in(write(tmp_path / "b.h5ad", counts))  # the run of any file cleans up
    assert not list(own_cache.glob("stores/.*.tmp"))
    assert take_in(spec).rows == other.rows


def test_two_processes_at_once_make_one_store(tmp_path, own_cache, counts):
    spec = write(tmp_path / "a.h5ad", counts)
    with Reader(spec, tmp_path / "go") as early:
        early.until("at work")
        with Reader(spec, tmp_path / "go") as late:
            late.until("waiting for its store")
            take_in(write(tmp_path / "b.h5ad", counts))  # a third, which must not sweep away what the first is writing
            (tmp_path / "go").touch()
            assert early.until("made ") == late.until("made ")
    assert "at work" not in late.lines, "the second did not read the file"
    assert len(stores(own_cache)) == 2


# Limits.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_that_is_too_small_is_said_in_numbers(tmp_path, small_disk, layout, monkeypatch):
    monkeypatch.setenv("PERTURBRAY_CACHE", str(small_disk))
    values = sparse.random(20_000, 50, density=0.5, format="csr", random_state=0, dtype=np.float32)
    spec = write(tmp_path / "a.h5ad", LAYOUTS[layout](values))
    text = r"is full \(0\.00 GB free\) after" if layout == "dense" else r"needs 0\.00\d? GB|needs 0\.01 GB"
    with pytest.raises(InputError, match=text) as caught:
        take_in(spec)
    assert "PERTURBRAY_CACHE" in str(caught.value)
    assert not list(small_disk.rglob("*.npy"))


def test_an_error_of_the_disk_that_is_not_its_size_is_not_taken_for_it(tmp_path, counts, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(matrix, "digests", broken)
    with pytest.raises(OSError, match="broken"):
        take_in(write(tmp_path / "a.h5ad", counts))


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_limit_that_is_too_low_is_refused_with_the_number_that_is_enough(tmp_path, layout, monkeypatch):
    values = sparse.random(4096, 400, density=0.2, format=layout, random_state=0, dtype=np.float32)
    spec = write(tmp_path / "a.h5ad", values)
    if layout == "csr":
        with h5py.File(spec.path, "r+") as file:
            for name in ("indices", "data"):
                content = file[f"X/{name}"][:]
                del file[f"X/{name}"]
                file.create_dataset(f"X/{name}", data=content, chunks=(len(content),), compression="gzip")
    with pytest.raises(InputError, match="PERTURBRAY_INGEST_MB=") as caught:
        take_in(spec, memory_mb=8)
    enough = str(caught.value).split("PERTURBRAY_INGEST_MB=")[1].split()[0]
    assert int(enough) < 100
    monkeypatch.setenv("PERTURBRAY_INGEST_MB", enough)
    np.testing.assert_array_equal(dense(take_in(spec)), values.toarray())


@pytest.mark.parametrize("text", ["much", "0", "-3", "nan"])
def test_a_limit_that_makes_no_sense_is_refused(text, monkeypatch):
    monkeypatch.setenv("PERTURBRAY_INGEST_MB", text)
    with pytest.raises(InputError, match=f"PERTURBRAY_INGEST_MB={text}"):
        made.Limits.of()


MEMORY = """
    import re, sys, threading
    from perturbray.data import store
    from perturbray.data.dataset import DatasetSpec

    spec = DatasetSpec(path=sys.argv[1])
    conditions = spec.conditions()

    def private():  # pages of this process's own, in MB: mapped files are the page cache's
        return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

    peak, before, end = [0.0], private(), threading.Event()

    def watch():
        while not end.wait(0.002):
            peak[0] = max(peak[0], private())

    thread = threading.Thread(target=watch)
    thread.start()
    found = store.ingest(spec, conditions, memory_mb=float(sys.argv[2]))
    end.set()
    thread.join()
    print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_holds_no_more_than_its_limit_whatever_the_number_of_cells(tmp_path, layout):
    def held(cells: int) -> float:
        values = sparse.random(cells, 1000, density=0.2, format="csr", random_state=0, dtype=np.float32)
        spec = write(tmp_path / "a.h5ad", LAYOUTS[layout](values))
        command = [sys.executable, "-c", textwrap.dedent(MEMORY), spec.path, "48"]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    few, many = held(15_000), held(60_000)  # 24 and 96 MB of values and numbers, 60 and 240 dense
    assert many < 48 + 20
    assert many < few + 10


# Real screens.

SCREENS = {
    "papalexi_eccite": (("bio_rep",), "control"),
    "kang_ifnb": (("cell_type",), "ctrl"),
    "perturbench_devel": (("cell_type",), "control"),
}


@pytest.mark.parametrize("name", SCREENS)
def test_real_screens_give_the_rows_and_the_fingerprint_of_their_file(shared_data, tmp_path, name):
    covariates, control = SCREENS[name]
    data = ad.read_h5ad(shared_data / f"{name}.h5ad")
    labels = set(data.obs["condition"].astype(str))
    spec = DatasetSpec(
        path=str(shared_data / f"{name}.h5ad"),
        covariates=covariates,
        control=control if control in labels else sorted(labels)[0],
    )
    conditions = spec.conditions()
    found = take_in(spec, shard_rows=4096)
    whole = sparse.csr_matrix(data.X)
    expected = whole.toarray() if found.facts.maximum < 15 and not found.facts.whole else normalised(whole)
    np.testing.assert_allclose(dense(found), expected, rtol=1e-6)
    assert len(found.rows) == -(-data.n_obs // 4096)
    with open_screen(spec.path) as file:
        rows = matrix.read_rows(file, spec, 0, data.n_obs)
    assert found.facts == screens.facts_of(rows, spec, conditions)
    assert fingerprint(store.conditions(spec), found.facts.digest) == fingerprint(conditions, found.facts.digest)


def test_rows_refuse_a_gene_number_that_two_bytes_would_hide():
    wrong = sparse.csr_matrix((np.ones(1, np.float32), np.array([2**16 + 1]), np.array([0, 1])))
    wrong._shape = (1, 12)
    with pytest.raises(InputError, match="gene number 65537, but there are 12"):
        Rows.of(wrong)


def test_a_manifest_names_every_file_with_its_size(tmp_path, counts):
    place = Path(take_in(write(tmp_path / "a.h5ad", counts)).folder)
    manifest = json.loads((place / store.MANIFEST).read_text())
    assert {path.name: path.stat().st_size for path in place.iterdir() if path.name != store.MANIFEST} == {
        name: entry["size"] for name, entry in manifest["files"].items()
    }
    with open_screen(manifest["source"]["path"]) as file:
        assert manifest["cells"] == len(file["X/indptr"]) - 1
