"""Marks: places and letters on a leaderboard that say who cannot be told from whom."""

from string import ascii_lowercase

import numpy as np

MOST = 60  # series that are lettered: of more, letters say little and take long


def of(apart: np.ndarray) -> list[tuple[int, bool, str]]:
    """Place, whether it is shared, and letters of each series, best first, from which of them are told apart.

    A place is that of the first of its group; a group ends at the first series that is told from its first. Series that
    share a letter cannot be told apart, those that share none can.
    """
    count, start, places = len(apart), 0, []
    while start < count:
        told = np.flatnonzero(apart[start, start:])
        size = int(told[0]) if len(told) else count - start
        places += [(start + 1, size > 1)] * size
        start += size
    return [(*place, text) for place, text in zip(places, letters(apart), strict=True)]


def letters(apart: np.ndarray) -> list[str]:
    """The letters of each series, best first: the compact letter display of Piepho (2004, J. Comput. Graph. Stat. 13:456).

    Every pair that is told apart splits each group that holds both; groups inside another are absorbed. What remains are
    the largest groups without a pair that is told apart, lettered by their best. None for more than ``MOST`` series.
    """
    if len(apart) > MOST:
        return [""] * len(apart)
    groups = [frozenset(range(len(apart)))] if len(apart) else []
    for one, other in np.argwhere(np.triu(apart)):
        split = {part for group in groups if {one, other} <= group for part in (group - {one}, group - {other})}
        whole = [group for group in groups if not {one, other} <= group]
        found = [*whole, *split]
        groups = [group for group in dict.fromkeys(found) if not any(group < wider for wider in found)]
    groups.sort(key=sorted)
    return ["".join(_letter(number) for number, group in enumerate(groups) if at in group) for at in range(len(apart))]


def _letter(number: int) -> str:
    """a to z, then a1 to z1, and so on."""
    return ascii_lowercase[number % 26] + (str(number // 26) if number >= 26 else "")
