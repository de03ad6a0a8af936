"""Small Grafana on a real socket: the used part of its HTTP API, with strict checks of requests.

Shapes and statuses follow the reference of the HTTP API (folders, data sources, dashboards, alerting provisioning,
annotations). It returns 400 for a body that Grafana would refuse. A test can make it fail.
"""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Json = Any
TOKEN = "glsa_a-token-of-the-tests"
WEB_PAGE = "<!DOCTYPE html><html><body>Grafana</body></html>"


class RefusalError(Exception):
    """Response with an error status."""

    def __init__(self, status: int, message: str, **more: Json) -> None:
        super().__init__(message)
        self.status, self.body = status, {"message": message, **more}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Json

    @property
    def writes(self) -> bool:
        return self.method != "GET"


@dataclass
class State:
    """State of this Grafana."""

    version: str = "11.6.0"
    datasources: dict[str, Json] = field(default_factory=dict)
    folders: dict[str, Json] = field(default_factory=dict)
    dashboards: dict[str, Json] = field(default_factory=dict)
    groups: dict[tuple[str, str], Json] = field(default_factory=dict)
    annotations: list[Json] = field(default_factory=list)


class FakeGrafana:
    """Server until `close`. `requests` has the requests; `failing` replaces responses of the API."""

    def __init__(self, prefix: str = "", port: int = 0) -> None:
        self.state = State()
        self.requests: list[Request] = []
        self.prefix = prefix
        self._faults: list[Callable[[Request], int | str | None]] = []
        self._release = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # a response in one packet: two packets would wait for an acknowledgement
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                fake._serve(self)

            def do_POST(self) -> None:
                fake._serve(self)

            def do_PUT(self) -> None:
                fake._serve(self)

            def do_DELETE(self) -> None:
                fake._serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}/"

    @property
    def writes(self) -> list[Request]:
        return [request for request in self.requests if request.writes]

    def close(self) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @contextmanager
    def failing(self, answer: int | str, *, method: str = "", path: str = "", times: int = -1) -> Iterator[None]:
        """Fail requests of this method whose path contains the given text, for a number of times.

        The response is a status, "html", "text", "redirect", "hang" or "close".
        """
        left = [times]

        def fault(request: Request) -> int | str | None:
            if left[0] == 0 or (method and request.method != method) or path not in request.path:
                return None
            left[0] -= 1
            return answer

        self._faults.append(fault)
        try:
            yield
        finally:
            self._faults.remove(fault)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {key.lower(): value for key, value in handler.headers.items()}
        body = json.loads(raw) if raw else None
        request = Request(handler.command, unquote(parts.path), headers, body)
        self.requests.append(request)
        fault = next((found for made in self._faults if (found := made(request)) is not None), None)
        if fault == "hang":
            self._release.wait(30)
        if fault in ("hang", "close"):
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "redirect":
            _answer(handler, 302, b"", "text/html", location="/login")
        elif fault in ("html", "text"):
            kind = "text/html; charset=utf-8" if fault == "html" else "application/json"
            _answer(handler, 200, WEB_PAGE.encode(), kind)
        elif not request.path.startswith(f"{self.prefix}/api/"):
            _answer(handler, 404, WEB_PAGE.encode(), "text/html; charset=utf-8")
        else:
            try:
                status, answer = self._answer_of_the_api(request, fault)
            except RefusalError as refusal:
                status, answer = refusal.status, refusal.body
            _answer(handler, status, json.dumps(answer).encode(), "application/json")

    def _answer_of_the_api(self, request: Request, fault: int | str | None) -> tuple[int, Json]:
        if isinstance(fault, int):
            raise RefusalError(fault, f"told to answer {fault}")
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, "Invalid API key")
        kind = request.headers.get("content-type", "")
        if request.method in ("POST", "PUT") and not kind.startswith("application/json"):
            raise RefusalError(400, f"content type {kind!r}")
        return self._route(request, request.path.removeprefix(f"{self.prefix}/api/").split("/"))

    def _route(self, request: Request, words: list[str]) -> tuple[int, Json]:
        method, state, body = request.method, self.state, copy.deepcopy(request.body)
        match method, words:
            case "GET", ["frontend", "settings"]:
                return 200, {"buildInfo": {"version": state.version, "commit": "abc"}}
            case "GET", ["folders", uid]:
                return 200, _known(state.folders, uid, "folder not found")
            case "POST", ["folders"]:
                _needs(body, "title", "uid")
                if body["uid"] in state.folders:
                    raise RefusalError(412, "the folder has been changed by someone else", status="version-mismatch")
                state.folders[body["uid"]] = {"id": 1, **body, "version": 1, "canSave": True}
                return 200, state.folders[body["uid"]]
            case "POST", ["annotations"]:
                _needs(body, "text", "tags", "time")
                state.annotations.append(body)
                return 200, {"message": "Annotation added", "id": len(state.annotations)}
            case _, ["datasources", *rest]:
                return self._datasources(method, rest, body)
            case _, ["dashboards", *rest]:
                return self._dashboards(method, rest, body)
            case _, ["v1", "provisioning", *rest]:
                provenance = "" if request.headers.get("x-disable-provenance") == "true" else "api"
                return self._provisioning(method, rest, body, provenance)
        raise RefusalError(404, "Not found")

    def _datasources(self, method: str, words: list[str], body: Json) -> tuple[int, Json]:
        known = self.state.datasources
        match method, words:
            case "GET", ["uid", uid]:
                return 200, _known(known, uid, "Data source not found")
            case "GET", ["name", name]:
                return 200, _known({each["name"]: each for each in known.values()}, name, "Data source not found")
            case "POST", []:
                _needs(body, "name", "type", "access", "uid")
                if body["uid"] in known or body["name"] in [each["name"] for each in known.values()]:
                    raise RefusalError(409, "data source with the same name already exists")
                known[body["uid"]] = {"id": len(known) + 1, "orgId": 1, "readOnly": False, "version": 1, **body}
                return 200, {"message": "Datasource added", "datasource": known[body["uid"]]}
            case "PUT", ["uid", uid]:
                _needs(body, "name", "type", "access")
                have = _known(known, uid, "Data source not found")
                if have["readOnly"]:
                    raise RefusalError(403, "Cannot update read-only data source")
                known[uid] = {**body, "version": have["version"] + 1}
                return 200, {"message": "Datasource updated", "datasource": known[uid]}
        raise RefusalError(404, "Not found")

    def _dashboards(self, method: str, words: list[str], body: Json) -> tuple[int, Json]:
        known = self.state.dashboards
        match method, words:
            case "GET", ["uid", uid]:
                return 200, _known(known, uid, "Dashboard not found")
            case "POST", ["db"]:
                _needs(body, "dashboard", "folderUid")
                dashboard, folder = body["dashboard"], body["folderUid"]
                _needs(dashboard, "title", "uid")
                _known(self.state.folders, folder, "folder not found")
                uid, have = dashboard["uid"], known.get(dashboard["uid"], {"dashboard": {"id": 7, "version": 0}})
                if have.get("meta", {}).get("provisioned"):
                    raise RefusalError(400, "Cannot save provisioned dashboard")
                version = have["dashboard"]["version"]
                if not body.get("overwrite") and dashboard["version"] != version:
                    raise RefusalError(412, "The dashboard has been changed by someone else", status="version-mismatch")
                kept = {**dashboard, "id": have["dashboard"]["id"], "version": version + 1}
                known[uid] = {"dashboard": kept, "meta": {"folderUid": folder, "provisioned": False}}
                return 200, {"uid": uid, "status": "success", "version": version + 1}
        raise RefusalError(404, "Not found")

    def _provisioning(self, method: str, words: list[str], body: Json, provenance: str) -> tuple[int, Json]:
        state = self.state
        if state.version.startswith("8."):
            raise RefusalError(404, "Not found")
        match method, words:
            case "GET", ["folder", folder, "rule-groups", title]:
                return 200, _known(state.groups, (folder, title), "rule group not found")
            case "PUT", ["folder", folder, "rule-groups", title]:
                state.groups[folder, title] = self._rule_group(folder, title, body, provenance)
                return 200, state.groups[folder, title]
        raise RefusalError(404, "Not found")

    def _rule_group(self, folder: str, title: str, body: Json, provenance: str) -> Json:
        _needs(body, "title", "folderUid", "interval", "rules")
        _known(self.state.folders, folder, "folder not found")
        if body["interval"] % 10:
            raise RefusalError(400, "interval must be a multiple of 10 s")
        rules = []
        for number, rule in enumerate(body["rules"]):
            _needs(rule, "uid", "title", "condition", "data", "noDataState", "execErrState", "for")
            if len(rule["uid"]) > 40:
                raise RefusalError(400, "uid is longer than 40 symbols")
            if rule["condition"] not in [query["refId"] for query in rule["data"]]:
                raise RefusalError(400, "condition is not among the queries")
            # Grafana fills in missing fields and writes durations in its own format.
            kept = {"id": number + 1, **rule, "updated": "2026-01-01T00:00:00Z", "notification_settings": None}
            for query in kept["data"]:
                query["model"] = {"intervalMs": 1000, "maxDataPoints": 43200, **query["model"]}
            if self.state.version < "12":
                kept.pop("keep_firing_for", None)
            kept["for"] = {"60s": "1m", "60m": "1h"}.get(rule["for"], rule["for"])
            rules.append({**kept, "orgID": 1, "folderUID": folder, "ruleGroup": title, "provenance": provenance})
        return {"title": title, "folderUid": folder, "interval": body["interval"], "rules": rules}


def _answer(handler: BaseHTTPRequestHandler, status: int, text: bytes, kind: str, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(text)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(text)


def _needs(body: Json, *names: str) -> None:
    missing = [name for name in names if not isinstance(body, dict) or body.get(name) in (None, "")]
    if missing:
        raise RefusalError(400, f"bad request data: {', '.join(missing)} missing")


def _known(things: dict[Any, Json], key: Any, otherwise: str) -> Json:
    if key not in things:
        raise RefusalError(404, otherwise)
    return things[key]
