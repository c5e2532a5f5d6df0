"""Placement: trials and scorers fit on the cluster, said in numbers before anything waits for ever."""

import pytest

from perturbray.cluster import SCORER_CPUS, place
from perturbray.errors import InputError


@pytest.mark.parametrize(
    ("cpus", "gpus", "trials", "at_once", "trial_cpus", "trial_gpus", "scorers"),
    [
        (1, 0, 96, 1, 1.0, 0.0, 0),
        (2, 0, 96, 2, 0.9, 0.0, 1),
        (2, 0, 1, 1, 1.0, 0.0, 1),
        (4, 0, 96, 4, 0.95, 0.0, 1),
        (16, 0, 96, 16, 0.97, 0.0, 2),
        (16, 4, 96, 4, 1.0, 1.0, 2),
        (2, 1, 96, 1, 1.0, 1.0, 1),
        (64, 8, 1000, 8, 1.0, 1.0, 8),
    ],
)
def test_a_cluster_is_divided_between_trials_and_scorers(cpus, gpus, trials, at_once, trial_cpus, trial_gpus, scorers):
    found = place(cpus, gpus, trials=trials)
    assert (found.at_once, found.trial_cpus, found.trial_gpus, found.scorers) == (
        at_once,
        trial_cpus,
        trial_gpus,
        scorers,
    )


@pytest.mark.parametrize("gpus", [0, 0.5, 1, 3, 8])
@pytest.mark.parametrize("cpus", [0.5, 1, 1.5, 2, 3, 4, 7, 8, 16, 100])
@pytest.mark.parametrize("trials", [1, 2, 5, 1000])
def test_scorers_and_trials_never_exceed_the_cluster(cpus, gpus, trials):
    found = place(cpus, gpus, trials=trials)
    assert found.at_once * found.trial_cpus + found.scorers * SCORER_CPUS <= cpus + 1e-9
    assert found.at_once * found.trial_gpus <= gpus
    assert 1 <= found.at_once <= trials
    assert found.trial_cpus > 0


def test_a_single_core_scores_inline():
    assert place(1, 0, trials=5).scorers == 0
    assert str(place(1, 0, trials=5)) == "1 trial at once (1 CPU each), scoring inline"


def test_a_placement_says_itself_in_numbers():
    assert str(place(16, 4, trials=96)) == "4 trials at once (1 CPU, 1 GPU each), 2 scorers (0.2 CPU each)"


def test_a_cluster_without_cpus_is_refused_in_numbers():
    with pytest.raises(InputError, match="0 CPUs.*--num-cpus"):
        place(0, 4, trials=1)
