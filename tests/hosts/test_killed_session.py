"""A session that is killed leaves no pretend host. Alone in its module: one session at a time has hosts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pretend
import pytest

pytestmark = pytest.mark.slow

KILLED = """
import sys
from pathlib import Path

import pretend

with pretend.hosts(Path(sys.argv[1])) as hosts:
    hosts.b.run("setsid sleep 1000 >/dev/null 2>&1 < /dev/null &")
    print(*(host.number for host in hosts), flush=True)
    sys.stdin.read()
"""


def links() -> str:
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout


def inside(number: int) -> set[int]:
    """Processes of a host, by the numbers that they have outside: those in the process namespace of its first one."""
    space = os.readlink(f"/proc/{number}/ns/pid_for_children")
    found = set()
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                if os.readlink(place / "ns" / "pid") == space:
                    found.add(int(place.name))
            except OSError:
                continue
    return found


def test_nothing_stays_of_hosts_whose_session_is_killed(tmp_path):
    if reason := pretend.impossible():
        pytest.skip(reason)
    words = [sys.executable, "-c", KILLED, str(tmp_path / "hosts")]
    environment = {**os.environ, "PYTHONPATH": str(Path(pretend.__file__).parent)}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as session:
        numbers = [int(number) for number in session.stdout.readline().split()]
        processes = set().union(*map(inside, numbers))
        assert len(processes) >= 3, "two sshd and a sleep"
        session.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while left := {number for number in processes if Path(f"/proc/{number}").exists()}:
        assert time.monotonic() < end, f"processes {left} stay"
        time.sleep(0.1)
    with pretend.hosts(tmp_path / "next") as hosts:  # what stayed of the network does not stand in the way
        assert hosts.a.run("hostname").strip() == "pretend-a"
    assert "pray" not in links()
