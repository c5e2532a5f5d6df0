"""What is wrong with the part of a cluster file that goes to AWS: node_config against EC2's own model, and credentials."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from perturbray.clusterfile.file import PLACEHOLDER, ClusterFile, Finding, join
from perturbray.errors import nearest

HOW = "pip install -e '.[aws]', which `ray up` needs too"
RAYS_OWN = {"SubnetIds"}  # what Ray takes in node_config and never hands on
WITH_GPU = re.compile(r"(g|gr|p)\d")  # names of instance types that have one


def aws_findings(file: ClusterFile) -> Iterator[Finding]:
    if file.kind != "aws":
        return
    yield from _zones(file)
    try:
        import botocore.session
    except ImportError:
        yield Finding("available_node_types", f"node_config and credentials were not checked: {HOW}", warning=True)
        return
    yield from _credentials(file, botocore.session.Session())
    shape, regions = _ec2()
    region = str(file.provider.get("region", ""))
    if region not in regions:
        yield Finding("provider.region", f"EC2 has no region {region!r}; {nearest(region, regions)}")
    for name, kind in file.node_types.items():
        path = join(join("available_node_types", name), "node_config")
        given = kind.get("node_config")
        own = RAYS_OWN if isinstance(given, dict) else set()
        yield from _against(shape, {k: v for k, v in given.items() if k not in own} if own else given, path)


@cache
def _ec2() -> tuple[Any, list[str]]:
    """What EC2 takes when an instance is started, and where there is EC2, by botocore's copy of its service model."""
    import botocore.session

    session = botocore.session.Session()
    parts = session.get_available_partitions()
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    return shape, [name for part in parts for name in session.get_available_regions("ec2", part)]


def _zones(file: ClusterFile) -> Iterator[Finding]:
    """Everything is in one region."""
    region = str(file.provider.get("region", ""))
    zones = [zone.strip() for zone in str(file.provider.get("availability_zone", "")).split(",") if zone.strip()]
    if wrong := [zone for zone in zones if not zone.startswith(region)]:
        right = f"a zone is {region} and a letter"
        yield Finding("provider.availability_zone", f"{', '.join(wrong)} is not in region {region}; {right}")
    for path, text in file.commands("initialization_commands", "setup_commands"):
        for other in set(re.findall(r"\.efs\.([\w-]+)\.amazonaws\.com", text)) - {region}:
            yield Finding(path, f"the file system is in {other} and the nodes in {region}: one that is in {region}")


def _credentials(file: ClusterFile, session: Any) -> Iterator[Finding]:
    from botocore.exceptions import BotoCoreError

    if file.provider.get("aws_credentials"):
        return
    try:
        found, reason = session.get_credentials(), "none in the environment or in ~/.aws"
    except BotoCoreError as error:
        found, reason = None, str(error)
    if found is None:
        yield Finding(
            "provider", f"no AWS credentials ({reason}): run `aws configure`, or set AWS_PROFILE to what there is"
        )


SCALARS = {"string": str, "integer": int, "long": int, "boolean": bool, "float": float, "double": float}


def _against(shape: Any, value: Any, path: str) -> Iterator[Finding]:
    """What EC2 would refuse in ``value``, by the shape that its service model gives for it."""
    if shape.type_name == "structure" and isinstance(value, dict):
        for key, part in value.items():
            if key in shape.members:
                yield from _against(shape.members[key], part, join(path, str(key)))
            else:
                yield Finding(join(path, str(key)), f"EC2 knows no such key here; {nearest(str(key), shape.members)}")
    elif shape.type_name == "list" and isinstance(value, list):
        for number, part in enumerate(value):
            yield from _against(shape.member, part, join(path, number))
    elif shape.type_name in ("structure", "list"):
        kind = "a mapping" if shape.type_name == "structure" else "a list"
        yield Finding(path, f"{value!r} stands where EC2 takes {kind}")
    elif kind := SCALARS.get(shape.type_name):
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            yield Finding(path, f"{value!r} stands where EC2 takes {'an' if kind is int else 'a'} {shape.type_name}")
        elif (options := getattr(shape, "enum", None)) and value not in options and not PLACEHOLDER.search(value):
            yield Finding(path, f"EC2 knows no {value!r}; {nearest(value, options)}")
