"""Metrics: from a prediction to one value a condition. Scores, effects and ranks combine freely in ``Metric``."""

from perturbray.metrics.cell_metrics import CELL_METRICS, CellMetric, ExpressionMetric
from perturbray.metrics.conventions import CONVENTIONS, aggregate, convention, evaluate
from perturbray.metrics.effects import EFFECTS, effect
from perturbray.metrics.expression import AGREEMENTS, agreement
from perturbray.metrics.metric import METRICS, Metric, score_prediction
from perturbray.metrics.scores import SCORES, score

# these register their conventions
from perturbray.metrics import standard, upstream  # isort: skip

__all__ = [
    "AGREEMENTS",
    "CELL_METRICS",
    "CONVENTIONS",
    "EFFECTS",
    "METRICS",
    "SCORES",
    "CellMetric",
    "ExpressionMetric",
    "Metric",
    "aggregate",
    "agreement",
    "convention",
    "effect",
    "evaluate",
    "score",
    "score_prediction",
    "standard",
    "upstream",
]
