"""What every test may ask for: a Ray of the session's own, a small screen, the shared data; and a cache that is nobody's."""

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Here and not in a fixture: Ray reads them when it is imported, which test modules do while they are collected.
os.environ.update(
    OMP_NUM_THREADS="1",  # two threads on two busy cores wait for each other: ten times the time
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AIR_NEW_OUTPUT="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a test did to torch's threads, the next starts with one."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache():
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="perturbray-tests-") as folder:
        patch.setenv("PERTURBRAY_CACHE", folder)
        yield Path(folder)


@pytest.fixture(scope="session")
def ray_session(own_cache):
    """Two CPUs that all tests share; `cluster.connect` uses a Ray that is there."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def small_screen(tmp_path_factory) -> Path:
    """2,000 cells with known effects, raw counts; the file is for reading only."""
    from perturbray import synthetic

    return synthetic.write(tmp_path_factory.mktemp("screen") / "small.h5ad", synthetic.Screen.small())


@pytest.fixture
def own_screen(small_screen, tmp_path) -> Path:
    """A copy of the small screen that a test may change."""
    return Path(shutil.copy(small_screen, tmp_path / "own.h5ad"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real screens; PERTURBRAY_TEST_DATA names another."""
    folder = Path(os.environ.get("PERTURBRAY_TEST_DATA") or SHARED)
    if not folder.is_dir():
        pytest.skip(f"no real screens in {folder}; PERTURBRAY_TEST_DATA names a folder that holds them")
    return folder
