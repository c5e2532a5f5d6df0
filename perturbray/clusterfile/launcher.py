"""What Ray's own launcher says of a cluster file: its schema, and the checks that it makes before it starts."""

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path

from perturbray.clusterfile.file import ClusterFile, Finding, join
from perturbray.errors import nearest

# Ray's words, the place that they are about, and what would be right.
SAID = (
    ("`head_node_type` must be one of", "head_node_type", "name one of available_node_types"),
    ("specify `head_node_type`", "head_node_type", "name one of available_node_types"),
    ("sum of `min_workers`", "max_workers", "at least the sum of the node types' min_workers"),
    ("container & image name", "docker", "give both container_name and image"),
    ("head_ip", "provider", "give head_ip and worker_ips"),
    ("available_node_types", "available_node_types", "a local cluster has one type of node, which Ray makes"),
)


def ray_findings(file: ClusterFile) -> Iterator[Finding]:
    """What keeps Ray from accepting the file. All errors of its schema; where there are none, the first of its checks."""
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    if not file.kind or file.kind not in _NODE_PROVIDERS:
        yield Finding("provider.type", f"Ray knows no {file.kind!r}; {nearest(file.kind, _NODE_PROVIDERS)}")
        return
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    errors = [finding for error in validator.iter_errors(file.config) for finding in _schema_findings(error)]
    yield from errors
    if not errors:
        yield from _checks(file)


def _schema_findings(error) -> Iterator[Finding]:
    path = ""
    for part in error.absolute_path:
        path = join(path, part)
    if error.validator == "additionalProperties":
        known = set(error.schema.get("properties", {}))
        for key in sorted(set(map(str, error.instance)) - known):
            yield Finding(join(path, key), f"Ray knows no such key here; {nearest(key, known)}")
    else:
        yield Finding(path, f"Ray's schema: {error.message}")


def _checks(file: ClusterFile) -> Iterator[Finding]:
    """prepare_config and validate_config, which raise whatever comes to hand and print beside it."""
    import click
    import jsonschema
    from ray.autoscaler._private.cli_logger import cli_logger
    from ray.autoscaler._private.util import prepare_config, validate_config

    kept = {"color_mode": cli_logger.color_mode, "log_style": cli_logger.log_style}
    quiet = io.StringIO()
    try:
        cli_logger.configure(log_style="pretty", color_mode="false")  # its other style logs past the redirection
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            validate_config(prepare_config(copy.deepcopy(file.config)))
    except (click.ClickException, jsonschema.ValidationError) as error:
        yield _said(file, error.message)
    except (AssertionError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        yield _said(file, f"{type(error).__name__}: {error}")
    finally:
        cli_logger.configure(**kept)


def _said(file: ClusterFile, words: str) -> Finding:
    words = " ".join(words.split())
    for fragment, where, right in SAID:
        if fragment in words:
            if where == "head_node_type":
                right = nearest(file.head, file.node_types)
            if where == "docker":
                where = "docker.image" if file.docker.get("container_name") else "docker.container_name"
            return Finding(where, f"Ray says: {words}; {right}")
    return Finding("", f"Ray says: {words}")
