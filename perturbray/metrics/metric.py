"""Metric: a score of an effect, or its rank, evaluated on a ``Prediction``. A new default stands in ``METRICS``.

Scores are registered in ``scores``, effects in ``effects``, tie rules in ``ranks``; any combination is a metric.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from perturbray.errors import InputError, nearest
from perturbray.metrics.effects import EFFECTS
from perturbray.metrics.ranks import DIRECTIONS, TIES, ranks
from perturbray.metrics.scores import SCORES
from perturbray.prediction import LostCellsError, Prediction, Pseudobulk
from perturbray.randomness import generator
from perturbray.registry import Registry

FAILED = "failed_prediction"
EXCLUDE = ("panel", "own", "none")
GENES = ("all", "top_expressed")
TOP_EXPRESSED = 1000  # genes with the largest control mean (Ahlmann-Eltze et al., Nat. Methods 2025)


@dataclass(frozen=True)
class Metric:
    """A score of an effect: ``Metric("cosine", "logfc_logmean")`` is ``cosine/logfc_logmean``.

    With ``rank`` the value is instead the share of other conditions of the same context that are nearer than the right
    one: 0 is best, 0.5 is chance (``direction`` and ``ties`` as in ``ranks``). Ranks leave out the genes that any
    candidate targets (``exclude="panel"``), whose own knock-down or overexpression would identify the condition;
    ``"own"`` leaves out those of the ranked condition only, which a model can exploit.
    """

    score: str
    effect: str = "average"
    rank: bool = False
    direction: str = "obs"
    ties: str = "half"
    exclude: str = "panel"
    genes: str = "all"

    def __post_init__(self) -> None:
        SCORES[self.score], EFFECTS[self.effect], TIES[self.ties]  # an unknown name raises and lists the others
        for name, options in (("direction", DIRECTIONS), ("exclude", EXCLUDE), ("genes", GENES)):
            if getattr(self, name) not in options:
                raise InputError(
                    f"a metric has no {name} {getattr(self, name)!r}: {nearest(getattr(self, name), options)}"
                )
        if self.rank and SCORES[self.score].weighted:
            raise InputError(
                f"score {self.score!r} has a weight per condition, so it cannot be compared across conditions"
            )

    @property
    def name(self) -> str:
        """``score/effect``, then ``/rank`` or ``/rank_pred``, then options other than the default in brackets."""
        form = ("/rank" if self.direction == "obs" else "/rank_pred") if self.rank else ""
        named = ("ties", "exclude", "genes") if self.rank else ("genes",)
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name in named and getattr(self, f.name) != f.default
        ]
        return f"{self.score}/{self.effect}{form}" + (f"[{','.join(options)}]" if options else "")

    @classmethod
    def parse(cls, name: str) -> "Metric | Any":
        """The metric of a name, cell metrics (``energy/pca``) included; the inverse of ``name``."""
        from perturbray.metrics.cell_metrics import AGREEMENTS, STATISTICS, parse_cell_metric  # builds on this module

        body, _, bracket = name.partition("[")
        parts = body.split("/")
        if parts[0] in STATISTICS or parts[0] in AGREEMENTS:
            return parse_cell_metric(name)
        if not 2 <= len(parts) <= 3 or (bracket and not bracket.endswith("]")):
            raise InputError(f"no metric is named {name!r}: {nearest(name, METRICS)}")
        forms = {"rank": {"rank": True}, "rank_pred": {"rank": True, "direction": "pred"}}
        if len(parts) == 3 and parts[2] not in forms:
            raise InputError(f"no metric is named {name!r}: {nearest(name, METRICS)}")
        options = dict(option.partition("=")[::2] for option in bracket.rstrip("]").split(",") if option)
        if unknown := set(options) - {"ties", "exclude", "genes"}:
            raise InputError(f"metric {name!r}: no option {sorted(unknown)[0]!r}; there are ties, exclude, genes")
        try:
            metric = cls(parts[0], parts[1], **(forms[parts[2]] if len(parts) == 3 else {}), **options)
        except InputError as error:
            raise InputError(f"no metric is named {name!r}: {error}") from error
        return metric

    @property
    def higher_is_better(self) -> bool:
        return not self.rank and SCORES[self.score].higher_is_better

    @property
    def best(self) -> float:
        return 0.0 if self.rank else SCORES[self.score].best

    @property
    def worst(self) -> float:
        """What a failed prediction gets: the bound of a bounded metric, else infinity, so that failing never pays."""
        return 1.0 if self.rank else SCORES[self.score].worst

    @property
    def chance(self) -> float | None:
        """What an uninformed prediction gets; None where that depends on the data.

        An angle to the control is not 0 by chance: the noise of a shared control stands in both effects, which gives
        about n/(n + n₀) with n cells in the condition and n₀ in the control.
        """
        if self.rank:
            return 0.5
        return SCORES[self.score].chance if EFFECTS[self.effect].centred else None

    def evaluate(self, prediction: Prediction, memo: dict | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Values (conditions,) float64 and why they are special (conditions,) str, ``""`` for most.

        NaN only where the truth leaves the metric undefined; a predicted row with NaN or infinity is
        ``failed_prediction`` and gets the worst value, without a change to the others. ``memo`` keeps what several
        metrics of the same prediction share: effects and distances.
        """
        failed = ~np.isfinite(prediction.predicted.mean).all(axis=1)
        if EFFECTS[self.effect].linear and prediction.predicted.linear is not None:
            failed |= ~np.isfinite(prediction.predicted.linear).all(axis=1)  # expm1 of what is no log1p
        if failed.any():  # placeholders: their values are replaced below
            prediction = replace(prediction, predicted=_without(prediction.predicted, failed))
        memo = {} if memo is None else memo
        if ("effect", self.effect) not in memo:
            memo["effect", self.effect] = EFFECTS[self.effect].pair(prediction)
        predicted, observed = memo["effect", self.effect]
        values, status = np.full(len(prediction), np.nan), np.full(len(prediction), "", dtype="U24")
        for rows in prediction.groups():
            context = prediction.contexts[prediction.context[rows[0]]]
            kept = self._genes(prediction, rows)
            sides = _cut(predicted, rows, kept), _cut(observed, rows, kept)
            if self.rank:
                own = self._own(prediction, rows, kept)
                values[rows], status[rows] = self._rank(
                    *sides, failed[rows], prediction.perturbation[rows].astype(str), context, own, memo
                )
            else:
                weights = self._weights(prediction, rows, kept)
                score = SCORES[self.score]
                values[rows], status[rows] = score(*sides, weights), score.status(*sides, weights)
        undefined = np.isnan(values)
        values[failed & ~undefined], status[failed & ~undefined] = self.worst, FAILED
        return values, status

    def _rank(self, predicted, observed, failed, names, context, own, memo) -> tuple[np.ndarray, np.ndarray]:
        if len(predicted) < 2:
            return np.full(len(predicted), np.nan), np.full(len(predicted), "single_candidate")
        if predicted.shape[1] == 0:
            return np.full(len(predicted), np.nan), np.full(len(predicted), "no_genes")
        key = ("distance", self.score, self.effect, self.exclude, self.genes, context, *names)  # of both directions
        if key not in memo:
            memo[key] = SCORES[self.score].distance(predicted[:, None], observed[None])
        distance = memo[key].copy()
        for row, targets in enumerate(own):
            if len(targets):
                pair = np.delete(predicted, targets, axis=1), np.delete(observed, targets, axis=1)
                if self.direction == "obs":
                    distance[:, row] = SCORES[self.score].distance(pair[0][:, None], pair[1][row][None, None])[:, 0]
                else:
                    distance[row] = SCORES[self.score].distance(pair[0][row][None, None], pair[1][None])[0]
        if self.direction == "obs":
            distance[failed] = np.where(
                np.isnan(distance[failed]), np.nan, np.inf
            )  # never nearer to another's observation
        order = np.argsort(names, kind="stable")  # so that ties by position do not depend on the order of rows
        draws = None
        if self.ties == "random":
            draws = np.array([generator(0, self.name, *context, name).random() for name in names[order]])
        values = np.empty(len(predicted))
        values[order] = ranks(distance[np.ix_(order, order)], direction=self.direction, ties=self.ties, draws=draws)
        return values, np.where(np.isnan(values), "constant_truth", "")

    def _genes(self, prediction: Prediction, rows: np.ndarray) -> np.ndarray:
        """Indices of the genes compared among these conditions."""
        kept = np.ones(len(prediction.genes), dtype=bool)
        if self.genes == "top_expressed":
            control = prediction.control.mean[prediction.context[rows[0]]]
            kept[np.argsort(-control, kind="stable")[TOP_EXPRESSED:]] = False
        if self.rank and self.exclude == "panel":
            targets = targeted(prediction.perturbation[rows])
            kept &= ~np.array([gene in targets for gene in prediction.genes], dtype=bool)
        return np.flatnonzero(kept)

    def _own(self, prediction: Prediction, rows: np.ndarray, kept: np.ndarray) -> list[np.ndarray]:
        """For each condition the compared genes that only its own rank leaves out."""
        if self.exclude != "own":
            return []
        position = {prediction.genes[gene]: index for index, gene in enumerate(kept)}
        targets = (targeted([name]) for name in prediction.perturbation[rows])
        return [np.array([position[gene] for gene in genes if gene in position], dtype=int) for genes in targets]

    def _weights(self, prediction: Prediction, rows: np.ndarray, kept: np.ndarray) -> np.ndarray | None:
        if not SCORES[self.score].weighted:
            return None
        if prediction.weights is None:
            raise InputError(f"metric {self.name!r} needs gene weights; this prediction carries none")
        return prediction.weights[np.ix_(rows, kept)]


def _cut(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """These rows and columns; without a copy where they are all columns of consecutive rows."""
    if len(columns) == matrix.shape[1] and len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return matrix[rows[0] : rows[-1] + 1]
    return matrix[np.ix_(rows, columns)]


def targeted(perturbations: Iterable[str]) -> set[str]:
    """The single perturbations in these, combinations (``A+B``) taken apart."""
    return {single for name in perturbations for single in str(name).split("+")}


def _without(bulk: Pseudobulk, failed: np.ndarray) -> Pseudobulk:
    """A pseudobulk whose failed rows are zeros."""
    parts = {name: getattr(bulk, name) for name in ("mean", "linear", "variance")}
    cleaned = {name: None if part is None else np.where(failed[:, None], 0.0, part) for name, part in parts.items()}
    return replace(bulk, **cleaned)


def score_prediction(prediction: Prediction, metrics: Iterable[Metric]) -> dict[str, np.ndarray]:
    """A long table as columns of equal length: ``condition`` (row number), ``metric``, ``value``, ``status``."""
    metrics, memo = list(metrics), {}
    evaluated = [evaluated_by(metric, prediction, memo) for metric in metrics]
    rows = np.arange(len(prediction))
    return {
        "condition": np.tile(rows, len(metrics)),
        "metric": np.repeat(np.array([metric.name for metric in metrics], dtype=str), len(prediction)),
        "value": np.concatenate([values for values, _ in evaluated]) if metrics else np.empty(0),
        "status": np.concatenate([status for _, status in evaluated]) if metrics else np.empty(0, dtype=str),
    }


def evaluated_by(metric: "Metric | Any", prediction: Prediction, memo: dict) -> tuple[np.ndarray, np.ndarray]:
    """``metric.evaluate``; an error says which metric it was, and at which condition."""
    try:
        return metric.evaluate(prediction, memo)
    except LostCellsError:
        raise
    except Exception as error:
        kind = InputError if isinstance(error, InputError) else MetricError
        raise kind(f"metric {metric.name}, {_culprit(metric, prediction)}: {type(error).__name__}: {error}") from error


class MetricError(RuntimeError):
    """A metric raised an error: which, and at which condition."""


def _culprit(metric: "Metric | Any", prediction: Prediction) -> str:
    """The first condition that raises an error on its own, else the number of conditions."""
    for row in range(len(prediction)):
        try:
            metric.evaluate(prediction.rows(np.array([row])))
        except Exception:
            names = (*prediction.contexts[prediction.context[row]], str(prediction.perturbation[row]))
            return f"condition {', '.join(names)}"
    return f"{len(prediction)} conditions together"


def score_split(first: Prediction, second: Prediction, metrics: Iterable[Metric]) -> dict[str, np.ndarray]:
    """The table of ``score_prediction`` under split controls, where noise of the control is not taken for skill.

    The control cells of each context are cut once into halves A and B. In ``first`` the model predicted from B, which is
    its ``control``, and A is its ``observed_control``; in ``second`` the roles are exchanged. Values are averaged over
    both, and a status is that of the first that has one. A prediction made from all control cells must not be scored
    so: its effect would hold the truth's noise with the opposite sign.
    """
    for one, other in ((first, second), (second, first)):
        if one.observed_control is None or not np.array_equal(one.observed_control.mean, other.control.mean):
            raise ValueError("split controls: the observed control of one prediction is the control of the other")
    metrics = list(metrics)
    tables = [score_prediction(prediction, metrics) for prediction in (first, second)]
    status = np.where(tables[0]["status"] != "", tables[0]["status"], tables[1]["status"])
    return tables[0] | {"value": (tables[0]["value"] + tables[1]["value"]) / 2, "status": status}


METRICS: Registry[Metric] = Registry("metric")
for _metric in (
    Metric("cosine", "delta_ctrl"),
    Metric("cosine", "delta_ctrl", rank=True),
    Metric("cosine", "delta_ctrl", rank=True, direction="pred"),
    Metric("cosine", "logfc_logmean"),
    Metric("cosine", "logfc_logmean", rank=True),
    Metric("cosine", "logfc_logmean", rank=True, direction="pred"),
    Metric("rmse", "average"),
    Metric("rmse", "average", rank=True),
    Metric("rmse", "average", rank=True, direction="pred"),
    Metric("mse", "average"),
    Metric("mae", "average"),
    Metric("l2", "average"),
    Metric("pearson", "delta_ctrl"),
    Metric("pearson", "delta_mean"),
    Metric("spearman", "delta_ctrl"),
    Metric("r2", "delta_mean"),
):
    METRICS.register(_metric.name)(_metric)
