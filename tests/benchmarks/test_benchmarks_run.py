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
            "energy_difference_loop",
            "rank_ours_l2_cpu_s",
            "de_ours_cpu_s",
            "perturbench_cpu_s",
            "perturbench_peak_gb",
        },
        "bounds": {"energy_difference_loop": 1e-7, "energy_difference_loop_exact": 1e-9},
    },
    "loader.py": {
        "parts": "speed,memory",
        "ratios": {
            "resident_over_ceiling",
            "resident_over_ceiling_cpu",
            "streaming_over_resident",
            "streaming_memory_of_four_times_the_cells",
        },
        "figures": {"resident_cells_a_second", "annloader_cells_a_cpu_second", "streaming_4000_peak_gb"},
        "bounds": {"speed_cells_that_differ": 0.5, "streaming_4000_peak_gb": 2.5},
    },
    "training.py": {
        "parts": "linear,latent",
        "ratios": {"linear_over_plain", "latent_over_plain"},
        "figures": {f"{part}_{name}_val_loss" for part in ("linear", "latent") for name in ("ours", "plain")},
    },
    "search.py": {
        "parts": "tpe,asha,ours",  # optuna is a peer
        "ratios": {f"{way}_over_perturbench_{t}" for way in ("tpe", "asha", "ours") for t in ("half", "whole")},
        "figures": {"ours_whole_epochs", "perturbench_half_median"},
    },
    "engine.py": {
        "parts": "noop,memory",
        "ratios": {"noop_over_tune"},
        "figures": {"seconds_per_noop_trial", "memory_of_trials_many_gb", "copies_of_the_screen"},
    },
    "cluster.py": {
        "parts": "hosts,readers",  # scoring runs the same code as hosts
        "ratios": {"one_host_over_two", "readers_2_over_1", "readers_4_over_1"},
        "figures": {"sweep_two_wall_s", "cells_a_second_mapped_here", "cells_a_second_4_readers_there"},
        "bounds": {"sweep_tables_that_differ": 0.5},
    },
    "scale.py": {
        "parts": "folder,noop",
        "ratios": {"last_over_first_seconds", "last_over_first_driver_cpu_s"},
        "figures": {"result_files", "report_cpu_s", "report_peak_gb", "driver_cpu_s_a_trial", "tune_files_a_trial"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs_without_peers_and_leaves_its_figures(script, tmp_path):
    file, expected = tmp_path / "figures.json", SCRIPTS[script]
    command = [sys.executable, HERE / script, "--quick", "--no-peers", "--only", expected["parts"], "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.stderr.startswith("error: ") and "pretend hosts" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert set(found["ratios"]) == expected["ratios"]
    assert expected["figures"] <= set(found["figures"])
    for name, bound in expected.get("bounds", {}).items():
        assert found["figures"][name] < bound


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_refuses_a_part_that_it_does_not_have(script):
    command = [sys.executable, HERE / script, "--only", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no part 'nothing'; there are " in done.stderr
