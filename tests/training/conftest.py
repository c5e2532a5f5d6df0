"""The small synthetic screen in memory."""

import pytest
import screens

from perturbray.data.dataset import DatasetSpec


@pytest.fixture(scope="session")
def lab(small_screen) -> screens.Lab:
    return screens.lab_of(DatasetSpec(path=str(small_screen)))
