"""Fitted: a fitted model with all that it takes to predict with it elsewhere, in one file of tensors and plain values.

The file holds the table of conditions that the model was fitted on, and no cell.
"""

import dataclasses
import os
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from perturbray.data.dataset import Conditions
from perturbray.data.splits import UNUSED, Split
from perturbray.data.vocabulary import Vocabulary
from perturbray.errors import InputError, nearest
from perturbray.models.base import MODELS, Model, ModelSpec

FORMAT = 1
SUFFIX = ".pt"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A spec, the state of its network, and the screen as the network knows it."""

    spec: ModelSpec
    state: dict[str, torch.Tensor]
    conditions: Conditions  # without cells
    subset: np.ndarray  # (conditions,) int8, of the split that it was fitted on
    train_cells: np.ndarray  # (conditions,) int64
    roles: dict[str, str | None]  # perturbation, delimiter and layer of the dataset
    embedding_width: int  # of the obsm matrix that the model reads cells from; 0: it reads expression
    depth: float | None  # counts to which training cells were scaled before log1p; None: they came log-normalised
    seed: int
    name: str = ""  # of the trial, for messages and tables
    path: str = ""  # where it was read from

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; complete or not at all."""
        conditions = self.conditions
        table = {
            "format": FORMAT,
            "model": MODELS.name_of(self.spec),
            "spec": {f.name: _plain(getattr(self.spec, f.name)) for f in dataclasses.fields(self.spec)},
            "state": {name: value.detach().cpu() for name, value in self.state.items()},
            "genes": list(conditions.genes),
            "covariates": list(conditions.covariates),
            "contexts": [list(values) for values in conditions.contexts],
            "context": conditions.context.tolist(),
            "perturbation": conditions.perturbation.tolist(),
            "singles": [list(singles) for singles in conditions.singles],
            "control": conditions.control,
            "subset": self.subset.tolist(),
            "train_cells": self.train_cells.tolist(),
            "embedding_width": self.embedding_width,
            "roles": self.roles,
            "depth": self.depth,
            "seed": self.seed,
            "name": self.name,
        }
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.partial")
        with temporary.open("wb") as file:
            torch.save(table, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)

    @classmethod
    def load(cls, path: str) -> "Fitted":
        """Read a file of ``save``; runs no code of it. Raises InputError."""
        place = Path(path)
        if not place.is_file():
            beside = sorted(p.name for p in place.parent.glob(f"*{SUFFIX}")) if place.parent.is_dir() else []
            raise InputError(f"{path}: there is no such file; {nearest(place.name, beside)}")
        try:
            table = torch.load(place, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError):
            table = None
        if not isinstance(table, dict) or "format" not in table or "spec" not in table:
            raise InputError(
                f"{path}: this is no fitted model; sweeps write them to RESULTS/<sweep>/models with --keep-models"
            )
        if table["format"] != FORMAT:
            raise InputError(f"{path}: format {table['format']}; this version reads format {FORMAT}")
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in table["spec"].items()}
        conditions = Conditions(
            covariates=tuple(table["covariates"]),
            contexts=tuple(tuple(values) for values in table["contexts"]),
            context=np.array(table["context"], dtype=np.int64),
            perturbation=np.array(table["perturbation"], dtype=str),
            control=table["control"],
            singles=tuple(tuple(singles) for singles in table["singles"]),
            cell_condition=np.empty(0, dtype=np.int32),
            cell_names=np.empty(0, dtype=object),
            genes=tuple(table["genes"]),
        )
        if table["model"] not in MODELS:
            raise InputError(
                f"{path}: it is a {table['model']!r}, which no model here is called; --plugin registers it"
            )
        return cls(
            spec=MODELS[table["model"]](**fields),
            state=table["state"],
            conditions=conditions,
            subset=np.array(table["subset"], dtype=np.int8),
            train_cells=np.array(table["train_cells"], dtype=np.int64),
            embedding_width=table["embedding_width"],
            roles=table["roles"],
            depth=table["depth"],
            seed=table["seed"],
            name=table["name"],
            path=str(path),
        )

    def with_conditions(self, asked: Sequence[tuple[int, tuple[str, ...]]]) -> tuple[Model, np.ndarray]:
        """The model, and the condition code of each asked (context code, singles); it knows them as if the screen had
        had them, untrained. What it cannot predict is False in ``model.predictable``."""
        conditions = self.conditions
        code = {
            (int(context), singles): row
            for row, (context, singles) in enumerate(zip(conditions.context, conditions.singles, strict=True))
        }
        new: list[tuple[int, tuple[str, ...]]] = []
        rows = np.empty(len(asked), dtype=np.int64)
        for i, pair in enumerate(asked):
            if pair not in code:
                code[pair] = len(conditions) + len(new)
                new.append(pair)
            rows[i] = code[pair]
        joiner = self.roles["delimiter"] or "+"
        longer = replace(
            conditions,
            context=np.concatenate([conditions.context, np.array([c for c, _ in new], dtype=np.int64)]),
            perturbation=np.concatenate(
                [conditions.perturbation, np.array([joiner.join(s) for _, s in new], dtype=str)]
            ),
            singles=conditions.singles + tuple(singles for _, singles in new),
        )
        subset = np.concatenate([self.subset, np.full(len(new), UNUSED, dtype=np.int8)])
        split = Split(condition=subset, cell=np.empty(0, dtype=np.int8), stratum=np.full(len(subset), "common"))
        vocabulary = Vocabulary.of(longer, split, embedding_width=self.embedding_width)
        counted = np.concatenate([self.train_cells, np.zeros(len(new), dtype=np.int64)])
        model = self.spec.build(replace(vocabulary, train_cells=counted))
        model.restore(self.state)
        model.eval()
        return model, rows


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
