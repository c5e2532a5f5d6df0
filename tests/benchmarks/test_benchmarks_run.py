import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
AT_ONCE = 2  # nothing is measured, and most of what they do is to start processes
SCRIPTS = {  # the longest first
    "cluster.py": {
        "parts": "hosts,readers",  # scoring runs the same code as hosts
        "ratios": {"one_host_over_two", "readers_4_over_1"},
        "figures": {"sweep_two_wall_s", "cells_a_second_mapped_here", "cells_a_second_4_readers_there"},
        "bounds": {"sweep_tables_that_differ": 0.5},
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
    "engine.py": {
        "parts": "noop,memory",
        "ratios": {"noop_over_tune"},
        "figures": {"seconds_per_noop_trial", "memory_of_trials_many_gb", "copies_of_the_screen"},
    },
    "scale.py": {
        "parts": "folder,noop",
        "ratios": {"last_over_first_seconds", "last_over_first_driver_cpu_s"},
        "figures": {"result_files", "report_cpu_s", "report_peak_gb", "driver_cpu_s_a_trial", "tune_files_a_trial"},
    },
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
}


def run(script: str, file: Path) -> subprocess.CompletedProcess:
    words = ["--quick", "--no-peers", "--only", SCRIPTS[script]["parts"], "--json", file]
    command = [sys.executable, HERE / script, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """What becomes of each script that is asked for, and its figures' file."""
    place = tmp_path_factory.mktemp("figures")
    items = [item for item in request.session.items if item.path == request.path and "runs" in item.fixturenames]
    asked = [item.callspec.params["script"] for item in items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = {script: (place / script).with_suffix(".json") for script in asked}
        yield {script: (pool.submit(run, script, file), file) for script, file in files.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs_without_peers_and_leaves_its_figures(script, runs):
    (ended, file), expected = runs[script], SCRIPTS[script]
    done = ended.result()
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
