"""Rankings: which of the conditions that nobody measured to measure next, from what fitted models predict of all."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from perturbray.counterfactual.cells import Asked, effects, unpredictable
from perturbray.counterfactual.controls import Controls
from perturbray.data.splits import TRAIN, UNUSED
from perturbray.embeddings.vectors import Vectors
from perturbray.errors import InputError, nearest
from perturbray.randomness import generator
from perturbray.training.fitted import Fitted

KINDS = ("perturbations", "contexts")
RANKINGS = ("deviation", "effect", "similarity", "spread")


def read_signature(path: str, genes: Sequence[str]) -> np.ndarray:
    """(genes,) a signature from a CSV file of two columns, gene and value; 0 for a gene that it does not name."""
    vectors = Vectors.read(path)
    if vectors.values.shape[1] != 1:
        raise InputError(f"{path}: a signature has two columns, gene and value; it has {1 + vectors.values.shape[1]}")
    values, found = vectors.select(genes, missing="zero")
    if not found.any() or not values.any():
        raise InputError(
            f"{path}: none of its {len(vectors.names)} genes is a gene of the model, e.g. {vectors.names[0]!r}; "
            f"{nearest(vectors.names[0], genes)}"
        )
    return values[:, 0]


def rank(
    fitted: Sequence[Fitted],
    controls: Controls,
    *,
    kind: str = "perturbations",
    signature: np.ndarray | None = None,
    by: str | None = None,
) -> pd.DataFrame:
    """Every pair of perturbations in every context of the controls, or every (perturbation, context), the best first.

    Several fits differ in their seed. ``effect``: root mean square over genes of the mean predicted effect;
    ``deviation``: that of what it has beyond the sum of its singles' effects, as predicted, or, of a perturbation in a
    context, beyond its mean effect in the other contexts; ``interaction``: by how much of that sum the effect exceeds it
    (below 0: buffering); ``spread``: root mean square over genes of the standard deviation over fits; ``similarity``:
    cosine with the signature. ``measured``: whether the screen has the condition; ``trained``: whether the fit saw it.
    """
    if by is None:
        by = "similarity" if signature is not None else "deviation"
    if by not in RANKINGS or (by == "similarity" and signature is None) or (by == "spread" and len(fitted) < 2):
        why = {"similarity": "it needs a signature", "spread": "it needs two fitted models"}.get(
            by, nearest(by, RANKINGS)
        )
        raise InputError(f"ranking by {by!r}: {why}")
    first = fitted[0]
    for other in fitted[1:]:
        if other.spec != first.spec:
            raise InputError(
                f"{other.path}: this is a {_model(other)}, and {first.path} a {_model(first)}; give fits of one model that "
                "differ in their seed"
            )
        if other.conditions.genes != first.conditions.genes or other.conditions.contexts != first.conditions.contexts:
            raise InputError(f"{other.path}: it was fitted on other genes or contexts than {first.path}")
    asked, parts = _pairs(fitted, controls, kind)
    everything = list(dict.fromkeys([*asked, *itertools.chain.from_iterable(parts.values())]))
    lost = {pair for one in fitted for pair in unpredictable(one, controls, everything)}
    asked = [pair for pair in asked if not lost & {pair, *parts[pair]}]
    if not asked:
        raise InputError(f"{first.path}: nothing can be ranked: the models cannot predict any of the conditions")
    simple = sorted({part for pair in asked for part in parts[pair]})
    alone = [dict(zip(simple, effects(one, controls, simple), strict=True)) for one in fitted]
    rows, present = [], _measured(first)
    for pair, *found in zip(asked, *(effects(one, controls, asked) for one in fitted), strict=True):
        expected = [_expected(of, parts[pair], kind) for of in alone]
        subset = present.get((controls.contexts[pair[0]], pair[1]))
        rows.append(
            {
                **dict(zip(first.conditions.covariates, controls.contexts[pair[0]], strict=True)),
                first.roles["perturbation"]: (first.roles["delimiter"] or "+").join(pair[1]),
                "measured": subset is not None and subset != UNUSED,
                "trained": subset == TRAIN,
                **_values(np.stack(found), np.stack(expected), signature),
            }
        )
    table = pd.DataFrame(rows)
    descending = by != "spread"
    return table.sort_values(by, ascending=not descending, kind="stable", ignore_index=True)


def _model(fitted: Fitted) -> str:
    return f"{fitted.name or type(fitted.spec).__name__} ({fitted.spec})"


def _pairs(fitted: Sequence[Fitted], controls: Controls, kind: str) -> tuple[list[Asked], dict[Asked, list[Asked]]]:
    """What is to be ranked, and the simpler conditions that each is held against."""
    if kind not in KINDS:
        raise InputError(f"pairs of {kind!r}: {nearest(kind, KINDS)}")
    trained = [
        {s for row in np.flatnonzero(one.subset == TRAIN) for s in one.conditions.singles[row]} for one in fitted
    ]
    names = sorted(set.intersection(*trained))
    contexts = range(len(controls.contexts))
    parts: dict[Asked, list[Asked]] = {}
    if kind == "perturbations":
        for context, pair in itertools.product(contexts, itertools.combinations(names, 2)):
            parts[context, pair] = [(context, (single,)) for single in pair]
        if not parts:
            raise InputError(f"{fitted[0].path}: training has {len(names)} perturbation(s), which make no pair")
        return list(parts), parts
    if len(controls.contexts) < 2:
        raise InputError("pairs of perturbations and contexts need controls of two contexts")
    present = _measured(fitted[0])
    for context, name in itertools.product(contexts, names):
        if (controls.contexts[context], (name,)) not in present:
            parts[context, (name,)] = [(other, (name,)) for other in contexts if other != context]
    if not parts:
        raise InputError(f"{fitted[0].path}: every perturbation was measured in every context of the controls")
    return list(parts), parts


def _measured(fitted: Fitted) -> dict[tuple[tuple[str, ...], tuple[str, ...]], int]:
    """The subset of every condition of the screen, by context and singles."""
    conditions = fitted.conditions
    keys = (
        (conditions.contexts[context], singles)
        for context, singles in zip(conditions.context, conditions.singles, strict=True)
    )
    return dict(zip(keys, fitted.subset.tolist(), strict=True))


def _expected(of: dict[Asked, np.ndarray], parts: Sequence[Asked], kind: str) -> np.ndarray:
    simple = [of[part] for part in parts]
    return np.sum(simple, axis=0) if kind == "perturbations" else np.mean(simple, axis=0)


def _values(found: np.ndarray, expected: np.ndarray, signature: np.ndarray | None) -> dict[str, float]:
    """The numbers of a row, from (fits, genes) effects."""
    effect, simple = found.mean(axis=0), expected.mean(axis=0)
    several, norm = len(found) > 1, float(simple @ simple)
    row = {
        "effect": _rms(effect),
        "deviation": _rms(effect - simple),
        "interaction": float(effect @ simple) / norm - 1 if norm else np.nan,
        "spread": _rms(found.std(axis=0, ddof=1)) if several else np.nan,
        "deviation_sd": float(np.std([_rms(gap) for gap in found - expected], ddof=1)) if several else np.nan,
    }
    if signature is not None:
        norm = float(np.linalg.norm(effect) * np.linalg.norm(signature))
        row["similarity"] = float(effect @ signature) / norm if norm else 0.0
    return row


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def enrichment(
    predicted: np.ndarray, true: np.ndarray, *, share: float = 0.2, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """How many times more of the truly strongest stand at the top of a ranking than by chance; and its 95 % interval.

    Both tops are a ``share`` of the conditions, so that the most is 1 / share; chance is 1. The interval is that of a
    bootstrap over conditions.
    """
    rng = generator(seed, "enrichment")
    draws = [np.arange(len(true))] + [rng.integers(len(true), size=len(true)) for _ in range(resamples)]
    values = [_enrichment(predicted[rows], true[rows], share) for rows in draws]
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return values[0], float(low), float(high)


def _enrichment(predicted: np.ndarray, true: np.ndarray, share: float) -> float:
    top = max(1, round(share * len(true)))
    best = np.argsort(-true, kind="stable")[:top]
    # Equal scores are in no order: those at the edge of the top count with the chance to be in it.
    edge = np.sort(predicted)[-top]
    above, level = predicted > edge, predicted == edge
    weight = above + level * (top - above.sum()) / level.sum()
    return float(weight[best].sum() / top * len(true) / top)
