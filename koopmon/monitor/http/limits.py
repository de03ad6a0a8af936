"""Limits that uvicorn lacks: number of connections, unread event streams, errors in a page.

Above the maximum number of connections the oldest is closed: a normal request takes milliseconds, so the oldest is
probably a slow peer. There is no other limit on the time that a peer takes for its request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

STREAM_SECONDS = 3600.0
"""Maximum duration of a response. Only event streams last, and their readers reconnect."""
STALL_SECONDS = 30.0
"""Maximum time for which the reader of an event stream may accept no data."""
EVENTS = b"text/event-stream"
THREAD = "koopmon-web"
"""Name of the server's thread."""
Note = Callable[..., None]


class Connections:
    """Factory of uvicorn's connections, and ASGI application around `pages`.

    `note(reason, detail)` is called for each connection or request that was refused or ended.
    """

    def __init__(self, pages: ASGIApp, most: int, note: Note) -> None:
        self._pages, self._most, self._note = pages, most, note
        self._streaming: WeakKeyDictionary[H11Protocol, bool] = WeakKeyDictionary()  # oldest connection first

    def accept(self, server_state: ServerState, app_state: dict[str, Any], **parts: Any) -> H11Protocol:
        """Return uvicorn's protocol for a new connection. Close the oldest one without a stream if it is one too many.

        uvicorn copies `app_state` into the scope of each request.
        """
        # After the connections before this one are open: asyncio makes those that arrive at once before it opens them.
        asyncio.get_running_loop().call_soon(self._cut_oldest, server_state.connections)
        state = dict(app_state)
        protocol = H11Protocol(server_state=server_state, app_state=state, **parts)
        state["connection"] = ref(protocol)
        self._streaming[protocol] = False
        return protocol

    def _cut_oldest(self, opened: set[Any]) -> None:
        closable = [each for each, streaming in self._streaming.items() if each in opened and not streaming]
        for oldest in closable[: max(0, len(opened) - self._most + 1)]:
            self._note("http_connections", f"more than {self._most} connections: the oldest is cut")
            oldest.transport.abort()
            opened.discard(oldest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. An error in a page or in a request ends only that request."""
        connection = scope["state"]["connection"]()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_stream(message):
                self._streaming[connection] = True
            async with asyncio.timeout(STALL_SECONDS if self._streaming[connection] else None):
                await send(message)

        try:
            async with asyncio.timeout(STREAM_SECONDS) as whole:
                await self._pages(scope, receive, watched)
        except TimeoutError:
            if not whole.expired():
                self._note("http_slow", f"the reader of a stream took nothing for {STALL_SECONDS:g} s: cut")
                connection.transport.abort()
        except h11.LocalProtocolError:
            self._note("http_garbage", "the rest of a request was not HTTP")
        except Exception as error:
            self._note("internal", f"page {scope.get('path')!r}: {type(error).__name__}: {error}", cause=error)
        finally:
            self._streaming[connection] = False

    def filter_log(self, record: logging.LogRecord) -> bool:
        """Count a warning of uvicorn, its only report of a malformed request. Drop the line: `note` writes one."""
        if record.levelno == logging.WARNING:
            self._note("http_garbage", record.getMessage())
        return False

    def filter_loop_log(self, record: logging.LogRecord) -> bool:
        """Count an error of the server's event loop, and drop the line: `note` writes one a minute.

        Without a free descriptor asyncio logs hundreds of tracebacks a second.
        """
        if record.threadName != THREAD:
            return True
        text = record.getMessage().partition("\n")[0]
        self._note("http_connections" if text.startswith("socket.accept()") else "internal", text)
        return False


def _is_stream(start: Message) -> bool:
    headers = start.get("headers", ())
    return any(name.lower() == b"content-type" and value.startswith(EVENTS) for name, value in headers)
