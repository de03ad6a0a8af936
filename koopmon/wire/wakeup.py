"""Wakes a thread that waits on sockets, from any thread or from a signal handler."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Self


class Wakeup:
    """Wakes the thread that waits in `Poller.wait`, from any thread or a signal handler."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may run inside wake()
        self._closed = False
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def wake(self) -> None:
        """Wake the thread without blocking. Repeated calls before the wait cause one wake-up.

        The call does nothing in a forked child or after `close`.
        """
        with self._lock:
            if not self._closed and os.getpid() == self._pid:
                with contextlib.suppress(BlockingIOError):
                    self._write.send(b"\0")

    def fileno(self) -> int:
        """Return the file descriptor, which is readable after a wake-up; -1 after `close`."""
        return self._read.fileno()

    def clear(self) -> None:
        """Discard the calls so far; the waiting thread does this after it wakes."""
        with contextlib.suppress(BlockingIOError):
            while self._read.recv(4096):
                pass

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._read.close()
            self._write.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
