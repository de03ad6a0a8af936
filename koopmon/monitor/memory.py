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

CHECK_SECONDS = 0.25
PAUSE_SECONDS = 30.0
"""Time after a closure in which the memory may return to the system."""
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


@dataclass(slots=True)
class MemoryWatch:
    """Checks the resident memory against `max_bytes`; 0 stands for half of the container's or the host's memory."""

    max_bytes: int
    _next_check: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.max_bytes = self.max_bytes or available_bytes() // 2

    def exceeded(self, now: float) -> int:
        """Return the resident bytes if they are above the limit and a check is due at `now` (seconds), else 0."""
        if now < self._next_check:
            return 0
        resident = resident_bytes()
        above = resident > self.max_bytes
        self._next_check = now + (PAUSE_SECONDS if above else CHECK_SECONDS)
        return resident if above else 0
