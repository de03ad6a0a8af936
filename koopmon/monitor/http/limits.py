"""Limits on HTTP connections: header size, lifetime, count.

No limit depends on the cooperation of the peer. Above the maximum number of connections the oldest is closed: a normal
request takes milliseconds, so the oldest is probably a slow peer. Rejected requests are counted, and their log lines
are rate-limited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 16 << 10
LIFE_SECONDS = 30.0
"""Maximum lifetime of a connection. A scraper gives up on a longer scrape."""
STREAM_SECONDS = 3600.0
"""Maximum lifetime of an event stream. Streams are few, and their readers reconnect."""
STALL_SECONDS = 30.0
"""Maximum time for which a stream's reader may accept no data while STREAM_BYTES wait."""
STREAM_BYTES = 16 << 10
EVENTS = b"text/event-stream"
Note = Callable[[str, str], None]


def protocol(max_connections: int, note: Note) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol class with limits.

    `note(reason, detail)` is called for every connection that was refused or closed.
    """

    class Bounded(H11Protocol):
        _end: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None
        _streaming = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._end = self.loop.call_later(LIFE_SECONDS, self._too_slow)
            self.app = self._watched(self.app)
            open_now = self.server_state.connections
            if len(open_now) > max_connections:
                note("http_connections", f"more than {max_connections} connections: the oldest is cut")
                oldest = min((other for other in open_now if isinstance(other, Bounded)), key=Bounded._ends_at)
                oldest.transport.abort()
                oldest.server_state.connections.discard(oldest)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._end, self._stall):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._streaming:
                self._stall = self.loop.call_later(STALL_SECONDS, self._stalled)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None

        def send_400_response(self, msg: str) -> None:
            note("http_garbage", "not HTTP, or a head that is too long")
            super().send_400_response(msg)

        def _too_slow(self) -> None:
            note("http_slow", f"a connection lived for {LIFE_SECONDS:g} s: cut")
            self.transport.abort()

        def _watched(self, pages: ASGIApp) -> ASGIApp:
            """Extend the lifetime only for our own event-stream responses: no request can extend it."""

            async def watched(scope: Scope, receive: Receive, send: Send) -> None:
                async def watching(message: Message) -> None:
                    if message["type"] == "http.response.start" and _is_stream(message):
                        self._lift()
                    await send(message)

                await pages(scope, receive, watching)

            return watched

        def _lift(self) -> None:
            self._streaming = True
            self.transport.set_write_buffer_limits(STREAM_BYTES)
            if self._end is not None:
                self._end.cancel()
            self._end = self.loop.call_later(STREAM_SECONDS, self.transport.abort)

        def _stalled(self) -> None:
            note("http_slow", f"the reader of a stream took nothing for {STALL_SECONDS:g} s: cut")
            self.transport.abort()

        def _ends_at(self) -> float:
            return float("inf") if self._end is None else self._end.when()

    return Bounded


def _is_stream(start: Message) -> bool:
    headers = start.get("headers", ())
    return any(name.lower() == b"content-type" and value.startswith(EVENTS) for name, value in headers)


class ErrorBoundary:
    """ASGI middleware: an error in a page or in a request ends only that request."""

    def __init__(self, pages: ASGIApp, note: Callable[..., None]) -> None:
        self._pages = pages
        self._note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._pages(scope, receive, send)
        except h11.LocalProtocolError:
            self._note("http_garbage", "the rest of a request was not HTTP")
        except Exception as error:
            self._note("internal", f"page {scope.get('path')!r}: {type(error).__name__}: {error}", cause=error)


def options(max_connections: int, note: Note) -> dict[str, Any]:
    """Return the limits as options for uvicorn.Config."""
    return {
        "http": protocol(max_connections, note),
        "h11_max_incomplete_event_size": MAX_HEAD_BYTES,
        # uvicorn would log a line for every malformed request; `note` rate-limits these lines.
        "log_level": "critical",
    }
