"""Time limits of exchanges: a socket timeout bounds each read, and a slow server could answer byte by byte."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


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


class LimitedCalls:
    """Calls of a library whose sockets are out of reach, each in a daemon thread.

    After `seconds` the caller goes on, and the thread is left behind. While it runs, further calls fail at once, so
    that a server that never ends an answer costs one thread.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], T]) -> T:
        """Return `call()`. Raises TimeoutError, and every exception of the call."""
        results: list[T] = []
        errors: list[Exception] = []

        def work() -> None:
            try:
                results.append(call())
            except Exception as error:
                errors.append(error)

        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=work, name="koopmon-call", daemon=True)
            self._thread.start()
            self._thread.join(self._seconds)
        if errors:
            raise errors[0]
        if not results:
            raise TimeoutError(f"no complete answer within {self._seconds:g} s")
        return results[0]
