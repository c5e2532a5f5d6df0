"""The same things by perturbray."""

import anndata
import numpy as np
from serve import serve

from perturbray.metrics import Metric, evaluate
from perturbray.metrics.cells import Cells, pseudobulk
from perturbray.metrics.distribution import _REMEMBERED, Gaussian, energy_matrix, mmd, within
from perturbray.metrics.expression import rank_sum_table, table
from perturbray.metrics.upstream import fold_change_of_geometric_means
from perturbray.prediction import Prediction, Pseudobulk


def energy(path, cached=False):
    """To control. ``cached``: what a second trial of a sweep pays, which knows the terms within observed cells.

    Observed are the control cells; the conditions are predicted.
    """
    data = np.load(path)
    conditions, control = list(data["conditions"]), data["control"]

    def run():
        if not cached:
            _REMEMBERED.clear()
        return energy_matrix(conditions, [control])[:, 0].tolist()

    run()  # compiles
    return run


def discrepancy(path, cached=False):
    """As ``energy``."""
    data = np.load(path)
    conditions, control, sigmas = data["conditions"], data["control"], data["sigmas"]
    kernel = Gaussian(tuple(sigmas))

    def known():
        return [within(cells, kernel) for cells in (control, *conditions)]

    before = known() if cached else None

    def run():
        own, *others = before or known()
        return [
            float(mmd(cells, control, sigmas, within_x=other, within_y=own).mean())
            for cells, other in zip(conditions, others, strict=True)
        ]

    return run


def rank(path, score):
    """A rank over conditions of each context, in positions."""
    data = np.load(path)
    (contexts, count, genes), names = data["observed"].shape, data["names"]

    def bulk(means):
        return Pseudobulk(mean=means.reshape(-1, genes), cells=np.full(means.size // genes, 100))

    prediction = Prediction(
        genes=tuple(data["genes"].tolist()),
        covariates=("cell_type",),
        contexts=tuple((f"c{i}",) for i in range(contexts)),
        context=np.repeat(np.arange(contexts), count),
        perturbation=np.tile(names, contexts),
        stratum=np.full(contexts * count, ""),
        predicted=bulk(data["predicted"]),
        observed=bulk(data["observed"]),
        control=bulk(np.zeros((contexts, genes))),
    )
    metric = Metric(score, "delta_ctrl", rank=True, direction="pred")
    return lambda: np.rint(metric.evaluate(prediction)[0] * (count - 1)).astype(int).reshape(contexts, -1).tolist()


def tables(path, warm):
    """Wilcoxon p and q values and fold changes of all conditions against control, from a file."""

    def run(file):
        data = anndata.read_h5ad(file)
        labels = data.obs["condition"].astype(str).to_numpy()
        names = [name for name in np.unique(labels) if name != "control"]
        code = {name: position for position, name in enumerate([*names, "control"])}
        cells = Cells(X=data.X, group=np.array([code[label] for label in labels]), groups=len(code))
        mean = pseudobulk(cells).mean
        z, p = rank_sum_table(cells, range(len(names)), cells, len(names))
        return int(table(z, p, fold_change_of_geometric_means(mean[:-1], mean[-1])).q.size)

    run(warm)
    return lambda: run(path)


def evaluation(observed, predicted, warm, convention, covariates=()):
    """A convention from two files to its table; the means of its columns."""

    def run(*files):
        _REMEMBERED.clear()  # each turn as if it were the first
        found = evaluate(
            *(anndata.read_h5ad(file) for file in files),
            perturbation_key="condition",
            control="control",
            covariate_keys=covariates,
            convention=convention,
        )
        return found.groupby("metric")["value"].mean().to_dict()

    run(*warm)
    return lambda: run(observed, predicted)


if __name__ == "__main__":
    serve({"energy": energy, "mmd": discrepancy, "rank": rank, "de": tables, "evaluate": evaluation})
