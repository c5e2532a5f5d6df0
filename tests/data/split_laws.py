"""What every split must keep, said apart from the code that draws; designs and tasks to try it on; and how to break it."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import screens
from hypothesis import strategies as st

from perturbray.data import dataset
from perturbray.data.dataset import Conditions, DatasetSpec
from perturbray.data.splits import (
    SUBSETS,
    TEST,
    TRAIN,
    UNUSED,
    VAL,
    Combination,
    CovariateTransfer,
    HeldOutContexts,
    InverseCombination,
    Manual,
    PublishedCombination,
    PublishedInverseCombination,
    PublishedTransfer,
    Saved,
    Split,
    SplitSpec,
    TransferInto,
    UnseenPerturbation,
)

# Labels and values that tempt a parser: delimiters of other packages, parts of one another, names of sets and of contexts.
LABELS = ("KO", "KO_1", "KO_1_2", "1_2", "A+B", "B+C_1", "A", "B", "C_1", "γ", "drug / 2", "train", "test", "a", "a: A")
COMBINED = ("A", "B", "C_1", "A+B", "B+C_1")
VALUES = ("a", "a_b", "b", "b_c", "K562", "K562 / a", "x+y", "control", "a,b")
SHARES = ((0.5, 0.25, 0.25), (0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.0, 0.4, 0.6))
PUBLISHED = (PublishedTransfer, PublishedCombination, PublishedInverseCombination)


@st.composite
def designs(draw, least: int = 2) -> list[screens.Cell]:
    """Cells of a screen: contexts of one or two covariates, some of one condition, missing pairs, few cells."""
    width = draw(st.integers(1, 2))
    contexts = draw(st.lists(st.tuples(*[st.sampled_from(VALUES)] * width), min_size=least, max_size=5, unique=True))
    labels = draw(st.lists(st.sampled_from(LABELS), min_size=1, max_size=9, unique=True))
    combined = draw(st.booleans())  # with combinations of which most have their singles
    labels = [*dict.fromkeys([*COMBINED, *labels[:4]])] if combined else labels
    cells: list[screens.Cell] = []
    for context in contexts:
        cells += [(context, "control")] * draw(st.sampled_from([6, 9, 15, 30, 30]))
        few = draw(st.integers(0, 4)) == 0
        for label in labels[: 1 if few else None]:
            cells += [(context, label)] * draw(st.sampled_from([1, 1, 1, 1, 3] if combined else [0, 1, 1, 1, 3]))
    cells += [(context, labels[0]) for context in contexts[:2]]  # something that can be held out
    return draw(st.permutations(cells)) if len(cells) < 60 else cells


def conditions_of(cells: list[screens.Cell]) -> Conditions:
    """As screens.conditions_of, without a file."""
    width = len(cells[0][0])
    spec = DatasetSpec(path="", covariates=tuple(f"covariate_{i}" for i in range(width)))
    labels = pd.Series([label for _, label in cells])
    levels = [pd.Series([context[i] for context, _ in cells]) for i in range(width)]
    names = np.array([f"cell_{i:05d}" for i in range(len(cells))], dtype=object)
    return dataset.conditions_of(spec, labels, levels, cell_names=names, genes=np.array(["gene"]))


def _saved(draw, conditions: Conditions) -> Saved:
    """A file that puts every condition anywhere, and the controls of every context everywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    where = rng.integers(0, 4, len(conditions))
    where[rng.choice(np.flatnonzero(~conditions.is_control))] = TEST
    names = {}
    for cell, code in zip(conditions.cell_names, conditions.cell_condition, strict=True):
        number = 1 + len(names) % 3 if conditions.is_control[code] else where[code]
        if number != UNUSED or len(names) % 2:
            names[cell] = ("none", *SUBSETS[1:])[number]
    path = Path(os.environ["PERTURBRAY_CACHE"]) / "drawn-split.csv"
    pd.Series(names).to_csv(path, header=False)
    return Saved(path=str(path))


def pair_of(conditions: Conditions, row: int) -> str:
    """The name of one condition."""
    return f"{','.join(conditions.contexts[conditions.context[row]])}: {conditions.perturbation[row]}"


def _manual(draw, conditions: Conditions) -> Manual:
    rows = draw(
        st.lists(st.sampled_from(np.flatnonzero(~conditions.is_control).tolist()), min_size=1, max_size=6, unique=True)
    )
    names = [pair_of(conditions, row) for row in rows]
    return Manual(test=tuple(names[:2]), val=tuple(names[2:4]), unused=tuple(names[4:]), **_controls(draw))


def _controls(draw) -> dict:
    return {"controls": draw(st.sampled_from(SHARES)), "seed": draw(st.integers(0, 1000))}


def _turn(draw, fraction: float, least: int) -> int | None:
    return draw(st.one_of(st.none(), st.integers(0, 2 * max(least, round(1 / fraction)) - 1)))


def _transfer(draw, conditions: Conditions) -> CovariateTransfer:
    fraction = draw(st.sampled_from([0.1, 0.3, 0.5, 0.9]))
    return CovariateTransfer(
        fraction=fraction,
        max_contexts=draw(st.integers(1, 3)),
        min_train_contexts=draw(st.integers(1, 2)),
        turn=_turn(draw, fraction, 2),
        **_controls(draw),
    )


def _transfer_into(draw, conditions: Conditions) -> TransferInto:
    names = [",".join(values) for values in conditions.contexts]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    return TransferInto(contexts=tuple(chosen), fraction=draw(st.sampled_from([0.3, 0.7, 1.0])), **_controls(draw))


def _combination(draw, conditions: Conditions) -> Combination:
    fraction = draw(st.sampled_from([0.1, 0.3, 0.7, 1.0]))
    missing = draw(st.sampled_from(["to_train", "allow", "error"]))
    return Combination(fraction=fraction, missing_single=missing, turn=_turn(draw, fraction, 1), **_controls(draw))


def _unseen(draw, conditions: Conditions) -> UnseenPerturbation:
    fraction = draw(st.sampled_from([0.1, 0.3, 0.7]))
    return UnseenPerturbation(fraction=fraction, turn=_turn(draw, fraction, 2), **_controls(draw))


def _held_out_contexts(draw, conditions: Conditions) -> HeldOutContexts:
    return HeldOutContexts(
        number=draw(st.integers(1, 2)),
        by=draw(st.sampled_from(["", *conditions.covariates])),
        turn=draw(st.integers(0, 1)),
        unseen=draw(st.sampled_from(["error", "unused", "allow"])),
        **_controls(draw),
    )


# How a task of each name is drawn for given conditions; a new split comes in here.
TASKS: dict[str, Callable[..., SplitSpec]] = {
    "transfer": _transfer,
    "transfer_into": _transfer_into,
    "combination": _combination,
    "inverse_combination": lambda draw, _: InverseCombination(
        fraction=draw(st.sampled_from([0.1, 0.5, 0.9])), **_controls(draw)
    ),
    "unseen_perturbation": _unseen,
    "held_out_contexts": _held_out_contexts,
    "manual": _manual,
    "saved": _saved,
    "transfer_published": lambda draw, _: PublishedTransfer(
        fraction=draw(st.sampled_from([0.3, 0.9])), max_contexts=draw(st.integers(1, 3)), seed=draw(st.integers(0, 99))
    ),
    "combination_published": lambda draw, _: PublishedCombination(
        fraction=draw(st.sampled_from([1.0, 1.0, 0.7])), seed=draw(st.integers(0, 99))
    ),
    "inverse_combination_published": lambda draw, _: PublishedInverseCombination(
        fraction=draw(st.sampled_from([0.3, 0.9])), seed=draw(st.integers(0, 99))
    ),
}


def in_words(conditions: Conditions, split: Split) -> tuple[dict, dict]:
    """The subset of every condition and of every cell, in words."""
    of_condition = {pair: SUBSETS[code] for pair, code in zip(conditions, split.condition, strict=True)}
    of_cell = {n: SUBSETS[code] for n, code in zip(conditions.cell_names.tolist(), split.cell, strict=True)}
    return of_condition, of_cell


def broken(conditions: Conditions, task: SplitSpec, split: Split) -> list[str]:
    """The laws that a split of a task breaks, found from the names of cells, labels and contexts alone."""
    laws = {**_of_cells(conditions, task, split), **_of_conditions(conditions, task, split)}
    return [law for law, kept in laws.items() if not kept]


def _of_cells(conditions: Conditions, task: SplitSpec, split: Split) -> dict[str, bool]:
    of_condition, of_cell = in_words(conditions, split)
    pairs = list(conditions)
    pair_of_cell = dict(zip(conditions.cell_names.tolist(), (pairs[c] for c in conditions.cell_condition), strict=True))
    parts = [split.cells(s, conditions=conditions, controls=c).tolist() for s in range(4) for c in (False, True)]
    controls: dict[tuple, set[str]] = {}
    follows, filled = True, {}
    for cell, where in of_cell.items():
        context, label = pair_of_cell[cell]
        if label == conditions.control:
            controls.setdefault(context, set()).add(where)
        else:
            follows &= where in (of_condition[context, label], "unused")
            filled.setdefault((context, label), set()).add(where)
    used: dict[tuple, set[str]] = {}
    for (context, label), where in of_condition.items():
        if label != conditions.control and where != "unused":
            used.setdefault(context, {"train"}).add(where)
    everywhere = isinstance(task, (Saved, *PUBLISHED)) or all({"train", "val", "test"} <= s for s in controls.values())
    return {
        "every cell stands in one set": sorted(row for part in parts for row in part) == list(range(len(of_cell))),
        "perturbed cells stand where their condition stands": follows,
        "what is judged has cells": all(
            where in filled.get(pair, ()) for pair, where in of_condition.items() if where in ("val", "test")
        ),
        "every set has controls of the contexts it uses, and training of all": all(
            sets <= controls[context] for context, sets in used.items()
        ),
        "every context has controls in every set": everywhere,
    }


def _of_conditions(conditions: Conditions, task: SplitSpec, split: Split) -> dict[str, bool]:
    of_condition, _ = in_words(conditions, split)
    where_of: dict[str, dict[tuple, str]] = {}
    for (context, label), where in of_condition.items():
        if label != conditions.control:
            where_of.setdefault(label, {})[context] = where
    held = {label for label, places in where_of.items() if {"val", "test"} & set(places.values())}
    singles = {label: set(label.split("+")) for label in where_of}
    alone = {(context, label) for label, places in where_of.items() for context in places if len(singles[label]) == 1}
    training = {
        (context, label) for label, places in where_of.items() for context, where in places.items() if where == "train"
    }

    def one_set(sets) -> bool:
        return len(set(sets) - {"unused"}) <= 1

    laws = {
        "control conditions are not held out": all(
            where == "train" for (_, label), where in of_condition.items() if label == conditions.control
        ),
        "something is judged": any(where == "test" for where in of_condition.values()),
        "conditions are left out by those tasks alone that say so": isinstance(task, (Saved, *PUBLISHED))
        or "unused" not in set(of_condition.values()) - ({"unused"} if getattr(task, "unused", ()) else set())
        or getattr(task, "unseen", "") == "unused",
    }
    if isinstance(task, TransferInto) or (isinstance(task, PublishedTransfer) and task.max_contexts == 1):
        laws["a held-out perturbation stays in training elsewhere"] = all(
            "train" in where_of[label].values() for label in held
        )
    if isinstance(task, CovariateTransfer):
        laws["no perturbation is held out in too many contexts"] = all(
            sum(where != "train" for where in where_of[label].values()) <= task.max_contexts for label in held
        ) and all(sum(w == "train" for w in where_of[label].values()) >= task.min_train_contexts for label in held)
    if isinstance(task, Combination | InverseCombination | UnseenPerturbation):
        laws["a label stands in one set, whatever the context"] = all(
            map(one_set, (p.values() for p in where_of.values()))
        )
    if isinstance(task, Combination | PublishedCombination):
        laws["single perturbations stay in training"] = all(len(singles[label]) > 1 for label in held)
    if isinstance(task, Combination) and task.missing_single != "allow":
        laws["the singles of a held-out combination are trained on in its contexts"] = all(
            (context, single) in training for label in held for context in where_of[label] for single in singles[label]
        )
    if isinstance(task, InverseCombination):
        laws["a held-out single is shown in a combination with singles that training shows"] = all(
            len(singles[label]) == 1
            and any(
                label in singles[other]
                and (context, other) in training
                and all((context, single) in training & alone for single in singles[other] - {label})
                for other in where_of
            )
            for label in held
            for context in where_of[label]
        )
    if isinstance(task, UnseenPerturbation):
        gone = {label for label in held if len(singles[label]) == 1}
        laws["training never shows an unseen perturbation"] = not any(singles[label] & gone for _, label in training)
    if isinstance(task, HeldOutContexts):
        contexts = {context for context, _ in of_condition}
        laws["a context stands in one set"] = all(
            one_set(where for (c, label), where in of_condition.items() if c == context and label != conditions.control)
            for context in contexts
        )
    return laws


def leaks(conditions: Conditions, split: Split) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Splits spoilt by one leak each, by what was done: condition and cell."""
    found = {}
    code, control = conditions.cell_condition, conditions.is_control
    held = np.flatnonzero(np.isin(split.condition, [TEST]) & ~control)
    cell = split.cell.copy()
    cell[np.flatnonzero(code == held[0])[0]] = TRAIN
    found["a cell of a test condition is trained on"] = split.condition, cell
    cell = split.cell.copy()
    cell[
        np.isin(code, np.flatnonzero(control & (conditions.context == conditions.context[held[0]]))) & (cell == TEST)
    ] = TRAIN
    found["training takes the test controls of a context"] = split.condition, cell
    cell = split.cell.copy()
    cell[code == held[0]] = UNUSED
    found["a test condition loses its cells"] = split.condition, cell
    condition = split.condition.copy()
    condition[np.flatnonzero(control)[0]] = TEST
    found["a control condition is tested"] = condition, split.cell
    for name, moved in (("validation", VAL), ("training", TRAIN)):
        condition = split.condition.copy()
        condition[held[0]] = moved
        found[f"a test condition moves to {name} and its cells stay"] = condition, split.cell
    return found
