"""The command `perturbray watch`, and the same page beside a sweep (`--watch`): flags, the process, its end."""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from perturbray.errors import InputError

NICE = 5  # of the page beside a sweep, which trials come before
END_SECONDS = 6.0  # that the page beside a sweep is given to end by itself


def add_watch(commands: argparse._SubParsersAction) -> None:
    """The `perturbray watch` command."""
    watch = commands.add_parser(
        "watch",
        help="a live page of a sweep: what runs, failed, is left; curves and leaderboard as they form",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serves a page of a sweep that runs, or ran, until Ctrl-C: trials queued, running (with their learning\n"
        "curves, cells a second, memory), done, and failed with the reason; time left; the leaderboard and\n"
        "the figures as they form; searches. It keeps itself up to date.",
        epilog="It reads the results folder and nothing else, and never writes there: the sweep may run on another machine,\n"
        "if the folder is shared, and the page may be stopped and started at any time. A sweep that was killed is\n"
        "told from one that runs: its last sign of life is some seconds old.\n\n"
        "The page is served on 127.0.0.1 alone: to whoever is logged in to this machine. From a laptop, through SSH:\n"
        "  ssh -L 8350:127.0.0.1:8350 HOST    and then http://127.0.0.1:8350/ there\n"
        "Any sweep shows it too while it runs:  python sweeps/imbalance.py --watch",
    )
    watch.add_argument("folder", metavar="RESULTS/SWEEP", help="the folder of one sweep, e.g. results/imbalance")
    watch.add_argument(
        "--port", metavar="N", type=int, help="where to serve it (default: 8350, or the next one that is free)"
    )
    watch.add_argument(
        "--open", action=argparse.BooleanOptionalAction, default=False, help="open it in a browser (default: no)"
    )
    watch.add_argument("--beside", action="store_true", help=argparse.SUPPRESS)  # until standard input ends


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Raises InputError for a folder or a port that cannot be."""
    folder = Path(arguments.folder)
    if not folder.is_dir() and not arguments.beside:
        there = sorted(path.parent for path in folder.parent.glob("*/sweep.json")) if folder.parent.is_dir() else []
        known = f"; there is {', '.join(map(str, there[:5]))}" if there else ""
        raise InputError(f"{folder}: no such folder; a sweep writes its results to results/<sweep>{known}")
    from perturbray.watch.server import HOST, Watch, bind, serve

    listening = bind(arguments.port)
    address = f"http://{HOST}:{listening.getsockname()[1]}/"
    print(f"live page of {folder}: {address}" + ("" if arguments.beside else "  (Ctrl-C ends it)"), flush=True)
    if arguments.open:
        import webbrowser

        webbrowser.open(address)

    async def until_the_end() -> None:
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end.set)
        if arguments.beside:
            threading.Thread(target=_until_eof, args=(loop, end), daemon=True).start()
        await serve(Watch(folder), listening, end=end)

    asyncio.run(until_the_end())
    return 0


def _until_eof(loop: asyncio.AbstractEventLoop, end: asyncio.Event) -> None:
    """Whoever started this process holds the other end of its standard input, and lets go of it even when it is killed."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(end.set)


@contextmanager
def beside(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """The page of a folder in a process of its own while a sweep runs there, which nothing that happens to it harms."""
    words = [sys.executable, "-m", "perturbray", "watch", str(folder), "--beside"]
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is the sweep's, whose end the page is to show
            preexec_fn=_step_back if hasattr(os, "nice") else None,
        )
    except OSError as error:
        say(f"the live page did not start ({error}); the sweep goes on without it")
        yield
        return
    ending = threading.Event()
    listener = threading.Thread(target=_listen, args=(process, ending, say), daemon=True)
    listener.start()
    try:
        yield
    finally:
        ending.set()
        process.stdin.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        listener.join()
        process.stdout.close()
        say(f"look again: perturbray watch {folder}")


def _step_back() -> None:
    os.nice(NICE)


def _listen(process: subprocess.Popen, ending: threading.Event, say: Callable[[str], None]) -> None:
    """Pass on the address; and the last line, if the page ends before the sweep."""
    lines = [""]
    for line in process.stdout:
        if lines == [""]:
            say(line.rstrip())
        lines = [*lines[-20:], line.rstrip()]
    if not ending.is_set():
        say(f"the live page ended ({lines[-1] or 'it said nothing'}); the sweep goes on without it")
