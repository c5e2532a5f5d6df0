"""The server: on loopback alone, for reading alone, and for no name but this machine's; the command, and its end."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from fake_sweep import fake_sweep
from said import say

from perturbray.errors import InputError
from perturbray.watch import command, server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The port of a server in a thread, and its folder."""
    folder = tmp_path_factory.mktemp("served") / "imbalance"
    plan = fake_sweep(folder, trials=10, failing=2, levels=(0.0, 0.3), seeds=1, status={"state": "running"})
    say(folder, runs=[trial["key"] for trial in plan["trials"][12:14]])
    watch, listening, ready = server.Watch(folder), server.bind(), threading.Event()
    held = {}

    async def main():
        held.update(loop=asyncio.get_running_loop(), end=asyncio.Event())
        ready.set()
        await server.serve(watch, listening, end=held["end"])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    ready.wait(10)
    yield listening.getsockname()[1], folder
    held["loop"].call_soon_threadsafe(held["end"].set)
    thread.join(10)
    assert not thread.is_alive()


def ask(port, path="/state", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_the_page_is_whole_and_loads_nothing(served):
    port, _ = served
    status, headers, body = ask(port, "/")
    assert status == 200
    assert b"loss is NaN in epoch 3" in body
    assert b"http://" not in body.replace(b"http://www.w3.org", b"")
    assert b" src=" not in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe-inline" not in headers["Content-Security-Policy"].split("script-src")[1].split(";")[0]


def test_the_state_is_told_once_and_again_only_when_it_is_another(served):
    port, folder = served
    status, headers, body = ask(port)
    assert status == 200
    assert json.loads(body)["title"] == "10/16 imbalance"
    say(folder, state="interrupted", beat=1)
    while b"Interrupted" not in body:
        _, headers, body = ask(port)
    known = headers["ETag"]
    seen = [ask(port, If_None_Match=known)[0] for _ in range(3)]
    assert 304 in seen


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8350", "127.0.0.1.evil.example", "localhost.evil", ""])
@pytest.mark.parametrize("path", ["/", "/state", "/nothing"])
def test_a_name_that_is_not_this_machines_is_refused(served, host, path):
    status, _, body = ask(served[0], path, Host=host)
    assert status in (400, 403)
    assert b"imbalance" not in body


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:8350", "[::1]:8350"])
def test_this_machine_is_answered_through_any_port_of_a_tunnel(served, host):
    assert ask(served[0], Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/state"])
def test_there_is_nothing_but_to_read(served, method, path):
    status, headers, _ = ask(served[0], path, method)
    assert status == 405
    assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/sweep.json", "/live.json", "/../sweep.json", "/%2e%2e/sweep.json", "//etc/passwd"])
def test_no_file_is_served(served, path):
    assert ask(served[0], path)[0] == 404


def test_it_listens_on_loopback_and_takes_the_next_free_port():
    first = server.bind()
    with first, server.bind() as second:
        assert first.getsockname()[0] == second.getsockname()[0] == "127.0.0.1"
        assert second.getsockname()[1] > first.getsockname()[1] >= server.PORT
        with pytest.raises(InputError, match=rf"--port {first.getsockname()[1]}: cannot be used .*in use"):
            server.bind(first.getsockname()[1])
    with pytest.raises(InputError, match="--port 70000"):
        server.bind(70000)


def start(*words, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "perturbray", "watch", *words], **pipes, **options)


@pytest.mark.slow
def test_the_command_ends_quietly_with_ctrl_c(half):
    folder, _ = half
    with start(str(folder)) as process:
        line = process.stdout.readline()
        port = int(line.split(":")[-1].split("/")[0])
        assert f"live page of {folder}: http://127.0.0.1:{port}/" in line
        assert ask(port)[0] == 200
        process.send_signal(signal.SIGINT)
        assert (process.stdout.read(), process.wait(20)) == ("", 0)


def test_a_folder_that_is_not_there_is_an_error_that_names_one_that_is(half):
    folder, _ = half
    with start(str(folder.parent / "imbalanse")) as process:
        said = process.stdout.read()
        assert process.wait(20) == 2
    assert said == (
        f"error: {folder.parent / 'imbalanse'}: no such folder; a sweep writes its results to results/<sweep>; "
        f"there is {folder}\n"
    )


@pytest.mark.slow
def test_the_page_beside_a_sweep_ends_with_it_however_it_ends(half):
    folder, _ = half
    code = (
        "import os, sys, time; from pathlib import Path; from perturbray.watch.command import beside\n"
        "with beside(Path(sys.argv[1]), lambda line: print(line, flush=True)): time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as driver:
        port = int(driver.stdout.readline().split(":")[-1].split("/")[0])
        assert ask(port)[0] == 200
        driver.kill()
    for _ in range(100):
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)):
                return
        threading.Event().wait(0.1)
    pytest.fail("the page goes on without its sweep")


@pytest.mark.slow
def test_what_happens_to_the_page_beside_a_sweep_harms_no_sweep(half):
    folder, _ = half
    lines, heard = [], threading.Event()

    def hear(line):
        lines.append(line)
        heard.set()

    made = []
    true = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.subprocess, "Popen", lambda *a, **k: made.append(true(*a, **k)) or made[-1])
        with command.beside(folder, hear):
            assert heard.wait(30)
            heard.clear()
            os.kill(made[0].pid, signal.SIGKILL)
            assert heard.wait(30)
    assert "live page of" in lines[0]
    assert "the sweep goes on without it" in lines[1]
    assert lines[2] == f"look again: perturbray watch {folder}"
