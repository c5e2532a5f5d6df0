"""Intervals over conditions with seeds nested in them: the macro mean and its paired bootstrap, the one place that says
what is resampled."""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
FEWEST = 10  # with fewer conditions there is no interval
SMALLEST_POOL = 5  # perturbations; fewer that share their contexts are resampled together with others

_WEIGHTS_AT_ONCE = 4_000_000  # 32 MB of weights


def macro(values: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Mean over conditions within a context, then over contexts: (conditions, columns) -> (columns,).

    NaN is left out; a column with an infinite value has an infinite mean; a column without a value is NaN.
    """
    return _weighted(np.ones((1, len(values))), values, context)[0]


def resampled(
    values: np.ndarray, *, context: np.ndarray, perturbation: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """Macro means of bootstrap samples of the conditions: (conditions, columns) -> (resamples, columns).

    All columns see the same samples, so that differences of columns are paired. ``context`` and ``perturbation`` are
    codes, (conditions,). What is drawn is a perturbation, with all contexts in which it occurs: its conditions share
    the response of one gene or drug, and are no independent evidence.
    """
    parts = [
        _weighted(weights, values, context) for weights in draw(context, perturbation, resamples=resamples, seed=seed)
    ]
    return np.concatenate(parts)


def draw(
    context: np.ndarray, perturbation: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Iterator[np.ndarray]:
    """How often each condition occurs in each bootstrap sample, in parts: (resamples of a part, conditions)."""
    clusters, cluster = np.unique(perturbation, return_inverse=True)
    pool = pools(context, cluster)
    streams = [np.random.default_rng([seed, number]) for number in range(pool.max() + 1)]
    step = max(1, _WEIGHTS_AT_ONCE // len(context))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        times = np.empty((size, len(clusters)))
        for number, stream in enumerate(streams):
            members = np.flatnonzero(pool == number)
            times[:, members] = stream.multinomial(len(members), np.full(len(members), 1 / len(members)), size=size)
        yield times[:, cluster]


def pools(context: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """The pool of each cluster, (clusters,): clusters are exchanged only for clusters that occur in the same contexts.

    So each context keeps its number of conditions in each sample. Where fewer than ``SMALLEST_POOL`` clusters share a
    set of contexts they would hardly vary; those go together into one pool, and the numbers of conditions vary too.
    """
    occurs = np.zeros((cluster.max() + 1, context.max() + 1), bool)
    occurs[cluster, context] = True
    pool, sizes = np.unique(occurs, axis=0, return_inverse=True, return_counts=True)[1:]
    pool = pool.reshape(-1)
    small = sizes < SMALLEST_POOL
    if 0 < sizes[small].sum() < SMALLEST_POOL and not small.all():
        small[np.flatnonzero(~small)[np.argmin(sizes[~small])]] = True
    pool = np.where(small[pool], len(sizes), pool)
    return np.unique(pool, return_inverse=True)[1].reshape(-1)


def of_seeds(trials: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """What training again adds to bootstrap samples of a mean over seeds: (seeds, columns) -> (resamples, columns).

    ``trials`` are means of trials, NaN where a column has none of a seed; returned are deviations around 0. A sample gives
    each seed a normal weight (the multiplier bootstrap: Wu 1986, Ann. Stat. 14:1261), so the mean varies by s²/n exactly;
    seeds drawn with replacement would leave (n − 1)/n of that, in a few steps. The weights are the same for all columns, so
    that differences of columns are paired. A column of one seed does not deviate: nothing says by how much it would.
    """
    here = np.isfinite(trials)
    count = here.sum(axis=0)
    middle = np.where(here, trials, 0.0).sum(axis=0) / np.maximum(count, 1)
    apart = np.where(here & (count > 1), trials - middle, 0.0) / np.sqrt(np.maximum(count * (count - 1), 1))
    return np.random.default_rng([seed, len(trials), 1]).normal(size=(resamples, len(trials))) @ apart


def nested(
    draws: np.ndarray, of_seeds: np.ndarray, seeds: np.ndarray, *, conditions: np.ndarray | None = None
) -> np.ndarray:
    """Draws in which conditions and seeds vary, (resamples, ...), whose percentiles have the tails that few seeds ask for.

    A variance from n seeds has n − 1 degrees of freedom; those of the sum are Satterthwaite's (1946, Biometrics 2:110),
    and the draws are spread about their mean by the ratio of Student's quantile to the normal one. ``seeds``: of each
    column. With ``conditions``, their numbers, the variance over conditions counts its degrees of freedom too.
    """
    from scipy import special  # here, so that pages of sweeps without it open fast

    broken = ~np.isfinite(draws).all(axis=0)
    draws = np.where(broken, 0.0, draws)
    inside, between = draws.var(axis=0), of_seeds.var(axis=0)
    lost = between**2 / np.maximum(np.asarray(seeds) - 1, 1)
    if conditions is not None:
        lost = lost + inside**2 / np.maximum(np.asarray(conditions) - 1, 1)
    free = np.where(lost > 0, (inside + between) ** 2 / np.where(lost > 0, lost, 1.0), np.inf)
    tail = (1 + LEVEL) / 2
    factor = np.where(np.isfinite(free), special.stdtrit(np.clip(free, 1, 1e6), tail) / special.ndtri(tail), 1.0)
    middle = draws.mean(axis=0)
    return np.where(broken, np.nan, middle + factor * (draws - middle + of_seeds))


def simultaneous(draws: np.ndarray) -> np.ndarray:
    """Half-widths of intervals that hold all their truths at once, (resamples, parts) -> (parts,); NaN where a part has none.

    The critical value is the quantile of the largest of the studentised deviations, so it knows how the parts hang together
    (the single-step maximum-t method: Westfall and Young 1993, Resampling-Based Multiple Testing; Romano and Wolf 2005,
    J. Am. Stat. Assoc. 100:94). With one part it is an ordinary, symmetric interval.
    """
    size, largest = deviation(draws)
    return critical(largest) * size


def critical(largest: np.ndarray) -> float:
    """The value that the largest deviation, (resamples,), stays below at the level of an interval."""
    return float(np.quantile(largest, LEVEL))


def deviation(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale of each part, (parts,), and the largest deviation of a sample in that scale, (resamples,)."""
    broken = ~np.isfinite(draws).all(axis=0)
    draws = np.where(broken, 0.0, draws)
    size = draws.std(axis=0)
    still = size <= 1e-12 * np.maximum(np.abs(draws).max(axis=0), 1e-300)  # the same in every sample, but for rounding
    deviation = np.abs(draws - draws.mean(axis=0)) / np.where(still, 1.0, size)
    largest = np.where(still, 0.0, deviation).max(axis=1) if draws.shape[1] else np.zeros(len(draws))
    return np.where(broken, np.nan, np.where(still, 0.0, size)), largest


def interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of (resamples, ...) -> low, high; NaN where a draw is not finite."""
    broken = ~np.isfinite(draws).all(axis=0)
    low, high = np.quantile(np.where(broken, 0.0, draws), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return np.where(broken, np.nan, low), np.where(broken, np.nan, high)


def _weighted(weights: np.ndarray, values: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Macro means under weights of conditions: (samples, conditions) x (conditions, columns) -> (samples, columns)."""
    total = np.zeros((len(weights), values.shape[1]))
    contexts = np.zeros_like(total)  # contexts that have a condition in the sample
    finite = np.isfinite(values)
    for code in np.unique(context):
        rows = context == code
        count = weights[:, rows] @ finite[rows]
        mean = weights[:, rows] @ np.where(finite[rows], values[rows], 0.0) / np.maximum(count, 1)
        total += mean
        contexts += count > 0
    result = np.where(contexts > 0, total / np.maximum(contexts, 1), np.nan)
    for sign in (np.inf, -np.inf):  # a failed prediction keeps its price in every sample
        result[:, (values == sign).any(axis=0)] = sign
    return result
