"""The shipped cluster files: nothing but the head costs while idle, one storage for all, ports as SECURITY.md says."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from perturbray.clusterfile.command import check
from perturbray.clusterfile.file import ClusterFile

ROOT = Path(__file__).parents[1]
FILES = ("cluster.yaml", "sweeps/clusters/local.yaml")
SECURITY = (ROOT / "SECURITY.md").read_text()
OWN = "perturbray-env/bin"


@pytest.fixture(scope="module")
def aws():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module", params=FILES)
def config(request):
    return yaml.safe_load((ROOT / request.param).read_text())


def start(config: dict, role: str) -> str:
    (command,) = [text for text in config[f"{role}_start_ray_commands"] if "ray start" in text]
    return command


def rows_of_ports() -> list[dict[str, str]]:
    """The table of SECURITY.md."""
    lines = [line.strip("|").split("|") for line in SECURITY.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_workers_come_from_zero_on_spot_with_and_without_a_gpu(aws):
    workers = {name: kind for name, kind in aws["available_node_types"].items() if name != aws["head_node_type"]}
    assert all(kind["min_workers"] == 0 for kind in aws["available_node_types"].values())
    for kind in workers.values():
        assert 0 < kind["max_workers"] <= aws["max_workers"]
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(kind["max_workers"] for kind in workers.values()) == aws["max_workers"]
    gpu = {name: bool(re.match(r"[gp]\d", kind["node_config"]["InstanceType"])) for name, kind in workers.items()}
    assert gpu == {"gpu": True, "cpu": False}, "instances of AWS with a GPU are G and P"


def test_head_runs_no_trials_and_is_not_on_spot(aws):
    head = aws["available_node_types"][aws["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_image_has_the_oldest_python_or_a_newer_one_and_a_ray_that_the_project_accepts(aws):
    ray, major, minor = re.search(r":(\d+\.\d+)\.\d+-py(\d)(\d+)", aws["docker"]["image"]).groups()
    project = (ROOT / "pyproject.toml").read_text()
    oldest_python = re.search(r'requires-python = ">=(\d+\.\d+)"', project)[1]
    oldest_ray = re.search(r'"ray\[[^\]]*\]>=(\d+\.\d+)', project)[1]
    assert (int(major), int(minor)) >= tuple(map(int, oldest_python.split(".")))
    assert tuple(map(int, ray.split("."))) >= tuple(map(int, oldest_ray.split(".")))


def test_token_stays_with_its_owner_and_git_ignores_it(config):
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    assert "auth_token" in (ROOT / ".gitignore").read_text().split()


def test_project_is_installed_on_every_node_from_files_that_exist(config):
    sources = {path for path in config["file_mounts"].values() if path != "./auth_token"}
    assert {"./pyproject.toml", "./perturbray", "./sweeps"} <= sources
    assert all((ROOT / source).exists() for source in sources)
    assert any("pip install -e" in command and "perturbray" in command for command in config["setup_commands"])


def ports(command: str) -> dict[str, int]:
    return {name: int(port) for name, port in re.findall(r"--([\w-]*port)=(\d+)", command)}


def test_every_port_of_a_node_is_a_number_that_the_table_of_security_knows(config):
    table = {row["port"]: row for row in rows_of_ports()}
    said = yaml.safe_dump([config["docker"]["run_options"] if "docker" in config else config["setup_commands"]])
    metrics = {port for _, port in re.findall(r"(AUTOSCALER|DASHBOARD)_METRIC_PORT=(\d+)", said)}
    assert len(metrics) == 2
    for role in ("head", "worker"):
        given = ports(start(config, role))
        workers = f"{given.pop('min-worker-port')}-{given.pop('max-worker-port')}"
        listening = {*map(str, given.values()), workers, "22"} | (metrics if role == "head" else set())
        if role == "worker":
            assert {port for port, row in table.items() if "worker too" in row["what"]} == listening
        else:
            assert set(table) == listening
    assert table["8265"]["address"] == "loopback"
    assert "--dashboard-host=127.0.0.1" in start(config, "head").split()


def test_head_and_workers_agree_on_the_ports_that_both_have(config):
    head, worker = ports(start(config, "head")), ports(start(config, "worker"))
    assert len(worker) >= 8
    assert worker.items() <= head.items()


@pytest.fixture
def machine(tmp_path):
    """A home with a token and an environment that is there, and a shared folder: runs commands as `ray up` does."""
    config = yaml.safe_load((ROOT / FILES[1]).read_text().replace("FILL_IN_SHARED_FOLDER", str(tmp_path / "shared")))
    (tmp_path / "shared").mkdir()

    def run(home: str, *sections: str) -> subprocess.CompletedProcess:
        place = tmp_path / home
        for folder in (".ray", "perturbray", OWN):
            (place / folder).mkdir(parents=True, exist_ok=True)
        (place / ".ray" / "auth_token").write_text("5e" * 32)
        (place / OWN / "ray").touch(mode=0o755)
        for section in sections:
            for command in config.get(section, [section]):
                words = ["bash", "-c", f"source ~/.bashrc; ({command})"]
                environment = {"HOME": str(place), "PATH": "/usr/bin:/bin"}
                ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
                if ended.returncode:
                    return ended
        return ended

    return run


def test_a_machine_of_ones_own_is_set_up_once_and_its_shells_know_the_shared_folder(machine, tmp_path):
    for _ in range(2):
        assert machine("head", "setup_commands", "head_setup_commands").returncode == 0
    bashrc = (tmp_path / "head" / ".bashrc").read_text()
    assert bashrc.count("environment.sh") == 2, "one line, which names it twice"
    ended = machine("head", "echo $PERTURBRAY_CACHE $RAY_AUTH_MODE $PYTHONPATH; command -v ray")
    assert ended.stdout.splitlines() == [
        f"{tmp_path}/shared/cache token {tmp_path}/head/perturbray",
        str(tmp_path / "head" / OWN / "ray"),
    ]
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"cache", "results", ".head"}
    assert (tmp_path / "head" / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


def test_a_worker_that_sees_another_folder_than_the_head_stops_with_the_reason(machine, tmp_path):
    assert machine("head", "setup_commands", "head_setup_commands").returncode == 0
    assert machine("worker", "setup_commands", "worker_setup_commands").returncode == 0
    (tmp_path / "shared").rename(tmp_path / "the heads")
    (tmp_path / "shared" / "cache").mkdir(parents=True)
    ended = machine("worker", "worker_setup_commands")
    assert ended.returncode == 1
    assert f"{tmp_path}/shared is not the folder that the head sees" in ended.stdout


def test_the_secret_does_not_lie_in_the_shared_folder(machine, tmp_path):
    machine("head", "setup_commands", "head_setup_commands")
    stored = "".join(path.read_text() for path in (tmp_path / "shared").rglob("*") if path.is_file())
    assert stored
    assert "5e5e5e5e" not in stored


@pytest.mark.parametrize("name", FILES)
def test_a_header_names_commands_that_the_launcher_has(name):
    header = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("#")]
    called = set(re.findall(rf"\bray (\S+) (?:--tmux )?{re.escape(name)}", "\n".join(header)))
    assert called >= {"up", "exec", "attach", "dashboard", "down"}
    assert f"perturbray cluster check {name}" in " ".join(" ".join(header).split())
    from ray.scripts.scripts import cli

    assert called <= set(cli.commands)


PAGE = (ROOT / "sweeps" / "clusters" / "README.md").read_text()
BLOCKS = {  # of the page, by section
    part.splitlines()[0]: re.findall(r"```(\w+)\n(.*?)```", part, re.DOTALL) for part in PAGE.split("\n## ")[1:]
}


def test_the_page_says_of_every_section_that_nobody_has_run_it():
    with_scripts = [section for section, blocks in BLOCKS.items() if blocks]
    assert with_scripts == ["The file system of `cluster.yaml`", "Google Cloud", "Kubernetes", "Slurm"]
    assert all("ot tested" in part.split("```")[0] for part in PAGE.split("\n## ")[1:])


@pytest.mark.parametrize("section", BLOCKS)
def test_every_script_of_the_page_is_a_script(section):
    for language, text in BLOCKS[section]:
        if language == "bash":
            assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_the_cluster_on_google_is_right_but_for_what_is_to_be_filled_in(aws, tmp_path):
    ((_, text),) = BLOCKS["Google Cloud"]
    (tmp_path / "auth_token").write_text("5e" * 32)
    (tmp_path / "auth_token").chmod(0o600)
    for name in ("pyproject.toml", "README.md", "LICENSE", "perturbray", "sweeps"):
        (tmp_path / name).symlink_to(ROOT / name)
    found = check(ClusterFile(Path("gcp.yaml"), {**aws, **yaml.safe_load(text)}, tmp_path))
    errors = [str(finding) for finding in found if not finding.warning]
    assert len(errors) == text.count("FILL_IN") == 3
    assert all("still to be filled in" in error for error in errors)


def test_the_cluster_on_kubernetes_has_a_token_shared_storage_and_a_head_that_runs_no_trials():
    ((_, text), _) = BLOCKS["Kubernetes"]
    spec = yaml.safe_load(text)["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        cache = {entry["name"]: entry["value"] for entry in container["env"]}["PERTURBRAY_CACHE"]
        assert cache.startswith(mounts["shared"] + "/")
    gpus = [group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group in pods]
    assert gpus == [None, "1", None]
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0, 0]
