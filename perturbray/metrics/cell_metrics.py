"""Cell metrics: metrics that look at cells, not only at their means. The third registry of names behind ``Metric.parse``.

``CellMetric`` compares distributions (``energy/pca``), ``ExpressionMetric`` tables of differential expression
(``des/wilcoxon``). Both read ``Prediction.cells``; the statistics are in ``distribution`` and ``expression``.
"""

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse

from perturbray.errors import InputError, nearest
from perturbray.metrics import distribution, expression
from perturbray.metrics.cells import Cells, dense, moments, shuffled, signatures
from perturbray.metrics.expression import AGREEMENTS
from perturbray.metrics.metric import FAILED, METRICS, targeted
from perturbray.metrics.ranks import ranks
from perturbray.prediction import CellSample, Prediction
from perturbray.registry import Registry

SPACES = ("pca", "genes")
STATISTICS = ("energy", "mmd")
TESTS = ("wilcoxon", "t_test", "t_test_overestim_var")
COMPONENTS = 50
CAPS = {"pca": 1000, "genes": 400}  # cells of a side; the U statistic has no bias from fewer
DE_CAP = 400
RANK_CELLS = 200  # of each condition where all pairs are compared
BANDWIDTH_CELLS = 2000
SPLITS = 5

Memo = dict[Hashable, Any]


def _once(memo: Memo | None, key: Hashable, make: Callable[[], Any]) -> Any:
    """A value that several metrics of one prediction share."""
    if memo is None:
        return make()
    if key not in memo:
        memo[key] = make()
    return memo[key]


def _sample(prediction: Prediction, name: str) -> CellSample:
    if prediction.cells is None:
        raise InputError(f"metric {name!r} needs cells; this prediction carries only means")
    return prediction.cells


def _condition(prediction: Prediction, row: int) -> tuple[str, ...]:
    return (*prediction.contexts[prediction.context[row]], str(prediction.perturbation[row]))


def drawn(prediction: Prediction, X: Any, size: int, purpose: str, row: int) -> Any:
    """At most ``size`` cells of a condition, in an order that follows from their content and the condition's name."""
    order = shuffled(signatures(X, prediction.genes), purpose, *_condition(prediction, row))
    return X[order[:size]]


def failed_rows(prediction: Prediction) -> np.ndarray:
    """Conditions predicted with NaN or infinity, or without any cell, (conditions,) bool."""

    def broken(X) -> bool:
        return X.shape[0] == 0 or not np.isfinite(X.data if sparse.issparse(X) else X).all()

    return np.array([broken(X) for X in prediction.cells.predicted], dtype=bool)


def _flat(prediction: Prediction, failed: np.ndarray) -> np.ndarray:
    """Conditions predicted with almost no variance between cells, (conditions,) bool."""
    flat = np.zeros(len(prediction), dtype=bool)
    for row in np.flatnonzero(~failed):
        sides = prediction.cells.predicted[row], prediction.cells.observed[row]
        if min(side.shape[0] for side in sides) > 1:
            totals = [moments(dense(side))[1].sum() for side in sides]
            flat[row] = totals[0] < expression.DEGENERATE * totals[1]
    return flat


def _space(prediction: Prediction, space: str) -> Callable[[Any], np.ndarray]:
    """From cells to coordinates: the given PCA, else one fitted on the observed cells of this prediction."""
    if space == "genes":
        return dense
    sample = prediction.cells
    if sample.pca_loadings is not None:
        return distribution.PCA(mean=sample.pca_mean, loadings=sample.pca_loadings)
    parts = [*sample.observed, *sample.control]
    stack = sparse.vstack(parts, format="csr") if sparse.issparse(parts[0]) else np.concatenate(parts)
    return distribution.fit_pca(stack, COMPONENTS)


@dataclass(frozen=True)
class CellMetric:
    """A distance between distributions of cells: ``CellMetric("energy")`` is ``energy/pca``.

    U statistics, so negative values occur and 0 is no difference; equal numbers of cells on both sides. ``form`` is
    ``value``, ``skill`` (1 as near as a replicate, 0 as far as control cells), ``rank`` or ``rank_pred``.
    """

    statistic: str
    space: str = "pca"
    form: str = "value"

    def __post_init__(self) -> None:
        for name, options in (("statistic", STATISTICS), ("space", SPACES), ("form", self.forms(self.statistic))):
            if getattr(self, name) not in options:
                raise InputError(
                    f"a cell metric has no {name} {getattr(self, name)!r}: {nearest(getattr(self, name), options)}"
                )

    @staticmethod
    def forms(statistic: str) -> tuple[str, ...]:
        if statistic == "energy":
            return "value", "skill", "rank", "rank_pred"
        return "value", *(f"x{factor:g}" for factor in distribution.BANDWIDTHS)  # a single bandwidth

    @property
    def name(self) -> str:
        return f"{self.statistic}/{self.space}" + ("" if self.form == "value" else f"/{self.form}")

    @property
    def higher_is_better(self) -> bool:
        return self.form == "skill"

    @property
    def best(self) -> float:
        return 1.0 if self.form == "skill" else 0.0

    @property
    def worst(self) -> float:
        return {"skill": -np.inf, "rank": 1.0, "rank_pred": 1.0}.get(self.form, np.inf)

    @property
    def chance(self) -> float | None:
        return {"skill": 0.0, "rank": 0.5, "rank_pred": 0.5}.get(self.form)

    def evaluate(self, prediction: Prediction, memo: Memo | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Values (conditions,) and their status (conditions,), as ``Metric.evaluate``."""
        _sample(prediction, self.name)
        values, status = np.full(len(prediction), np.nan), np.full(len(prediction), "", dtype="U24")
        failed = _once(memo, "failed cells", lambda: failed_rows(prediction))
        space = _once(memo, ("space", self.space), lambda: _space(prediction, self.space))
        if self.form in ("rank", "rank_pred"):
            return self._rank(prediction, failed, space)
        flat = _once(memo, "flat", lambda: _flat(prediction, failed))
        for row in range(len(prediction)):
            key = ("distance", self.statistic, self.space, self.form == "skill", row)
            make = partial(self._distance, prediction, row, space, failed[row], memo)
            found, status[row] = _once(memo, key, make)
            values[row] = found[self.form] if isinstance(found, dict) else found
            if not status[row] and flat[row]:
                status[row] = "degenerate_variance"
        return values, status

    def _coordinates(self, prediction: Prediction, row: int, space: Callable) -> tuple[np.ndarray, np.ndarray]:
        """Equal numbers of observed and predicted cells."""
        sides = prediction.cells.observed[row], prediction.cells.predicted[row]
        size = min(CAPS[self.space], *(side.shape[0] for side in sides))
        return tuple(space(drawn(prediction, side, size, "match", row)) for side in sides)

    def _distance(self, prediction: Prediction, row: int, space: Callable, failed: bool, memo: Memo | None):
        if prediction.cells.observed[row].shape[0] < 2:
            return np.nan, "too_few_cells"
        if failed or prediction.cells.predicted[row].shape[0] < 2:
            return self.worst, FAILED
        x, y = self._coordinates(prediction, row, space)
        if self.statistic == "mmd":
            sigma = _once(
                memo, ("sigma", self.space, prediction.context[row]), lambda: self._sigma(prediction, row, space)
            )
            if sigma == 0:
                return np.nan, "constant_truth"
            kernel = distribution.Gaussian(tuple(factor * sigma for factor in distribution.BANDWIDTHS))
            own = distribution.remembered(lambda: distribution.within(x, kernel), "within", kernel, x)
            each = distribution.mmd(x, y, kernel.sigmas, within_x=own)
            found = dict(zip(self.forms("mmd")[1:], each, strict=True))
            return {"value": each.mean(), **found}, ""
        kernel = distribution.Euclidean()
        own = distribution.remembered(lambda: distribution.within(x, kernel)[0], "within", kernel, x)
        value = distribution.energy(x, y, within_x=own)
        status = "copied_cells" if distribution.copied_cells(value, own, len(x)) else ""
        if self.form == "value":
            return value, status
        skill = self._skill(prediction, row, space, value)
        return (skill, "no_detectable_effect") if np.isnan(skill) else (skill, status)

    def _skill(self, prediction: Prediction, row: int, space: Callable, value: float) -> float:
        observed, control = prediction.cells.observed[row], prediction.cells.control[prediction.context[row]]
        if observed.shape[0] < 4 or control.shape[0] < 2:
            return np.nan
        cap = CAPS[self.space]
        cells = space(drawn(prediction, observed, min(2 * cap, observed.shape[0]), "floor", row))
        # cells are drawn in the order of their content, so that positions are as good as signatures from here on
        halves = distribution.halvings(np.arange(len(cells), dtype=np.uint64), "floor", splits=SPLITS)
        floor = distribution.remembered(
            lambda: [distribution.energy(cells[a], cells[b]) for a, b in halves], "floor", cells
        )
        size = min(cap, observed.shape[0], control.shape[0])
        x, y = (space(drawn(prediction, side, size, "ceiling", row)) for side in (observed, control))
        ceiling = distribution.remembered(lambda: distribution.energy(x, y), "energy", x, y)
        return distribution.skill(value, floor, ceiling)

    def _sigma(self, prediction: Prediction, row: int, space: Callable) -> float:
        """Median distance between observed cells of the context, perturbed and control; never of predicted cells."""
        context = prediction.context[row]
        parts = [prediction.cells.observed[k] for k in np.flatnonzero(prediction.context == context)]
        parts.append(prediction.cells.control[context])
        signature = np.concatenate([signatures(X, prediction.genes) for X in parts])
        key = (signature, space.mean, space.loadings) if isinstance(space, distribution.PCA) else (signature,)
        return float(
            distribution.remembered(lambda: self._median(prediction, context, space, parts, signature), "sigma", *key)
        )

    @staticmethod
    def _median(prediction: Prediction, context: int, space: Callable, parts: list, signature: np.ndarray) -> float:
        kept = np.zeros(len(signature), dtype=bool)
        kept[shuffled(signature, "bandwidth", *prediction.contexts[context])[:BANDWIDTH_CELLS]] = True
        masks = np.split(kept, np.cumsum([X.shape[0] for X in parts])[:-1])
        return distribution.median_distance(
            np.concatenate([space(X[np.flatnonzero(mask)]) for X, mask in zip(parts, masks, strict=True)])
        )

    def _rank(self, prediction: Prediction, failed: np.ndarray, space: Callable) -> tuple[np.ndarray, np.ndarray]:
        values, status = np.full(len(prediction), np.nan), np.full(len(prediction), "", dtype="U24")
        sample = prediction.cells
        for rows in prediction.groups():
            enough = np.array([sample.observed[row].shape[0] > 1 for row in rows])
            status[rows[~enough]] = "too_few_cells"
            rows = rows[enough]
            if len(rows) < 2:
                status[rows] = "single_candidate"
                continue
            broken = failed[rows] | np.array([sample.predicted[row].shape[0] < 2 for row in rows])
            predicted, observed = [], []
            for row, is_broken in zip(rows, broken, strict=True):
                observed.append(drawn(prediction, sample.observed[row], RANK_CELLS, "rank", row))
                if not is_broken:
                    predicted.append(drawn(prediction, sample.predicted[row], RANK_CELLS, "rank", row))
            distance = np.full((len(rows), len(rows)), np.inf)
            if predicted:
                distance[~broken] = distribution.energy_matrix(predicted, observed, space=space)
            direction = "obs" if self.form == "rank" else "pred"
            values[rows] = ranks(distance, direction=direction)
            values[rows[broken]], status[rows[broken]] = self.worst, FAILED
        return values, status


@dataclass(frozen=True)
class ExpressionMetric:
    """Agreement of differential expression, ``ExpressionMetric("des")`` is ``des/wilcoxon``.

    Both sides are tested against the observed control cells of the context, with equal numbers of cells; genes below
    the gate in control and the condition's own target genes are not tested.
    """

    agreement: str
    test: str = "wilcoxon"

    def __post_init__(self) -> None:
        AGREEMENTS[self.agreement]
        if self.test not in TESTS:
            raise InputError(f"no test is named {self.test!r}: {nearest(self.test, TESTS)}")

    @property
    def name(self) -> str:
        return f"{self.agreement}/{self.test}"

    @property
    def higher_is_better(self) -> bool:
        return AGREEMENTS[self.agreement].higher_is_better

    @property
    def best(self) -> float:
        return AGREEMENTS[self.agreement].best

    @property
    def worst(self) -> float:
        return AGREEMENTS[self.agreement].worst

    @property
    def chance(self) -> float | None:
        return {"direction_match": 0.5, "roc_auc": 0.5, "lfc_spearman": 0.0, "lfc_nmae": 1.0}.get(self.agreement)

    def evaluate(self, prediction: Prediction, memo: Memo | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Values (conditions,) and their status (conditions,), as ``Metric.evaluate``."""
        sample = _sample(prediction, self.name)
        failed = _once(memo, "failed cells", lambda: failed_rows(prediction))
        flat = _once(memo, "flat", lambda: _flat(prediction, failed))
        tables = _once(memo, ("tables", self.test), lambda: expression_tables(prediction, self.test, failed))
        values, status = np.full(len(prediction), np.nan), np.full(len(prediction), "", dtype="U24")
        names = np.asarray(prediction.genes)
        for row in range(len(prediction)):
            control = sample.control[prediction.context[row]].shape[0]
            if min(sample.observed[row].shape[0], control) < expression.FEWEST_CELLS:
                status[row] = "too_few_cells"
            elif failed[row] or sample.predicted[row].shape[0] < expression.FEWEST_CELLS:
                values[row], status[row] = self.worst, FAILED
            else:
                guess, truth, tested = (part[row] for part in tables)
                kept = np.flatnonzero(tested)
                values[row], status[row] = AGREEMENTS[self.agreement](
                    _cut(guess, kept, names), _cut(truth, kept, names)
                )
                if not status[row] and flat[row]:
                    status[row] = "degenerate_variance"
        return values, status


def _cut(genes: expression.Genes, kept: np.ndarray, names: np.ndarray) -> expression.Genes:
    parts = {part: getattr(genes, part)[kept] for part in ("score", "p", "q", "logfc")}
    return expression.Genes(names=names[kept], **parts)


def expression_tables(prediction: Prediction, test: str, failed: np.ndarray) -> tuple[list, list, list]:
    """Predicted table, observed table and tested genes of each condition; None where there are too few cells."""
    sample, count = prediction.cells, len(prediction)
    guesses, truths, tests = [None] * count, [None] * count, [None] * count
    target_sum = prediction.target_sum or _target_sum(sample.control)
    for code in range(len(prediction.contexts)):
        control = sample.control[code]
        rows = [
            row
            for row in np.flatnonzero(prediction.context == code)
            if not failed[row]
            and min(control.shape[0], sample.observed[row].shape[0], sample.predicted[row].shape[0])
            >= expression.FEWEST_CELLS
        ]
        if not rows:
            continue
        linear = np.expm1(dense(control)).mean(axis=0)
        tested = np.stack([_tested(prediction, row, linear, target_sum) for row in rows])
        sides = []
        for side, test_of in (
            (sample.predicted, _test),
            (sample.observed, partial(_observed_test, genes=prediction.genes)),
        ):
            sizes = [min(DE_CAP, sample.observed[row].shape[0], sample.predicted[row].shape[0]) for row in rows]
            members = [drawn(prediction, side[row], n, "expression", row) for row, n in zip(rows, sizes, strict=True)]
            folds = np.stack([_fold(side[row], linear, target_sum) for row in rows])
            score, p = test_of(members, control, test)
            sides.append(expression.table(score, p, folds, tested))
        every, names = np.arange(len(prediction.genes)), np.asarray(prediction.genes)
        for position, row in enumerate(rows):
            guesses[row], truths[row] = (side.row(position, every, names) for side in sides)
            tests[row] = tested[position]
    return guesses, truths, tests


def _tested(prediction: Prediction, row: int, linear: np.ndarray, target_sum: float) -> np.ndarray:
    """Genes above the gate in control that the condition does not target, (genes,) bool. Never a look at the condition."""
    targets = targeted([prediction.perturbation[row]])
    return (linear > expression.GATE * target_sum) & np.array([gene not in targets for gene in prediction.genes])


def _fold(X: Any, linear: np.ndarray, target_sum: float) -> np.ndarray:
    """Finite log2 fold change of linear means, as effect ``logfc``."""
    epsilon = 1e-6 * target_sum
    mean = np.maximum(np.expm1(dense(X)).mean(axis=0), 0)
    return np.log2(mean + epsilon) - np.log2(linear + epsilon)


def _target_sum(control: tuple[Any, ...]) -> float:
    """Counts to which cells were normalised: the median over control cells of Σ expm1(X)."""
    return float(np.median(np.concatenate([np.expm1(dense(X)).sum(axis=1) for X in control])))


_TABLES: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}  # tests of observed cells; the oldest go first
TABLE_BYTES = 256 << 20


def _observed_test(
    members: list[Any], control: Any, test: str, *, genes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """``_test`` of observed cells: once a process for all the predictions that are held against the same cells."""
    content = (signatures(X, genes) for X in (*members, control))
    key = (test, genes, *(hashlib.blake2b(part, digest_size=16).digest() for part in content))
    if key not in _TABLES:
        found = _test(members, control, test)
        size = sum(part.nbytes for part in found)
        while _TABLES and size + sum(p.nbytes for parts in _TABLES.values() for p in parts) > TABLE_BYTES:
            _TABLES.pop(next(iter(_TABLES)))
        _TABLES[key] = found
    return _TABLES[key]


def _test(members: list[Any], control: Any, test: str) -> tuple[np.ndarray, np.ndarray]:
    """Statistic and p of each group of cells against the control, (groups, genes)."""
    stack = (
        sparse.vstack([*members, control], format="csr")
        if sparse.issparse(control)
        else np.concatenate([*members, control])
    )
    sizes = [*(X.shape[0] for X in members), control.shape[0]]
    cells = Cells(X=stack, group=np.repeat(np.arange(len(sizes)), sizes), groups=len(sizes))
    groups = range(len(members))
    if test == "wilcoxon":
        return expression.rank_sum_table(cells, groups, cells, len(members))
    against = (*moments(dense(control)), control.shape[0])
    return expression.t_table(cells, groups, against, overestimate=test == "t_test_overestim_var")


CELL_METRICS: Registry[CellMetric | ExpressionMetric] = Registry("cell metric")
for _metric in (
    *(CellMetric("energy", space, form) for space in SPACES for form in ("value", "skill")),
    CellMetric("energy", "pca", "rank"),
    CellMetric("energy", "pca", "rank_pred"),
    *(CellMetric("mmd", space) for space in SPACES),
    *(ExpressionMetric(agreement) for agreement in AGREEMENTS),
):
    CELL_METRICS.register(_metric.name)(_metric)


def parse_cell_metric(name: str) -> CellMetric | ExpressionMetric:
    """The cell metric of a name: ``energy/pca``, ``mmd/genes/x0.5``, ``des/wilcoxon``."""
    parts = name.split("/")
    if len(parts) == 2 and parts[0] in AGREEMENTS:
        return ExpressionMetric(*parts)
    if 2 <= len(parts) <= 3 and parts[0] in STATISTICS:
        return CellMetric(*parts)
    raise InputError(f"no metric is named {name!r}: {nearest(name, [*METRICS, *CELL_METRICS])}")
