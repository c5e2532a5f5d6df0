"""The notebook runs from its first cell to its last, and what it shows is there."""

import os
from pathlib import Path

import pytest

from perturbray.results import table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_notebook_runs_and_its_second_run_repeats_nothing(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="the test extra installs nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PERTURBRAY_RESULTS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    stamps = []
    for _ in range(2):
        notebook = nbformat.read(ROOT / "sweeps" / "search.ipynb", as_version=4)
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
        folder = tmp_path / "notebook"
        stamps.append({path.name: path.stat().st_mtime_ns for path in folder.glob("?" * 16 + ".parquet")})
    *_, scores, _, printed = notebook.cells
    text = scores["outputs"][0]["data"]["text/plain"]
    assert "latent_additive" in text
    assert "mean_shift" in text
    assert printed["outputs"][0]["text"].startswith("pr.Trial(")
    assert stamps[0] == stamps[1]
    assert len(table.finished(folder)) >= 4
    assert "What the search learnt" in (folder / "report.html").read_text()
