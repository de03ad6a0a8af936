"""Time limit of one delivery: a socket timeout bounds each read, and a slow server could answer byte by byte."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType


class Deadline:
    """Shuts the watched socket down after `seconds`, which ends a read or write of another thread with an error."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._find: Callable[[], socket.socket | None] = lambda: None
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True

    def watch(self, find: Callable[[], socket.socket | None]) -> None:
        """Watch the socket that `find` returns at the deadline, which may be past."""
        self._find = find
        if self.passed:
            self._shut()

    def _shut(self) -> None:
        self.passed = True
        if (found := self._find()) is not None:
            with suppress(OSError):
                # The method of SSLSocket would also change its state under a reading thread.
                socket.socket.shutdown(found, socket.SHUT_RDWR)

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._timer.cancel()
        if self.passed and error is not None:
            raise TimeoutError(f"no complete answer within {self._timer.interval:g} s") from error
