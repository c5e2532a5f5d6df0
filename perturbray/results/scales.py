"""How to read a metric: direction, best, chance, title, unit; from its name, unless the plan's entry says otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass

_LOWER = ("rmse", "mse", "mae", "l1", "l2", "wmse", "energy", "mmd")
_UNITS = {"rmse": "log1p expression", "mae": "log1p expression", "mse": "log1p expression²"}
_TITLES = {
    **{"rmse": "RMSE", "mse": "MSE", "mae": "MAE", "cosine": "Cosine", "pearson": "Pearson", "spearman": "Spearman"},
    **{"energy": "Energy distance", "mmd": "MMD²", "des": "DES", "pr_auc": "PR-AUC", "roc_auc": "ROC-AUC"},
    **{"topk_recall": "Top-50 recall", "lfc_nmae": "Error of fold changes", "lfc_spearman": "Spearman of fold changes"},
    **{"direction_match": "Right direction", "jaccard": "Jaccard", "recall": "Recall", "fidelity": "Fidelity"},
    "reach": "Reach",
}
_EFFECTS = {
    "average": "mean expression",
    "delta_ctrl": "change from control",
    "delta_mean": "change from the mean response",
    "logfc": "log fold change",
    "logfc_logmean": "log fold change (of log means)",
    "pca": "cells in PCA space",
    "genes": "cells in gene space",
    "wilcoxon": "responding genes by Wilcoxon",
    "t_test": "responding genes by Welch's t",
    "t_test_overestim_var": "responding genes by t (overestimated variance)",
}
_FORMS = {"skill": "skill: 1 as a replicate, 0 as control cells"}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One metric. ``title`` names the score ("Cosine"), ``effect`` what it is taken on ("change from control")."""

    name: str
    title: str
    effect: str
    higher_is_better: bool
    best: float | None
    chance: float | None
    unit: str

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.higher_is_better else -1

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def short(self) -> str:
        """The title inside a sentence: "cosine", but "RMSE" and "Pearson"."""
        lower = self.title[1:2].islower() and not self.title.startswith(("Pearson", "Spearman", "Jaccard"))
        return self.title[0].lower() + self.title[1:] if lower else self.title

    @classmethod
    def of(cls, name: str, recorded: Mapping | None = None) -> "Scale":
        """From the plan's entry of the metric; what it leaves out is read from the name."""
        score, _, effect = name.removesuffix("/rank").partition("/")
        effect, _, form = effect.partition("/")
        rank = name.endswith("/rank")
        title = _TITLES.get(score, score)
        facts = {
            "title": f"Rank by {title.lower() if title == 'Cosine' else title}" if rank else title,
            "effect": ", ".join(filter(None, [_EFFECTS.get(effect, effect), _FORMS.get(form, form)])),
            "higher_is_better": not rank and score not in _LOWER,
            "best": 0.0 if rank else None,
            "chance": 0.5 if rank else None,
            "unit": "0 best, 1 worst" if rank else _UNITS.get(score, ""),
        }
        given = {key: value for key, value in (recorded or {}).items() if key in facts and value is not None}
        return cls(name=name, **(facts | given))
