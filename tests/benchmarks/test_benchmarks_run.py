import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = {
    "metrics.py": {
        "parts": "energy,rank,de,perturbench",  # mmd and evaluate run the same code, and pool starts a Ray of its own
        "ratios": {"energy_over_loop"},
        "figures": {
            "energy_difference",
            "rank_ours_l2_cpu_s",
            "de_ours_cpu_s",
            "perturbench_cpu_s",
            "perturbench_peak_gb",
        },
    },
    "training.py": {
        "parts": "linear,latent",
        "ratios": {"linear_over_plain", "latent_over_plain"},
        "figures": {f"{part}_{name}_val_loss" for part in ("linear", "latent") for name in ("ours", "plain")},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs_without_peers_and_leaves_its_figures(script, tmp_path):
    file, expected = tmp_path / "figures.json", SCRIPTS[script]
    command = [sys.executable, HERE / script, "--quick", "--no-peers", "--only", expected["parts"], "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert set(found["ratios"]) == expected["ratios"]
    assert expected["figures"] <= set(found["figures"])
    assert found["figures"].get("energy_difference", 0) < 1e-7


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_refuses_a_part_that_it_does_not_have(script):
    command = [sys.executable, HERE / script, "--only", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no part 'nothing'; there are " in done.stderr
