"""Rank-sum tests of many groups in one pass over the non-zeros, by the illico package. Importing this needs illico."""

from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO

import anndata
import numpy as np
import pandas as pd
from illico import asymptotic_wilcoxon
from loguru import logger
from scipy import sparse

from perturbray.metrics.cells import Cells
from perturbray.metrics.expression import _z

REFERENCE = "reference"

logger.disable("illico")


def rank_sums(cells: Cells, groups: Sequence[int], reference: Cells, control: int) -> tuple[np.ndarray, np.ndarray]:
    """z and p of each group against the reference's control cells, (groups, genes) each."""
    rows = [cells.X[cells.rows(group)] for group in groups]
    against = reference.X[reference.rows(control)]
    stack = sparse.vstack([*rows, against], format="csr") if sparse.issparse(against) else np.vstack([*rows, against])
    if sparse.issparse(stack):
        stack.sort_indices()  # illico refuses unsorted rows
    sizes = [part.shape[0] for part in rows]
    names = [str(position) for position in range(len(groups))]
    label = np.repeat([*names, REFERENCE], [*sizes, against.shape[0]])
    genes = [str(gene) for gene in range(cells.X.shape[1])]
    index = pd.Index([str(cell) for cell in range(len(label))])
    data = anndata.AnnData(
        X=stack, obs=pd.DataFrame({"group": pd.Categorical(label)}, index=index), var=pd.DataFrame(index=genes)
    )
    with redirect_stderr(StringIO()):  # its progress bar
        tests = asymptotic_wilcoxon(
            data, is_log1p=True, group_keys="group", reference=REFERENCE, tie_correct=True, use_continuity=True
        )
    shape = (len(names), len(genes))
    order = pd.MultiIndex.from_product([names, genes])
    p = tests["p_value"].reindex(order).to_numpy(dtype=float).reshape(shape)
    u = tests["statistic"].reindex(order).to_numpy(dtype=float).reshape(shape)
    middle = np.array(sizes)[:, None] * against.shape[0] / 2
    p = np.where(u == middle, 1.0, p)  # illico applies the continuity to a difference of 0 too: 0.99, not 1
    return _z(p, u - middle), p
