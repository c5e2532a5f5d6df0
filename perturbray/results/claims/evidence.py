"""Evidence: the columns of a sweep as claims ask for them, and estimates from functions of their means."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perturbray.results import intervals
from perturbray.results.cube import Cube
from perturbray.results.summary import Summary

Column = tuple[str, object, str]  # metric, level, series


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval; NaN ends where there is none."""

    subjects: tuple[str, ...]  # of what it is
    value: float
    low: float
    high: float
    seeds: int
    conditions: int  # 0: it does not rest on conditions


@dataclass(frozen=True)
class Need:
    """What a claim cannot be tested without."""

    text: str
    met: Callable[["Evidence"], bool]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A sweep under test. A model stands for its main series: tuned before untuned, without an embedding before with."""

    summary: Summary
    cube: Cube
    main: Mapping[str, str]  # model -> series
    embedded: Mapping[tuple[str, str], str]  # model, embedding -> series

    @classmethod
    def of(cls, summary: Summary) -> "Evidence":
        found = summary.trials.drop_duplicates("series").copy()
        place = {series: number for number, series in enumerate(summary.series)}
        text = {name: found[name].astype(object) if name in found else "" for name in ("variant", "model.embedding")}
        found = found.assign(
            variant=text["variant"], embedding=text["model.embedding"], place=found["series"].map(place)
        )
        found["variant"] = found["variant"].where(found["variant"].map(lambda one: isinstance(one, str)), "")
        found["embedding"] = found["embedding"].where(found["embedding"].map(lambda one: isinstance(one, str)), "")
        found["order"] = found["variant"].map({"tuned": 0, "": 1}).fillna(2)
        found = found.sort_values(["embedding", "order", "place"], kind="stable")
        first = found.drop_duplicates(["model", "embedding"])
        return cls(
            summary=summary,
            cube=summary.cube,
            main=dict(found.drop_duplicates("model")[["model", "series"]].itertuples(index=False)),
            embedded={(row.model, row.embedding): row.series for row in first.itertuples() if row.embedding},
        )

    @property
    def axis(self) -> str:
        """What rises along the levels: imbalance, data, or nothing that claims know ("")."""
        x = self.summary.plan.get("x", "")
        return "" if len(self.summary.levels) < 2 else "data" if self.summary.of_data else x

    @property
    def base(self) -> object:
        """The level at which nothing is taken away: the lowest imbalance, the most data."""
        return self.summary.base

    @cached_property
    def halves(self) -> Cube:
        """Values against one half of the observed cells at the base level, with the replicate as a series."""
        return Cube.of(self.summary.half_rows, bootstrap=self.cube.bootstrap)

    @property
    def splits(self) -> set[str]:
        return set(self.summary.trials["split"].astype(str)) if "split" in self.summary.trials else set()

    @property
    def models(self) -> list[str]:
        """Models that are no baselines, in the plan's order."""
        baselines = set(self.summary.trials.loc[self.summary.trials["baseline"], "model"])
        place = {series: number for number, series in enumerate(self.summary.series)}
        return sorted((name for name in self.main if name not in baselines), key=lambda name: place[self.main[name]])

    def has(self, *columns: Column) -> bool:
        """Whether all are there, without a failed prediction."""
        found = [place(self.cube, column) for column in columns]
        return None not in found and not self.cube.failed[found].any()

    def failed(self, metric: str) -> list[str]:
        """Series with a failed prediction by a metric, at whatever level: claims leave them out, and say so."""
        broken = self.cube.failed & (self.cube.columns["metric"] == metric).to_numpy()
        return sorted(set(self.cube.columns.loc[broken, "series"]))

    def estimates(
        self,
        subjects: Sequence[tuple[str, ...]],
        columns: Sequence[Column],
        function: Callable[[np.ndarray], np.ndarray],
        *,
        cube: Cube | None = None,
    ) -> list[Estimate]:
        """A function of the means of columns, (..., columns) -> (..., subjects), with intervals that hold together.

        All columns are taken on the conditions that all have; the draws are of conditions, with seeds nested.
        """
        cube = cube or self.cube
        places = [place(cube, column) for column in columns]
        joint = cube.joint(places)
        value, draws = joint.estimate(function)
        half = intervals.simultaneous(draws)
        none = joint.failed | ~np.isfinite(value) | ~np.isfinite(half) | (joint.conditions < intervals.FEWEST)
        low, high = np.where(none, np.nan, value - half), np.where(none, np.nan, value + half)
        seeds = int(cube.seeds[places].min())
        return [
            Estimate(
                subjects=who, value=float(v), low=float(a), high=float(b), seeds=seeds, conditions=joint.conditions
            )
            for who, v, a, b in zip(subjects, value, low, high, strict=True)
        ]

    def contrasts(self, weights: Mapping[tuple[str, ...], Mapping[Column, float]]) -> list[Estimate]:
        """Weighted sums of columns, by their subjects; those of columns that are not there, or failed, are left out."""
        weights = {who: parts for who, parts in weights.items() if self.has(*parts)}
        if not weights:
            return []
        columns = list(dict.fromkeys(column for parts in weights.values() for column in parts))
        matrix = np.array([[parts.get(column, 0.0) for column in columns] for parts in weights.values()])
        return self.estimates(list(weights), columns, lambda means: means @ matrix.T)


def place(cube: Cube, column: Column) -> int | None:
    """The number of a column, or None."""
    return cube.find(**dict(zip(("metric", "level", "series"), column, strict=True)))
