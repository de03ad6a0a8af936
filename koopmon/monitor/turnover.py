"""New runs within a minute: a peer may begin as many as it leaves to others.

Each new run is a record of the history, and it may take the place of another one.
"""

from __future__ import annotations

from collections import Counter, deque

from koopmon.errors import ProtocolError

MAX_LAUNCHES = 60
"""Maximum number of launches of a run within a minute, so that a peer cannot fill the history with launches."""
MAX_TURNOVER = 4
"""New runs within a minute, beside MAX_LAUNCHES, as a multiple of `[monitor] max_runs`. A source may begin as many as
it leaves to others."""
WINDOW_SECONDS = 60.0


class Turnover:
    """New runs of the last minute, by the peer that began them. `max_runs` is `[monitor] max_runs`."""

    def __init__(self, max_runs: int) -> None:
        self._max_runs = max_runs
        self._begun: deque[tuple[float, bytes]] = deque()
        """Time and source of each new run, in order."""
        self._num_begun: Counter[bytes] = Counter()
        """Number of new runs by source."""

    def check(self, now: float, source: bytes) -> None:
        """Raise ProtocolError if `source` may begin no further run at `now`. A restart of a known run is none."""
        while self._begun and now - self._begun[0][0] >= WINDOW_SECONDS:
            _, earlier = self._begun.popleft()
            self._num_begun[earlier] -= 1
            if not self._num_begun[earlier]:
                del self._num_begun[earlier]
        left = MAX_LAUNCHES + MAX_TURNOVER * self._max_runs - len(self._begun)
        if (own := self._num_begun[source]) >= left:
            what = f"{len(self._begun)} new runs came within a minute, {own} of them from this peer"
            limit = f"{left} more are allowed for [monitor] max_runs = {self._max_runs}"
            raise ProtocolError("refused", f"{what}; {limit}: wait a minute")

    def add(self, now: float, source: bytes) -> None:
        """Note a new run of `source`."""
        self._begun.append((now, source))
        self._num_begun[source] += 1
