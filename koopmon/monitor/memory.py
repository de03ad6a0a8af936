"""Watch on the memory of this process: connections that hold too much of it are closed.

libzmq stores the frames of a message until the last one has come. A peer that never sends the last frame, or many peers
that each begin a large one, can fill the memory, and no limit of libzmq covers it: MAXMSGSIZE counts one frame, the
receive queue whole messages.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from koopmon.errors import ConfigError

CHECK_SECONDS = 0.25
PAUSE_SECONDS = 30.0
"""Time after a closure in which the memory may return to the system."""
ROOM_BYTES = 128 << 20
"""Memory that a monitor takes between its start and the first profiles; 50 to 100 MiB were measured."""
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def available_bytes() -> int:
    """Return the memory of the container, or of the host without one."""
    host = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    with suppress(OSError, ValueError):  # "max" without a limit
        return min(host, int(_CONTAINER_LIMIT.read_text(encoding="ascii")))
    return host


def memory_limit(configured: int) -> int:
    """Return the limit for a monitor that starts; `configured` 0 stands for half of the memory that is left.

    Raises ConfigError for a limit that a monitor without peers would exceed: it would close all connections for good.
    """
    resident = resident_bytes()
    if not configured:
        return (resident + max(available_bytes(), resident)) // 2
    if configured < resident + ROOM_BYTES:
        expected = f"expected 0, or at least {resident + ROOM_BYTES}: the monitor itself uses {resident >> 20} MiB"
        raise ConfigError(f"monitor.max_memory_bytes = {configured}: {expected}")
    return configured


@dataclass(slots=True)
class MemoryWatch:
    """Checks the resident memory against `max_bytes`."""

    max_bytes: int
    _next_check: float = field(default=0.0, init=False)

    def exceeded(self, now: float) -> int:
        """Return the resident bytes if they are above the limit and a check is due at `now` (seconds), else 0."""
        if now < self._next_check:
            return 0
        resident = resident_bytes()
        above = resident > self.max_bytes
        self._next_check = now + (PAUSE_SECONDS if above else CHECK_SECONDS)
        return resident if above else 0
