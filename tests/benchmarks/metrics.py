"""How fast the metrics are, as ratios over other ways to compute the same numbers.

Parts, each of which can be run alone (--only mmd,rank):

  mmd, energy   distance of 200 conditions x 300 cells x 50 components to 2,000 control cells; over a loop of
                torch.cdist with three blocks of distances a condition, in float64 as ours. The loop takes each tenth
                condition, times ten. `*_float32` is the same loop in float32, eight digits poorer; `*_cached` is what
                a second trial of a sweep pays, which knows the terms within observed cells; `energy_over_loop_exact`
                is over the loop in the mode of torch.cdist that has the digits of ours, by direct differences.
                The loop visits 7.2 times as many pairs, because it computes the control block for each condition.
                Beyond that a ratio for energy is one of costs a pair: at the processor's full speed the float64
                product alone, 100 operations, takes 0.4 of a pair of the loop, so no method can exceed 18
  rank          ranks of 200 perturbations x 3 contexts x 2,000 genes from means, effects included; over cell-eval's
                own discrimination score, a row of scikit-learn distances a perturbation with its target masked
                (euclidean; `figures` has other distances). The matrix product alone, at the speed of the processor,
                takes a fiftieth of that loop
  de            Wilcoxon tables of 20,000 cells x 2,000 genes x 100 perturbations; over pdex
  evaluate      the whole convention cell-eval on two such files; over cell-eval without clustering_agreement, a
                neighbour graph that is no part of the convention
  perturbench   the whole convention perturbench-2026 on 603 conditions x 5,000 genes, with 10 cells a condition:
                CPU-seconds and memory. For PerturBench's own evaluation about 290 CPU-s and 5.1 GB were measured
  pool          rank matrices of energy distances by two scorer actors; over one actor, in wall time, so it means
                something only on a machine with two idle cores. Starts Ray

A ratio is of medians of CPU-seconds (pool: wall time), each contestant on one thread in a process of its own, imports
and compilation excluded; files are read within the measurement. The prediction in each file is random and as sparse
as real cells. Peers are installed once, in environments of their own in the cache folder (PERTURBRAY_CACHE moves it).
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from harness import Contestant, Peer, Report, parser, race
from scipy import sparse
from scipy.optimize import brentq

CELL_EVAL = Peer("cell-eval", "0.8.2")
PDEX = Peer("pdex", "0.3.0")
TARGET_SUM = 1e4


@dataclass(frozen=True)
class Run:
    """What the parts share."""

    report: Report
    folder: Path
    rounds: int
    quick: bool
    peers: bool

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def peer(self, peer: Peer) -> str | None:
        return peer.interpreter() if self.peers else None


def distances(run: Run, statistic: str) -> None:
    """Energy distance or MMD to control, over loops of torch.cdist."""
    rng = np.random.default_rng(0)
    every = run.size(10, 1)
    components = np.linspace(3, 0.3, run.size(50, 5))  # as the spread of principal components falls
    control = rng.normal(size=(run.size(2000, 40), len(components))) * components
    shape = run.size(200, 3), run.size(300, 20), len(components)
    conditions = rng.normal(size=shape) * components + rng.normal(size=(shape[0], 1, shape[2])) * 0.3
    sigmas = np.linalg.norm(components) * np.sqrt(2) * np.array([0.25, 0.5, 1, 2, 4])
    path = run.folder / f"{statistic}.npz"
    np.savez(path, control=control, conditions=conditions, sigmas=sigmas)
    loop, exact = {"path": path, "every": every}, statistic == "energy"
    costs = race(
        {
            "ours": Contestant("ours.py", statistic, path=path),
            "ours_cached": Contestant("ours.py", statistic, path=path, cached=True),
            "loop": Contestant("loops.py", statistic, share=1 / every, **loop),
            "loop_float32": Contestant("loops.py", statistic, share=1 / every, precision="float32", **loop),
        }
        | ({"loop_exact": Contestant("loops.py", "energy", exact=True, share=1 / every, **loop)} if exact else {}),
        rounds=run.rounds,
    )
    run.report.costs(statistic, costs)
    run.report.ratio(f"{statistic}_over_loop", costs["loop"].cpu / costs["ours"].cpu, ">= 30")
    for name, baseline, mine in (
        ("loop_float32", "loop_float32", "ours"),
        ("loop_cached", "loop", "ours_cached"),
        ("loop_float32_cached", "loop_float32", "ours_cached"),
        *([("loop_exact", "loop_exact", "ours")] if exact else []),
    ):
        run.report.figure(f"{statistic}_over_{name}", costs[baseline].cpu / costs[mine].cpu)
    found = np.array(costs["ours"].value)[::every]
    for name, aim in (("loop_exact", "<= 1e-9"), ("loop", "<= 1e-7")):
        if name in costs:
            wrong = np.abs(found / np.array(costs[name].value) - 1).max()
            run.report.figure(f"{statistic}_difference_{name}", wrong, f"{aim}, relative")


def rank(run: Run) -> None:
    """Ranks within three contexts, over a row loop."""
    rng = np.random.default_rng(0)
    shape = 3, run.size(200, 8), run.size(2000, 30)
    observed = rng.normal(size=shape)
    path = run.folder / "rank.npz"
    np.savez(
        path,
        observed=observed,
        predicted=0.1 * observed + rng.normal(size=shape),
        names=np.array([f"p{i}" for i in range(shape[1])]),
        genes=np.array([f"g{i}" for i in range(shape[2])]),
    )
    python = run.peer(CELL_EVAL)
    for score in ("l2",) if run.quick else ("l2", "cosine", "l1"):
        contestants = {f"ours_{score}": Contestant("ours.py", "rank", path=path, score=score)}
        if python:
            rows = {"path": path, "score": score}
            contestants[f"rows_{score}"] = Contestant("with_cell_eval.py", "rank", python=python, **rows)
        costs = race(contestants, rounds=run.rounds)
        run.report.costs("rank", costs)
        if python:
            ours, rows = costs.values()
            if score == "l2":
                run.report.ratio("rank_over_rows", rows.cpu / ours.cpu, ">= 100")
            else:
                run.report.figure(f"rank_over_rows_{score}", rows.cpu / ours.cpu)
            wrong = np.mean(np.array(ours.value) != np.array(rows.value))
            run.report.figure(f"rank_differing_{score}", float(wrong), "0, the share of ranks")


def expression(run: Run) -> None:
    """Wilcoxon tables, over pdex."""
    path, warm = (files[0] for files in _files(run))
    contestants = {"ours": Contestant("ours.py", "de", path=path, warm=warm)}
    if python := run.peer(PDEX):
        contestants["pdex"] = Contestant("with_pdex.py", "de", python=python, path=path, warm=warm)
    costs = race(contestants, rounds=run.rounds)
    run.report.costs("de", costs)
    if python:
        run.report.ratio("de_over_pdex", costs["pdex"].cpu / costs["ours"].cpu, ">= 4")


def evaluation(run: Run) -> None:
    """The convention cell-eval, over cell-eval."""
    (observed, predicted), warm = _files(run)
    files = {"observed": observed, "predicted": predicted, "warm": [str(file) for file in warm]}
    contestants = {"ours": Contestant("ours.py", "evaluate", convention="cell-eval", **files)}
    if python := run.peer(CELL_EVAL):
        contestants["cell_eval"] = Contestant("with_cell_eval.py", "evaluate", python=python, **files)
    costs = race(contestants, rounds=run.rounds)
    run.report.costs("evaluate", costs)
    if python:
        ours, theirs = costs["ours"], costs["cell_eval"]
        run.report.ratio("evaluate_over_cell_eval", theirs.cpu / ours.cpu, ">= 4")
        run.report.ratio("evaluate_memory_of_cell_eval", ours.peak / theirs.peak, "<= 0.5")
        shared = sorted(ours.value.keys() & theirs.value.keys())
        means = np.array([[side.value[name] for name in shared] for side in (ours, theirs)], dtype=float)
        run.report.figure("evaluate_columns_compared", len(shared))
        run.report.figure("evaluate_difference", np.abs(np.diff(means, axis=0)).max(), "<= 1e-4, of means of columns")


def perturbench(run: Run) -> None:
    """The convention perturbench-2026 at the size of a published benchmark."""
    shape = {"perturbations": run.size(201, 4), "genes": run.size(5000, 120), "density": 0.08, "contexts": 3}
    files = screen(run.folder, "perturbench", cells=run.size(10, 8), controls=run.size(90, 20), **shape)
    options = {
        "observed": files[0],
        "predicted": files[1],
        "convention": "perturbench-2026",
        "covariates": ["cell_type"],
    }
    warm = [str(file) for file in _small(run)]
    costs = race({"ours": Contestant("ours.py", "evaluate", warm=warm, **options)}, rounds=run.rounds)
    run.report.costs("perturbench", costs)
    run.report.figure("perturbench_cpu_s", costs["ours"].cpu, "<= 10")
    run.report.figure("perturbench_peak_gb", costs["ours"].peak * 2**20 / 1e9, "<= 1")


def pool(run: Run) -> None:
    """Energy rank matrices by two scorer actors and by one."""
    import ray

    from perturbray.metrics.pool import Pool

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    trials = [_trial(seed, run.size(40, 4), run.size(200, 10)) for seed in range(run.size(12, 2))]
    spent = run.folder / "spent"
    spent.mkdir()
    costs: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    pools = {actors: Pool.start(_ranker(spent), actors=actors, cpus=1) for actors in costs}
    for turn in range(-1, run.rounds):  # the first imports and is not counted
        for actors, workers in pools.items():
            began = time.perf_counter()
            for number, trial in enumerate(trials):
                workers.submit(f"trial {number}", trial, turn=number)
            failed, _ = workers.drain()
            if failed:
                raise failed[0].error
            wall = time.perf_counter() - began
            files = list(spent.iterdir())
            cpu = sum(float(file.read_text()) for file in files)
            for file in files:
                file.unlink()
            if turn >= 0:
                costs[actors].append((wall, cpu))
    ray.shutdown()
    (wall_one, cpu_one), (wall_two, cpu_two) = (np.median(costs[actors], axis=0) for actors in (1, 2))
    count = sum(len(trial) for trial in trials)
    run.report.ratio("pool_two_over_one", wall_one / wall_two, ">= 1.4 on an idle machine")
    run.report.figure("pool_cpu_ms_a_condition_one", 1e3 * cpu_one / count)
    run.report.figure("pool_cpu_ms_a_condition_two", 1e3 * cpu_two / count, "within 10 % of one")


def _ranker(spent: Path) -> Callable:
    """Work of a scorer that leaves the CPU-seconds it took; a closure, so that it travels by value."""

    def rank(trial) -> None:
        import time
        import uuid

        from perturbray.metrics import CellMetric

        began = time.process_time()
        CellMetric("energy", "pca", "rank").evaluate(trial)
        (spent / uuid.uuid4().hex).write_text(str(time.process_time() - began))

    return rank


def _trial(seed: int, conditions: int, cells: int):
    """A prediction of cells that are their own principal components."""
    from perturbray.prediction import CellSample, Prediction, Pseudobulk

    rng = np.random.default_rng(seed)
    size = 50
    predicted, observed = (
        [rng.normal(size=(cells, size)) + rng.normal(size=size) for _ in range(conditions)] for _ in range(2)
    )
    control = rng.normal(size=(cells, size))

    def bulk(parts: Sequence[np.ndarray]) -> Pseudobulk:
        return Pseudobulk(mean=np.stack([x.mean(axis=0) for x in parts]), cells=np.array([len(x) for x in parts]))

    return Prediction(
        genes=tuple(f"g{i}" for i in range(size)),
        covariates=("cell_type",),
        contexts=(("a",),),
        context=np.zeros(conditions, dtype=int),
        perturbation=np.array([f"p{i}" for i in range(conditions)]),
        stratum=np.full(conditions, ""),
        predicted=bulk(predicted),
        observed=bulk(observed),
        control=bulk([control]),
        cells=CellSample(
            predicted=tuple(predicted),
            observed=tuple(observed),
            control=(control,),
            pca_mean=np.zeros(size),
            pca_loadings=np.eye(size),
        ),
    )


def _files(run: Run) -> tuple[list[Path], list[Path]]:
    """Observed and predicted cells of 100 perturbations, and a small pair that warms compilers up."""
    if run.quick:
        return _small(run), _small(run)
    shape = {"perturbations": 100, "cells": 180, "controls": 2000, "genes": 2000, "density": 0.18}
    return screen(run.folder, "cells", **shape), _small(run)


def _small(run: Run) -> list[Path]:
    shape = {"perturbations": 5, "cells": 30, "controls": 60, "genes": 120, "density": 0.3}
    return screen(run.folder, "small", **shape)


def screen(
    folder: Path,
    name: str,
    *,
    perturbations: int,
    cells: int,
    controls: int,
    genes: int,
    density: float,
    contexts: int = 1,
) -> list[Path]:
    """Observed and predicted files of random counts with known effects, log1p of counts per 10,000; CSR, float32.

    A twentieth of the genes moves with each perturbation; the prediction has half of the effect.
    """
    paths = [folder / f"{name}_{side}.h5ad" for side in ("observed", "predicted")]
    if paths[0].exists():
        return paths
    rng = np.random.default_rng(0)
    base = rng.gamma(0.7, size=genes)
    base *= brentq(lambda scale: (1 - np.exp(-scale * base)).mean() - density, 1e-6, 1e6)
    labels = ["control", *(f"p{i}" for i in range(perturbations))]
    moved = rng.random((perturbations + 1, genes)) < 0.05
    effect = np.where(moved, rng.normal(0, 1, moved.shape), 0)
    effect[0] = 0
    for path, strength in zip(paths, (1.0, 0.5), strict=True):
        blocks, rows = [], []
        for context in range(contexts):
            shift = np.random.default_rng([1, context]).normal(0, 0.3, genes)
            for code, label in enumerate(labels):
                count = cells if code else controls
                depth = rng.lognormal(0, 0.3, (count, 1))
                counts = sparse.csr_matrix(rng.poisson(depth * base * np.exp(shift + strength * effect[code])))
                total = np.asarray(counts.sum(axis=1)).clip(1)
                blocks.append(sparse.csr_matrix(counts.multiply(TARGET_SUM / total)).log1p().astype(np.float32))
                rows += [(label, f"c{context}")] * count
        obs = pd.DataFrame(rows, columns=["condition", "cell_type"], dtype="category")
        obs.index = obs.index.astype(str)
        var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
        anndata.AnnData(X=sparse.vstack(blocks, format="csr"), obs=obs, var=var).write_h5ad(path)
    return paths


PARTS: dict[str, Callable[[Run], None]] = {
    "mmd": lambda run: distances(run, "mmd"),
    "energy": lambda run: distances(run, "energy"),
    "rank": rank,
    "de": expression,
    "evaluate": evaluation,
    "perturbench": perturbench,
    "pool": pool,
}


def main() -> None:
    flags = parser(__doc__, list(PARTS)).parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="perturbray-benchmark-") as folder:
        rounds = 1 if flags.quick else flags.rounds
        run = Run(report, Path(folder), rounds, quick=flags.quick, peers=not flags.no_peers)
        for part in flags.only:
            print(part, flush=True)
            PARTS[part](run)
            report.write(flags.json)  # after each part: a long run that is cut short leaves what it found


if __name__ == "__main__":
    main()
