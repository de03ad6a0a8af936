"""Server-sent events for changes of runs.

Each stream stores one number, the last revision that it has sent. It periodically sends every run changed since then,
once and in its current state. A slow reader skips intermediate states, so no backlog grows. A reader that reconnects
with the id of its last event continues from there. Streams poll the live state, which keeps no list of streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from koopmon.monitor.http.json_api import summary
from koopmon.monitor.http.live_state import LiveState

PACE_SECONDS = 0.5
"""Interval between polls of the live state: the maximum delay of an update, and the minimum time between two events."""
HEARTBEAT_SECONDS = 15.0
"""Idle time after which a comment is sent, because proxies close idle connections."""
RETRY_MILLISECONDS = 2000
COMPLETE = b"event: complete\ndata: all runs so far\n\n"
"""The first events are those of the runs that exist. A run that appears after this event is new."""


class EventStreams:
    """Limits the number of open streams to `most`; `close` ends all of them.

    All other calls come from the server's event loop, so that the count needs no lock.
    """

    def __init__(self, live_state: LiveState, most: int) -> None:
        self._live_state = live_state
        self.most = most
        self._num_open = 0
        self._closing = False

    def close(self) -> None:
        self._closing = True

    def acquire(self) -> bool:
        """Reserve a stream; False when none is free. Call `release` afterwards."""
        free = self._num_open < self.most and not self._closing
        self._num_open += free
        return free

    def release(self) -> None:
        self._num_open -= 1

    async def follow(self, run: str | None, last_id: str) -> AsyncIterator[bytes]:
        """Yield events of `run`, or of all runs, after the reader's last event. Ends when the server closes."""
        live_state, silent, opened = self._live_state, 0.0, False
        told = resumed(live_state, last_id)
        yield b"retry: %d\n\n" % RETRY_MILLISECONDS
        while not self._closing:
            changed = live_state.views(since=told) if live_state.revision > told else []
            told = max((view.revision for view in changed), default=told)
            wanted = [view for view in changed if run in (None, view.name)]
            # Only the last event has the id: after a disconnection in between, the reader gets all of them again.
            identity = f"{live_state.boot}-{told}"
            frames = [frame(summary(view), identity if view is wanted[-1] else "") for view in wanted]
            if not opened:
                opened = True
                frames.append(COMPLETE)
            if not frames and silent >= HEARTBEAT_SECONDS:
                frames = [b": still here\n\n"]
            silent = 0.0 if frames else silent + PACE_SECONDS
            if frames:
                yield b"".join(frames)
            await asyncio.sleep(PACE_SECONDS)


def resumed(live_state: LiveState, last_id: str) -> int:
    """Return the revision of an event id; 0, before all changes, for an id of another monitor or an empty one."""
    boot, _, revision = last_id.partition("-")
    known = boot == live_state.boot and revision.isascii() and revision.isdigit() and len(revision) < 20
    return min(int(revision), live_state.revision) if known else 0


def frame(run: object, identity: str) -> bytes:
    """Encode one event. JSON contains no raw line break, so its data is one line."""
    told = b"id: %b\n" % identity.encode() if identity else b""
    return told + b"event: run\ndata: %b\n\n" % msgspec.json.encode(run)
