"""Metrics: from a prediction to one value a condition. Scores, effects and ranks combine freely in ``Metric``."""

from perturbray.metrics.effects import EFFECTS, effect
from perturbray.metrics.metric import METRICS, Metric, score_prediction
from perturbray.metrics.scores import SCORES, score

__all__ = ["EFFECTS", "METRICS", "SCORES", "Metric", "effect", "score", "score_prediction"]
