"""Small screens for tests: from a list of cells to a file, its conditions, its rows and batches of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbray.data import matrix
from perturbray.data.batches import BatchStream, Cells
from perturbray.data.dataset import Conditions, DatasetSpec, open_screen
from perturbray.data.splits import TEST, CovariateTransfer, Split, SplitSpec
from perturbray.data.truth import observe
from perturbray.data.vocabulary import Vocabulary
from perturbray.models.base import MODELS, Model, ModelSpec
from perturbray.models.label_vectors import LabelVectors
from perturbray.prediction import assemble
from perturbray.training.fit import Training, fit
from perturbray.training.predict import predict

Cell = tuple[tuple[str, ...], str]  # context, label


def write(path: Path, obs: dict[str, Sequence] | pd.DataFrame, *, X=None, genes=None, layers=None, names=None) -> Path:
    """An h5ad file; without X a matrix of ones over one gene."""
    obs = pd.DataFrame(obs)
    obs.index = [f"cell_{i:05d}" for i in range(len(obs))] if names is None else list(names)
    X = np.ones((len(obs), 1), dtype=np.float32) if X is None else X
    var = pd.DataFrame(index=[f"gene_{i}" for i in range(X.shape[1])] if genes is None else list(genes))
    ad.AnnData(X=X, obs=obs, var=var, layers=layers or {}).write_h5ad(path)
    return path


def conditions_of(cells: Sequence[Cell], *, names: Sequence[str] | None = None, categories=None, **spec) -> Conditions:
    """The conditions of cells as they are read from a file. ``categories`` makes label and covariates categorical."""
    width = len(cells[0][0])
    obs = {"condition": [label for _, label in cells]}
    obs |= {f"covariate_{i}": [context[i] for context, _ in cells] for i in range(width)}
    if categories is not None:
        obs = {key: pd.Categorical(values, categories(values)) for key, values in obs.items()}
    names = [f"cell_{i:05d}" for i in range(len(cells))] if names is None else list(names)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "screen.h5ad"
        with h5py.File(path, "w") as file:  # what anndata would write, in a fifth of the time
            for name, columns in (("obs", {**obs, "_index": names}), ("var", {"_index": ["gene_0"]})):
                for key, values in columns.items():
                    _write_column(file, f"{name}/{key}", values)
                order = np.array([key for key in columns if key != "_index"], dtype=object)
                file[name].attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
                file[name].attrs.create("column-order", order, dtype=h5py.string_dtype())
            file["X"] = np.ones((len(cells), 1), dtype=np.float32)
        return DatasetSpec(
            path=str(path), covariates=tuple(f"covariate_{i}" for i in range(width)), **spec
        ).conditions()


def _write_column(file: h5py.File, place: str, values) -> None:
    if isinstance(values, pd.Categorical):
        ad.io.write_elem(file, place, values)
        return
    file.create_dataset(place, data=values, dtype=h5py.string_dtype())
    file[place].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def rectangle(contexts: int, perturbations: int, *, cells: int = 1, controls: int = 8) -> list[Cell]:
    """Every perturbation in every context."""
    found: list[Cell] = []
    for c in range(contexts):
        context = (f"line_{chr(ord('a') + c)}",)
        found += [(context, "control")] * controls
        found += [(context, f"drug_{p:03d}") for p in range(perturbations) for _ in range(cells)]
    return found


def rows_of(spec: DatasetSpec, conditions: Conditions) -> sparse.csr_matrix:
    """The normalised rows of a file, as its store holds them."""
    with open_screen(spec.path) as file:
        rows = matrix.read_rows(file, spec, 0, len(conditions.cell_condition))
    totals = np.asarray(rows.sum(axis=1, dtype=np.float64)).ravel()
    rows.data = matrix.decide(spec, facts_of(rows, spec, conditions)).apply(rows.data, np.diff(rows.indptr), totals)
    return rows


def facts_of(rows: sparse.csr_matrix, spec: DatasetSpec, conditions: Conditions) -> matrix.MatrixFacts:
    """What a matrix holds, from all of its rows at once."""
    facts, digests = [matrix.row_facts(rows)], matrix.digests(rows)
    return matrix.gather(facts, digests, spec=spec, cell_names=conditions.cell_names, genes=conditions.genes)


def in_blocks(rows: sparse.csr_matrix, blocks: int) -> Cells:
    """The rows in this many blocks of unequal size."""
    cuts = np.unique(np.round(np.linspace(0, np.sqrt(rows.shape[0]), blocks + 1) ** 2).astype(int))
    return Cells([rows[start:stop] for start, stop in pairwise(cuts)])


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A screen in memory with a split, and what is made of them for a model."""

    conditions: Conditions
    cells: Cells
    split: Split
    seed: int = 0

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.conditions, self.split)

    def stream(self, mode: str = "paired", *, batch_size: int = 64, device: str = "cpu", **options) -> BatchStream:
        return BatchStream(
            self.cells,
            self.conditions,
            self.split,
            **{"batch_size": batch_size, "seed": self.seed, "mode": mode, "device": device} | options,
        )

    def fitted(self, spec: ModelSpec, **training) -> Model:
        """A model of a spec, built and fitted here; the caller seeds torch."""
        model = spec.build(self.vocabulary)
        how = Training(**{"epochs": 3, "batch_size": 64, **training})
        sampling = how.sampling(spec.unit, getattr(spec, "set_size", 0))
        stream = self.stream(spec.mode, sampling=sampling, embedding=getattr(spec, "embedding", None))
        fit(model, stream, how)
        return model


def lab_of(spec: DatasetSpec, *, blocks: int = 1, task: SplitSpec | None = None, seed: int = 0) -> Lab:
    conditions = spec.conditions()
    cells = in_blocks(rows_of(spec, conditions), blocks)
    return Lab(conditions=conditions, cells=cells, split=(task or CovariateTransfer()).split(conditions), seed=seed)


def noise_free(
    *,
    contexts: int = 3,
    perturbations: int = 8,
    pairs: Sequence[tuple[int, int]] = (),
    genes: int = 20,
    cells: int = 6,
    controls: int = 12,
    specific: float = 0.0,
    seed: int = 0,
    task: SplitSpec | None = None,
) -> tuple[Lab, np.ndarray]:
    """Cells without noise, and the mean of every condition (conditions, genes).

    The effect of a perturbation is the same in every context but for a part of size ``specific``; that of each of
    ``pairs`` of perturbations is the sum of theirs. Values are multiples of 1/256, so that sums of them are exact; none is
    below 0.
    """
    rng = np.random.default_rng(seed)
    design = rectangle(contexts, perturbations, cells=cells, controls=controls)
    combined = [f"drug_{first:03d}+drug_{second:03d}" for first, second in pairs]
    design += [(context, label) for context in dict(design) for label in combined for _ in range(cells)]
    conditions = conditions_of([design[i] for i in rng.permutation(len(design))])
    names = sorted({single for singles in conditions.singles for single in singles})
    member = np.array([[name in singles for name in names] for singles in conditions.singles], dtype=float)
    control = _rounded(rng.uniform(2, 3, (contexts, genes)))
    effect = _rounded(rng.uniform(-0.8, 0.8, (contexts, len(names), genes)))
    effect = effect[:1] + _rounded(specific * effect)
    means = control[conditions.context] + np.einsum("cn,cng->cg", member, effect[conditions.context])
    means = means.astype(np.float32)
    rows = sparse.csr_matrix(means[conditions.cell_condition])
    split = (task or CovariateTransfer()).split(conditions)
    conditions = replace(conditions, genes=tuple(f"gene_{i}" for i in range(genes)))
    return Lab(conditions=conditions, cells=Cells([rows]), split=split, seed=seed), means


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.round(values * 256) / 256


def default_spec(name: str) -> ModelSpec:
    """A registered model as it comes; one that needs vectors of perturbations gets random ones of every name in use."""
    if not issubclass(MODELS[name], LabelVectors):
        return MODELS[name]()
    path = Path(os.environ["PERTURBRAY_CACHE"]) / "vectors.csv"
    if not path.exists():
        values = np.random.default_rng(0).standard_normal((200, 48))
        pd.DataFrame(values, index=[f"drug_{i:03d}" for i in range(200)]).to_csv(path)
    return MODELS[name](vectors=str(path))


def predicted(model: Model, stream: BatchStream, vocabulary: Vocabulary, *, subset: int = TEST):
    """What a fitted model predicts for a subset, the codes of its conditions, and of those that training never showed."""
    truth = observe(stream.cells, stream.conditions, stream.split, subset=subset)
    found = predict(model, stream, truth)
    unseen = np.setdiff1d(truth.rows, truth.rows[found.rows])
    return assemble(truth, found, stream.split.stratum[truth.rows]), truth.rows[found.rows], unseen
