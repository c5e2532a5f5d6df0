"""Files from others run no code: pickles planted in a fitted model and in a zarr screen, and no way in for more."""

import ast
import json
import pickle
import warnings
from pathlib import Path

import anndata as ad
import pytest
import torch
from marker import Marker

from perturbray.data.dataset import DatasetSpec
from perturbray.errors import InputError
from perturbray.training.fitted import Fitted

PACKAGE = Path(__file__).parents[1] / "perturbray"

# Where a pickle is opened, and why that is no file from others.
OPENED = {
    ("process.py", "pickle.loads"): "a trial, from the driver through Ray's object store",
    ("tuning.py", "pickle.loads"): "the search, from the driver through Ray's object store",
    ("metrics/pool.py", "ray.cloudpickle.loads"): "references, from the driver",
    ("metrics/pool.py", "pickle.loads"): "an error that was pickled in the same line",
    ("embeddings/vectors.py", "_StringsOnly(file).load"): "refuses all but strings",
    ("plugin.py", "point.load"): "an entry point of an installed package, no pickle",
}
OPENING = ("load", "loads", "Unpickler", "read_pickle", "get_unpickler")


@pytest.fixture
def marker(tmp_path) -> Marker:
    return Marker(tmp_path / "ran")


def test_the_marker_shows_that_it_ran(marker):
    pickle.loads(pickle.dumps(marker))
    assert marker.place.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_fitted_model_that_holds_code_is_refused_and_not_run(marker, tmp_path, legacy):
    table = {"format": 1, "spec": {}, "state": marker}
    torch.save(table, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="this is no fitted model"):
        Fitted.load(str(tmp_path / "m.pt"))
    assert not marker.place.exists()


@pytest.mark.parametrize("column", ["condition/categories", "cell_type/categories", "_index"])
@pytest.mark.parametrize("filters", [["pickle"], ["vlen-utf8", "pickle"]])
def test_a_zarr_screen_that_holds_code_is_refused_and_not_run(marker, small_screen, tmp_path, column, filters):
    with warnings.catch_warnings(action="ignore"), ad.settings.override(zarr_write_format=2):
        ad.read_h5ad(small_screen).write_zarr(tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / ".zmetadata").unlink(missing_ok=True)  # it would say what was there before
    assert DatasetSpec(path=str(tmp_path / "s.zarr")).conditions().genes
    place = tmp_path / "s.zarr" / "obs" / column
    meta = json.loads((place / ".zarray").read_text())
    meta.update(filters=[{"id": name} for name in filters], compressor=None)
    (place / ".zarray").write_text(json.dumps(meta))
    for chunk in place.glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(marker))
    with pytest.raises((RuntimeError, ValueError), match=r"[Pp]ickle"):
        DatasetSpec(path=str(tmp_path / "s.zarr")).conditions()
    assert not marker.place.exists()


def openings(source: str) -> list[tuple[str, bool]]:
    """Calls that could open a pickle, and whether they forbid it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        module, _, what = name.rpartition(".")
        if (
            what not in OPENING
            or module.endswith(("json", "yaml"))
            or module.startswith(("cls", "checkpoint", "Fitted"))
        ):
            continue
        safe = {"torch": words.get("weights_only") == "True", "np": words.get("allow_pickle", "False") == "False"}
        found.append((name, safe.get(module, False)))
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(p)", [("torch.load", False)]),
        ("torch.load(p, weights_only=False)", [("torch.load", False)]),
        ("torch.load(p, weights_only=True)", [("torch.load", True)]),
        ("np.load(p, allow_pickle=True)", [("np.load", False)]),
        ("np.load(p, mmap_mode='r')", [("np.load", True)]),
        ("pd.read_pickle(p)", [("pd.read_pickle", False)]),
        ("joblib.load(p)", [("joblib.load", False)]),
        ("json.loads(p)", []),
    ],
)
def test_calls_that_open_a_pickle_are_recognised(source, found):
    assert openings(source) == found


def test_no_module_opens_a_pickle_from_a_file():
    calls = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, safe in openings(path.read_text(encoding="utf-8")):
            calls.setdefault((path.relative_to(PACKAGE).as_posix(), name), []).append(safe)
    assert calls[("training/checkpoint.py", "torch.load")] == [True]
    assert {call for call, safe in calls.items() if not all(safe)} == set(OPENED)
