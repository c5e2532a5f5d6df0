"""The store: a screen as checked, normalised rows in files that every process of a machine maps and none reads twice.

A folder under ``$PERTURBRAY_CACHE``, made by the first run on a file and used again while the file is the same by size
and time. Its manifest is written last and names every file with its size and checksum: what has no manifest is no store.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from perturbray.data import ingest as made
from perturbray.data import matrix
from perturbray.data.dataset import Conditions, DatasetSpec, Group, conditions_of, obs_table, open_screen
from perturbray.data.rows import Rows, index_type
from perturbray.data.shards import COLUMNS
from perturbray.errors import InputError, nearest

VERSION = 1  # of the layout; a store of another is made again
MANIFEST, GENES, CELLS, OBS, TRUTH = "manifest.json", "genes.json", "cells.parquet", "obs.parquet", "truth.h5"
KEYS = {
    "version",
    "key",
    "source",
    "cells",
    "genes",
    "rows",
    "stored",
    "facts",
    "normalisation",
    "embeddings",
    "obs",
    "files",
}
UNUSED_DAYS = 1.0  # after which the store of a file that has changed since is deleted

Say = Callable[[str], None]


@dataclass(frozen=True)
class Store:
    """A screen's rows on disk. Pickles small; processes that see the folder map it, and share the memory."""

    folder: str
    key: str  # of the content: the matrix, its scale, its genes and embeddings
    genes: int
    rows: tuple[int, ...]  # of each shard
    stored: int  # values
    embeddings: tuple[tuple[str, int], ...]  # (obsm key, width)
    facts: matrix.MatrixFacts
    normalisation: matrix.Normalisation

    def __len__(self) -> int:
        return sum(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, mapped or moved."""
        return self.stored * (4 + index_type(self.genes).itemsize) + 8 * (len(self) + len(self.rows))

    @cached_property
    def starts(self) -> np.ndarray:
        """(shards + 1,) int64, the number of each shard's first row."""
        return np.array([0, *accumulate(self.rows)], dtype=np.int64)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Store":
        """The store in a folder. Raises InputError where there is none, or where a file is missing or cut off."""
        place = Path(folder)
        manifest = _manifest(place)
        if manifest is None:
            raise InputError(f"{folder}: this is no store of this version; it has no {MANIFEST} that can be read")
        if harm := _harm(place, manifest):
            raise InputError(f"{folder}: the store is damaged: {harm}; delete it, and the next run makes it again")
        return _store(place, manifest)

    @property
    def visible(self) -> bool:
        """Whether this process sees the folder, with this content."""
        manifest = _manifest(Path(self.folder))
        return manifest is not None and manifest["key"] == self.key

    def shard(self, number: int) -> Rows:
        """The rows of one shard, mapped."""
        arrays = (self._array(f"{number:05d}.{name}.npy") for name in COLUMNS)
        return Rows(*arrays, genes=self.genes)

    def cells(self) -> "Cells":  # noqa: F821  # imports torch
        """All rows and embeddings, mapped: no copy, and one page cache for all processes of a machine."""
        from perturbray.data.batches import Cells

        shards = [self.shard(number) for number in range(len(self.rows))]
        return Cells(shards, {key: self.embedding(key) for key, _ in self.embeddings}, checked=True)

    def embedding(self, key: str) -> np.ndarray:
        """(cells, width) float32, mapped: a matrix of obsm, row by row with the cells. Raises InputError."""
        keys = [name for name, _ in self.embeddings]
        if key not in keys:
            raise InputError(f"{self.folder}: obsm has no numeric matrix {key!r}: {nearest(key, keys)}")
        return self._array(made.embedding_file(key))

    def gene_names(self) -> tuple[str, ...]:
        return tuple(json.loads((Path(self.folder) / GENES).read_text(encoding="utf-8")))

    @property
    def truth(self) -> Path | None:
        """A file with the known effects of a synthetic screen, as `synthetic.Truth.read` takes it."""
        place = Path(self.folder) / TRUTH
        return place if place.exists() else None

    def _array(self, name: str) -> np.ndarray:
        place = Path(self.folder) / name
        array = np.load(place, mmap_mode="r")
        return np.asarray(array) if array.size else np.empty(array.shape, array.dtype)  # no class that slices slowly


def find(spec: DatasetSpec, *, say: Say = lambda _: None) -> Store | None:
    """The intact store of a file that has not changed since, by its size and time: nothing of the file is read.

    Raises InputError where the file's values do not fit ``spec.normalize``.
    """
    for place, manifest in _candidates(spec):
        wanted = matrix.decide(spec, matrix.MatrixFacts(**manifest["facts"]))
        if not wanted.same(matrix.Normalisation(**manifest["normalisation"])):
            continue
        if harm := _harm(place, manifest):
            say(f"the store {place} is damaged ({harm}): making it again")
            continue
        with suppress(OSError):
            os.utime(place / MANIFEST)  # when it was last used
        return _store(place, manifest)
    return None


def known(path: str) -> bool:
    """Whether a file was read before, and is unchanged since."""
    return any(True for _ in _candidates(DatasetSpec(path=path), any_layer=True))


def conditions(spec: DatasetSpec) -> Conditions:
    """As ``spec.conditions()``, from the store of an unchanged file where there is one."""
    for place, manifest in _candidates(spec):
        columns = [*spec.covariates, spec.perturbation]
        if not set(columns) <= set(manifest["obs"]) or _harm(place, manifest):
            continue
        obs = pq.read_table(place / OBS, columns=list(dict.fromkeys(columns)))
        if any(obs[column].null_count for column in columns):
            break  # the file says best which cells they are
        text = {column: pd.Series(obs[column].to_pandas().astype(object)) for column in columns}
        return conditions_of(
            spec,
            text[spec.perturbation],
            [text[column] for column in spec.covariates],
            cell_names=pq.read_table(place / CELLS).column(0).to_pandas().to_numpy(dtype=object),
            genes=np.array(json.loads((place / GENES).read_text(encoding="utf-8")), dtype=object),
        )
    return spec.conditions()


def ingest(
    spec: DatasetSpec,
    conditions: Conditions,
    *,
    progress: made.Progress = lambda _: None,
    say: Say = lambda _: None,
    memory_mb: float | None = None,
    shard_rows: int | None = None,
) -> Store:
    """The store of a screen: the one there is, or one that is made now from the file, in bounded memory.

    ``memory_mb`` bounds what reading holds (``$PERTURBRAY_INGEST_MB``, 256 MB by default). Raises InputError for values
    that are not finite, out of range or of no known scale, and for too little space.
    """
    limits = made.Limits.of(memory_mb, shard_rows)
    if shard_rows is None and (found := find(spec, say=say)):
        return found
    root = _root(say)
    cells, genes = len(conditions.cell_condition), len(conditions.genes)
    say(f"reading {spec.path}: {cells:,} cells x {genes:,} genes")
    with _alone(root, _name(spec), say):
        if shard_rows is None and (found := find(spec)):  # another process made it meanwhile
            return found
        _sweep(root)
        before = matrix.stamp(spec)
        begun = time.perf_counter()
        with _temporary(root, spec) as folder, open_screen(spec.path) as file, made.space(spec, folder):
            manifest = _write(spec, file, conditions, folder, limits, progress)
            if matrix.stamp(spec) != before:
                raise InputError(f"{spec.path}: the file was changed while it was read; run again once it is written")
            manifest["source"] = before
            place = _publish(folder, manifest, root / f"{_name(spec)}-{manifest['key']}")
        matrix.remember(spec, matrix.MatrixFacts(**manifest["facts"]))
        _forget(spec, place)
    store = _store(place, manifest)
    seconds = time.perf_counter() - begun
    say(
        f"{spec.path}: {len(store):,} cells read in {seconds:.1f} s ({len(store) / seconds:,.0f} cells/s, "
        f"{store.nbytes / seconds / 1e6:,.0f} MB/s) into {store.nbytes / 1e6:,.0f} MB in {place}"
    )
    return store


def _write(
    spec: DatasetSpec, file: Group, conditions: Conditions, folder: Path, limits: made.Limits, progress: made.Progress
) -> dict:
    """Every file of a store but the manifest, which is returned without its source."""
    found = made.write(spec, file, conditions, folder, limits=limits, progress=progress)
    widths = made.embeddings(spec, file, folder, limits=limits)
    (folder / GENES).write_text(json.dumps(conditions.genes), encoding="utf-8")
    obs = obs_table(spec, file)
    names = pa.table({"name": pa.array(conditions.cell_names, type=pa.string())})
    pq.write_table(obs, folder / OBS, compression="zstd")
    pq.write_table(names, folder / CELLS, compression="zstd")
    if isinstance(file, h5py.Group) and "uns/truth" in file:
        with h5py.File(folder / TRUTH, "w") as out:
            for name in ("uns/truth", "varm", "var"):
                file.copy(name, out.require_group(str(Path(name).parent)), name=Path(name).name)
    files = {path.name: _entry(path) for path in sorted(folder.iterdir())}
    scale = [found.normalisation.log1p, found.normalisation.depth]
    content = [found.facts.digest, scale, conditions.genes, widths, found.rows]
    content += [files[made.embedding_file(key)]["crc32"] for key in sorted(widths)]
    return {
        "version": VERSION,
        "key": hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest(),
        "cells": sum(found.rows),
        "genes": len(conditions.genes),
        "rows": found.rows,
        "stored": found.stored,
        "facts": asdict(found.facts),
        "normalisation": asdict(found.normalisation),
        "embeddings": widths,
        "obs": obs.column_names,
        "files": files,
    }


def _entry(path: Path) -> dict:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "crc32": _checksum(path)}


def _checksum(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            found = zlib.crc32(piece, found)
    return found


def _harm(place: Path, manifest: dict) -> str:
    """What is wrong with the files of a store, '' if nothing. A file of another time is summed up again."""
    for name, entry in manifest["files"].items():
        try:
            stat = (place / name).stat()
        except OSError:
            return f"{name} is missing"
        if stat.st_size != entry["size"]:
            return f"{name} has {stat.st_size:,} bytes and should have {entry['size']:,}"
        if stat.st_mtime_ns != entry["mtime_ns"] and _checksum(place / name) != entry["crc32"]:
            return f"{name} was changed: its checksum is another"
    return ""


def _manifest(place: Path) -> dict | None:
    try:
        found = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        return found if found["version"] == VERSION and found.keys() >= KEYS else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _store(place: Path, manifest: dict) -> Store:
    return Store(
        folder=str(place),
        key=manifest["key"],
        genes=manifest["genes"],
        rows=tuple(manifest["rows"]),
        stored=manifest["stored"],
        embeddings=tuple(sorted(manifest["embeddings"].items())),
        facts=matrix.MatrixFacts(**manifest["facts"]),
        normalisation=matrix.Normalisation(**manifest["normalisation"]),
    )


def _name(spec: DatasetSpec) -> str:
    """The beginning of the names of all stores of a path."""
    place = Path(spec.path).resolve()
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", place.stem)[:40]
    return f"{stem}-{hashlib.blake2b(str(place).encode(), digest_size=6).hexdigest()}"


def _candidates(spec: DatasetSpec, *, any_layer: bool = False) -> Iterator[tuple[Path, dict]]:
    """The stores of a file as it is now, with their manifests."""
    try:
        source = matrix.stamp(spec)
    except OSError:
        return
    for root in _roots():
        for place in sorted(root.glob(f"{_name(spec)}-*")):
            manifest = _manifest(place)
            if manifest is None:
                continue
            same = source | {"layer": manifest["source"]["layer"]} if any_layer else source
            if manifest["source"] == same:
                yield place, manifest


def _roots() -> list[Path]:
    """Where stores lie: in the cache, or for a user whose cache cannot be written among temporary files."""
    return [matrix.cache_folder() / "stores", Path(tempfile.gettempdir()) / f"perturbray-{os.getuid()}" / "stores"]


def _root(say: Say) -> Path:
    first, second = _roots()
    for root in (first, second):
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(root, os.W_OK | os.X_OK) and root.stat().st_uid == os.getuid():
            if root == second:
                say(f"{first} cannot be written: the store goes to {second}; PERTURBRAY_CACHE names another folder")
            return root
    raise InputError(f"neither {first} nor {second} can be written: set PERTURBRAY_CACHE to a folder that can")


@contextmanager
def _alone(root: Path, name: str, say: Say = lambda _: None) -> Iterator[None]:
    """Keep other processes from making the stores of a path. Where a file system has no locks, the last one wins."""
    with open(root / f".{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is reading the same file: waiting for its store")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(f"{root} has no file locks ({error.strerror}): two processes that begin at once each make the store")
        yield


@contextmanager
def _temporary(root: Path, spec: DatasetSpec) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{_name(spec)}.", suffix=".tmp", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Delete what processes left behind that were killed while they wrote: nobody holds the lock of their path."""
    for folder in root.glob(".*.tmp"):
        name = folder.name[1:].rsplit(".", 2)[0]
        with open(root / f".{name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # at work, or no locks here
            shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, manifest: dict, place: Path) -> Path:
    """Give a finished folder its name. One of the same name has the same rows: who has mapped it goes on with it."""
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    if place.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{place.name.rsplit('-', 1)[0]}.", suffix=".tmp", dir=place.parent))
        place.rename(aside / "old")
        folder.rename(place)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        folder.rename(place)
    return place


def _forget(spec: DatasetSpec, place: Path) -> None:
    """Delete stores of what the file held before, unless they were used lately: a sweep may run on one."""
    now, source = time.time(), matrix.stamp(spec)
    for other in place.parent.glob(f"{_name(spec)}-*"):
        manifest = _manifest(other)
        outdated = manifest is None or {**manifest["source"], "layer": None} != {**source, "layer": None}
        with suppress(OSError):
            used = (other / MANIFEST if manifest else other).stat().st_mtime
            if other != place and outdated and now - used > UNUSED_DAYS * 86_400:
                shutil.rmtree(other, ignore_errors=True)
