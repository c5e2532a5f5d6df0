"""Evaluation and ranks as cell-eval does them, in its own environment."""

import logging
import tempfile

import anndata
import numpy as np
import pandas as pd
from cell_eval import MetricsEvaluator
from cell_eval._types import PerturbationAnndataPair
from cell_eval.metrics._anndata import discrimination_score
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
    """Its own discrimination score of pseudobulks, a row loop, over contexts; their control is zero."""
    data = np.load(path)
    names, genes = data["names"].tolist(), data["genes"].tolist()

    def bulk(means):
        obs = pd.DataFrame({"condition": [*names, "control"]}, index=[*names, "control"])
        return anndata.AnnData(np.vstack([means, np.zeros(len(genes))]), obs=obs, var=pd.DataFrame(index=genes))

    pairs = [
        PerturbationAnndataPair(real=bulk(observed), pred=bulk(predicted), pert_col="condition", control_pert="control")
        for predicted, observed in zip(data["predicted"], data["observed"], strict=True)
    ]
    for pair in pairs:
        pair._initialize_bulk_arrays()  # means are given to ours too

    def one(pair):
        found = discrimination_score(pair, metric=score)
        return [round((1 - found[name]) * len(names)) for name in names]

    return lambda: [one(pair) for pair in pairs]


if __name__ == "__main__":
    serve({"evaluate": evaluation, "rank": rank})
