"""How often a file is opened, by any process: inotify."""

import ctypes
import os
import struct
import threading
from pathlib import Path

IN_OPEN, IN_CLOSE_NOWRITE = 0x20, 0x10
EVENT = struct.Struct("iIII")


class Opens:
    """Counts the opens of a file while the block runs. Closes are watched too, since equal events in a row are merged."""

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.count = 0
        self._end = threading.Event()
        self._handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._handle < 0 or libc.inotify_add_watch(self._handle, bytes(path), IN_OPEN | IN_CLOSE_NOWRITE) < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Opens":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()
        self._take()
        os.close(self._handle)

    def _follow(self) -> None:
        while not self._end.wait(0.001):
            self._take()

    def _take(self) -> None:
        try:
            content = os.read(self._handle, 65536)
        except BlockingIOError:
            return
        for _, mask, _, _ in EVENT.iter_unpack(content):  # no names: the watch is on a file
            self.count += bool(mask & IN_OPEN)
