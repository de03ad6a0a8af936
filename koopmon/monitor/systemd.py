"""Messages to systemd from a unit of Type=notify (sd_notify(3)). Elsewhere nothing is sent.

The packages for it are a C extension (systemd-python) and one without a release for years (sdnotify); the protocol is
one datagram.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress


def sd_notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send `state`, such as READY=1, to the socket in NOTIFY_SOCKET. It never blocks, and a failure has no effect."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # the abstract namespace
        address = f"\0{address[1:]}"
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
        channel.sendto(state.encode(), address)


class Watchdog:
    """Sends WATCHDOG=1 twice in each period of WATCHDOG_USEC, as long as `alive` is called."""

    def __init__(self, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic) -> None:
        period, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        ours = period.isdecimal() and int(period) > 0 and pid in ("", str(os.getpid()))
        self._pause = int(period) / 2e6 if ours else math.inf
        self._environ = environ
        self._clock = clock
        self._due = -math.inf if ours else math.inf

    def alive(self) -> None:
        """Send a message if one is due."""
        if (now := self._clock()) >= self._due:
            self._due = now + self._pause
            sd_notify("WATCHDOG=1", self._environ)
