"""Control cells from which fitted models predict: read from an h5ad file, and given the form that training had."""

from collections.abc import Sequence
from dataclasses import dataclass

import h5py
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbray.data.dataset import DatasetSpec, matrix_shape, obs_columns, open_h5ad, var_names
from perturbray.data.matrix import LOG_LIMIT, read_rows
from perturbray.errors import InputError, nearest
from perturbray.randomness import generator
from perturbray.training.fitted import Fitted

ROW_BYTES = 8 << 20  # of dense rows that are read at once
DEPTH_TOLERANCE = 0.1  # by which log-normalised controls may miss the counts a cell of training


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Control cells of each context, as the model was shown them in training."""

    contexts: tuple[tuple[str, ...], ...]
    cells: tuple[Tensor, ...]  # (cells, genes) float32 each, genes in the model's order
    names: tuple[np.ndarray, ...]  # (cells,) str each
    embedding: tuple[Tensor, ...] | None = None  # (cells, width) float32 each, where the model reads one

    @classmethod
    def read(cls, path: str, fitted: Fitted, *, most: int = 200, control: str | None = None) -> "Controls":
        """At most ``most`` control cells of each context, by name and a fixed seed. Raises InputError."""
        roles, conditions = fitted.roles, fitted.conditions
        spec = DatasetSpec(
            path=path,
            perturbation=roles["perturbation"],
            control=control or conditions.control,
            covariates=conditions.covariates,
            layer=roles.get("layer"),
        )
        with open_h5ad(path) as file:
            obs = obs_columns(spec, file, [spec.perturbation, *spec.covariates])
            is_control = (obs[spec.perturbation] == spec.control).to_numpy()
            if not is_control.any():
                raise InputError(
                    f"{path}: no cell has obs[{spec.perturbation!r}] == {spec.control!r}; "
                    f"{nearest(spec.control, set(obs[spec.perturbation]))}"
                )
            names = np.asarray(var_names(file), dtype=object)
            order = _gene_order(names, conditions.genes, path)
            cell_names = _cell_names(file)
            values = list(obs[list(spec.covariates)].itertuples(index=False, name=None))
            known = {context: number for number, context in enumerate(conditions.contexts)}
            found = sorted({values[row] for row in np.flatnonzero(is_control)})
            for context in found:
                if context not in known:
                    raise InputError(
                        f"{path}: the model knows no context {' / '.join(context)}: "
                        f"{nearest(' / '.join(context), [' / '.join(c) for c in known])}"
                    )
            rows = [_chosen(is_control, values, cell_names, context, most) for context in found]
            cells = _rows_of(spec, file, np.concatenate(rows), fitted.depth)[:, order]
            embedding = _embedding(fitted, file, np.concatenate(rows), path)
        cuts = np.cumsum([len(part) for part in rows])[:-1]
        return cls(
            contexts=tuple(found),
            cells=tuple(torch.from_numpy(part) for part in np.split(cells, cuts)),
            names=tuple(cell_names[part] for part in rows),
            embedding=None if embedding is None else tuple(map(torch.from_numpy, np.split(embedding, cuts))),
        )


def _gene_order(names: np.ndarray, genes: Sequence[str], path: str) -> np.ndarray:
    position = pd.Index(names).get_indexer(list(genes))
    if (position < 0).any():
        absent = [gene for gene, at in zip(genes, position, strict=True) if at < 0]
        raise InputError(
            f"{path}: {len(absent)} of the model's {len(genes)} genes are not there: {', '.join(absent[:10])}"
            f"{', ...' if len(absent) > 10 else ''}"
        )
    return position


def _cell_names(file: h5py.File) -> np.ndarray:
    from anndata.io import read_elem

    obs = file["obs"]
    index = read_elem(obs).index if isinstance(obs, h5py.Dataset) else read_elem(obs[obs.attrs["_index"]])
    return np.asarray(pd.Index(index).astype(str), dtype=object)


def _chosen(is_control: np.ndarray, values: list, names: np.ndarray, context: tuple[str, ...], most: int) -> np.ndarray:
    here = np.array([row for row in np.flatnonzero(is_control) if values[row] == context])
    here = here[np.argsort(names[here], kind="stable")]
    if len(here) > most:
        here = here[np.sort(generator(0, "counterfactual", *context).choice(len(here), most, replace=False))]
    return here


def _rows_of(spec: DatasetSpec, file: h5py.File, rows: np.ndarray, depth: float | None) -> np.ndarray:
    """(rows, genes) float32 as training had them: scaled to its depth and log1p, or as they are."""
    cells, genes = matrix_shape(spec.matrix(file))
    out = np.empty((len(rows), genes), dtype=np.float32)
    step = max(1, ROW_BYTES // (4 * genes))
    for start in range(0, cells, step):
        here = np.flatnonzero((rows >= start) & (rows < start + step))
        if len(here):
            part = read_rows(file, spec, start, min(start + step, cells))
            out[here] = part[rows[here] - start].toarray()
    if not np.isfinite(out).all() or out.min(initial=0) < 0:
        raise InputError(f"{spec.path}: control cells hold negative or non-finite values")
    counts = bool((out == np.floor(out)).all())
    if depth is None:
        if counts or out.max(initial=0) >= LOG_LIMIT:
            raise InputError(
                f"{spec.path}: these are counts, but the model was fitted on log-normalised values; "
                "normalise them as those were"
            )
        return out
    if counts:
        total = out.sum(axis=1, dtype=np.float64, keepdims=True)
        return np.log1p(out * np.divide(depth, total, out=np.zeros_like(total), where=total > 0)).astype(np.float32)
    scale = float(np.median(np.expm1(out.astype(np.float64)).sum(axis=1)))
    if out.max(initial=0) >= LOG_LIMIT or abs(scale / depth - 1) > DEPTH_TOLERANCE:
        raise InputError(
            f"{spec.path}: control cells hold {scale:,.4g} counts a cell, log-normalised; the model was fitted on "
            f"{depth:,.4g}: give counts, or scale to that"
        )
    return out


def _embedding(fitted: Fitted, file: h5py.File, rows: np.ndarray, path: str) -> np.ndarray | None:
    key = getattr(fitted.spec, "embedding", "")
    if not key:
        return None
    from anndata.io import read_elem

    there = list(file["obsm"]) if "obsm" in file else []
    if key not in there:
        raise InputError(f"{path}: the model reads obsm[{key!r}], which is not there; {nearest(key, there)}")
    return np.asarray(read_elem(file["obsm"][key]), dtype=np.float32)[rows]
