"""What models share that know a perturbation by a vector: where vectors come from, and what is done where one is missing."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from perturbray.data.batches import Mode
from perturbray.data.vocabulary import Vocabulary
from perturbray.embeddings.vectors import MISSING, Vectors, digest
from perturbray.errors import InputError, nearest
from perturbray.models.base import Learning, ModelSpec, Need, Unseen
from perturbray.models.baselines import ConditionMeans


@dataclass(frozen=True, kw_only=True)
class LabelVectors(ModelSpec):
    """Vectors of perturbations from a file, or the perturbed gene's own loadings on the training profiles.

    So perturbations that training never shows can be predicted. A name without a vector is an ``error``; or is left out
    of fit and prediction (``drop``); or has the ``mean`` of the others' vectors, or ``zero`` as its vector.
    """

    mode: ClassVar[Mode] = "all"
    learning: ClassVar[Learning] = "one pass"
    needs: ClassVar[tuple[Need, ...]] = ("controls", "perturbation vectors")
    unseen: ClassVar[tuple[Unseen, ...]] = ("combination", "perturbation")

    vectors: str = (
        ""  # npz, csv, tsv or parquet with names and numbers; "": loadings of genes named as perturbations are
    )
    missing: str = "error"  # error | drop | mean | zero
    components: int = 10  # principal components of the loadings of genes

    def __post_init__(self) -> None:
        if self.missing not in MISSING:
            raise InputError(f"model.missing={self.missing!r}: {nearest(self.missing, MISSING)}")
        if self.components < 1:
            raise InputError(f"model.components={self.components}: at least 1")

    def content(self) -> dict[str, str]:
        return {"vectors": digest(self.vectors)} if self.vectors else {}


class LabelVectorsNet(ConditionMeans):
    """Condition means, and a vector for every single perturbation of the screen, in training or not."""

    def __init__(self, spec: LabelVectors, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.spec = spec
        names = sorted({single for singles in vocabulary.singles for single in singles})
        number = {name: i for i, name in enumerate(names)}
        member = torch.zeros(len(vocabulary.singles), len(names), dtype=torch.float64)
        for row, singles in enumerate(vocabulary.singles):
            member[row, [number[single] for single in singles]] = 1
        self.register_buffer("member", member, persistent=False)  # (conditions, names)
        trained = torch.tensor([number[name] for name in vocabulary.perturbations], dtype=torch.int64)
        self.register_buffer("trained", trained, persistent=False)  # (singles of training,) numbers of their names
        if spec.vectors:
            self.genes = None
            values, found = Vectors.read(spec.vectors).select(names, missing=spec.missing)
            self.register_buffer("table", torch.from_numpy(values), persistent=False)
        else:
            found, self.genes = self._genes(names, vocabulary)
        if not found[trained.numpy()].any():
            source = spec.vectors or "the genes of the screen"
            raise InputError(
                f"none of the {len(trained)} training perturbations is among {source}; give model.vectors a file with a "
                "vector for each"
            )
        self.register_buffer("found", torch.from_numpy(found), persistent=False)  # (names,) bool
        absent = self.member @ torch.from_numpy(~found).double() > 0
        self.register_buffer("absent", absent, persistent=False)  # (conditions,) bool, a single has no vector
        self.predictable = ~absent.numpy() if spec.missing == "drop" else np.ones(len(absent), dtype=bool)

    def _genes(self, names: list[str], vocabulary: Vocabulary) -> tuple[np.ndarray, Tensor]:
        row = {gene: i for i, gene in enumerate(vocabulary.genes)}
        place = np.array([row.get(name, -1) for name in names])
        if self.spec.missing == "error" and (place < 0).any():
            absent = [name for name, at in zip(names, place, strict=True) if at < 0]
            raise InputError(
                f"{len(absent)} perturbation(s) are no gene of the screen and have no loadings: {', '.join(absent[:10])}"
                f"{', ...' if len(absent) > 10 else ''}; give model.vectors a file, or set model.missing to drop, mean or zero"
            )
        return place >= 0, torch.from_numpy(place)

    def loadings(self, means: Tensor, rows: Tensor) -> Tensor:
        """(genes, components) principal component scores of genes over the profiles of training conditions."""
        profiles = means[rows].T
        left, size, _ = torch.linalg.svd(profiles - profiles.mean(0), full_matrices=False)
        return (left * size)[:, : self.spec.components]

    def label_vectors(self, loadings: Tensor) -> Tensor:
        """(names, width) a vector for each single perturbation of the screen."""
        if self.genes is None:
            return self.table
        genes = self.genes.to(loadings.device)
        values = loadings[genes.clamp(min=0)] * self.found.unsqueeze(1)
        if self.spec.missing == "mean":
            values[~self.found] = values[self.found].mean(0)
        return values

    def trained_in(self, context: int) -> Tensor:
        """Training conditions of a context; of all contexts where it has none."""
        here = self.is_train & (self.context == context)
        return (here if here.any() else self.is_train).nonzero().ravel()
