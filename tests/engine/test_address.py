"""Where a cluster is looked for and not found: said at once, in one line."""

import socket

import pytest

from perturbray.cluster import _check_address
from perturbray.errors import InputError


def test_an_address_where_nothing_listens_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _check_address(f"127.0.0.1:{port}")
    with pytest.raises(InputError, match=f"--address 127.0.0.1:{port}: no Ray cluster answers there") as caught:
        _check_address(f"127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["auto", "local", "ray://head:10001"])
def test_addresses_of_other_forms_are_left_to_ray(address):
    _check_address(address)


def test_a_port_that_is_none_is_refused():
    with pytest.raises(InputError, match="no Ray cluster answers there"):
        _check_address("127.0.0.1:99999")
