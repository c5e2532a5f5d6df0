import pytest
from fake_sweep import fake_reference, fake_sweep

from perturbray.results import table
from perturbray.results.summary import summarise


@pytest.fixture(scope="session")
def finished_sweep(tmp_path_factory):
    """A folder in which every trial of a small sweep finished. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("results") / "imbalance"
    fake_sweep(folder, levels=(0.0, 0.3), seeds=2)
    fake_reference(folder)
    return folder


@pytest.fixture(scope="session")
def summary(finished_sweep):
    plan, reference = table.read_plan(finished_sweep), table.read_reference(finished_sweep)
    return summarise(table.read(finished_sweep), plan, analytic=reference, resamples=500)
