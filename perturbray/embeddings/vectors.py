"""Vectors of perturbations from a file (npz, csv, tsv or parquet): fingerprints of drugs, embeddings of genes, another screen.

A new format is a function from a path to names and numbers, and a line in ``READERS``.
"""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perturbray.errors import InputError, nearest

MISSING = ("error", "drop", "mean", "zero")


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """A vector for each name."""

    names: tuple[str, ...]
    values: np.ndarray  # (names, width) float64
    source: str = ""  # for messages

    @classmethod
    def read(cls, path: str) -> "Vectors":
        """The vectors of a file. Raises InputError for one that does not hold a vector of finite numbers for each name."""
        place = _existing(path)
        if place.suffix.lower() not in READERS:
            raise InputError(f"{path}: vectors are read from {', '.join(READERS)}, not from {place.suffix!r}")
        try:
            names, values = READERS[place.suffix.lower()](place)
        except InputError:
            raise
        except Exception as error:  # whatever a parser says of a file that is not what its name says
            raise InputError(f"{path}: this cannot be read as {place.suffix[1:]} ({error})") from None
        if not len(names) or not values.shape[1]:
            raise InputError(f"{path}: it holds no vectors")
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise InputError(f"{path}: {name!r} has two vectors; keep one")
            seen.add(name)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise InputError(f"{path}: the vector of {names[bad[0]]!r} is not finite ({len(bad)} such in all)")
        return cls(names=tuple(names), values=values, source=path)

    def select(self, names: Sequence[str], *, missing: str) -> tuple[np.ndarray, np.ndarray]:
        """(names, width) vectors, and which of the names have one of their own.

        ``missing``: an ``error``; a vector of ``zero``, or the ``mean`` of the others' vectors, in its place; ``drop``:
        zeros too, and the caller leaves the name out.
        """
        if missing not in MISSING:
            raise InputError(f"missing={missing!r}: {nearest(missing, MISSING)}")
        row = {name: i for i, name in enumerate(self.names)}
        found = np.array([name in row for name in names], dtype=bool)
        if missing == "error" and not found.all():
            absent = [name for name, there in zip(names, found, strict=True) if not there]
            raise InputError(
                f"{self.source}: no vector for {len(absent)} perturbation(s): {', '.join(absent[:10])}"
                f"{', ...' if len(absent) > 10 else ''} (of {absent[0]!r}: {nearest(absent[0], self.names)}); add them, "
                "or set model.missing to drop, mean or zero"
            )
        values = np.zeros((len(names), self.values.shape[1]))
        values[found] = self.values[[row[name] for name in names if name in row]]
        if missing == "mean" and found.any():
            values[~found] = values[found].mean(axis=0)
        return values, found


def digest(path: str) -> str:
    """What a file holds, in 16 characters; its name does not matter."""
    hasher = hashlib.blake2b(digest_size=8)
    with _existing(path).open("rb") as file:
        while part := file.read(1 << 20):
            hasher.update(part)
    return hasher.hexdigest()


def _existing(path: str) -> Path:
    place = Path(path)
    if not place.is_file():
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise InputError(f"{path}: there is no such file" + (f"; {nearest(place.name, beside)}" if beside else ""))
    return place


def _read_npz(place: Path) -> tuple[list[str], np.ndarray]:
    """One array of names and one matrix with a row for each, whatever they are called."""
    with zipfile.ZipFile(place) as archive:
        arrays = {name.removesuffix(".npy"): _array(archive.read(name)) for name in archive.namelist()}
    words = {name: a for name, a in arrays.items() if a.ndim == 1 and a.dtype.kind in "OUS"}
    matrices = {name: a for name, a in arrays.items() if a.ndim == 2 and a.dtype.kind in "fiub"}
    if len(words) != 1 or len(matrices) != 1:
        shapes = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in arrays.items())
        raise InputError(f"{place}: it needs one array of names and one matrix of numbers; it has {shapes}")
    (label, names), (title, values) = words.popitem(), matrices.popitem()
    if len(names) != len(values):
        raise InputError(f"{place}: {label} has {len(names)} names, but {title} has {len(values)} rows")
    return [_text(name) for name in names], values.astype(np.float64)


def _array(content: bytes) -> np.ndarray:
    """An array in the npy format. Strings kept as objects are pickled: they are read without running any code."""
    file = io.BytesIO(content)
    try:
        return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError:
        file.seek(0)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape = read(file)[0]
        return np.asarray(_StringsOnly(file).load(), dtype=object).reshape(shape)


class _StringsOnly(pickle.Unpickler):
    """Unpickles what numpy writes for an array of objects, and refuses everything else."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] != "numpy" or name not in self.ALLOWED:
            raise InputError(f"an array holds {module}.{name} objects; save names as strings, e.g. array.astype(str)")
        return super().find_class(module, name)


def _text(name: object) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _read_table(place: Path) -> tuple[list[str], np.ndarray]:
    """The first column (or a Parquet file's index of names) holds names, the others numbers."""
    import pandas as pd

    if place.suffix.lower() == ".parquet":
        frame = pd.read_parquet(place)
        frame = frame.reset_index() if not isinstance(frame.index, pd.RangeIndex) else frame
    else:
        options = {"sep": "\t" if place.suffix.lower() == ".tsv" else ","}
        first, *others = pd.read_csv(place, nrows=0, **options).columns
        # A perturbation may be called NA or 007: names are read as they stand.
        gaps = {column: ["", "NA", "NaN", "nan"] for column in others}
        frame = pd.read_csv(place, dtype={first: str}, keep_default_na=False, na_values=gaps, **options)
    names, numbers = frame.iloc[:, 0], frame.iloc[:, 1:]
    nameless = np.flatnonzero(names.isna() | (names.astype(str).str.strip() == ""))
    if len(nameless):
        raise InputError(f"{place}: row {nameless[0] + 1} has no name in the first column")
    for column in numbers.columns if len(numbers) else ():
        if not pd.api.types.is_numeric_dtype(numbers[column]):
            raise InputError(
                f"{place}: column {column!r} holds {numbers[column].iloc[0]!r}; after the first column, of names, "
                "all are numbers"
            )
    return [_text(name) for name in names], numbers.to_numpy(np.float64)


READERS = {".npz": _read_npz, ".csv": _read_table, ".tsv": _read_table, ".parquet": _read_table}
