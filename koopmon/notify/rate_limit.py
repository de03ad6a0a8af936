"""Limit on the notifications of one kind about one run, so that a run that flaps sends few."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from koopmon.config import NotifyEvent

WINDOW_SECONDS = 3600.0
MAX_KEYS = 4096
"""Runs and kinds with a window. Above it, the oldest window ends without a summary."""

Key = tuple[str, NotifyEvent]


@dataclass(slots=True)
class _Window:
    ends_at: float
    admitted: int = 0
    held_back: int = 0


class RateLimit:
    """Admits `max_per_hour` notifications of each key in an hour, and counts the others. Not thread-safe."""

    def __init__(self, max_per_hour: int) -> None:
        self._most = max_per_hour
        self._windows: OrderedDict[Key, _Window] = OrderedDict()

    def admit(self, now: float, key: Key) -> int:
        """Return the number of notifications that the window still admits with this one, 0 if it is held back.

        Call `ended` with the same time first.
        """
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(now + WINDOW_SECONDS)
            if len(self._windows) > MAX_KEYS:
                self._windows.popitem(last=False)
        left = self._most - window.admitted
        if left > 0:
            window.admitted += 1
        else:
            window.held_back += 1
        return left

    def next_end(self) -> float | None:
        """Time of the next end of a window; None without one."""
        return next((window.ends_at for window in self._windows.values()), None)

    def ended(self, now: float) -> Iterator[tuple[Key, int]]:
        """Forget the windows that end by `now`; yield those that held notifications back, with their number."""
        while (end := self.next_end()) is not None and end <= now:
            key, window = self._windows.popitem(last=False)
            if window.held_back:
                yield key, window.held_back
