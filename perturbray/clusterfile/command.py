"""The command `perturbray cluster check`: its flags, and what it does."""

import argparse
from pathlib import Path

from perturbray.clusterfile.file import ClusterFile, Finding

FAILED = 1


def add_cluster(commands: argparse._SubParsersAction) -> None:
    """The `perturbray cluster check` command."""
    cluster = commands.add_parser("cluster", help="a cluster file, before `ray up` starts anything")
    actions = cluster.add_subparsers(dest="action", required=True)
    checking = actions.add_parser(
        "check",
        help="what is wrong with a cluster file",
        description="Says what Ray's launcher would refuse in a cluster file, and what it accepts and a sweep would suffer "
        "from: keys that EC2 does not know, missing credentials, a token that others can read or that reaches no node, no "
        "storage that all nodes see, a head that runs trials, ... Nothing is started. A line each: where, what is wrong, what "
        "would be right. Code 1 where there is an error, 0 where there are warnings alone.",
    )
    checking.add_argument("file", metavar="FILE.yaml", help="from the folder where `ray up` will be called")


def check(file: ClusterFile) -> list[Finding]:
    """Everything that is wrong with a cluster file, errors before warnings."""
    from perturbray.clusterfile.aws import aws_findings
    from perturbray.clusterfile.launcher import ray_findings
    from perturbray.clusterfile.rules import RULES

    found = [finding for rule in (ray_findings, *RULES, aws_findings) for finding in rule(file)]
    return sorted(dict.fromkeys(found), key=lambda finding: finding.warning)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found, and what to call next. Raises InputError where the file cannot be read."""
    file = ClusterFile.read(Path(arguments.file))
    found = check(file)
    for finding in found:
        print(finding)
    warnings = sum(finding.warning for finding in found)
    errors = len(found) - warnings
    print(f"{file.path}: {_count(errors, 'error')}, {_count(warnings, 'warning')}")
    if not errors:
        second = "RAY_UP_enable_autoscaler_v2=0 " if file.kind == "local" else ""
        print(f"next: {second}ray up {file.path}")
    return FAILED if errors else 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
