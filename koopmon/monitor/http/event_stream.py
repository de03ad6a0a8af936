"""Server-sent events: which runs have changed, for as long as somebody listens.

A stream remembers one number, the revision that it has told of. Each time round it tells what has changed since, each
run once and as it is now: so a slow reader misses what was in between and nothing piles up, and one that comes back
with the id of its last event goes on where it was. Streams look at the live state at their own pace; it does not know
them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import msgspec

from koopmon.monitor.http.json_api import summary
from koopmon.monitor.http.live_state import LiveState

PACE_SECONDS = 0.5
"""Between two looks at the live state: what an update may be late by, and how often one reader is told at most."""
HEARTBEAT_SECONDS = 15.0
"""Of silence; then a comment keeps proxies from giving the connection up."""
RETRY_MILLISECONDS = 2000


class EventStreams:
    """At most `most` streams at a time; `close` ends them all."""

    def __init__(self, live_state: LiveState, most: int) -> None:
        self._live_state = live_state
        self.most = most
        self._num_open = 0
        self._lock = threading.Lock()
        self._closing = False

    @property
    def num_open(self) -> int:
        return self._num_open

    def close(self) -> None:
        self._closing = True

    def acquire(self) -> bool:
        """Take a place; False when there is none. `release` it."""
        with self._lock:
            free = self._num_open < self.most and not self._closing
            self._num_open += free
            return free

    def release(self) -> None:
        with self._lock:
            self._num_open -= 1

    async def follow(self, run: str | None, last_id: str) -> AsyncIterator[bytes]:
        """Events of `run`, or of all, after the one that the reader saw last. Ends when the server closes."""
        live_state, silent = self._live_state, 0.0
        told = resumed(live_state, last_id)
        yield b"retry: %d\n\n" % RETRY_MILLISECONDS
        while not self._closing:
            changed = live_state.views(since=told) if live_state.revision > told else []
            told = max((view.revision for view in changed), default=told)
            wanted = [view for view in changed if run in (None, view.name)]
            # The id goes with the last: who is cut off in between hears of all of them again.
            frames = [frame("run", summary(view), "") for view in wanted[:-1]]
            frames += [frame("run", summary(view), f"{live_state.boot}-{told}") for view in wanted[-1:]]
            if not frames and silent >= HEARTBEAT_SECONDS:
                frames = [b": still here\n\n"]
            silent = 0.0 if frames else silent + PACE_SECONDS
            if frames:
                yield b"".join(frames)
            await asyncio.sleep(PACE_SECONDS)


def resumed(live_state: LiveState, last_id: str) -> int:
    """The revision that an event's id stands for; 0, before everything, for one of another monitor or of none."""
    boot, _, revision = last_id.partition("-")
    known = boot == live_state.boot and revision.isascii() and revision.isdigit() and len(revision) < 20
    return min(int(revision), live_state.revision) if known else 0


def frame(kind: str, data: object, identity: str) -> bytes:
    """One event on the wire. JSON holds no raw line break, so its data is one line."""
    told = b"id: %b\n" % identity.encode() if identity else b""
    return told + b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))
