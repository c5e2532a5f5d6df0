"""Counterfactual cells: made in chunks and written as they are made, so that memory does not grow with the conditions."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbray.counterfactual.controls import Controls
from perturbray.data.batches import Batch
from perturbray.data.dataset import split_label
from perturbray.data.splits import TRAIN
from perturbray.errors import InputError, nearest
from perturbray.randomness import derive
from perturbray.training.fitted import Fitted

CHUNK = 4096  # cells that are predicted at once
CONDITIONS = 1024  # conditions that a model is built for at once

Asked = tuple[int, tuple[str, ...]]  # a context's code in the controls, and single perturbations


def read_conditions(path: str, fitted: Fitted, controls: Controls) -> list[Asked]:
    """The conditions that a CSV file asks for: a column of labels, named as in the dataset, and a column a covariate.

    Without the covariates' columns every label is asked for in every context of the controls. Raises InputError.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: this cannot be read as CSV ({error})") from None
    roles, conditions = fitted.roles, fitted.conditions
    key = roles["perturbation"]
    if key not in table:
        raise InputError(f"{path}: no column {key!r} with perturbations; it has {', '.join(table.columns)}")
    absent = [name for name in conditions.covariates if name not in table]
    if absent and len(absent) < len(conditions.covariates):
        raise InputError(f"{path}: no column {absent[0]!r}; give all of {', '.join(conditions.covariates)}, or none")
    if not len(table):
        raise InputError(f"{path}: it asks for no condition")
    code = {context: number for number, context in enumerate(controls.contexts)}
    asked: list[Asked] = []
    for number, row in enumerate(table.to_dict("records"), start=1):
        singles = split_label(row[key], control=conditions.control, delimiter=roles["delimiter"])
        if not singles:
            raise InputError(f"{path}: row {number} asks for {row[key]!r}, which is no perturbation")
        contexts = controls.contexts if absent else [tuple(row[name] for name in conditions.covariates)]
        for context in contexts:
            if context not in code:
                raise InputError(
                    f"{path}: row {number}: the controls have no context {' / '.join(context)}; "
                    f"{nearest(' / '.join(context), [' / '.join(c) for c in code])}"
                )
            asked.append((code[context], singles))
    return list(dict.fromkeys(asked))


def unpredictable(fitted: Fitted, controls: Controls, asked: Sequence[Asked]) -> list[Asked]:
    """Those of the conditions that the model cannot predict."""
    found = []
    for part in _chunks(asked):
        model, rows = fitted.with_conditions(_coded(fitted, controls, part))
        found += [pair for pair, row in zip(part, rows, strict=True) if not model.predictable[row]]
    return found


def check(fitted: Fitted, controls: Controls, asked: Sequence[Asked]) -> None:
    """Raise InputError that names what the model cannot predict."""
    lost = unpredictable(fitted, controls, asked)
    if lost:
        rows = np.flatnonzero(fitted.subset == TRAIN)
        trained = {single for row in rows for single in fitted.conditions.singles[row]}
        culprits = sorted({single for _, singles in lost for single in singles} - trained) or ["+".join(lost[0][1])]
        raise InputError(
            f"{fitted.path}: the model cannot predict {len(lost)} of {len(asked)} conditions; it never saw "
            f"{', '.join(culprits[:10])}{', ...' if len(culprits) > 10 else ''} ({nearest(culprits[0], trained)})"
        )


@torch.no_grad()
def predicted(fitted: Fitted, controls: Controls, asked: Sequence[Asked]) -> Iterator[Tensor]:
    """(control cells of its context, genes) predicted cells of each condition."""
    for part in _chunks(asked):
        coded = _coded(fitted, controls, part)
        model, rows = fitted.with_conditions(coded)
        for (context, singles), (code, _), row in zip(part, coded, rows.tolist(), strict=True):
            # A generator of its own, so that no other condition changes the cells that a sampling model draws.
            noise = torch.Generator().manual_seed(
                derive(fitted.seed, "counterfactual", *controls.contexts[context], *singles)
            )
            cells = []
            for start in range(0, len(controls.cells[context]), CHUNK):
                control = controls.cells[context][start : start + CHUNK]
                embedding = None if controls.embedding is None else controls.embedding[context][start : start + CHUNK]
                batch = Batch(
                    expression=None,
                    control=control,
                    condition=torch.full((len(control),), row),
                    context=torch.full((len(control),), code),
                    control_embedding=embedding,
                    generator=noise,
                )
                cells.append(model.predict(batch))
            yield torch.cat(cells)


def effects(fitted: Fitted, controls: Controls, asked: Sequence[Asked]) -> Iterator[np.ndarray]:
    """(genes,) float64 mean of each condition's predicted cells, not below 0, less that of its controls."""
    means = [cells.double().mean(0).numpy() for cells in controls.cells]
    for (context, _), cells in zip(asked, predicted(fitted, controls, asked), strict=True):
        yield np.maximum(cells.double().mean(0).numpy(), 0) - means[context]


def _chunks(asked: Sequence[Asked]) -> Iterator[Sequence[Asked]]:
    for start in range(0, len(asked), CONDITIONS):
        yield asked[start : start + CONDITIONS]


def _coded(fitted: Fitted, controls: Controls, asked: Sequence[Asked]) -> list[Asked]:
    """The conditions by the model's codes of contexts."""
    code = {context: number for number, context in enumerate(fitted.conditions.contexts)}
    return [(code[controls.contexts[context]], singles) for context, singles in asked]


def write_cells(fitted: Fitted, controls: Controls, asked: Sequence[Asked], out: Path) -> int:
    """Predicted cells of the asked conditions after the control cells, as h5ad; the number of rows.

    X is log-normalised as in training, and not below 0. ``control_cell`` names the cell that each was predicted from.
    """
    import anndata as ad

    check(fitted, controls, asked)
    joiner = fitted.roles["delimiter"] or "+"
    blocks = [(context, fitted.conditions.control) for context in range(len(controls.contexts))]
    blocks += [(context, joiner.join(singles)) for context, singles in asked]
    size = [len(controls.names[context]) for context, _ in blocks]
    columns = {fitted.roles["perturbation"]: np.repeat(np.array([label for _, label in blocks], dtype=object), size)}
    for i, name in enumerate(fitted.conditions.covariates):
        values = np.array([controls.contexts[context][i] for context, _ in blocks], dtype=object)
        columns[name] = np.repeat(values, size)
    obs = pd.DataFrame({name: pd.Categorical(values) for name, values in columns.items()})
    obs["control_cell"] = np.concatenate([controls.names[context] for context, _ in blocks])
    obs.index = [f"predicted_{i}" for i in range(len(obs))]
    var = pd.DataFrame(index=pd.Index(fitted.conditions.genes, dtype=object))
    partial = out.with_name(f".{out.name}.partial")
    try:
        ad.AnnData(obs=obs, var=var).write_h5ad(partial)
        with h5py.File(partial, "r+") as file:
            shape = (len(obs), len(var))
            rows = max(1, min(len(obs), (1 << 20) // (4 * shape[1])))
            X = file.create_dataset(
                "X", shape, np.float32, chunks=(rows, shape[1]), compression="gzip", compression_opts=1
            )
            X.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            start = 0
            for cells in itertools.chain(controls.cells, predicted(fitted, controls, asked)):
                X[start : start + len(cells)] = cells.clamp(min=0).numpy()
                start += len(cells)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return len(obs)
