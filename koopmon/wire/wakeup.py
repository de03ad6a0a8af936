"""Wakes a thread that waits on sockets, from any thread or from a signal handler."""

from __future__ import annotations

import os
import threading
import weakref


class Wakeup:
    """Wakes the thread that waits in `Poller.wait`, from any thread or a signal handler."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may run inside wake()
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._descriptor)  # also without a call of close
        self._close.atexit = False  # a daemon thread may wait on it until the process ends

    def wake(self) -> None:
        """Wake the thread without blocking. Repeated calls before the wait cause one wake-up.

        The call does nothing in a forked child or after `close`.
        """
        with self._lock:
            if self._close.alive and os.getpid() == self._pid:
                try:
                    os.eventfd_write(self._descriptor, 1)
                except BlockingIOError:
                    return  # it is full of earlier calls

    def fileno(self) -> int:
        """Return the file descriptor, which is readable after a wake-up; -1 after `close`."""
        return self._descriptor if self._close.alive else -1

    def clear(self) -> None:
        """Discard the calls so far; the waiting thread does this after it wakes."""
        try:
            os.eventfd_read(self.fileno())
        except BlockingIOError:
            return  # woken by a socket

    def close(self) -> None:
        with self._lock:
            self._close()
