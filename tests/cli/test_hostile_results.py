"""Names from data never become paths, and a results folder runs no code, whatever was put into it."""

import pickle
import shutil
from pathlib import Path

import anndata as ad
import pytest
from marker import Marker

from perturbray import cli
from perturbray.results import table

NAMES = {"drug_001": "../../up", "drug_002": "/tmp/perturbray-absolute", "drug_003": "..", "drug_004": "a/b\\c"}
CONTEXTS = {"line_a": "../../../line", "line_b": "."}


@pytest.fixture
def hostile(small_screen, tmp_path) -> Path:
    """The small screen, with perturbations and contexts named as paths are."""
    data = ad.read_h5ad(small_screen)
    labels = data.obs["condition"].astype(str)
    data.obs["condition"] = ["+".join(NAMES.get(one, one) for one in label.split("+")) for label in labels]
    data.obs["cell_type"] = [CONTEXTS.get(name, name) for name in data.obs["cell_type"].astype(str)]
    del data.uns["truth"]  # it knows the conditions by their old names
    place = tmp_path / "screens" / "hostile.h5ad"
    place.parent.mkdir()
    data.write_h5ad(place)
    return place


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


def test_names_become_no_paths_and_pickles_in_results_are_not_opened(
    command, hostile, tmp_path, monkeypatch, ray_session
):
    cache = tmp_path / "one" / "two" / "cache"  # so deep that what climbs out of it stays in the test's folder
    monkeypatch.setenv("PERTURBRAY_CACHE", str(cache))
    before = files(tmp_path)
    words = ["--data", hostile, "--set", "ablation.highest=0.2", "--grid", "ablation.level=0.2", "--smoke"]
    words += ["--set", "training.epochs=1", "--model", "latent_additive", "--keep-models"]
    assert command(*words).code == 0
    folder = Path("results/imbalance-smoke-hostile").resolve()
    assert set(table.read(folder)["perturbation"]) & {*NAMES.values()}, "they are there, as names"
    written = files(tmp_path) - before
    assert {path for path in written if not path.is_relative_to(folder) and not path.is_relative_to(cache)} == set()
    assert not Path("/tmp/perturbray-absolute").exists()

    marker = Marker(tmp_path / "ran")
    opened = [path for path in files(folder) if path.suffix in {".pkl", ".pickle", ".pt"} or "tune" in path.parts]
    assert len(opened) >= 4
    for path in opened:
        path.write_bytes(pickle.dumps(marker, protocol=2))
    key = sorted(table.finished(folder))[0]
    (folder / f"{key}.parquet").unlink()
    again = command(*words)
    assert again.code == 0
    fake = folder / "models" / "fake.pt"
    fake.write_bytes(pickle.dumps(marker, protocol=2))
    ended = command("predict", fake, "--controls", hostile, "--all-pairs", "--out", "pairs.csv", entry=cli.command)
    assert (ended.code, "this is no fitted model" in ended.err) == (2, True)
    assert not marker.place.exists()
    pickle.loads(fake.read_bytes())
    assert marker.place.exists(), "it would have run"
    shutil.rmtree(marker.place)
