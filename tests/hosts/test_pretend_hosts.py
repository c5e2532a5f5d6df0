"""Pretend hosts are apart from each other and from this machine, and nothing of them stays."""

import sys
from pathlib import Path

import pretend
import pytest

pytestmark = pytest.mark.slow


def test_hosts_are_apart_and_reach_each_other(pair, shared):
    (shared / "seen").touch()
    for one, other in ((pair.a, pair.b), (pair.b, pair.a)):
        assert one.run("hostname").strip() == f"pretend-{one.name}"
        assert one.run(["ls", str(shared)]).split() == ["seen"]
        one.run(f"echo {one.name} > ~/own; echo {one.name} > /tmp/own; echo {one.name} > /dev/shm/own")
        assert f"{pretend.NETWORK}.1{'12'[one is pair.b]}" in one.run("ip -4 address show eth0")
        code = f"import socket; socket.create_connection(('{other.address}', 22), timeout=5).close()"
        one.run([sys.executable, "-c", code])
    for host in pair:
        assert host.run("cat ~/own /tmp/own /dev/shm/own").split() == [host.name] * 3
        assert (host.folder / "root" / "own").read_text().strip() == host.name
    for place in ("/root/own", "/tmp/own", "/dev/shm/own"):
        assert not Path(place).exists(), "this machine's own folder"


def test_a_signal_reaches_the_processes_of_one_host_alone(pair):
    for host in pair:
        host.run("setsid sleep 1234 > /dev/null 2>&1 < /dev/null & true")
    assert len(pair.a.processes("sleep")) == len(pair.b.processes("sleep")) == 1
    assert pair.b.kill("sleep") == 1
    assert (len(pair.a.processes("sleep")), len(pair.b.processes("sleep"))) == (1, 0)
