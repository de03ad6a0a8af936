"""Read-only routes. Run names are untrusted input and always escaped."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from koopmon.config import PolicyConfig
from koopmon.monitor.http import json_api, page, run_page, runs_page
from koopmon.monitor.http.event_stream import EventStreams
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.http.page_cache import PageCache
from koopmon.views.html import join, tag
from koopmon.views.run_view import QUANTITIES

STATIC = {
    "live.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
NOSNIFF = {"x-content-type-options": "nosniff"}
RETRY_AFTER_SECONDS = 15
Answer = Callable[[Request], Response]


def routes(
    live_state: LiveState, streams: EventStreams, policy: PolicyConfig, wall: Callable[[], float] = time.time
) -> list[BaseRoute]:
    """Routes of pages, JSON and events for one live state. `policy` holds the thresholds of runs without assessment."""

    once = PageCache()

    # Plain functions: starlette runs them in threads.
    def all_runs(request: Request) -> Response:
        root = page.root_of(request.scope["raw_path"])

        def draw() -> str:
            return runs_page.render(root, live_state.views(), wall(), policy, num_hidden=live_state.num_hidden)

        return _html(once.page(root, live_state.revision, draw))

    def one_run(request: Request) -> Response:
        root, name = page.root_of(request.scope["raw_path"]), request.path_params["name"]
        view = live_state.view(name)
        if view is None:
            return _html(_unknown(root, name, live_state), status=404)
        chosen = request.query_params.get("show", "")
        quantity = chosen if chosen in QUANTITIES else "near_unit_mass"

        def draw() -> str:
            return run_page.render(root, view, wall(), policy, quantity=quantity)

        return _html(once.page((root, name, quantity), view.revision, draw))

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
                f"{streams.most} streams of events are open, as many as [http] max_streams and max_http_connections"
                " allow: close a page, or ask api/v1/runs now and then\n"
            )
            headers = {**page.HEADERS, "retry-after": str(RETRY_AFTER_SECONDS)}
            return Response(words, status_code=503, headers=headers, media_type="text/plain")
        last_id = request.headers.get("last-event-id", "")
        return EventStream(streams, streams.follow(request.query_params.get("run"), last_id))

    shown = [
        Route("/", all_runs),
        Route("/runs/{name:path}", one_run),
        Route("/api/v1/runs", runs_json),
        Route("/api/v1/runs/{name:path}", run_json),
        Route("/api/v1/events", events),
    ]
    return [*shown, *(Route(f"/static/{name}", _file(name, kind)) for name, kind in STATIC.items())]


class EventStream(StreamingResponse):
    """Streaming response; it releases its stream in every case."""

    def __init__(self, streams: EventStreams, content: AsyncIterator[bytes]) -> None:
        # Close the connection with the stream, because its lifetime exceeds that of other connections.
        headers = {**page.HEADERS, "x-accel-buffering": "no", "connection": "close"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.release()


def not_found(request: Request, _: Exception) -> Response:
    """Page for an unknown address."""
    root = page.root_of(request.scope["raw_path"])
    return _html(page.message(root, "No such page", "This monitor has no page at this address."), status=404)


def _unknown(root: str, name: str, live_state: LiveState) -> str:
    links = [tag("li", tag("a", each, href=page.run_address(root, each))) for each in live_state.names()[-20:]]
    words = tag("p", "This monitor knows no run ", tag("code", name[:128]), ".")
    listed = join(tag("p", "Known here:"), tag("ul", *links)) if links else tag("p", "It knows none yet.")
    return page.message(root, "No such run", words, listed)


def _file(name: str, kind: str) -> Answer:
    body = files("koopmon.monitor.http").joinpath("static", name).read_bytes()

    def answer(_: Request) -> Response:
        return Response(body, headers={**NOSNIFF, "content-type": kind, "cache-control": "no-cache"})

    return answer


def _html(text: str, *, status: int = 200) -> Response:
    return HTMLResponse(text, status_code=status, headers=page.HEADERS)


def _json(value: Any, *, status: int = 200) -> Response:
    headers = {**NOSNIFF, "content-type": "application/json", "cache-control": "no-store"}
    return Response(msgspec.json.encode(value), status_code=status, headers=headers)
