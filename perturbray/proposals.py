"""Proposals: which configuration to try next, as a function of what is known, a seed and a number. Knows nothing of Ray.

Nothing is remembered between two calls, so a search that was killed goes on with the configurations that an undisturbed
one would have tried. A way to search is a function in ``WAYS``.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from perturbray.parzen import Parzen
from perturbray.randomness import derive, generator
from perturbray.space import (
    Choice,
    Distribution,
    IntLogUniform,
    LogUniform,
    QUniform,
    Space,
    Value,
    Values,
    counts,
    draw,
    holds,
    points,
    roots_first,
)
from perturbray.space import distribution as distribution_of

STARTUP = 10  # configurations drawn at random before TPE has something to learn from
GOOD, MOST_GOOD = 0.2, 25  # of the known configurations TPE takes the best fifth for good ones, and no more than 25
CANDIDATES = 24  # draws from the good ones, of which TPE takes the most promising
STALE = 10  # trials without a better one, after which every other proposal is one draw as it comes
GAMMA, HYPEROPT_CANDIDATES = 1.0, 24  # HyperOpt's takes the best GAMMA * sqrt(n) of n
TRIES = 50  # proposals in a row that were made before: then there is nothing left to try


@dataclass(frozen=True)
class Seen:
    """A configuration that was tried; no loss: it failed, or it is still under way."""

    values: Values
    loss: float | None


def propose(
    space: Space, seen: Sequence[Seen], *, way: str, seed: int, number: int, startup: int = STARTUP
) -> Values | None:
    """The configuration of trial ``number``, none that was seen; None where there is nothing left to try.

    ``seen``: in the order of their numbers. A failed configuration counts as worse than any other.
    """
    known = {_frozen(one.values) for one in seen}
    tries = WAYS[way](space, seen, seed, number, startup)
    for _, values in zip(range(TRIES) if way != "grid" else count(), tries, strict=False):
        if _frozen(values) not in known:
            return values
    return None


def _frozen(values: Mapping[str, Value]) -> tuple:
    return tuple(sorted(values.items()))


def _random(space: Space, seen: Sequence[Seen], seed: int, number: int, startup: int):
    """Draws that know nothing of each other."""
    return (draw(space, generator(seed, "propose", number, attempt)) for attempt in range(TRIES))


def _grid(space: Space, seen: Sequence[Seen], seed: int, number: int, startup: int):
    """Every combination, in an order drawn from the seed: half of a grid is a fair sample of it."""
    found = list(points(space))
    return (found[i] for i in generator(seed, "grid").permutation(len(found)))


def _tpe(space: Space, seen: Sequence[Seen], seed: int, number: int, startup: int):
    """A tree of Parzen estimators over all hyperparameters at once: what is likely among good configurations and not among
    the others. One by one, as HyperOpt's has them, good values of each are proposed that were never good together, and a
    search stays where it began."""
    inside = [one for one in seen if holds(space, one.values)]  # a point to try first may lie outside
    if len(inside) < startup:
        yield from _random(space, seen, seed, number, startup)
        return
    ranked = sorted(inside, key=lambda one: math.inf if one.loss is None else one.loss)
    split = min(math.ceil(GOOD * len(ranked)), MOST_GOOD)
    good, others = (Parzen(space, [one.values for one in part]) for part in (ranked[:split], ranked[split:]))
    losses = [math.inf if one.loss is None else one.loss for one in inside]
    stale = len(losses) - 1 - losses.index(min(losses)) >= STALE
    # Of many the most promising is always one of their kind: alone it would hold a search in a region that is nearly best.
    draws = 1 if stale and number % 2 else CANDIDATES
    for attempt in range(TRIES):
        rng = generator(seed, "propose", number, attempt)
        drawn = [good.draw(rng) for _ in range(draws)]
        promise = good.log(drawn) - others.log(drawn)
        yield from (drawn[i] for i in np.argsort(-promise, kind="stable"))


def _hyperopt(space: Space, seen: Sequence[Seen], seed: int, number: int, startup: int):
    """The tree of Parzen estimators of HyperOpt (Bergstra et al., NeurIPS 2011), each hyperparameter by itself."""
    inside = [one for one in seen if holds(space, one.values)]  # a point to try first may lie outside
    if len(inside) < startup:
        yield from _random(space, seen, seed, number, startup)
        return
    from hyperopt import base, tpe

    logging.getLogger("hyperopt.tpe").setLevel(logging.WARNING)
    domain = base.Domain(lambda values: 0.0, _expression(space))
    for attempt in range(TRIES):
        trials = _history(space, inside)
        made = tpe.suggest(
            [len(inside)],
            domain,
            trials,
            derive(seed, "propose", number, attempt) % 2**31,
            n_startup_jobs=0,
            n_EI_candidates=HYPEROPT_CANDIDATES,
            gamma=GAMMA,
            verbose=False,
        )
        raw = made[0]["misc"]["vals"]
        yield _values(space, {path: found[0] for path, found in raw.items() if len(found)})


WAYS: dict[str, Callable] = {"tpe": _tpe, "hyperopt": _hyperopt, "random": _random, "grid": _grid}


def _expression(space: Space) -> dict:
    """The space in HyperOpt's terms: numbers with steps are whole numbers of steps, conditions are choices of parts."""
    from hyperopt import hp

    children: dict[tuple[str, Value], list[str]] = {}
    for path, part in space.items():
        if hasattr(part, "then"):
            children.setdefault((part.path, part.value), []).append(path)

    def node(path: str):
        kind = distribution_of(space, path)
        steps = _steps(kind)
        if steps is None:
            logarithm = isinstance(kind, LogUniform)
            ends = (math.log(kind.low), math.log(kind.high)) if logarithm else (kind.low, kind.high)
            return (hp.loguniform if logarithm else hp.uniform)(path, *ends)
        branches = [{child: node(child) for child in children.get((path, value), ())} for value in steps]
        if isinstance(kind, Choice) and (not kind.ordered or any(branches)):
            return hp.choice(path, [{"": number, **branch} for number, branch in enumerate(branches)])
        return hp.quniform(path, -0.499, len(steps) - 0.501, 1) if len(steps) > 1 else hp.choice(path, [{"": 0}])

    return {path: node(path) for path, part in space.items() if not hasattr(part, "then")}


def _steps(kind: Distribution) -> tuple[Value, ...] | None:
    return kind.values if isinstance(kind, Choice | QUniform) else None


def _history(space: Space, seen: Sequence[Seen]):
    """What is known, as HyperOpt keeps it."""
    from hyperopt import base

    trials, ids = base.Trials(), list(range(len(seen)))
    results = [
        {"status": base.STATUS_FAIL} if one.loss is None else {"status": base.STATUS_OK, "loss": one.loss}
        for one in seen
    ]
    misc = []
    for tid, one in zip(ids, seen, strict=True):
        raw = {path: [_raw(space, path, one.values[path])] if path in one.values else [] for path in space}
        idxs = {path: [tid] * len(found) for path, found in raw.items()}
        misc.append({"tid": tid, "cmd": ("domain_attachment", "FMinIter_Domain"), "idxs": idxs, "vals": raw})
    documents = trials.new_trial_docs(ids, [None] * len(ids), results, misc)
    for document in documents:
        document["state"] = base.JOB_STATE_DONE
    trials.insert_trial_docs(documents)
    trials.refresh()
    return trials


def _raw(space: Space, path: str, value: Value) -> int | float:
    kind = distribution_of(space, path)
    steps = _steps(kind)
    return float(value) if steps is None else next(i for i, known in enumerate(steps) if known == value)


def _values(space: Space, raw: Mapping[str, float]) -> Values:
    values: Values = {}
    for path in roots_first(space):
        if not counts(space, path, values):
            continue
        kind = distribution_of(space, path)
        steps = _steps(kind)
        if steps is not None:
            values[path] = steps[min(max(round(float(raw[path])), 0), len(steps) - 1)]
        else:
            value = float(np.clip(raw[path], kind.low, kind.high))
            values[path] = round(value) if isinstance(kind, IntLogUniform) else value
    return {path: values[path] for path in space if path in values}
