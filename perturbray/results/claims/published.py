"""The sixteen claims of PerturBench's paper (arXiv 2408.10609v4) and slides that a sweep can test; one entry each."""

from collections.abc import Callable

from perturbray.results.anchors import MEAN_RESPONSE, NO_CHANGE
from perturbray.results.claims.claim import Claim
from perturbray.results.claims.evidence import Need
from perturbray.results.claims.findings import (
    ANY,
    COMBINATIONS,
    EMBEDDED,
    HALVES,
    LATENT,
    RANK_LEAST,
    SHIFTS,
    UNSTABLE,
    VAES,
    WORSE,
    additive,
    against_all,
    against_seeing,
    alike,
    axis,
    blind,
    blind_to_cells,
    deep,
    harm,
    is_rank,
    is_score,
    loses,
    models,
    named,
    never_below,
    not_hurt,
    of_cells,
    of_means,
    one_of,
    pair,
    rises,
    unstable,
    vaes,
    versus,
    with_embedding,
)

PAPER, SLIDES = "paper", "slides"


def _claim(name: str, text: str, source: str, by: Callable, test: Callable, *needs: Need) -> Claim:
    return Claim(name=name, text=text, source=source, needs=needs, by=by, test=test)


CELLS = Need(
    "a metric of the distribution of cells", lambda evidence: any(map(of_cells, evidence.summary.scales.values()))
)
DATA, IMBALANCE = axis("data"), axis("imbalance")
BOTH = f"{SLIDES} and {PAPER}"

CLAIMS = (
    _claim(
        "C1",
        "Effects of two perturbations together are mostly additive.",
        SLIDES,
        is_score,
        additive,
        *(COMBINATIONS, HALVES, models("additive", NO_CHANGE)),
    ),
    _claim(
        "C2",
        "Deep models beat additivity, so they capture some interaction.",
        SLIDES,
        of_means,
        versus(deep),
        *(COMBINATIONS, models("additive")),
    ),
    _claim(
        "C3",
        "Latent additive is the best on combinations.",
        BOTH,
        of_means,
        versus(against_all),
        *(COMBINATIONS, models(LATENT)),
    ),
    _claim(
        "C4",
        "SAMS-VAE (S) and CPA without its adversary beat the originals.",
        BOTH,
        of_means,
        versus(named(("sams_vae_s", "sams_vae"), ("cpa_noadv", "cpa"))),
        pair(("sams_vae_s", "sams_vae"), ("cpa_noadv", "cpa")),
    ),
    _claim(
        "C5",
        "A decoder of covariates alone has a fair cosine and ranks at chance, so ranks are needed.",
        SLIDES,
        of_means,
        blind,
        models("decoder_cov"),
    ),
    _claim(
        "C6",
        "scGPT's embedding of control cells gives a similar performance.",
        BOTH,
        of_means,
        alike,
        EMBEDDED,
    ),
    _claim("C7", "Performance rises with training data.", SLIDES, of_means, rises, DATA),
    _claim(
        "C8",
        "With the most data latent additive is the best.",
        SLIDES,
        of_means,
        versus(against_all),
        DATA,
        models(LATENT),
    ),
    _claim("C9", f"No model ranks below {RANK_LEAST}, even with the most data.", PAPER, is_rank, never_below, DATA),
    _claim("C10", "Imbalance hurts every model.", SLIDES, of_means, harm, IMBALANCE),
    _claim(
        "C11",
        "Imbalance hurts latent additive most.",
        SLIDES,
        of_means,
        loses(against_seeing, WORSE),
        *(IMBALANCE, models(LATENT)),
    ),
    _claim(
        "C12",
        "scGPT's embedding buffers imbalance.",
        SLIDES,
        of_means,
        loses(with_embedding, ANY),
        *(IMBALANCE, EMBEDDED),
    ),
    _claim(
        "C13",
        "Scores of means miss that cells respond unlike; distances of distributions see it.",
        SLIDES,
        is_score,
        blind_to_cells,
        *(HALVES, CELLS, models(MEAN_RESPONSE), one_of(*SHIFTS)),
    ),
    _claim(
        "C14",
        "Models of the VAE kind beat latent additive and the decoder on the distribution of cells.",
        PAPER,
        of_cells,
        versus(vaes),
        *(CELLS, one_of(*VAES), one_of(LATENT, "decoder")),
    ),
    _claim(
        "C15",
        "To take CPA's adversary away never hurts the rank.",
        PAPER,
        is_rank,
        not_hurt,
        models("cpa_noadv", "cpa"),
    ),
    _claim(
        "C16",
        f"BioLord is unstable: over seeds it spreads more than {UNSTABLE:g} times as much as other models.",
        PAPER,
        of_means,
        unstable,
        models("biolord_star"),
    ),
)
