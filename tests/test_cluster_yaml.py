"""`cluster.yaml` passes Ray's own validation, costs nothing but the head while idle, and opens no port to strangers."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def prepared(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    ready = prepare_config(copy.deepcopy(config))
    validate_config(ready)
    return ready


def start_commands(config, role):
    return [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]


def test_ray_accepts_the_cluster_file(config):
    ready = prepared(config)
    assert ready["cluster_name"] == "perturbray"
    assert ready["provider"]["type"] == "aws"


@pytest.mark.parametrize(
    ("right", "wrong"), [("max_workers", "max_worker"), ("idle_timeout_minutes", "idle_timeout_minute")]
)
def test_ray_refuses_a_typo_in_a_top_level_key(config, right, wrong):
    from jsonschema import ValidationError

    mistyped = {wrong if key == right else key: value for key, value in config.items()}
    with pytest.raises(ValidationError, match=f"'{wrong}' was unexpected"):
        prepared(mistyped)


def test_ray_refuses_a_head_of_an_unknown_node_type(config):
    with pytest.raises(ValueError, match="head_node_type"):
        prepared({**config, "head_node_type": "heads"})


def test_workers_come_from_zero_on_spot_with_a_gpu(config):
    ready = prepared(config)
    workers = {name: kind for name, kind in ready["available_node_types"].items() if name != ready["head_node_type"]}
    assert workers
    assert all(kind["min_workers"] == 0 for kind in ready["available_node_types"].values())
    for kind in workers.values():
        assert 0 < kind["max_workers"] <= ready["max_workers"]
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert re.match(r"[gp]\d", kind["node_config"]["InstanceType"]), "instances of AWS with a GPU are G and P"


def test_head_runs_no_trials_and_is_not_on_spot(config):
    head = prepared(config)["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_dashboard_listens_on_the_loopback_address_alone(config):
    (command,) = start_commands(config, "head")
    assert "--dashboard-host=127.0.0.1" in command.split()
    assert "0.0.0.0" not in json.dumps(config)


def test_both_kinds_of_node_start_with_token_authentication(config):
    for role in ("head", "worker"):
        (command,) = start_commands(config, role)
        assert command.startswith("RAY_AUTH_MODE=token ray start")
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_token_reaches_every_node_readable_by_its_owner_alone_and_git_ignores_it(config):
    assert config["file_mounts"]["~/.ray/auth_token"] == "./auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    assert "auth_token" in (ROOT / ".gitignore").read_text().split()


def test_project_is_installed_on_every_node_from_files_that_exist(config):
    sources = {path for path in config["file_mounts"].values() if path != "./auth_token"}
    assert {"./pyproject.toml", "./perturbray", "./sweeps"} <= sources
    assert all((ROOT / source).exists() for source in sources)
    assert any("perturbray[aws]" in command for command in config["setup_commands"])


def test_image_has_the_oldest_python_or_a_newer_one_and_a_ray_that_the_project_accepts(config):
    ray, major, minor = re.search(r":(\d+\.\d+)\.\d+-py(\d)(\d+)", config["docker"]["image"]).groups()
    project = (ROOT / "pyproject.toml").read_text()
    oldest_python = re.search(r'requires-python = ">=(\d+\.\d+)"', project)[1]
    oldest_ray = re.search(r'"ray\[[^\]]*\]>=(\d+\.\d+)', project)[1]
    assert (int(major), int(minor)) >= tuple(map(int, oldest_python.split(".")))
    assert tuple(map(int, ray.split("."))) >= tuple(map(int, oldest_ray.split(".")))
