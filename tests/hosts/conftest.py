"""A pair of pretend hosts and a cluster on them, once for a module: a real `ray up` takes half a minute."""

from pathlib import Path

import launched
import pretend
import pytest


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder that both hosts and this machine see under one path."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def pair(shared, tmp_path_factory):
    """Two hosts."""
    if reason := pretend.impossible():
        pytest.skip(reason)
    with pretend.hosts(tmp_path_factory.mktemp("hosts"), visible=[shared]) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def cluster(pair, shared):
    """The local variant filled in; nothing runs yet."""
    return launched.launch(pair, shared)


@pytest.fixture(scope="module")
def dashboard(cluster):
    """The address of the running cluster's dashboard, through a tunnel."""
    with launched.up(cluster) as url:
        yield url
