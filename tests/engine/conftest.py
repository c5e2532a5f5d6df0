"""Tests of the engine fail by time only where they hang."""

import signal

import processes
import pytest

HANG = 300  # seconds; the longest sweep here takes a tenth of it


@pytest.fixture(autouse=True)
def hang_limit(request):
    """Raise in the middle of a test that waits for ever; a slow test limits its processes itself."""
    if request.node.get_closest_marker("slow"):
        yield
        return

    def stop(*_):
        raise TimeoutError(f"the test hangs: nothing for {HANG} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def left():
    """What tests that kill a command put here is gone in the end; waited for once, while other tests run."""
    found: set[tuple[int, str]] = set()
    yield found
    processes.wait_for_none(found)
