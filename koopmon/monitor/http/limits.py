"""What the pages' server takes from a connection: well-formed requests, soon, and of so many peers at once.

Nothing of it trusts the peer to go on. When there are too many connections the oldest gives way: an honest request
takes milliseconds, so it is one that dawdles. What is refused is counted and now and then logged, not each time.
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
"""Of a connection, whatever it does: a scrape that takes longer is given up by who asked for it."""
STREAM_SECONDS = 3600.0
"""Of one whose answer has declared itself a stream of events: those are few, and their readers come back by
themselves."""
STALL_SECONDS = 30.0
"""How long the reader of a stream may take nothing while STREAM_BYTES wait for it."""
STREAM_BYTES = 16 << 10
EVENTS = b"text/event-stream"
Note = Callable[[str, str], None]


def protocol(max_connections: int, note: Note) -> type[H11Protocol]:
    """uvicorn's protocol within bounds; `note(reason, detail)` hears of every connection that was refused or cut."""

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
            """It is only by our own answer that a connection gets more time: no request can ask for it."""

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
    """Around the pages: an error in one of them, or in the middle of a request, ends this request and no more."""

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
    """What uvicorn.Config is to be told."""
    return {
        "http": protocol(max_connections, note),
        "h11_max_incomplete_event_size": MAX_HEAD_BYTES,
        # It would log a line for every malformed request; what is worth one goes through `note`.
        "log_level": "critical",
    }
