"""The same task several times: with other seeds, or in turns that together test everything once."""

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from perturbray.data.dataset import Conditions
from perturbray.data.splits.base import SplitSpec, halve
from perturbray.errors import InputError


def repeats(task: SplitSpec, number: int) -> tuple[SplitSpec, ...]:
    """The task under ``number`` seeds, its own and those that follow it."""
    if "seed" not in {f.name for f in fields(task)}:
        raise InputError(f"{type(task).__name__} draws nothing, so it has no seed and all repeats would be one")
    return tuple(replace(task, seed=task.seed + i) for i in range(number))


def rotation(task: SplitSpec, conditions: Conditions) -> tuple[SplitSpec, ...]:
    """Every turn of the task: each condition that may be held out is tested in one of them, and in one only."""
    if not hasattr(task, "turns"):
        raise InputError(
            f"{type(task).__name__} has no turns; transfer, combination, unseen_perturbation and held_out_contexts have"
        )
    return tuple(replace(task, turn=turn) for turn in range(task.turns(conditions)))


def folds_of(fraction: float, *, least: int = 2) -> int:
    """The number of parts of a rotation of which each holds out about ``fraction``."""
    return max(least, round(1 / fraction))


def check_turn(turn: int, turns: int, *, what: str) -> None:
    if turn >= turns:
        raise InputError(f"split.turn={turn}: {what} makes {turns} turns, 0 to {turns - 1}")


def draw_units(
    units: Sequence[str], *, number: int, folds: int, turn: int | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Validation and test: ``number`` of the units, or those of a turn of ``folds`` parts, each tested by halves."""
    if turn is None:
        return halve(rng.choice(units, number, replace=False), rng)
    if len(units) < 2 * folds:
        raise InputError(
            f"split.turn={turn}: {len(units)} cannot be held out in {folds} parts of two or more; raise split.fraction"
        )
    check_turn(turn, 2 * folds, what=f"1 of {folds} parts, tested by halves,")
    parts = [halve(part, rng) for part in np.array_split(rng.permutation(units), folds)]
    validation, test = parts[turn // 2]
    return (test, validation) if turn % 2 else (validation, test)


def equal_folds(left: np.ndarray, right: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """A fold for each pair of codes, so that the folds of every left and of every right code differ by at most one pair.

    That there is one for every set of pairs is de Werra's theorem (equitable edge colouring of bipartite graphs); it is
    found by balancing two folds at a time. (pairs,) int64.
    """
    # Which pairs meet in a fold depends on the order in which they are walked through, so codes and pairs are shuffled.
    order = rng.permutation(len(left))
    ends = rng.permutation(left.max() + 1)[left[order]], left.max() + 1 + rng.permutation(right.max() + 1)[right[order]]
    fold = rng.permutation(np.arange(len(left)) % folds)
    table = np.zeros((left.max() + right.max() + 2, folds), dtype=int)
    for vertex in ends:
        np.add.at(table, (vertex, fold), 1)
    while (table.max(axis=1) - table.min(axis=1)).max() > 1:
        vertex = int(np.argmax(table.max(axis=1) - table.min(axis=1)))
        one, two = int(table[vertex].argmax()), int(table[vertex].argmin())
        pairs = np.flatnonzero((fold == one) | (fold == two))
        fold[pairs] = np.where(_alternate(ends[0][pairs], ends[1][pairs]), one, two)
        table[:, [one, two]] = 0
        for vertices in ends:
            np.add.at(table, (vertices[pairs], fold[pairs]), 1)
    found = np.empty_like(fold)
    found[order] = fold
    return found


def _alternate(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(pairs,) bool, so that of every vertex's pairs half are True, give or take one.

    Vertices of odd degree are joined to a vertex more on the other side, which leaves only even ones; then closed walks
    use every pair once, and taking their pairs in turns halves those of each vertex, since walks between two sides are
    of even length.
    """
    extra = int(max(left.max(), right.max())) + 1  # stands on the left, extra + 1 on the right
    degree = np.bincount(np.concatenate([left, right]), minlength=extra + 2)
    odd = np.flatnonzero(degree % 2)
    on_left = np.isin(odd, left)
    ends = [*zip(left.tolist(), right.tolist(), strict=True)]
    ends += [(int(v), extra + 1) if there else (extra, int(v)) for v, there in zip(odd, on_left, strict=True)]
    if on_left.sum() % 2:
        ends.append((extra, extra + 1))
    at: list[list[int]] = [[] for _ in range(extra + 2)]
    for number, pair in enumerate(ends):
        for vertex in pair:
            at[vertex].append(number)
    used, first = [False] * len(ends), np.zeros(len(ends), dtype=bool)
    for start in range(extra + 2):  # a walk ends where it began, when that vertex has no pair left
        vertex, turn = start, True
        while True:
            while at[vertex] and used[at[vertex][-1]]:
                at[vertex].pop()
            if not at[vertex]:
                break
            number = at[vertex].pop()
            used[number], first[number] = True, turn
            vertex, turn = ends[number][0] + ends[number][1] - vertex, not turn
    return first[: len(left)]
