"""Events: what the engine tells whoever watches a sweep run; a display or a recorder is a class with some of its methods."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perturbray.cluster import Cluster
    from perturbray.placement import Placement
    from perturbray.plan import Plan


class Events:
    """What the engine tells whoever watches; every method may be left as it is."""

    def line(self, text: str) -> None:
        """A line for the user."""

    def connected(self, cluster: "Cluster", placement: "Placement", tune_folder: Path) -> None:
        """Ray is there, and the trials fit."""

    def planned(self, plan: "Plan") -> None:
        """Keys are known, and the plan is stored."""

    def started(self, key: str) -> None:
        """A trial began to run."""

    def reported(self, key: str, values: Mapping[str, Any]) -> None:
        """A trial told its losses after an epoch, and what it takes."""

    def stopped(self, key: str) -> None:
        """A trial ended, well or not; its scores may still be under way."""

    def lost(self, key: str) -> None:
        """A trial ended with its process, and is run again."""

    def tried(self, search: str, number: int, values: Mapping[str, Any]) -> None:
        """A search, by the name of its folder, began a trial with these values."""

    def learnt(self, search: str, number: int, values: Mapping[str, Any]) -> None:
        """What a trial of a search told after an epoch."""

    def judged(self, search: str, number: int) -> None:
        """A trial of a search ended, well or not."""

    @contextmanager
    def watching(self, plan: "Plan") -> Iterator[None]:
        """Around the running of trials."""
        yield
