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

from perturbray.metrics.cells import Cells, Matrix
from perturbray.metrics.expression import _z

logger.disable("illico")


def rank_sums(cells: Cells, groups: Sequence[int], reference: Cells, control: int) -> tuple[np.ndarray, np.ndarray]:
    """z and p of each group against the reference's control cells, (groups, genes) each."""
    names = [str(position) for position in range(len(groups) + 1)]  # the last is the control
    stack, position = _stacked(cells, groups, reference, control)
    label = np.array(names)[position]
    sizes = np.bincount(position)
    genes = [str(gene) for gene in range(cells.X.shape[1])]
    index = pd.Index([str(cell) for cell in range(len(label))])
    data = anndata.AnnData(
        X=stack, obs=pd.DataFrame({"group": pd.Categorical(label)}, index=index), var=pd.DataFrame(index=genes)
    )
    with redirect_stderr(StringIO()):  # its progress bar
        tests = asymptotic_wilcoxon(
            data, is_log1p=True, group_keys="group", reference=names[-1], tie_correct=True, use_continuity=True
        )
    group, gene = (
        level.to_numpy().astype(int)[code] for level, code in zip(tests.index.levels, tests.index.codes, strict=True)
    )
    p, u = np.empty((2, len(names), len(genes)))
    p[group, gene], u[group, gene] = tests["p_value"], tests["statistic"]
    p, u = p[:-1], u[:-1]
    middle = sizes[:-1, None] * sizes[-1] / 2
    p = np.where(u == middle, 1.0, p)  # illico applies the continuity to a difference of 0 too: 0.99, not 1
    return _z(p, u - middle), p


def _stacked(cells: Cells, groups: Sequence[int], reference: Cells, control: int) -> tuple[Matrix, np.ndarray]:
    """Cells of all groups and of the control, and the place of each one's group in that list.

    No copy where both come from one X of which every cell takes part: a copy is as large as the file.
    """
    members = [*(cells.rows(group) for group in groups), reference.rows(control)]
    position = np.repeat(np.arange(len(members)), [len(rows) for rows in members])
    rows = np.concatenate(members)
    if cells.X is not reference.X:
        own = cells.X[rows[: -len(members[-1])]], reference.X[members[-1]]
        stack = sparse.vstack(own, format="csr") if sparse.issparse(cells.X) else np.concatenate(own)
    elif len(rows) == cells.X.shape[0] and len(np.unique(rows)) == len(rows):
        stack, position = cells.X, position[np.argsort(rows)]
    else:
        stack = cells.X[rows]
    if not sparse.issparse(stack):
        return np.asarray(stack), position
    stack = sparse.csr_matrix((stack.data, stack.indices, stack.indptr), shape=stack.shape)  # it knows no subclass
    return stack if stack.has_sorted_indices else stack.sorted_indices(), position
