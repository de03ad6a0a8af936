"""HTTP server: live pages, /alerts, /metrics, /healthz, /readyz. `login` controls access."""

from __future__ import annotations

import gzip
import logging
import os
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from koopmon.config import Config
from koopmon.monitor.http.address import listen
from koopmon.monitor.http.auth import HttpAuth, only_for_hosts
from koopmon.monitor.http.event_stream import EventStreams
from koopmon.monitor.http.limits import THREAD, Connections
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.http.routes import not_found, routes
from koopmon.wire.endpoints import is_loopback

STOP_SECONDS = 5.0
MAX_HEAD_BYTES = 16 << 10
GZIP_LEVEL = 4
"""Compression of /metrics. At 100 runs of 48 layers it saves a tenth of the bytes of level 1; level 6 takes four times
the CPU time of level 1, and saves a fifth."""


class Exposition(Protocol):
    """Returns the metrics in the format of an encoder of prometheus_client, with `created` also times of starts."""

    def __call__(self, encode: Callable[[Any], bytes], *, created: bool = False) -> bytes: ...


UVICORN_LOG = logging.getLogger("uvicorn.error")
LOOP_LOG = logging.getLogger("asyncio")


class WebServer:
    """Serves the pages from its own thread; `address` is the actual HOST:PORT.

    The live page shows `live_state`, with the thresholds of `config` for new runs. Event streams take at most half of
    the connections. Each name in `checks` is a page that returns 200 "ok" while its function returns True, else 503.
    These pages need no `login`. With `tls` the pages use https. An address reachable from other hosts requires `tls`
    with a `login` or client certificates, or `[http] insecure_plaintext`. `note(reason, detail)` is called in the
    server's thread for each rejected request or connection. `exposition` writes the metrics, by default those of
    `registry`.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        checks: Mapping[str, Callable[[], bool]],
        *,
        login: HttpAuth | None = None,
        tls: ssl.SSLContext | None = None,
        config: Config | None = None,
        live_state: LiveState | None = None,
        note: Callable[..., None] = lambda *_, **__: None,
        exposition: Exposition | None = None,
    ) -> None:
        config, login = config or Config(), login or HttpAuth()
        checked = tls is not None and (login.required or tls.verify_mode is ssl.CERT_REQUIRED)
        exposed = config.http.insecure_plaintext or checked
        self._socket = listen(address, exposed=exposed)
        host, port = self._socket.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        live_state = live_state or LiveState()
        max_connections = config.monitor.max_http_connections
        self._streams = EventStreams(live_state, min(config.http.max_streams, max_connections // 2))
        pages: ASGIApp = _application(
            exposition or _plainly(registry), checks, routes(live_state, self._streams, config.policy)
        )
        if not login.required and is_loopback(f"tcp://{self.address}"):
            pages = only_for_hosts(pages, config.http.hosts)
        connections = Connections(login.wrap(pages), max_connections, note)
        settings = uvicorn.Config(
            connections,
            http=cast(Any, connections.accept),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            backlog=max_connections,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        settings.load()
        settings.ssl = tls
        self._server = uvicorn.Server(settings)
        self._filters = {UVICORN_LOG: connections.filter_log, LOOP_LOG: connections.filter_loop_log}
        for log, each in self._filters.items():
            log.addFilter(each)
        # Outside the main thread uvicorn installs no signal handlers.
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name=THREAD, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish the requests in progress, then close the listening socket."""
        self._streams.close()
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS)
        self._socket.close()
        for log, each in self._filters.items():
            log.removeFilter(each)


def _plainly(registry: CollectorRegistry) -> Exposition:
    def exposition(encode: Callable[[Any], bytes], *, created: bool = False) -> bytes:
        return encode(registry)

    return exposition


def _application(
    exposition: Exposition, checks: Mapping[str, Callable[[], bool]], live: Sequence[BaseRoute]
) -> ASGIApp:
    with_created = os.environ.get("PROMETHEUS_DISABLE_CREATED_SERIES", "").lower() not in ("true", "1", "t")

    # Plain functions: starlette runs them in threads, so a scrape does not block a health check.
    def metrics(request: Request) -> Response:
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # choose_encoder fails on some version parameters
            encode, content_type = choose_encoder("")
        # In the older text format the time of a start would be a metric of its own.
        created = with_created and content_type.startswith("application/openmetrics-text")
        body = exposition(encode, created=created)
        headers = {"content-type": content_type, "vary": "accept-encoding"}
        if gzip_accepted(request.headers.get("accept-encoding", "")):
            body, headers["content-encoding"] = gzip.compress(body, compresslevel=GZIP_LEVEL), "gzip"
        return Response(body, headers=headers)

    def health(check: Callable[[], bool], _: Request) -> Response:
        return PlainTextResponse("ok\n") if check() else PlainTextResponse("not now\n", status_code=503)

    checked = [Route(f"/{name}", partial(health, check)) for name, check in checks.items()]
    pages = Starlette(
        routes=[*live, Route("/metrics", metrics), *checked],
        exception_handlers={404: not_found},
    )
    pages.router.redirect_slashes = False  # a redirect would repeat the Host header of the request
    return pages
