"""One small screen in memory for all tests that only read it."""

import pytest
import screens

from perturbray.data.dataset import DatasetSpec


@pytest.fixture(scope="session")
def small(small_screen) -> DatasetSpec:
    """3 contexts x 12 perturbations x 60 genes as counts."""
    return DatasetSpec(path=str(small_screen))


@pytest.fixture(scope="session")
def lab(small) -> screens.Lab:
    return screens.lab_of(small)
