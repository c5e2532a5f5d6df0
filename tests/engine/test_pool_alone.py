"""The pool without a sweep: it scores plain arrays and cells in memory, and gives what this process gives."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import ray

from perturbray.metrics import SCORES, evaluate
from perturbray.metrics.pool import Pool

ROLES = {"perturbation_key": "condition", "control": "control"}


def maker():
    """A function within a function pickles by value, so that a worker need not import this file."""

    def cells(seed: int) -> ad.AnnData:
        rng = np.random.default_rng(seed)
        labels = np.repeat(["control", "a", "b", "c"], 12)
        X = np.log1p(rng.gamma(1.0, 2.0, (len(labels), 20))).astype(np.float32)
        return ad.AnnData(X, obs=pd.DataFrame({"condition": labels}, index=[str(i) for i in range(len(labels))]))

    return cells


@pytest.fixture
def pool(ray_session):
    started = []

    def start(work, *common):
        started.append(Pool.start(work, *common, actors=2, cpus=0.2))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_it_scores_arrays(pool, tmp_path):
    pairs = np.random.default_rng(0).normal(size=(6, 2, 30))

    def work(number: int, held: np.ndarray) -> None:
        from perturbray.metrics import SCORES  # not the caller's, with what its plugins have registered

        np.save(tmp_path / f"{number}.npy", SCORES["cosine"](*held[number]))

    scorers = pool(work, ray.put(pairs))
    for number in range(len(pairs)):
        scorers.submit(str(number), number, turn=number)
    assert scorers.drain() == ([], 0)
    found = [float(np.load(tmp_path / f"{number}.npy")) for number in range(len(pairs))]
    assert found == [float(SCORES["cosine"](*pair)) for pair in pairs]


def test_it_scores_cells_in_memory_to_the_last_digit(pool, tmp_path):
    cells, roles = maker(), ROLES
    observed = cells(1)

    def work(seed: int, truth: ad.AnnData) -> None:
        evaluate(truth, cells(seed), **roles).to_pickle(tmp_path / f"{seed}.pickle")

    scorers = pool(work, ray.put(observed))
    for seed in (2, 3, 4):
        scorers.submit(f"prediction {seed}", seed, turn=seed)
    assert scorers.drain() == ([], 0)
    for seed in (2, 3, 4):
        here = evaluate(observed, cells(seed), **ROLES)
        there = pd.read_pickle(tmp_path / f"{seed}.pickle")
        np.testing.assert_array_equal(there["value"], here["value"])
        assert there["status"].tolist() == here["status"].tolist()
