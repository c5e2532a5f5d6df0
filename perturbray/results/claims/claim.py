"""A claim: what it needs, an estimate with its interval, and a sentence; three outcomes.

To add one, add a `Claim` to those of `published`: its test, in `findings`, says what is estimated and where it must lie.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from perturbray.results import wording
from perturbray.results.claims.evidence import Estimate, Evidence, Need
from perturbray.results.scales import Scale
from perturbray.results.summary import Summary

HOLDS, FAILS, OPEN = "holds", "does not hold", "the data cannot tell"


@dataclass(frozen=True)
class Region:
    """Where an estimate lies if the claim holds."""

    low: float = -np.inf
    high: float = np.inf

    def outcome(self, estimate: Estimate) -> str:
        """The interval decides: inside, outside, or neither."""
        if np.isnan(estimate.low):
            return OPEN
        if estimate.low > self.low and estimate.high < self.high:
            return HOLDS
        return FAILS if estimate.high < self.low or estimate.low > self.high else OPEN

    def turned(self, sign: int) -> "Region":
        """Of a gain as of a value, where a metric's sign is -1."""
        return self if sign > 0 else Region(-self.high, -self.low)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How an estimate is said: where it is surely above 0, surely below, or neither; ``{0}``, ``{1}`` are its subjects.

    ``subject`` goes before, and is not said again of the next estimate of the same first subject.
    """

    above: str
    below: str
    neither: str
    subject: str = "of {0} "

    def said(self, estimate: Estimate, digits: int, *, after: Estimate | None) -> str:
        """Up to the end of its interval, whose bracket is left open."""
        value, low, high = estimate.value, estimate.low, estimate.high
        signless = self.above == self.below
        sure = low > 0 or high < 0
        text = self.neither if not sure else self.above if value > 0 else self.below
        if sure and value < 0 and not signless:
            value, low, high = -value, -high, -low
        sign = not signless and not sure
        spread = wording.ends(low, high, digits, sign=sign) or "no interval"
        lead = "95\N{NO-BREAK SPACE}% interval " if after is None and spread != "no interval" else ""
        named = self.subject if after is None or after.subjects[0] != estimate.subjects[0] else ""
        size = wording.number(value, digits, sign=sign)
        return f"{(named + text).format(*estimate.subjects, size=size)} ({lead}{spread}"


CHANGE = Form(above="rises by {size}", below="falls by {size}", neither="changes by {size}")
GAP = Form(
    above="is higher than that of {1} by {size}",
    below="is lower than that of {1} by {size}",
    neither="differs from that of {1} by {size}",
)
LOSS = Form(
    above="loses {size} less than that of {1}",
    below="loses {size} more than that of {1}",
    neither="changes by {size} against that of {1}",
)
LEVEL = Form(above="is {size}", below="is {size}", neither="is {size}")
TIMES = Form(
    above="is {size} times that of {1}", below="is {size} times that of {1}", neither="is {size} times that of {1}"
)
SHARE = Form(above="goes {size}", below="goes {size}", neither="goes {size}", subject="{0} ")
FURTHER = Form(
    above="goes further by {size}",
    below="goes less far by {size}",
    neither="goes as far, but for {size}",
    subject="{0} ",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found by one metric: all estimates must lie in the region."""

    lead: str  # "From imbalance 0.00 to 0.30 the cosine"
    form: Form
    estimates: Sequence[Estimate]
    region: Region
    digits: int
    beside: Sequence[str] = ()  # further sentences

    @property
    def outcome(self) -> str:
        found = {self.region.outcome(estimate) for estimate in self.estimates}
        return FAILS if FAILS in found else HOLDS if found == {HOLDS} else OPEN

    @property
    def sentence(self) -> str:
        """The estimates with their intervals and on what they rest."""
        pairs = zip(self.estimates, [None, *self.estimates], strict=False)
        parts = [self.form.said(one, self.digits, after=before) for one, before in pairs]
        seeds = min(estimate.seeds for estimate in self.estimates)
        conditions = min(estimate.conditions for estimate in self.estimates)
        counts = f"{seeds} seed{'s' * (seeds != 1)}" + (f", {conditions} conditions" if conditions else "")
        if len(parts) == 1:
            text = f"{self.lead} {parts[0]}; {counts})."
        else:
            text = f"{self.lead} {'), '.join(parts)}); {counts}; the intervals hold together."
        return f"{text} The data cannot tell." if self.outcome == OPEN else text


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that was said of models, which a sweep that has what it needs can test."""

    name: str
    text: str
    source: str
    needs: tuple[Need, ...]
    by: Callable[[Scale], bool]  # the metrics that it is about
    test: Callable[[Evidence, Scale], Finding | None]

    def lacks(self, evidence: Evidence) -> list[str]:
        """What it needs and the sweep does not have."""
        return [need.text for need in self.needs if not need.met(evidence)]

    def judged(self, evidence: Evidence) -> dict[str, Finding]:
        """By metric; empty where something is lacking."""
        if self.lacks(evidence):
            return {}
        scales = [evidence.summary.scales[name] for name in evidence.summary.headline]
        found = {scale.name: self.test(evidence, scale) for scale in scales if self.by(scale)}
        found = {name: finding for name, finding in found.items() if finding is not None and finding.estimates}
        return {name: _beside_failed(finding, evidence.failed(name)) for name, finding in found.items()}


def _beside_failed(finding: Finding, failed: Sequence[str]) -> Finding:
    if not failed:
        return finding
    return replace(finding, beside=[*finding.beside, f"Left out, for failed predictions: {wording.listed(failed)}."])


def judged(summary: Summary, claims: Sequence[Claim]) -> dict[Claim, dict[str, Finding]]:
    """The claims that a sweep tests, with what it found by each metric."""
    if summary.cube is None:
        return {}
    evidence = Evidence.of(summary)
    found = {claim: claim.judged(evidence) for claim in claims}
    return {claim: tests for claim, tests in found.items() if tests}


def frame(found: Mapping[Claim, Mapping[str, Finding]]) -> pd.DataFrame:
    """A row an estimate, for other programs."""
    return pd.DataFrame(
        [
            {
                **{"claim": claim.name, "metric": metric, "outcome": finding.outcome},
                **{"subject": " - ".join(one.subjects), "value": one.value, "low": one.low, "high": one.high},
                **{"seeds": one.seeds, "conditions": one.conditions, "sentence": finding.sentence},
            }
            for claim, findings in found.items()
            for metric, finding in findings.items()
            for one in finding.estimates
        ]
    )
