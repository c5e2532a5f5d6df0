"""Claims: each is found true where it was built in, and never where it was left out; without what it needs it is left out."""

import numpy as np
import pandas as pd
import pytest
import simulated_scores
from scipy import stats
from simulated_scores import COSINE, RANK, plan, rows

from perturbray.results import intervals
from perturbray.results.claims import power_law
from perturbray.results.claims.claim import FAILS, HOLDS, OPEN, Region, frame, judged
from perturbray.results.claims.evidence import Estimate, Evidence
from perturbray.results.claims.findings import power_law_of
from perturbray.results.claims.published import CLAIMS
from perturbray.results.cube import Cube
from perturbray.results.summary import summarise

ENERGY = "energy/pca"
NAMES = [claim.name for claim in CLAIMS]
LEVELS = (0.0, 0.1, 0.2, 0.3)
AMOUNTS = {0.1: 50.0, 0.2: 100.0, 0.4: 200.0, 0.7: 350.0, 1.0: 500.0}
GPT = {"latent_additive (embedding X_scgpt)": {"model": "latent_additive", "model.embedding": "X_scgpt"}}
PLAIN = {"latent_additive": {"model.embedding": ""}}


def sweep(*tables, x="", anchors=None, **entries):
    table = pd.concat(tables, ignore_index=True)
    return summarise(table, plan(*dict.fromkeys(table["metric"]), x=x, **entries), anchors=anchors, resamples=500)


def both(quality, ranks, **options):
    """By a score and by a rank, which is the better the lower."""
    return rows(quality, **options), rows(ranks, metric=RANK, condition=0.05, own=0.02, noise=0.02, **options)


def combinations(quality, **options):
    return sweep(rows(quality, split="combination", seed=1, **options))


def at_levels(start, loss):
    return {level: start - loss * level / max(LEVELS) for level in LEVELS}


def along(quality, **options):
    return sweep(rows(quality, seed=2, **options), x="imbalance")


def growing(gain, *, base=0.2, exponent=0.5):
    return {level: base + gain * (1 - (amount / 50) ** -exponent) for level, amount in AMOUNTS.items()}


def with_data(quality, *, metric=COSINE, **options):
    table = rows(quality, seed=3, axis="train_conditions", x=AMOUNTS, metric=metric, **options)
    return sweep(table, x="train_conditions")


def additive(quality):
    """The additive baseline at a quality, where no change is 0 and a replicate 0.8."""
    found = {"additive": quality, "no_change": 0.0, "split_half": 0.8}
    table = rows(found, seed=4, split="combination", condition=0.05).assign(value_half=lambda rows: rows["value"])
    anchors = table[(table["model"] == "split_half") & (table["seed"] == 0)].assign(reference="split_half")
    return sweep(table[table["model"] != "split_half"], anchors=anchors)


def energy(x, y):
    """2E‖x−y‖ − E‖x−x'‖ − E‖y−y'‖ without a cell's distance to itself."""
    apart = [np.linalg.norm(a[:, None] - b[None], axis=-1) for a, b in ((x, y), (x, x), (y, y))]
    within = [part.sum() / (len(part) * (len(part) - 1)) for part in apart[1:]]
    return 2 * apart[0].mean() - sum(within)


def responders(share):
    """Cells of which only a share respond, by enough that the mean is the same; predicted as if all responded alike.

    Means and energy distances are those of the cells themselves, against one half; a replicate is the other half.
    """
    rng, parts = np.random.default_rng(5), []
    for number in range(24):
        shift = rng.normal(size=5)
        first, second, control = rng.normal(size=(3, 120, 5))
        first, second = (cells + shift * (rng.random((120, 1)) < share) / share for cells in (first, second))
        predicted = {"no_change": control, "perturbed_mean": control + 0.1, "mean_shift": control + shift}
        for name, cells in {**predicted, "split_half": second}.items():
            gap = first.mean(axis=0) - cells.mean(axis=0)
            for metric, value in (("rmse/average", np.sqrt((gap**2).mean())), (ENERGY, energy(first, cells))):
                facts = {"metric": metric, "value": value, "value_half": value, "status": "", "stratum": "common"}
                parts.append(
                    {"model": name, "name": name, "key": name, "perturbation": f"drug{number}", "seed": 0, **facts}
                )
    table = pd.DataFrame(parts).assign(condition=0, **{"covariate.line": "a"})
    anchors = table[table["model"] == "split_half"].assign(reference="split_half")
    return sweep(table[table["model"] != "split_half"], anchors=anchors)


def covariates_alone(cosine, rank):
    return sweep(*both({"decoder_cov": cosine}, {"decoder_cov": rank}, seed=6))


def embedded(gain, *, x="", start=0.5, loss=None):
    if x:
        quality = {"latent_additive": at_levels(start, 0.2), next(iter(GPT)): at_levels(start, loss)}
    else:
        quality = {"latent_additive": start, next(iter(GPT)): start + gain}
    return sweep(rows(quality, models={**GPT, **PLAIN}, seed=7), x=x)


def unstable(times):
    quality = dict.fromkeys(("biolord_star", "cpa", "decoder", "latent_additive"), 0.5)
    return sweep(rows(quality, seed=8, trial={"biolord_star": 0.01 * times}))


SIMULATORS = {
    "C1": (lambda: additive(0.6), lambda: additive(0.1)),
    "C2": (lambda: combinations({"cpa": 0.6, "additive": 0.5}), lambda: combinations({"cpa": 0.5, "additive": 0.5})),
    "C3": (
        lambda: combinations({"latent_additive": 0.6, "cpa": 0.5, "additive": 0.5}),
        lambda: combinations({"latent_additive": 0.5, "cpa": 0.5, "additive": 0.5}),
    ),
    "C4": (
        lambda: sweep(rows({"sams_vae": 0.4, "sams_vae_s": 0.5, "cpa": 0.4, "cpa_noadv": 0.5}, seed=9)),
        lambda: sweep(rows({"sams_vae": 0.4, "sams_vae_s": 0.4, "cpa": 0.4, "cpa_noadv": 0.5}, seed=9)),
    ),
    "C5": (lambda: covariates_alone(0.3, 0.5), lambda: covariates_alone(0.0, 0.3)),
    "C6": (lambda: embedded(0.0), lambda: embedded(0.1)),
    "C7": (
        lambda: with_data({"cpa": growing(0.4), "decoder": growing(0.3)}),
        lambda: with_data({"cpa": growing(0.4), "decoder": growing(0.0)}),
    ),
    "C8": (
        lambda: with_data({"latent_additive": growing(0.5), "cpa": growing(0.3)}),
        lambda: with_data({"latent_additive": growing(0.3), "cpa": growing(0.3)}),
    ),
    "C9": (
        lambda: with_data({"cpa": growing(-0.05, base=0.5)}, metric=RANK, condition=0.05),
        lambda: with_data({"cpa": growing(-0.4, base=0.5)}, metric=RANK, condition=0.05),
    ),
    "C10": (
        lambda: along({"cpa": at_levels(0.5, 0.1), "decoder": at_levels(0.6, 0.2)}),
        lambda: along({"cpa": at_levels(0.5, 0.0), "decoder": at_levels(0.6, 0.0)}),
    ),
    "C11": (
        lambda: along({"latent_additive": at_levels(0.6, 0.3), "decoder": at_levels(0.6, 0.1)}),
        lambda: along({"latent_additive": at_levels(0.6, 0.1), "decoder": at_levels(0.6, 0.1)}),
    ),
    "C12": (lambda: embedded(0, x="imbalance", loss=0.0), lambda: embedded(0, x="imbalance", loss=0.2)),
    "C13": (lambda: responders(0.2), lambda: responders(1.0)),
    "C14": (
        lambda: sweep(rows({"cpa": 0.3, "latent_additive": 0.5, "decoder": 0.5}, seed=10, metric=ENERGY)),
        lambda: sweep(rows({"cpa": 0.5, "latent_additive": 0.5, "decoder": 0.5}, seed=10, metric=ENERGY)),
    ),
    "C15": (
        lambda: sweep(rows({"cpa": 0.2, "cpa_noadv": 0.15}, seed=11, metric=RANK)),
        lambda: sweep(rows({"cpa": 0.2, "cpa_noadv": 0.25}, seed=11, metric=RANK)),
    ),
    "C16": (lambda: unstable(20), lambda: unstable(1)),
}


def outcomes(summary, name):
    return {
        metric: test.outcome
        for claim, tests in judged(summary, CLAIMS).items()
        if claim.name == name
        for metric, test in tests.items()
    }


def test_there_are_sixteen_claims_and_a_simulator_for_each():
    assert [f"C{number}" for number in range(1, 17)] == NAMES == list(SIMULATORS)


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_holds_where_it_was_built_in(name):
    found = outcomes(SIMULATORS[name][0](), name)
    assert found
    assert set(found.values()) == {HOLDS}


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_does_not_hold_where_it_was_left_out(name):
    found = outcomes(SIMULATORS[name][1](), name)
    assert found
    assert HOLDS not in found.values()


def test_a_claim_that_is_wrong_is_said_not_to_hold():
    worse = along({"cpa": at_levels(0.5, -0.1), "decoder": at_levels(0.6, 0.2)})
    assert outcomes(worse, "C10") == {COSINE: FAILS}
    assert outcomes(combinations({"cpa": 0.4, "additive": 0.5}), "C2") == {COSINE: FAILS}


def test_what_is_worse_does_not_depend_on_which_way_a_metric_points():
    quality = {"cpa": at_levels(0.5, -0.1), "decoder": at_levels(0.6, -0.2)}
    rising = sweep(rows(quality, seed=2, metric="rmse/average"), x="imbalance")
    assert outcomes(rising, "C10") == {"rmse/average": HOLDS}
    assert outcomes(along(quality), "C10") == {COSINE: FAILS}


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_whose_needs_are_not_met_is_left_out(name):
    bare = sweep(rows({"one": 0.5, "two": 0.4}, seed=0))
    assert not outcomes(bare, name)
    claim = CLAIMS[NAMES.index(name)]
    lacking = claim.lacks(Evidence.of(bare))
    assert bool(lacking) is bool(claim.needs)
    assert all(lacking)


def test_the_sentence_says_the_change_its_interval_and_on_what_it_rests():
    summary = along({"latent_additive": at_levels(0.5, 0.12)}, train_conditions=180)
    (test,) = [tests[COSINE] for claim, tests in judged(summary, CLAIMS).items() if claim.name == "C10"]
    found = (
        r"From imbalance 0\.00 to 0\.30, with 180 training conditions at both, the cosine of latent_additive falls by "
        r"0\.\d+ \(95.% interval 0\.\d+ to 0\.\d+; 5 seeds, 40 conditions\)\."
    )
    assert pd.Series([test.sentence]).str.fullmatch(found).all(), test.sentence


def test_the_sentence_says_when_the_data_cannot_tell():
    summary = along({"latent_additive": at_levels(0.5, 0.0)})
    (test,) = [tests[COSINE] for claim, tests in judged(summary, CLAIMS).items() if claim.name == "C10"]
    assert test.outcome == OPEN
    assert "changes by" in test.sentence
    assert test.sentence.endswith("The data cannot tell.")


def test_a_name_with_braces_is_printed_as_it_is():
    summary = along({"latent_{additive}": at_levels(0.5, 0.1), "{0}": at_levels(0.5, 0.1)})
    (test,) = [tests[COSINE] for claim, tests in judged(summary, CLAIMS).items() if claim.name == "C10"]
    assert "of latent_{additive} falls" in test.sentence
    assert "of {0} falls" in test.sentence


def test_too_few_conditions_leave_every_claim_open():
    table = rows({"latent_additive": at_levels(0.9, 0.8)}, seed=2, contexts=1, perturbations=9)
    assert outcomes(sweep(table, x="imbalance"), "C10") == {COSINE: OPEN}


def test_the_estimate_is_the_difference_of_means_over_contexts():
    table = rows({"cpa": at_levels(0.5, 0.1)}, seed=12)
    table = table.drop(
        table.index[(table["covariate.line"] == "1") & (table["condition"] > 30)]
    )  # contexts of unlike size
    (test,) = [t[COSINE] for claim, t in judged(sweep(table, x="imbalance"), CLAIMS).items() if claim.name == "C10"]
    (estimate,) = test.estimates
    by = table.groupby(["ablation.level", "covariate.line"])["value"].mean().groupby("ablation.level").mean()
    assert estimate.value == pytest.approx(by[0.3] - by[0.0])
    assert (estimate.conditions, estimate.seeds) == (31, 5)
    assert estimate.low < estimate.value < estimate.high


def test_the_slope_is_that_of_a_line_through_the_levels():
    summary = with_data({"cpa": growing(0.4)})
    (test,) = [tests[COSINE] for claim, tests in judged(summary, CLAIMS).items() if claim.name == "C7"]
    means = summary.means.sort_values("x")
    assert test.estimates[0].value == pytest.approx(stats.linregress(np.log2(means["x"]), means["mean"]).slope)


def test_the_ratio_of_spreads_has_the_interval_of_the_f_distribution():
    summary = unstable(5)
    (test,) = [tests[COSINE] for claim, tests in judged(summary, CLAIMS).items() if claim.name == "C16"]
    trials = summary.cube.trials
    names = ("biolord_star", "cpa", "decoder", "latent_additive")
    own, *others = [trials[:, summary.cube.find(metric=COSINE, level=0.0, series=name)] for name in names]
    ratio = own.var(ddof=1) / np.mean([values.var(ddof=1) for values in others])
    (estimate,) = test.estimates
    assert estimate.value == pytest.approx(np.sqrt(ratio))
    assert estimate.low == pytest.approx(np.sqrt(ratio / stats.f.ppf(0.975, 4, 12)))
    assert estimate.high == pytest.approx(np.sqrt(ratio / stats.f.ppf(0.025, 4, 12)))


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.1, 0.2, HOLDS), (-0.2, -0.1, FAILS), (-0.1, 0.1, OPEN), (np.nan, np.nan, OPEN), (0.0, 0.0, OPEN)],
)
def test_the_interval_decides(low, high, outcome):
    estimate = Estimate(subjects=("a",), value=0.0, low=low, high=high, seeds=1, conditions=20)
    assert Region(low=0.0).outcome(estimate) == outcome
    turned = Estimate(subjects=("a",), value=0.0, low=-high, high=-low, seeds=1, conditions=20)
    assert Region(low=0.0).turned(-1).outcome(turned) == outcome


def test_the_exponent_of_a_curve_without_noise_is_found():
    amount = np.array([50.0, 100, 200, 400, 800])
    for exponent in (0.1, 0.35, 1.0, 2.5):
        curve = 0.3 + 0.8 * (amount / 50) ** -exponent
        found, floor = power_law.exponents(amount, curve)
        assert found == pytest.approx(exponent, rel=1e-3)
        assert floor == pytest.approx(0.3, abs=0.01)
    several = power_law.exponents(amount, np.stack([0.1 + amount**-0.5, np.full(5, np.nan), 0.2 + 9 * amount**-1.5]))[0]
    np.testing.assert_allclose(several, [0.5, np.nan, 1.5], rtol=1e-3)


def test_the_exponent_lies_in_its_interval():
    hits, widths = 0, []
    amount = np.array(list(AMOUNTS.values()))
    for seed in range(40):
        table = rows({"cpa": growing(0.5, exponent=0.8)}, seed=seed, seeds=3, trial=0.004, noise=0.02)
        levels = table.assign(series="cpa", level=table["ablation.level"])
        joint = Cube.of(levels, bootstrap={"resamples": 300, "seed": 0}).joint(np.arange(len(amount)))
        found = power_law.fit(amount, -joint.means, -joint.draws, -joint.seed_draws, seeds=joint.seeds)
        hits += found.low <= 0.8 <= found.high
        widths.append(found.high - found.low)
    print(f"\nthe exponent lies in its interval: {hits} of 40")
    assert hits >= 34
    assert np.median(widths) < 0.5


@pytest.mark.parametrize(
    ("amounts", "gain", "why"),
    [
        (5, 0.0, "the error does not surely fall"),
        (3, 0.5, "it takes 4 amounts, and there are 3"),
        (5, 0.02, "they do not pin an exponent"),
    ],
)
def test_data_that_bear_no_power_law_are_said_to_bear_none(amounts, gain, why):
    quality = dict(list(growing(gain, exponent=0.8).items())[:amounts])
    table = rows({"cpa": quality}, seed=1, axis="train_conditions", x=AMOUNTS, trial=0.002, noise=0.02)
    summary = sweep(table, x="train_conditions")
    assert power_law_of(Evidence.of(summary), summary.scales[COSINE], "cpa").lacks == why


def test_the_power_law_is_printed_beside_the_slope():
    table = rows(
        {"cpa": growing(0.5, exponent=0.8), "decoder": growing(0.0)},
        seed=1,
        axis="train_conditions",
        x=AMOUNTS,
        trial=0.004,
        noise=0.02,
    )
    (test,) = [
        t[COSINE] for claim, t in judged(sweep(table, x="train_conditions"), CLAIMS).items() if claim.name == "C7"
    ]
    said, none = test.beside
    assert said.startswith("Its distance from the best falls to a floor by a power of the training conditions")
    assert "for cpa (95" in said
    assert none == "No power law for decoder: the error does not surely fall."


def test_a_model_whose_predictions_fail_is_left_out_by_name():
    table = rows({"cpa": at_levels(0.5, 0.1), "decoder": at_levels(0.6, 0.2)}, seed=2)
    lost = table.index[(table["model"] == "decoder") & (table["condition"] == 3) & (table["ablation.level"] == 0.3)]
    table.loc[lost, ["value", "status"]] = [np.nan, "failed_prediction"]
    (finding,) = [f[COSINE] for claim, f in judged(sweep(table, x="imbalance"), CLAIMS).items() if claim.name == "C10"]
    assert [one.subjects for one in finding.estimates] == [("cpa",)]
    assert finding.beside == ["Left out, for failed predictions: decoder."]


def test_the_frame_of_claims_has_a_row_an_estimate():
    found = judged(along({"cpa": at_levels(0.5, 0.1), "decoder": at_levels(0.6, 0.2)}), CLAIMS)
    table = frame(found)
    assert list(table["claim"]) == ["C10", "C10"]
    assert list(table["subject"]) == ["cpa", "decoder"]
    assert (table["low"] < table["value"]).all()
    assert (table["value"] < table["high"]).all()


def test_a_tuned_series_stands_for_its_model_and_an_embedded_one_does_not():
    models = {
        "one": {"model": "latent_additive", "variant": None, "model.embedding": "X_pca"},
        "two": {"model": "latent_additive", "variant": None, "model.embedding": ""},
        "three": {"model": "latent_additive", "variant": "tuned", "model.embedding": ""},
    }
    summary = sweep(rows(dict.fromkeys(models, 0.5), seed=0, models=models))
    evidence = Evidence.of(summary)
    assert evidence.main == {"latent_additive": "latent_additive (tuned)"}
    assert evidence.embedded == {("latent_additive", "X_pca"): "latent_additive (embedding X_pca)"}


def test_claims_are_the_same_whatever_the_order_of_rows():
    table = rows({"cpa": at_levels(0.5, 0.1), "decoder": at_levels(0.6, 0.2)}, seed=2)
    shuffled = table.sample(frac=1, random_state=0)
    one, two = (judged(sweep(part, x="imbalance"), CLAIMS) for part in (table, shuffled))
    assert [t[COSINE].outcome for t in one.values()] == [t[COSINE].outcome for t in two.values()]
    for left, right in zip(one.values(), two.values(), strict=True):
        pairs = zip(left[COSINE].estimates, right[COSINE].estimates, strict=True)
        assert all(a.value == pytest.approx(b.value) for a, b in pairs)


def test_intervals_of_a_claim_hold_together():
    """The same as alone where there is one part, and wider where there are several."""
    one = along({"cpa": at_levels(0.5, 0.1)})
    many = along({"cpa": at_levels(0.5, 0.1), **{f"m{number}": at_levels(0.5, 0.1) for number in range(6)}})
    alone, among = (
        next(t[COSINE].estimates[0] for claim, t in judged(summary, CLAIMS).items() if claim.name == "C10")
        for summary in (one, many)
    )
    change = one.changes.iloc[0]
    assert alone.value == pytest.approx(change["change"])
    assert alone.high - alone.low == pytest.approx(change["high"] - change["low"], rel=0.15)
    assert among.high - among.low > 1.1 * (alone.high - alone.low)
    assert intervals.LEVEL == 0.95


def test_the_simulator_is_what_it_says():
    table = simulated_scores.rows({"one": 0.5, "two": 0.3}, seed=0, perturbations=400)
    means = table.groupby("model")["value"].mean()
    assert means["one"] - means["two"] == pytest.approx(0.2, abs=0.02)
