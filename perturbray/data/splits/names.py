"""How a user names contexts and conditions of a screen: names are looked up whole, never parsed, so any label will do."""

from collections.abc import Sequence

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.errors import InputError, nearest

Readings = dict[str, dict[str, set[int]]]  # name -> what it may mean -> codes


def contexts_named(conditions: Conditions, names: Sequence[str], *, field: str) -> np.ndarray:
    """(contexts,) bool. A name is a context's values joined by "," or " / ", or ``covariate=value`` for all that have it.

    Raises InputError for a name that no context has, or that may mean two things.
    """
    found = np.zeros(len(conditions.contexts), dtype=bool)
    readings = _contexts(conditions)
    for name in names:
        found[sorted(_lookup(name, readings, field=field, what="context"))] = True
    return found


def conditions_named(conditions: Conditions, names: Sequence[str], *, field: str) -> np.ndarray:
    """(conditions,) bool, no control condition. A name is that of contexts, as above; a perturbation's label or
    ``perturbation=label``, for it in all contexts; or both joined by ": ", for one condition, as in ``K562: KLF1+FOXA1``.

    Raises InputError for a name that nothing has, or that may mean two things.
    """
    contexts, readings = _contexts(conditions), {}
    rows_of = [
        np.flatnonzero((conditions.context == c) & ~conditions.is_control) for c in range(len(conditions.contexts))
    ]
    for name, kinds in contexts.items():
        for kind, codes in kinds.items():
            rows = {int(row) for code in codes for row in rows_of[code]}
            readings.setdefault(name, {})[kind] = rows
            for row in rows:
                pair = f"{name}: {conditions.perturbation[row]}"
                readings.setdefault(pair, {}).setdefault(f"perturbation of {kind}", set()).add(row)
    for row in np.flatnonzero(~conditions.is_control):
        for name in (str(conditions.perturbation[row]), f"perturbation={conditions.perturbation[row]}"):
            readings.setdefault(name, {}).setdefault("perturbation", set()).add(int(row))
    found = np.zeros(len(conditions), dtype=bool)
    for name in names:
        found[sorted(_lookup(name, readings, field=field, what="perturbation, context or condition"))] = True
    return found


def _contexts(conditions: Conditions) -> Readings:
    readings: Readings = {}
    for code, values in enumerate(conditions.contexts):
        for name in (",".join(values), " / ".join(values)):
            readings.setdefault(name, {}).setdefault(f"context {values}", set()).add(code)
        for covariate, value in zip(conditions.covariates, values, strict=True):
            readings.setdefault(f"{covariate}={value}", {}).setdefault(f"value of {covariate}", set()).add(code)
    return readings


def _lookup(name: str, readings: Readings, *, field: str, what: str) -> set[int]:
    kinds = readings.get(name)
    if kinds is None:
        joined = (
            " (on a command line a semicolon parts names that hold commas)" if any("," in n for n in readings) else ""
        )
        raise InputError(f"{field}: no {what} is named {name!r}; {nearest(name, readings)}{joined}")
    if len({frozenset(codes) for codes in kinds.values()}) > 1:
        raise InputError(
            f"{field}: {name!r} may be {' or '.join(sorted(kinds))}; say covariate=value, perturbation=label or "
            "context: label"
        )
    return next(iter(kinds.values()))
