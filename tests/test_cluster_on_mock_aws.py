"""`cluster.yaml` on a mock of AWS: what Ray's launcher makes of it there, instances and their security group among it."""

import copy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Node types as Ray completes them, an instance of each by type, and the permissions of their security group."""
    moto = pytest.importorskip("moto", reason="no mock of AWS: the test extra has moto")
    pytest.importorskip("boto3", reason="no boto3: the test extra has it")
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        patch.setenv("HOME", str(home))  # Ray keeps the key pair that it makes there
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        import boto3
        from ray.autoscaler._private.aws import config as launcher
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
        from ray.autoscaler._private.util import prepare_config, validate_config

        patch.setattr(launcher.time, "sleep", lambda seconds: None)  # Ray waits 15 s for a role, twice
        ec2 = boto3.client("ec2", region_name="us-west-2")
        image = ec2.describe_images()["Images"][0]["ImageId"]
        text = (ROOT / "cluster.yaml").read_text().replace("FILL_IN_IMAGE", image)
        ready = prepare_config(copy.deepcopy(yaml.safe_load(text.replace("FILL_IN_FILE_SYSTEM", "fs-1"))))
        validate_config(ready)
        ready = launcher.bootstrap_aws(ready)
        ready = AWSNodeProvider.fillout_available_node_types_resources(ready)
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for name, kind in ready["available_node_types"].items():
            tags = {"ray-node-kind": "worker", "ray-user-node-type": name, "ray-cluster-name": ready["cluster_name"]}
            provider.create_node(kind["node_config"], tags, 1)
        instances = {}
        for reservation in ec2.describe_instances()["Reservations"]:
            for instance in reservation["Instances"]:
                tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
                instances[tags["ray-user-node-type"]] = instance
        groups = {group["GroupId"] for instance in instances.values() for group in instance["SecurityGroups"]}
        (group,) = ec2.describe_security_groups(GroupIds=sorted(groups))["SecurityGroups"]
        volumes = {volume["VolumeId"]: volume for volume in ec2.describe_volumes()["Volumes"]}
        yield ready["available_node_types"], instances, group, volumes


def test_ray_finds_the_cpus_and_gpus_of_workers_and_leaves_the_head_none(started):
    kinds, *_ = started
    found = {name: (kind["resources"].get("CPU"), kind["resources"].get("GPU", 0)) for name, kind in kinds.items()}
    assert found == {"head": (0, 0), "gpu": (4, 1), "cpu": (8, 0)}


def test_workers_run_on_spot_and_the_head_on_demand(started):
    _, instances, _, _ = started
    assert {name: instance["State"]["Name"] for name, instance in instances.items()} == dict.fromkeys(
        instances, "running"
    )
    found = {
        name: (instance["InstanceType"], instance.get("InstanceLifecycle")) for name, instance in instances.items()
    }
    assert found == {"head": ("m5.xlarge", None), "gpu": ("g5.xlarge", "spot"), "cpu": ("m5.2xlarge", "spot")}


def test_an_instance_leaves_no_disk_behind_and_hides_its_credentials_from_old_requests(started):
    _, instances, _, volumes = started
    for instance in instances.values():
        (disk,) = instance["BlockDeviceMappings"]
        assert disk["Ebs"]["DeleteOnTermination"]
        assert volumes[disk["Ebs"]["VolumeId"]]["Size"] == 140
        assert instance["MetadataOptions"]["HttpTokens"] == "required"


def test_strangers_reach_ssh_and_nothing_of_ray(started):
    *_, group, _ = started
    world = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in world] == [("tcp", 22, 22)]
    inside = [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]]
    assert inside == [group["GroupId"]], "nodes reach each other"
