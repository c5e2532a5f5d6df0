"""The server of the live page: one page and one address that tells its state, on loopback, for reading only.

A thread looks at the folder and another draws; a request is answered from what they left, so that no number of open tabs
costs more. Nothing of the folder is served as a file.
"""

import asyncio
import base64
import hashlib
import json
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from aiohttp import web

from perturbray.errors import InputError
from perturbray.watch import page
from perturbray.watch.drawing import Drawer, Drawing
from perturbray.watch.state import WAITING, Folder, State

HOST = "127.0.0.1"
PORT = 8350
TRIED = 50  # ports from PORT on, where none is asked for
SECONDS = 1.0  # between two looks at the folder, at least
SHARE = 0.1  # of the time that looking may take
LINGER = 3.0  # seconds, at most, that an open page is given to fetch the end of the sweep
NAMES = ("127.0.0.1", "localhost", "[::1]")

_SCRIPT = base64.b64encode(hashlib.sha256(page.SCRIPT.encode()).digest()).decode()
HEADERS = {
    # Figures carry style attributes, so styles are free; of scripts only the page's own runs, and nothing is loaded.
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{_SCRIPT}'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Watch:
    """What the page shows of a folder, kept up to date by two threads."""

    def __init__(self, folder: str | Path) -> None:
        self.path, self.folder = Path(folder), Folder(folder)
        self.drawing = Drawing()
        self.drawer = Drawer(self.path, self._drew)
        self.state = State(kind=WAITING)
        self.body, self.stamp = b"", ""
        self.fetched = -math.inf  # when a page last asked
        self._halt, self._looking = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="looker")
        self.look()

    def start(self) -> None:
        self.drawer.start()
        self._thread.start()

    def stop(self) -> None:
        self._halt.set()

    def look(self) -> None:
        """Look at the folder now."""
        with self._looking:
            self.state = self.folder.look()
            self.drawer.want(self.state)
            self._render()

    def _run(self) -> None:
        pause = SECONDS
        while not self._halt.wait(pause):
            began = time.monotonic()
            try:
                self.look()
            except Exception as error:  # said on the page, and tried again: the next look may succeed
                with self._looking:
                    self.state = State(**{**vars(self.state), "problem": f"{type(error).__name__}: {error}"})
                    self._render()
            pause = max(SECONDS, (time.monotonic() - began) / SHARE)

    def _drew(self, drawing: Drawing) -> None:
        with self._looking:
            self.drawing = drawing
            self._render()

    def _render(self) -> None:
        parts = page.fragments(self.state, self.drawing, str(self.path))
        body = json.dumps({"title": page.title(self.state), "parts": parts}).encode()
        stamp = hashlib.blake2b(body, digest_size=8).hexdigest()
        if stamp != self.stamp:
            self.body, self.stamp = body, stamp

    def html(self) -> str:
        return page.shell(self.state, self.drawing, str(self.path))


def application(watch: Watch) -> web.Application:
    """The two addresses, and what guards them."""

    @web.middleware
    async def guarded(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]):
        # A name that an attacker's server gives for this address (DNS rebinding) would make the page readable to his.
        if request.host.rsplit(":", 1)[0].lower() not in NAMES and request.host.lower() not in NAMES:
            return web.Response(status=403, text="this page answers to localhost alone\n", headers=HEADERS)
        try:
            return await handler(request)
        except web.HTTPException as refused:
            refused.headers.update(HEADERS)
            raise

    async def whole(_: web.Request) -> web.Response:
        return web.Response(text=watch.html(), content_type="text/html", headers=HEADERS)

    async def state(request: web.Request) -> web.Response:
        known, stamp = request.headers.get("If-None-Match", ""), f'"{watch.stamp}"'
        watch.fetched = time.monotonic()
        headers = {**HEADERS, "ETag": stamp}
        if known == stamp:
            return web.Response(status=304, headers=headers)
        return web.Response(body=watch.body, content_type="application/json", headers=headers)

    made = web.Application(middlewares=[guarded])
    made.router.add_get("/", whole)
    made.router.add_get("/state", state)
    return made


def bind(port: int | None = None) -> socket.socket:
    """A socket on loopback: at this port, or at the first that is free. Raises InputError where there is none."""
    ports = range(PORT, PORT + TRIED) if port is None else [port]
    for one in ports:
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((HOST, one))
            found.listen()
            return found
        except (OSError, OverflowError) as error:
            found.close()
            reason = getattr(error, "strerror", None) or str(error)
    if port is None:
        raise InputError(f"no port from {PORT} to {PORT + TRIED - 1} is free ({reason}); name one with --port")
    raise InputError(f"--port {port}: cannot be used ({reason}); name another, or none, and a free one is taken")


async def serve(watch: Watch, listening: socket.socket, *, end: asyncio.Event) -> None:
    """Serve until ``end`` is set, and then as long as an open page needs to fetch the end."""
    runner = web.AppRunner(application(watch), access_log=None)
    await runner.setup()
    await web.SockSite(runner, listening).start()
    watch.start()
    try:
        await end.wait()
        await _linger(watch)
    finally:
        watch.stop()
        await runner.cleanup()


async def _linger(watch: Watch) -> None:
    """Let a page that is open show how it ended."""
    if time.monotonic() - watch.fetched > 2 * LINGER:
        return
    deadline = time.monotonic() + LINGER
    with suppress(Exception):  # of a look: the page keeps what it has
        await asyncio.to_thread(watch.look)
    ready = time.monotonic()
    while time.monotonic() < deadline and watch.fetched < ready:
        await asyncio.sleep(0.1)
