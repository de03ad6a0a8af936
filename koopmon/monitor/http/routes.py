"""Read-only routes. Run names are untrusted input and always escaped."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from koopmon.config import PolicyConfig
from koopmon.monitor.http import json_api, pages
from koopmon.monitor.http.event_stream import EventStreams
from koopmon.monitor.http.live_state import LiveState
from koopmon.views.spectra import QUANTITIES

STATIC = {
    "views.css": ("koopmon.views", "text/css; charset=utf-8"),
    "live.css": ("koopmon.monitor.http", "text/css; charset=utf-8"),
    "live.js": ("koopmon.monitor.http", "text/javascript; charset=utf-8"),
    "icon.svg": ("koopmon.monitor.http", "image/svg+xml"),
}
NOSNIFF = {"x-content-type-options": "nosniff"}
RETRY_AFTER_SECONDS = 15
MAX_PAGES = 16
FRESH_SECONDS = 1.0
"""Maximum age of a cached page without changes: the times on it must be updated after this."""


def routes(
    live_state: LiveState, streams: EventStreams, policy: PolicyConfig, wall: Callable[[], float] = time.time
) -> list[BaseRoute]:
    """Routes of pages, JSON and events for one live state. `policy` holds the thresholds of runs without assessment."""

    cache = PageCache()

    # Plain functions: starlette runs them in threads.
    def all_runs(request: Request) -> Response:
        root = pages.root_of(request.scope["raw_path"])

        def draw() -> str:
            return pages.runs_page(root, live_state.views(), wall(), policy, num_hidden=live_state.num_hidden)

        return _html(cache.page(root, live_state.revision, draw))

    def one_run(request: Request) -> Response:
        root, name = pages.root_of(request.scope["raw_path"]), request.path_params["name"]
        view = live_state.view(name)
        if view is None:
            return _html(pages.unknown_run_page(root, name, live_state.names()[-20:]), status=404)
        chosen = request.query_params.get("show", "")
        quantity = chosen if chosen in QUANTITIES else "near_unit_mass"

        def draw() -> str:
            return pages.run_page(root, view, wall(), policy, quantity=quantity)

        return _html(cache.page((root, name, quantity), view.revision, draw))

    def alerts(_: Request) -> Response:
        return _html(cache.page("alerts", 0, pages.alerts_page))

    def runs_json(_: Request) -> Response:
        return _json(json_api.runs(live_state.views(), wall()))

    def run_json(request: Request) -> Response:
        name = request.path_params["name"]
        view = live_state.view(name)
        if view is None:
            return _json({"error": f"no run {name[:128]!r} is known here", "runs": live_state.names()}, status=404)
        return _json(json_api.run(view, wall()))

    async def events(request: Request) -> Response:
        if not streams.acquire():
            words = (
                f"{streams.most} event streams are open, the limit of [http] max_streams and max_http_connections:"
                " close a page, or poll api/v1/runs\n"
            )
            headers = {**pages.HEADERS, "retry-after": str(RETRY_AFTER_SECONDS)}
            return Response(words, status_code=503, headers=headers, media_type="text/plain")
        last_id = request.headers.get("last-event-id", "")
        return EventStream(streams, streams.follow(request.query_params.get("run"), last_id))

    shown = [
        Route("/", all_runs),
        Route("/runs/{name:path}", one_run),
        Route("/alerts", alerts),
        Route("/api/v1/runs", runs_json),
        Route("/api/v1/runs/{name:path}", run_json),
        Route("/api/v1/events", events),
    ]
    return [*shown, *(Route(f"/static/{name}", _file(name, *place)) for name, place in STATIC.items())]


class PageCache:
    """Cache of the pages rendered last. Rendering is serialised because it competes with the daemon for the GIL."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[int, float, str]] = OrderedDict()

    def page(self, key: Hashable, revision: int, draw: Callable[[], str]) -> str:
        """Return the cached page of `key` if it is fresh and has the same `revision`, else the result of `draw`."""
        with self._lock:
            known, at, text = self._kept.get(key, (-1, 0.0, ""))
            now = self._clock()
            if known == revision and now - at < FRESH_SECONDS:
                return text
            text = draw()
            self._kept[key] = (revision, now, text)
            self._kept.move_to_end(key)
            while len(self._kept) > MAX_PAGES:
                self._kept.popitem(last=False)
            return text


class EventStream(StreamingResponse):
    """Streaming response; it releases its stream in every case."""

    def __init__(self, streams: EventStreams, content: AsyncIterator[bytes]) -> None:
        # Close the connection with the stream, because its lifetime exceeds that of other connections.
        headers = {**pages.HEADERS, "x-accel-buffering": "no", "connection": "close"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.release()


def not_found(request: Request, _: Exception) -> Response:
    """Page for an unknown address."""
    return _html(pages.not_found_page(pages.root_of(request.scope["raw_path"])), status=404)


def _file(name: str, package: str, kind: str) -> Callable[[Request], Response]:
    body = files(package).joinpath("static", name).read_bytes()

    def answer(_: Request) -> Response:
        return Response(body, headers={**NOSNIFF, "content-type": kind, "cache-control": "no-cache"})

    return answer


def _html(text: str, *, status: int = 200) -> Response:
    return HTMLResponse(text, status_code=status, headers=pages.HEADERS)


def _json(value: Any, *, status: int = 200) -> Response:
    headers = {**NOSNIFF, "content-type": "application/json", "cache-control": "no-store"}
    return Response(msgspec.json.encode(value), status_code=status, headers=headers)
