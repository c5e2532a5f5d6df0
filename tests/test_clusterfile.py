"""`perturbray cluster check`: every planted mistake is found where it is, alone, and the shipped files have none."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from perturbray import cli
from perturbray.clusterfile.command import check
from perturbray.clusterfile.file import ClusterFile

ROOT = Path(__file__).parents[1]
FILES = {"aws": ROOT / "cluster.yaml", "local": ROOT / "sweeps" / "clusters" / "local.yaml"}
FILLED = {
    "FILL_IN_IMAGE": "ami-0123456789abcdef0",
    "FILL_IN_FILE_SYSTEM": "fs-0123456789abcdef0",
    "FILL_IN_ADDRESS_OF_THE_HEAD": "192.0.2.11",
    "FILL_IN_ADDRESS_OF_A_WORKER": "192.0.2.12",
    "FILL_IN_USER": "ubuntu",
    "FILL_IN_SHARED_FOLDER": "/mnt/shared",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where `ray up` would be called: the project's files, a token and an SSH key, and credentials of AWS."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "perturbray", "sweeps"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("auth_token", "key"):
        (tmp_path / name).write_text("5e" * 32)
        (tmp_path / name).chmod(0o600)
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def filled(kind: str, folder: Path) -> str:
    """A shipped file as a user fills it in."""
    text = FILES[kind].read_text()
    for name, value in (FILLED | {"FILL_IN_KEY": str(folder / "key")}).items():
        text = text.replace(name, value)
    return text


def found(config: dict, folder: Path) -> list[tuple[str, str]]:
    """Path and whole message of every finding; without botocore, less the notice that AWS was not looked at."""
    findings = [(f.where, str(f)) for f in check(ClusterFile(Path("cluster.yaml"), config, folder))]
    return [(where, text) for where, text in findings if "were not checked" not in text]


def ray_accepts(config: dict) -> bool:
    """What `ray up` itself says before it starts anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception:
        return False
    return True


def replaced(config: dict, right: str, wrong: str) -> None:
    """Change a text wherever it stands in the file; it must stand there."""
    text = yaml.safe_dump(config, width=10_000)
    assert right in text
    config.update(yaml.safe_load(text.replace(right, wrong)))


def types(config: dict) -> dict:
    return config["available_node_types"]


def machine(config: dict, name: str = "cpu") -> dict:
    return types(config)[name]["node_config"]


def rename(mapping: dict, old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


TOKEN = "file_mounts['~/.ray/auth_token']"
HEAD, WORKER = "head_start_ray_commands[1]", "worker_start_ray_commands[1]"
CPU = "available_node_types.cpu.node_config"
BY_RAY = {  # what Ray's own validation refuses; ours says it with the place and what would be right
    "a key of the file": (lambda c: rename(c, "max_workers", "max_worker"), "max_worker", "'max_workers'"),
    "a key of a node type": (
        lambda c: rename(types(c)["gpu"], "min_workers", "min_worker"),
        "available_node_types.gpu.min_worker",
        "'min_workers'",
    ),
    "a text for a list": (lambda c: c.update(setup_commands="pip install ray"), "setup_commands", "type 'array'"),
    "a head of no type": (lambda c: c.update(head_node_type="heads"), "head_node_type", "did you mean 'head'?"),
    "more workers than fit": (lambda c: types(c)["gpu"].update(min_workers=20), "max_workers", "sum of"),
    "a container without a name": (
        lambda c: c["docker"].pop("container_name"),
        "docker.container_name",
        "container_name",
    ),
    "a provider unheard of": (lambda c: c["provider"].update(type="awss"), "provider.type", "'aws'"),
}
BY_US = {  # what it lets pass
    "a value to fill in": (lambda c: machine(c).update(ImageId="FILL_IN_IMAGE"), f"{CPU}.ImageId", "FILL_IN_IMAGE"),
    "a head that runs trials": (
        lambda c: types(c)["head"].update(resources={}),
        "available_node_types.head.resources",
        "CPU: 0",
    ),
    "a head on spot": (
        lambda c: machine(c, "head").update(InstanceMarketOptions={"MarketType": "spot"}),
        "available_node_types.head.node_config",
        "on demand",
    ),
    "a type that never starts": (
        lambda c: types(c)["gpu"].update(max_workers=0),
        "available_node_types.gpu.max_workers",
        "no worker of this type",
    ),
    "no workers at all": (lambda c: c.update(max_workers=0), "max_workers", "no worker can start"),
    "no number of workers": (lambda c: c.pop("max_workers"), "max_workers", "warning: max_workers"),
    "no GPU": (
        lambda c: machine(c, "gpu").update(InstanceType="m5.xlarge"),
        "available_node_types",
        "no type of worker has a GPU, which the image",
    ),
    "an image without CUDA": (lambda c: replaced(c, "py311-gpu", "py311"), "docker.image", "no CUDA for the GPUs of"),
    "an image of another Ray": (lambda c: replaced(c, "ray:2.60.0", "ray:2.49.1"), "docker.image", "Ray 2.49.1 there"),
    "an image of another Python": (lambda c: replaced(c, "-py311-", "-py39-"), "docker.image", "Python 3.9 there"),
    "an image of no version": (lambda c: replaced(c, "2.60.0-py311", "latest"), "docker.image", "does not say"),
    "no token": (lambda c: Path("auth_token").unlink(), TOKEN, "secrets.token_hex"),
    "an empty token": (lambda c: Path("auth_token").write_text("\n"), TOKEN, "is empty"),
    "a token to guess": (lambda c: Path("auth_token").write_text("secret\n"), TOKEN, "6 characters"),
    "a token for all to read": (lambda c: Path("auth_token").chmod(0o644), TOKEN, "0644): chmod 600"),
    "a token that no node gets": (
        lambda c: c["file_mounts"].pop("~/.ray/auth_token"),
        "file_mounts",
        "~/.ray/auth_token: ./auth_token",
    ),
    "files that are not there": (
        lambda c: c["file_mounts"].update({"~/data": "./no-such-data"}),
        "file_mounts['~/data']",
        "no-such-data does not exist",
    ),
    "a worker without authentication": (
        lambda c: replaced(c, "token ray start --address", "disabled ray start --address"),
        WORKER,
        "RAY_AUTH_MODE=token ray start",
    ),
    "an open dashboard": (lambda c: replaced(c, "host=127.0.0.1", "host 0.0.0.0"), HEAD, "host=0.0.0.0 offers"),
    "an open debugger": (lambda c: replaced(c, "--head", "--head --ray-debugger-external"), HEAD, "leave it out"),
    "workers that look elsewhere": (lambda c: replaced(c, "IP:6379", "IP:6380"), WORKER, "$RAY_HEAD_IP:6379"),
    "no autoscaler": (
        lambda c: replaced(c, " --autoscaling-config=~/ray_bootstrap_config.yaml", ""),
        HEAD,
        "--autoscaling-config",
    ),
    "no start": (lambda c: c.update(head_start_ray_commands=["ray stop"]), HEAD[:-3], "no `ray start`"),
    "zones elsewhere": (
        lambda c: c["provider"].update(availability_zone="us-east-2a"),
        "provider.availability_zone",
        "not in region us-west-2",
    ),
    "a file system elsewhere": (
        lambda c: replaced(c, "efs.us-west-2", "efs.us-east-1"),
        "initialization_commands[2]",
        "in us-east-1",
    ),
    "nothing mounted": (
        lambda c: c["initialization_commands"].pop(2),
        "initialization_commands",
        "nothing is mounted at /mnt/perturbray",
    ),
    "a key that is not there": (
        lambda c: c["auth"].update(ssh_private_key="keys"),
        "auth.ssh_private_key",
        "keys is no file",
    ),
    "a key for all to read": (
        lambda c: (c["auth"].update(ssh_private_key="key"), Path("key").chmod(0o644)),
        "auth.ssh_private_key",
        "chmod 600 key",
    ),
}
BY_BOTOCORE = {  # what only EC2's own model knows
    "a key of node_config": (
        lambda c: rename(machine(c), "InstanceType", "InstanceTyp"),
        f"{CPU}.InstanceTyp",
        "did you mean 'InstanceType'?",
    ),
    "a key deep in node_config": (
        lambda c: machine(c)["BlockDeviceMappings"][0]["Ebs"].update(VolumeSiz=1),
        f"{CPU}.BlockDeviceMappings[0].Ebs.VolumeSiz",
        "'VolumeSize'",
    ),
    "a market that there is not": (
        lambda c: machine(c)["InstanceMarketOptions"].update(MarketType="spott"),
        f"{CPU}.InstanceMarketOptions.MarketType",
        "'spot'",
    ),
    "a machine that there is not": (
        lambda c: machine(c).update(InstanceType="m5.2xlage"),
        f"{CPU}.InstanceType",
        "'m5.2xlarge'",
    ),
    "a text for a yes": (lambda c: machine(c).update(EbsOptimized="yes"), f"{CPU}.EbsOptimized", "takes a boolean"),
    "a text for many": (
        lambda c: machine(c).update(SecurityGroupIds="sg-1"),
        f"{CPU}.SecurityGroupIds",
        "takes a list",
    ),
}
LOCAL = {
    "the second autoscaler": (
        lambda c: replaced(c, "RAY_enable_autoscaler_v2=0 ", ""),
        "head_start_ray_commands",
        "RAY_UP_enable_autoscaler_v2=0 ray up",
    ),
    "no workers": (lambda c: c["provider"].update(worker_ips=[]), "provider.worker_ips", "no workers"),
    "the head among them": (
        lambda c: c["provider"]["worker_ips"].append("192.0.2.11"),
        "provider.worker_ips",
        "192.0.2.11 is the head",
    ),
    "no key": (lambda c: c["auth"].pop("ssh_private_key"), "auth.ssh_private_key", "name one"),
    "no shared folder": (
        lambda c: replaced(c, "PERTURBRAY_CACHE=$", "CACHE=$"),
        "setup_commands",
        "PERTURBRAY_CACHE is not set",
    ),
}


def plants(table: dict):
    return pytest.mark.parametrize(("plant", "where", "says"), list(table.values()), ids=list(table))


@pytest.fixture
def config(folder) -> dict:
    """cluster.yaml filled in, each value an object of its own: YAML's anchors share them."""
    return json.loads(json.dumps(yaml.safe_load(filled("aws", folder))))


@pytest.mark.parametrize("kind", FILES)
def test_a_shipped_file_has_no_mistake_once_it_is_filled_in(kind, folder):
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    text = filled(kind, folder).replace("-py311-", f"-py{here.replace('.', '')}-")
    config = yaml.safe_load(text)
    assert ray_accepts(config)
    assert found(config, folder) == []


@pytest.mark.parametrize(("kind", "number"), [("aws", 2), ("local", 5)])
def test_a_shipped_file_names_all_that_is_to_be_filled_in_and_nothing_else(kind, number, folder):
    text = FILES[kind].read_text()
    body = "\n".join(line.split("#")[0] for line in text.splitlines())
    names = set(re.findall(r"FILL_IN_\w+", body))
    findings = found(yaml.safe_load(text), folder)
    assert {re.search(r"FILL_IN_\w+", message)[0] for _, message in findings} == names
    assert len(findings) == len(names) == number


@plants(BY_RAY)
def test_what_ray_refuses_is_said_with_its_place_and_what_would_be_right(plant, where, says, config, folder):
    plant(config)
    assert not ray_accepts(config)
    messages = dict(found(config, folder))
    assert where in messages
    assert says in messages[where]


@plants(BY_US)
def test_what_ray_lets_pass_is_found_alone(plant, where, says, config, folder):
    plant(config)
    assert ray_accepts(config)
    ((at, message),) = found(config, folder)
    assert at == where
    assert says in message


@plants(BY_BOTOCORE)
def test_what_ec2_would_refuse_is_found_alone(plant, where, says, config, folder):
    pytest.importorskip("botocore", reason="node_config is checked against boto3's model of EC2: the test extra has it")
    plant(config)
    assert ray_accepts(config)
    ((at, message),) = found(config, folder)
    assert at == where
    assert says in message


@plants(LOCAL)
def test_what_goes_wrong_on_machines_of_ones_own_is_found_alone(plant, where, says, folder):
    config = yaml.safe_load(filled("local", folder))
    plant(config)
    assert ray_accepts(config)
    ((at, message),) = found(config, folder)
    assert at == where
    assert says in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "PERTURBRAY_CACHE is not set on a worker"),
        (["--env PERTURBRAY_CACHE=/home/ray/cache", "-v /mnt/perturbray:/shared"], "lies in a worker's container"),
        (["-e PERTURBRAY_CACHE=/shared/cache", "--volume=/data:/shared"], "nothing is mounted at /data of a worker"),
        (["--env PERTURBRAY_CACHE=/shared/c", "--mount type=bind,source=/mnt/perturbray,target=/shared"], None),
    ],
)
def test_storage_that_workers_do_not_see_is_found(options, says, config, folder):
    kept = [text for text in config["docker"]["run_options"] if "PERTURBRAY_CACHE" not in text and "-v " not in text]
    given = ["--env PERTURBRAY_CACHE=/shared/cache", "-v /mnt/perturbray:/shared"]
    config["docker"].update(run_options=kept, head_run_options=given, worker_run_options=options)
    assert ray_accepts(config)
    messages = [text for _, text in found(config, folder)]
    assert len(messages) == (says is not None)
    assert says is None or says in messages[0]


def test_missing_credentials_and_an_unknown_profile_are_found(config, folder, monkeypatch):
    pytest.importorskip("botocore", reason="credentials are looked for as boto3 does: the test extra has it")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    ((where, message),) = found(config, folder)
    assert (where, "aws configure" in message) == ("provider", True)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    ((where, message),) = found(config, folder)
    assert (where, "nobody" in message) == ("provider", True)


def test_a_region_that_there_is_not_is_found(config, folder):
    pytest.importorskip("botocore", reason="boto3 knows the regions: the test extra has it")
    replaced(config, "us-west-2", "us-west-9")
    ((where, message),) = found(config, folder)
    assert where == "provider.region"
    assert "'us-west-2'" in message


def test_without_botocore_it_says_what_was_not_checked_and_how_to_get_it(config, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    (finding,) = check(ClusterFile(Path("cluster.yaml"), config, folder))
    assert finding.warning
    assert "pip install -e '.[aws]'" in finding.what


def test_a_cluster_on_google_needs_a_project(folder):
    config = yaml.safe_load(filled("aws", folder))
    config["provider"] = {"type": "gcp", "region": "us-west1", "availability_zone": "us-west1-a", "project_id": None}
    assert ray_accepts(config)
    assert [where for where, _ in found(config, folder)] == ["provider.project_id"]


def places(config: dict, *, deep: int) -> list[tuple[dict, str]]:
    """Every mapping in a mapping, to a depth, with each of its keys."""
    inner = [
        place for part in config.values() if isinstance(part, dict) and deep for place in places(part, deep=deep - 1)
    ]
    return [(config, key) for key in config] + inner


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_any_shape_gets_findings_and_no_traceback(kind, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "botocore.session", None)  # it has its own walk, and takes most of the time
    config = json.loads(json.dumps(yaml.safe_load(filled(kind, folder))))
    assert len(places(config, deep=2)) > 20
    for holder, key in places(config, deep=2):
        right = holder[key]
        for wrong in (None, 3, "text", [1], {"a": 1}):
            holder[key] = wrong
            found(config, folder)
        holder[key] = right
    assert found(config, folder) == []


@pytest.fixture
def checked(folder, monkeypatch, capsys):
    """Runs `perturbray cluster check FILE`: its exit code, and what it printed."""

    def run(text: str) -> tuple[int, str, str]:
        Path("cluster.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["perturbray", "cluster", "check", "cluster.yaml"])
        with pytest.raises(SystemExit) as end:
            cli.command()
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return run


def test_the_command_says_a_line_a_finding_and_ends_with_a_code(checked, folder):
    code, out, err = checked(filled("local", folder))
    assert (code, err) == (0, "")
    assert out == "cluster.yaml: 0 errors, 0 warnings\nnext: RAY_UP_enable_autoscaler_v2=0 ray up cluster.yaml\n"
    code, out, err = checked(filled("local", folder).replace("worker_ips:", "worker_ip:"))
    assert (code, err) == (1, "")
    assert out.splitlines()[0].startswith("error: provider")
    assert out.splitlines()[-1].startswith("cluster.yaml: 2 errors")
    code, out, _ = checked(filled("aws", folder).replace("2.60.0-py311-gpu", "latest-gpu"))
    assert code == 0, "a warning is no error"
    assert out.splitlines()[0].startswith("warning: docker.image")
    assert out.endswith("next: ray up cluster.yaml\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cluster_name: [a", "cluster.yaml, line 1: no valid YAML"),
        ("cluster_name: a\nmax_workers: 1\nmax_workers: 2\n", "line 3: no valid YAML ('max_workers' stands here twice"),
        ("- a\n", "holds no mapping"),
    ],
)
def test_what_is_no_cluster_file_is_bad_input(text, says, checked):
    code, out, err = checked(text)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
