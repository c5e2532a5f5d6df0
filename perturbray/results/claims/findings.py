"""What claims need and what they find: from columns of a sweep to estimates, and where these must lie for a claim."""

from collections.abc import Callable, Iterable

import numpy as np

from perturbray.results import intervals, wording
from perturbray.results.anchors import MEAN_RESPONSE, NO_CHANGE, REPLICATE
from perturbray.results.claims import power_law
from perturbray.results.claims.claim import CHANGE, FURTHER, GAP, LEVEL, LOSS, SHARE, TIMES, Finding, Form, Region
from perturbray.results.claims.evidence import Column, Estimate, Evidence, Need, place
from perturbray.results.scales import Scale

LATENT = "latent_additive"
BLIND = ("decoder_cov",)  # does not see the perturbation, and so has nothing to lose or to gain
LINEAR = ("linear_additive", "linear_plain", *BLIND)  # not what is meant by a deep model
VAES = ("cpa", "cpa_noadv", "sams_vae", "sams_vae_s", "biolord_star")
SHIFTS = ("mean_shift", "additive")  # baselines that add the mean of an effect to each control cell
COMBINED = {"combination", "combination_published"}  # splits whose test conditions are combinations alone
NEAR = 0.05  # of the span of a metric: within it two values are called alike
FAIR = 0.15  # half of the published cosine of the covariate-only decoder
ADDITIVE = 0.5  # of the way from no change to a replicate, above which effects are mostly additive
UNSTABLE = 2.0  # times the spread over seeds of the others
RANK_LEAST = 0.4

ANY = Region(low=0.0)
WORSE = Region(high=0.0)


def of_means(scale: Scale) -> bool:
    return not of_cells(scale)


def is_score(scale: Scale) -> bool:
    return of_means(scale) and not is_rank(scale)


def is_rank(scale: Scale) -> bool:
    return scale.name.endswith("/rank")


def of_cells(scale: Scale) -> bool:
    """Whether it looks at how cells are distributed, and not at their mean alone."""
    return scale.name.partition("/")[0] in ("energy", "mmd") and not is_rank(scale)


# what claims need


def models(*names: str) -> Need:
    return Need(f"the models {', '.join(names)}", lambda evidence: set(names) <= set(evidence.main))


def one_of(*names: str) -> Need:
    return Need(f"one of {', '.join(names)}", lambda evidence: bool(set(names) & set(evidence.main)))


def pair(*pairs: tuple[str, str]) -> Need:
    text = " or ".join(" with ".join(pair) for pair in pairs)
    return Need(text, lambda evidence: any(set(pair) <= set(evidence.main) for pair in pairs))


def axis(name: str) -> Need:
    return Need(f"levels of {name}", lambda evidence: evidence.axis == name)


COMBINATIONS = Need("held-out combinations", lambda evidence: bool(evidence.splits) and evidence.splits <= COMBINED)
HALVES = Need("replicates of the test conditions", lambda evidence: evidence.summary.half_rows is not None)
EMBEDDED = Need("a model with and without scGPT's embedding of cells", lambda evidence: bool(with_embedding(evidence)))


def with_embedding(evidence: Evidence) -> list[tuple[str, str]]:
    """Series with scGPT's embedding, and the same model's without one."""
    plain = {row.series for row in evidence.summary.trials.itertuples()} - set(evidence.embedded.values())
    return [
        (series, evidence.main[model])
        for (model, name), series in evidence.embedded.items()
        if "scgpt" in name.lower() and evidence.main[model] in plain
    ]


# what estimates are made of


def _span(evidence: Evidence, scale: Scale, columns: Iterable[Column]) -> float:
    """From chance to the best; of a metric without chance the mean of what is compared."""
    if scale.chance is not None and scale.best is not None:
        return abs(scale.best - scale.chance)
    found = [place(evidence.cube, column) for column in columns]
    means = np.abs(evidence.cube.means[[at for at in found if at is not None]])
    return float(means[np.isfinite(means)].mean()) if np.isfinite(means).any() else 1.0


def _short(evidence: Evidence, scale: Scale) -> str:
    return wording.short(evidence.summary, scale.name)


def _digits(evidence: Evidence, scale: Scale) -> int:
    return wording.decimals(evidence.summary, scale.name)


def _at(evidence: Evidence, scale: Scale, level: object, *, of: str = "") -> str:
    where = wording.level_name(evidence.summary, level)
    lead = "The" if where == wording.ALL else f"At {where} the"
    return f"{lead} {of}{_short(evidence, scale)}"


def _gaps(evidence: Evidence, scale: Scale, level: object, pairs: Iterable[tuple[str, str]]) -> list[Estimate]:
    """Of series: the first minus the second."""
    name = scale.name
    return evidence.contrasts({(a, b): {(name, level, a): 1.0, (name, level, b): -1.0} for a, b in pairs})


def versus(
    pairs: Callable[[Evidence], Iterable[tuple[str, str]]], *, region: Region = ANY, form: Form = GAP
) -> Callable[[Evidence, Scale], Finding]:
    """A test that at the base level the first series of each pair gains on the second."""

    def test(evidence: Evidence, scale: Scale) -> Finding:
        return Finding(
            lead=_at(evidence, scale, evidence.base),
            form=form,
            estimates=_gaps(evidence, scale, evidence.base, pairs(evidence)),
            region=region.turned(scale.sign),
            digits=_digits(evidence, scale),
        )

    return test


def named(*pairs: tuple[str, str]) -> Callable[[Evidence], list[tuple[str, str]]]:
    """Pairs of models, as far as they are there, as pairs of series."""
    return lambda evidence: [tuple(evidence.main[m] for m in pair) for pair in pairs if set(pair) <= set(evidence.main)]


def against_all(evidence: Evidence) -> list[tuple[str, str]]:
    """Latent additive against every other model and baseline."""
    others = [series for model, series in evidence.main.items() if model != LATENT]
    order = evidence.summary.series
    return [(evidence.main[LATENT], series) for series in sorted(others, key=order.index)]


def deep(evidence: Evidence) -> list[tuple[str, str]]:
    deep = [model for model in evidence.models if model not in LINEAR]
    return [(evidence.main[model], evidence.main["additive"]) for model in deep]


def vaes(evidence: Evidence) -> list[tuple[str, str]]:
    there = evidence.main
    return [(there[a], there[b]) for a in VAES if a in there for b in (LATENT, "decoder") if b in there]


def _seeing(evidence: Evidence) -> list[str]:
    """Series of models that see the perturbation."""
    return [evidence.main[model] for model in evidence.models if model not in BLIND]


def _way(means: np.ndarray, sign: int) -> np.ndarray:
    """How far the first of three columns goes from the second to the third, (..., 3) -> (...); NaN where that is no gain."""
    way = sign * (means[..., 2] - means[..., 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        gone = sign * (means[..., 0] - means[..., 1]) / way
    return np.where(way > 0, gone, np.nan)


# tests of their own kind


def additive(evidence: Evidence, scale: Scale) -> Finding | None:
    """C1: how far the additive baseline goes from no change to a replicate, against the same halves."""
    cube, level = evidence.halves, evidence.base
    columns = [(scale.name, level, name) for name in (evidence.main["additive"], evidence.main[NO_CHANGE], REPLICATE)]
    found = [place(cube, column) for column in columns]
    if None in found or cube.failed[found].any():
        return None

    return Finding(
        lead=f"Of the way from no change to a replicate, by {_short(evidence, scale)},",
        form=SHARE,
        estimates=evidence.estimates(
            [("the sum of the singles' effects",)], columns, lambda means: _way(means, scale.sign)[..., None], cube=cube
        ),
        region=Region(low=ADDITIVE),
        digits=2,
    )


def blind(evidence: Evidence, scale: Scale) -> Finding | None:
    """C5: the covariate-only decoder ranks at chance, though its cosine is fair."""
    region = Region(0.5 - NEAR, 0.5 + NEAR) if is_rank(scale) else Region(low=FAIR)
    if not is_rank(scale) and not scale.name.startswith("cosine"):
        return None
    column = (scale.name, evidence.base, evidence.main["decoder_cov"])
    return Finding(
        lead=_at(evidence, scale, evidence.base),
        form=LEVEL,
        estimates=evidence.contrasts({(column[2],): {column: 1.0}}),
        region=region,
        digits=_digits(evidence, scale),
    )


def alike(evidence: Evidence, scale: Scale) -> Finding:
    """C6: with and without the embedding within ``NEAR`` of the span."""
    pairs = with_embedding(evidence)
    span = _span(evidence, scale, [(scale.name, evidence.base, series) for pair in pairs for series in pair])
    return versus(lambda _: pairs, region=Region(-NEAR * span, NEAR * span))(evidence, scale)


def rises(evidence: Evidence, scale: Scale) -> Finding:
    """C7: the slope per doubling of the training data is a gain for every model; and the power law beside it."""
    levels = evidence.summary.levels
    x = np.log2(levels["x"].to_numpy(float))
    weight = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    series = [
        one for one in _seeing(evidence) if evidence.has(*[(scale.name, level, one) for level in levels["level"]])
    ]
    weights = {
        (one,): {(scale.name, level, one): w for level, w in zip(levels["level"], weight, strict=True)}
        for one in series
    }
    return Finding(
        lead=f"With each doubling of the {_amount(evidence)} the {_short(evidence, scale)}",
        form=CHANGE,
        estimates=evidence.contrasts(weights),
        region=ANY.turned(scale.sign),
        digits=_digits(evidence, scale) + 1,
        beside=_power_laws(evidence, scale, series),
    )


def _amount(evidence: Evidence) -> str:
    return evidence.summary.plan["x"].replace("_", " ").replace("train ", "training ")


def _power_laws(evidence: Evidence, scale: Scale, series: list[str]) -> list[str]:
    """A sentence on the models whose error falls by a power law, and one on the others."""
    borne, others = [], {}
    for one in series:
        law = power_law_of(evidence, scale, one)
        if law.lacks:
            others.setdefault(law.lacks, []).append(one)
        else:
            spread = wording.ends(law.low, law.high, 2, sign=False)
            lead = "" if borne else "95\N{NO-BREAK SPACE}% interval "
            borne.append(f"{wording.number(law.exponent, 2)} for {one} ({lead}{spread})")
    text = f"Its distance from the best falls to a floor by a power of the {_amount(evidence)}, with exponent"
    said = [f"{text} {', '.join(borne)}."] if borne else []
    return said + [f"No power law for {wording.listed(names)}: {why}." for why, names in others.items()]


def power_law_of(evidence: Evidence, scale: Scale, series: str) -> power_law.PowerLaw:
    """Of one series; the error is the metric itself, or its negative where higher is better: the floor takes up the rest."""
    levels = evidence.summary.levels
    joint = evidence.cube.joint([place(evidence.cube, (scale.name, level, series)) for level in levels["level"]])
    value, inside, between = (-scale.sign * part for part in (joint.means, joint.draws, joint.seed_draws))
    return power_law.fit(levels["x"].to_numpy(float), value, inside, between, seeds=joint.seeds)


def never_below(evidence: Evidence, scale: Scale) -> Finding:
    """C9: at the most data."""
    columns = [(scale.name, evidence.base, evidence.main[model]) for model in evidence.models]
    return Finding(
        lead=_at(evidence, scale, evidence.base),
        form=LEVEL,
        estimates=evidence.contrasts({(column[2],): {column: 1.0} for column in columns}),
        region=Region(low=RANK_LEAST),
        digits=_digits(evidence, scale),
    )


def _ends(evidence: Evidence) -> tuple[object, object]:
    levels = evidence.summary.levels["level"]
    return levels.iloc[0], levels.iloc[-1]


def _change_of(evidence: Evidence, scale: Scale, series: str, weight: float = 1.0) -> dict[Column, float]:
    low, high = _ends(evidence)
    return {(scale.name, high, series): weight, (scale.name, low, series): -weight}


def _from_to(evidence: Evidence, scale: Scale) -> str:
    """ "From imbalance 0.00 to 0.30, with 180 training conditions at both, the cosine"."""
    text = wording.from_to(evidence.summary, *_ends(evidence))
    trials = evidence.summary.trials
    if "train_conditions" in trials:
        counts = trials.groupby("level")["train_conditions"].mean().loc[list(_ends(evidence))].round().astype(int)
        first, last = counts.to_numpy()
        same = abs(first - last) <= 0.01 * first
        text += f", with {first:,} training conditions" + (
            " at both," if same else f" at the one and {last:,} at the other,"
        )
    return f"{text} the {_short(evidence, scale)}"


def harm(evidence: Evidence, scale: Scale) -> Finding:
    """C10: every model gets worse."""
    weights = {(series,): _change_of(evidence, scale, series) for series in _seeing(evidence)}
    return Finding(
        lead=_from_to(evidence, scale),
        form=CHANGE,
        estimates=evidence.contrasts(weights),
        region=WORSE.turned(scale.sign),
        digits=_digits(evidence, scale),
    )


def loses(
    pairs: Callable[[Evidence], Iterable[tuple[str, str]]], region: Region
) -> Callable[[Evidence, Scale], Finding]:
    """What the first series of a pair gains on the second from one end to the other, in the metric's good direction."""

    def test(evidence: Evidence, scale: Scale) -> Finding:
        weights = {}
        for one, other in pairs(evidence):
            own = _change_of(evidence, scale, one, scale.sign)
            weights[one, other] = own | _change_of(evidence, scale, other, -scale.sign)
        return Finding(
            lead=_from_to(evidence, scale),
            form=LOSS,
            estimates=evidence.contrasts(weights),
            region=region,
            digits=_digits(evidence, scale),
        )

    return test


def against_seeing(evidence: Evidence) -> list[tuple[str, str]]:
    own = evidence.main[LATENT]
    return [(own, series) for series in _seeing(evidence) if series != own]


def blind_to_cells(evidence: Evidence, scale: Scale) -> Finding | None:
    """C13: by a score of means a prediction stands near a replicate, by the distribution of cells it does not.

    Of a prediction that shifts all cells alike, the better of ``SHIFTS``: it has the noise of cells and no unlike response.
    A difference of scaled scores (``anchors``).
    """
    cube, level = evidence.halves, evidence.base
    cells = next((one for one in evidence.summary.scales.values() if of_cells(one)), None)
    best, response = None, evidence.main[MEAN_RESPONSE]
    for series in (evidence.main[model] for model in SHIFTS if model in evidence.main):
        columns = [
            (metric, level, name)
            for metric in (scale.name, getattr(cells, "name", ""))
            for name in (series, response, REPLICATE)
        ]
        found = [place(cube, column) for column in columns]
        if None in found or cube.failed[found].any():
            continue
        reached = scale.sign * cube.means[found[0]]
        best = max(best or (-np.inf, "", []), (reached, series, columns))
    if best is None:
        return None

    def gap(means: np.ndarray) -> np.ndarray:
        return (_way(means[..., :3], scale.sign) - _way(means[..., 3:], cells.sign))[..., None]

    return Finding(
        lead=f"From the mean response towards a replicate, by {_short(evidence, scale)} and not by {cells.short},",
        form=FURTHER,
        estimates=evidence.estimates([(best[1],)], best[2], gap, cube=cube),
        region=ANY,
        digits=2,
    )


def not_hurt(evidence: Evidence, scale: Scale) -> Finding:
    """C15: without the adversary no worse, by more than a fifth of ``NEAR``."""
    pairs = named(("cpa_noadv", "cpa"))
    span = _span(evidence, scale, [])
    return versus(pairs, region=Region(low=-NEAR / 5 * span))(evidence, scale)


def unstable(evidence: Evidence, scale: Scale) -> Finding | None:
    """C16: the ratio of standard deviations over seeds, with the interval of the F distribution for normal values."""
    from scipy import special  # here, so that pages of sweeps without it open fast

    others = [evidence.main[model] for model in evidence.models if model != "biolord_star"]
    variances = []
    for series in (evidence.main["biolord_star"], *others):
        at = place(evidence.cube, (scale.name, evidence.base, series))
        values = np.array([]) if at is None else evidence.cube.trials[:, at]
        values = values[np.isfinite(values)]
        variances.append((values.var(ddof=1), len(values) - 1) if len(values) > 2 else (0.0, 0))
    (own, free), rest = variances[0], [pair for pair in variances[1:] if pair[1]]
    total = sum(n for _, n in rest)
    pooled = sum(v * n for v, n in rest) / total if total else 0.0
    if not free or not pooled:
        return None
    tail = (1 + intervals.LEVEL) / 2
    low, high = (special.fdtri(free, total, p) for p in (1 - tail, tail))
    value, ends = np.sqrt(own / pooled), np.sqrt([own / pooled / high, own / pooled / low])
    subjects = (evidence.main["biolord_star"], "the others together")
    estimate = Estimate(
        subjects=subjects, value=value, low=float(ends[0]), high=float(ends[1]), seeds=free + 1, conditions=0
    )
    lead = _at(evidence, scale, evidence.base, of="standard deviation over seeds of the ")
    return Finding(lead=lead, form=TIMES, estimates=[estimate], region=Region(low=UNSTABLE), digits=1)
