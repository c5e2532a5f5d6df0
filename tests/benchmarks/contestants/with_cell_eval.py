"""Evaluation and ranks as cell-eval does them, in its own environment."""

import logging
import tempfile

import numpy as np
import sklearn.metrics
from cell_eval import MetricsEvaluator
from serve import serve

logging.disable(logging.WARNING)


def evaluation(observed, predicted, warm):
    """Its profile ``full`` without clustering_agreement: its neighbour graph is no part of our convention."""

    def run(observed, predicted):
        with tempfile.TemporaryDirectory() as folder:
            evaluator = MetricsEvaluator(
                predicted, observed, control_pert="control", pert_col="condition", num_threads=1, outdir=folder
            )
            found, _ = evaluator.compute("full", skip_metrics=["clustering_agreement"], break_on_error=True)
        means = found.mean()
        return {name: means[name][0] for name in found.columns if name != "perturbation"}

    run(*warm)  # compiles
    return lambda: run(observed, predicted)


def rank(path, score):
    """The row loop of its discrimination score, over contexts."""
    data = np.load(path)
    genes, names = data["genes"], data["names"]
    contexts = list(zip(data["predicted"], data["observed"], strict=True))

    def one(predicted, observed):
        found = []
        for row, name in enumerate(names):
            kept = np.flatnonzero(genes != name)
            distance = sklearn.metrics.pairwise_distances(
                observed[:, kept], predicted[row, kept].reshape(1, -1), metric=score
            ).flatten()
            found.append(int(np.flatnonzero(np.argsort(distance) == np.flatnonzero(names == name)[0])[0]))
        return found

    return lambda: [one(*context) for context in contexts]


if __name__ == "__main__":
    serve({"evaluate": evaluation, "rank": rank})
