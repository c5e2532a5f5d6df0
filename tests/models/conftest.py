"""Labs in which models are fitted: the small synthetic screen, and a screen without noise."""

import pytest
import screens

from perturbray.data.dataset import DatasetSpec


@pytest.fixture(scope="session")
def lab(small_screen) -> screens.Lab:
    return screens.lab_of(DatasetSpec(path=str(small_screen)))


@pytest.fixture(scope="session")
def clean() -> screens.Lab:
    """Effects that do not depend on the context, and no noise."""
    return screens.noise_free()[0]
