"""Events over real sockets: changes, resumption and bounds; the server closes slow connections."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from koopmon.config import from_mapping
from koopmon.monitor.http import event_stream, limits
from koopmon.monitor.http.event_stream import frame, resumed
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.http.server import WebServer

httpx = pytest.importorskip("httpx")

WAIT_SECONDS = 60.0
Feed = Callable[..., Any]


@pytest.fixture
def noted() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def server(live_state: LiveState, noted: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setattr(event_stream, "PACE_SECONDS", 0.02)
    monkeypatch.setattr(event_stream, "HEARTBEAT_SECONDS", 0.1)
    server = WebServer(
        "127.0.0.1:0",
        CollectorRegistry(),
        {"healthz": lambda: True},
        live_state=live_state,
        config=from_mapping({"monitor": {"max_http_connections": 8}, "http": {"max_streams": 2}}),
        note=lambda reason, detail, **_: noted.append((reason, detail)),
    )
    yield server
    server.close()


class Reader:
    """One open stream, read line by line."""

    def __init__(self, server: WebServer, run: str = "", last_id: str = "") -> None:
        headers = {"last-event-id": last_id} if last_id else {}
        self._client = httpx.Client(timeout=WAIT_SECONDS)
        self._open = self._client.stream(
            "GET", f"http://{server.address}/api/v1/events", params={"run": run} if run else {}, headers=headers
        )
        self.response = self._open.__enter__()
        self.lines = self.response.iter_lines()
        self.last_id = ""

    def event(self) -> dict[str, Any]:
        """Return the next event's data without heartbeats."""
        for line in self.lines:
            if line.startswith("id: "):
                self.last_id = line.removeprefix("id: ")
            if line.startswith("data: {"):
                found: dict[str, Any] = json.loads(line.removeprefix("data: "))
                return found
        raise AssertionError("the stream ended")

    def close(self) -> None:
        self._open.__exit__(None, None, None)
        self._client.close()


@pytest.fixture
def read(server: WebServer) -> Iterator[Callable[..., Reader]]:
    readers: list[Reader] = []

    def start(run: str = "", last_id: str = "") -> Reader:
        readers.append(Reader(server, run, last_id))
        return readers[-1]

    yield start
    for reader in readers:
        reader.close()


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition stayed false"
        time.sleep(0.01)


def test_a_stream_tells_what_is_and_then_what_changes(feed: Feed, read: Callable[..., Reader]) -> None:
    one = feed("one")
    reader = read()
    assert reader.response.headers["content-type"].startswith("text/event-stream")
    assert reader.response.headers["cache-control"] == "no-store"
    assert reader.event()["run"] == "one"
    one.heartbeat(5)
    assert reader.event()["step"] == 5
    feed("two")
    assert reader.event()["run"] == "two"


def test_a_stream_of_one_run_hears_of_no_other(feed: Feed, read: Callable[..., Reader]) -> None:
    one, two = feed("team/one"), feed("two")
    reader = read("team/one")
    assert reader.event()["run"] == "team/one"
    two.heartbeat(3)
    one.heartbeat(4)
    told = reader.event()
    assert (told["run"], told["step"]) == ("team/one", 4)


def test_who_comes_back_goes_on_where_they_were(live_state: LiveState, feed: Feed, read: Callable[..., Reader]) -> None:
    one, two = feed("one"), feed("two")
    reader = read()
    assert {reader.event()["run"], reader.event()["run"]} == {"one", "two"}
    reader.close()
    for step in range(1, 50):
        two.heartbeat(step)
    again = read(last_id=reader.last_id)
    told = again.event()
    assert (told["run"], told["step"]) == ("two", 49), "once, and as it is now"
    one.heartbeat(1)
    assert again.event()["run"] == "one"


@pytest.mark.parametrize(
    "last_id", ["", "x", "00000000-5", "-", "BOOT-", "BOOT-x", "BOOT-²", "BOOT--5", "BOOT-" + "9" * 99]
)
def test_an_id_that_is_none_of_this_monitor_begins_anew(live_state: LiveState, feed: Feed, last_id: str) -> None:
    feed("one")
    assert resumed(live_state, last_id.replace("BOOT", live_state.boot)) == 0


def test_an_id_from_the_future_waits_for_nothing(live_state: LiveState, feed: Feed) -> None:
    feed("one")
    assert resumed(live_state, f"{live_state.boot}-999999") == live_state.revision
    assert resumed(live_state, f"{live_state.boot}-1") == 1


def test_words_with_line_breaks_stay_one_event() -> None:
    told = frame({"reason": "a\n\ndata: forged\r\nid: 7\u2028"}, "b-1")
    assert told.startswith(b"id: b-1\nevent: run\ndata: ")
    assert told.count(b"\n") == 4
    assert b"\r" not in told


def test_silence_is_told_by_comments(read: Callable[..., Reader]) -> None:
    reader = read()
    assert next(reader.lines) == "retry: 2000"
    assert next(line for line in reader.lines if line.startswith(":")) == ": still here"


@pytest.mark.parametrize("runs", [[], ["one"], ["one", "two"]])
def test_a_stream_tells_when_it_has_sent_the_runs_that_exist(
    feed: Feed, read: Callable[..., Reader], runs: list[str]
) -> None:
    for run in runs:
        feed(run)
    reader = read()
    names = (line.removeprefix("event: ") for line in reader.lines if line.startswith("event: "))
    assert list(itertools.islice(names, len(runs) + 1)) == ["run"] * len(runs) + ["complete"]
    feed("new")
    assert next(names) == "run"


def test_one_stream_too_many_is_refused_in_words(read: Callable[..., Reader]) -> None:
    first, second = read(), read()
    third = read()
    assert third.response.status_code == 503
    assert third.response.headers["retry-after"] == "15"
    assert "[http] max_streams" in third.response.read().decode()
    first.close()
    eventually(lambda: read().response.status_code == 200)
    assert second.response.status_code == 200


def test_closing_the_server_ends_streams_at_once(server: WebServer, read: Callable[..., Reader]) -> None:
    reader = read()
    began = time.monotonic()
    server.close()
    with contextlib.suppress(httpx.HTTPError):
        list(reader.lines)
    assert time.monotonic() - began < 30.0


def connect(server: WebServer, said: bytes) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)
    connection.sendall(said)
    return connection


def cut(connection: socket.socket) -> bool:
    """Return True if the server ends it; earlier data is skipped."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return True


def test_a_stream_does_not_live_for_ever(
    server: WebServer, read: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STREAM_SECONDS", 0.3)
    reader = read()
    with contextlib.suppress(httpx.HTTPError):
        list(reader.lines)
    eventually(lambda: read().response.status_code == 200)


def test_a_reader_that_takes_nothing_is_cut_and_costs_little_until_then(
    server: WebServer,
    feed: Feed,
    noted: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., Reader],
) -> None:
    monkeypatch.setattr(limits, "STALL_SECONDS", 0.2)
    runs = [feed(f"run-{number}", adapter="a" * 64) for number in range(200)]
    other = read("run-0")
    host, _, port = server.address.rpartition(":")
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect((host, int(port)))
        stalled.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        step = 0

        def busy() -> bool:
            nonlocal step
            step += 1
            for run in runs:
                run.heartbeat(step)
            return "http_slow" in [reason for reason, _ in noted]

        eventually(busy)
        assert cut(stalled)
    assert "took nothing" in noted[-1][1]
    assert [reason for reason, _ in noted] == ["http_slow"], "the other reader stays"
    runs[0].heartbeat(10_000)
    while other.event()["step"] != 10_000:
        pass


def test_a_stream_is_not_the_one_that_gives_way(server: WebServer, feed: Feed, read: Callable[..., Reader]) -> None:
    one, reader = feed("one"), read()
    assert reader.event()["run"] == "one"
    idle = [connect(server, b"GET /healthz HTTP/1.1\r\nX: ") for _ in range(12)]
    assert cut(idle[0])
    one.heartbeat(5)
    assert reader.event()["step"] == 5
    for connection in idle:
        connection.close()
