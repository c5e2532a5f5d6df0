"""Where a cluster is looked for and not found: said at once, in one line."""

import socket

import pytest

from perturbray.cluster import JOB, _check_address, chosen
from perturbray.errors import InputError


def test_an_address_where_nothing_listens_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _check_address(f"127.0.0.1:{port}")
    with pytest.raises(InputError, match=f"--address 127.0.0.1:{port}: no Ray cluster answers there") as caught:
        _check_address(f"127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["auto", "local"])
def test_addresses_of_other_forms_are_left_to_ray(address):
    _check_address(address)


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265"])
def test_an_address_for_other_machines_is_refused_with_the_way_for_them(address):
    with pytest.raises(InputError, match=r"not through a tunnel.*ray job submit"):
        chosen(address)


@pytest.mark.parametrize(
    ("address", "variable", "job", "used", "said"),
    [
        (None, "", False, None, ""),
        ("auto", "", False, "auto", ""),
        ("local", "10.0.0.1:6379", False, None, ""),
        ("10.0.0.2:6379", "10.0.0.1:6379", False, "10.0.0.2:6379", ""),
        (None, "10.0.0.1:6379", False, "10.0.0.1:6379", "RAY_ADDRESS=10.0.0.1:6379 names the cluster"),
        (None, "10.0.0.1:6379", True, "10.0.0.1:6379", "the cluster that it was submitted to (10.0.0.1:6379)"),
        (None, "", True, "auto", "the cluster that it was submitted to"),
        (None, "http://127.0.0.1:8265", False, None, "this sweep runs on this machine alone"),
    ],
)
def test_the_environment_decides_where_no_address_is_given_and_that_is_said(
    monkeypatch, address, variable, job, used, said
):
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", variable)
    if job:
        monkeypatch.setenv(JOB, "{}")
    found, note = chosen(address)
    assert found == used
    assert said in note
    assert bool(said) == bool(note)


def test_a_port_that_is_none_is_refused():
    with pytest.raises(InputError, match="no Ray cluster answers there"):
        _check_address("127.0.0.1:99999")
