"""Golden cases: observed and predicted cells with values that other packages computed."""

import os
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from perturbray.prediction import Prediction, Pseudobulk

HERE = Path(__file__).resolve().parent.parent / "golden_cases"
CASES = ("identity", "shuffled", "devel_k562", "papalexi_multicov")


def shared_golden() -> Path:
    data = os.environ.get("PERTURBRAY_TEST_DATA")
    return (Path(data).parent if data else Path(__file__).resolve().parents[3] / "shared") / "golden"


@dataclass(frozen=True)
class Case:
    name: str
    observed: anndata.AnnData
    predicted: anndata.AnnData
    folder: Path

    @property
    def covariates(self) -> list[str]:
        return [column for column in self.observed.obs if column != "condition"]

    @property
    def exact(self) -> bool:
        """Whether X is float64, so that the other package's sums agree to rounding."""
        return self.name != "papalexi_multicov"

    def expected(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / name)

    def prediction(self) -> Prediction:
        """By dense means of cells, independent of the code under test."""
        keys = [*self.covariates, "condition"]
        groups = sorted(self.observed.obs.groupby(keys, observed=True).groups)
        conditions = [group for group in groups if group[-1] != "control"]
        contexts = sorted({group[:-1] for group in conditions})
        return Prediction(
            genes=tuple(self.observed.var_names),
            covariates=tuple(self.covariates),
            contexts=tuple(contexts),
            context=np.array([contexts.index(group[:-1]) for group in conditions]),
            perturbation=np.array([group[-1] for group in conditions]),
            stratum=np.full(len(conditions), ""),
            predicted=dense_bulk(self.predicted, keys, conditions),
            observed=dense_bulk(self.observed, keys, conditions),
            control=dense_bulk(self.observed, keys, [(*context, "control") for context in contexts]),
        )


def dense_bulk(cells: anndata.AnnData, keys: list[str], groups: list[tuple[str, ...]]) -> Pseudobulk:
    X = cells.X.toarray() if hasattr(cells.X, "toarray") else cells.X
    labels = list(cells.obs[keys].astype(str).itertuples(index=False, name=None))
    rows = [[i for i, label in enumerate(labels) if label == group] for group in groups]
    means = np.stack([X[members].astype(float).mean(axis=0) for members in rows])
    return Pseudobulk(mean=means, cells=np.array([len(members) for members in rows]))


def load(name: str) -> Case:
    if name in ("identity", "shuffled"):
        observed = anndata.read_h5ad(HERE / "identity" / "observed.h5ad")
        predicted = observed.copy()
        if name == "shuffled":
            predicted.X = observed.X[np.random.default_rng(1).permutation(len(observed))]
        return Case(name, observed, predicted, HERE / name)
    folder = shared_golden() / name
    if not folder.exists():
        pytest.skip(f"golden case {name} is not here: {folder}")
    return Case(name, *(anndata.read_h5ad(folder / f"{side}.h5ad") for side in ("observed", "predicted")), folder)


@pytest.fixture(scope="session", params=CASES)
def case(request) -> Case:
    return load(request.param)


@pytest.fixture(scope="session")
def shuffled() -> Case:
    return load("shuffled")


def screen(
    *, conditions: int = 12, genes: int = 60, contexts: int = 2, error: float = 0.0, seed: int = 0, scale: float = 1.0
) -> Prediction:
    """A small prediction with known effects; ``error`` is the sd of the noise on the predicted means."""
    rng = np.random.default_rng(seed)
    control = rng.gamma(2.0, 0.5, (contexts, genes))
    context = np.arange(conditions) % contexts
    observed = np.maximum(control[context] + scale * rng.normal(0, 0.4, (conditions, genes)), 0)
    predicted = np.maximum(observed + error * np.random.default_rng(seed + 1).normal(0, 1, observed.shape), 0)
    count = np.full(conditions, 50)

    def bulk(mean: np.ndarray, cells: np.ndarray) -> Pseudobulk:
        return Pseudobulk(mean=mean, cells=cells, linear=np.expm1(mean) * 1.1, variance=mean * 0.5)

    return Prediction(
        genes=tuple(f"G{i}" for i in range(genes)),
        covariates=("cell_type",),
        contexts=tuple((f"type {i}",) for i in range(contexts)),
        context=context,
        perturbation=np.array([f"G{i}" if i % 3 else f"G{i}+G{i + 1}" for i in range(conditions)]),
        stratum=np.full(conditions, "seen"),
        predicted=bulk(predicted, count),
        observed=bulk(observed, count),
        control=bulk(control, np.full(contexts, 200)),
        weights=rng.random((conditions, genes)),
        target_sum=1e4,
    )


@pytest.fixture
def make_screen():
    return screen


@pytest.fixture(scope="session")
def golden_cases() -> Path:
    return HERE
