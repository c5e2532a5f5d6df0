"""Processes and their descendants: who they are, whether they live, and what a kill leaves behind for a while."""

import time
from collections.abc import Callable
from pathlib import Path

HANG = 400  # seconds
ORPHANS = 240  # seconds; Ray's agents look for their parent once a minute


def wait(condition: Callable[[], bool], seconds: float = HANG) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def family(process: int) -> set[tuple[int, str]]:
    """A process and its descendants, each with the time that it started, by which a number used again is told."""
    parents, started = {}, {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(place.name)], started[int(place.name)] = int(fields[1]), fields[19]
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {(one, started[one]) for one in found if one in started}


def alive(processes: set[tuple[int, str]]) -> set[tuple[int, str]]:
    left = set()
    for number, started in processes:
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[19] == started and fields[0] != "Z":
            left.add((number, started))
    return left


def wait_for_none(processes: set[tuple[int, str]]) -> None:
    """Return when none of them lives."""
    end = time.monotonic() + ORPHANS
    while left := alive(processes):
        assert time.monotonic() < end, f"left of a command that was killed or interrupted: {named(left)}"
        time.sleep(0.2)


def named(processes: set[tuple[int, str]]) -> list[str]:
    found = []
    for number, _ in sorted(processes):
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found.append(f"{number} {b' '.join(words).decode(errors='replace')[:120]}")
    return found
