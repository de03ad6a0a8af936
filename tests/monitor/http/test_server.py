"""The monitor's pages over real sockets."""

from __future__ import annotations

import html
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from koopmon.errors import EndpointError
from koopmon.monitor.http.address import parse_address
from koopmon.monitor.http.server import WebServer
from koopmon.telemetry.alerts import ALERTS
from koopmon.telemetry.metrics import Metrics

httpx = pytest.importorskip("httpx")


CREATED = "PROMETHEUS_DISABLE_CREATED_SERIES"


@pytest.fixture
def state() -> SimpleNamespace:
    return SimpleNamespace(alive=True, ready=False)


@pytest.fixture
def server(state: SimpleNamespace) -> Iterator[WebServer]:
    registry = CollectorRegistry()
    metrics = Metrics(registry, {"version": "0"})
    metrics.begin_run("job")
    checks = {"healthz": lambda: state.alive, "readyz": lambda: state.ready}
    server = WebServer("127.0.0.1:0", registry, checks, exposition=metrics.exposition)
    yield server
    server.close()


@pytest.fixture
def client(server: WebServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{server.address}", timeout=30.0) as client:
        yield client


def test_health_and_readiness_follow_their_checks(client: httpx.Client, state: SimpleNamespace) -> None:
    assert client.get("/healthz").text == "ok\n"
    assert client.get("/readyz").status_code == 503
    state.ready, state.alive = True, False
    assert client.get("/readyz").status_code == 200
    assert client.get("/healthz").status_code == 503


def test_metrics_in_either_format(client: httpx.Client) -> None:
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert 'koopmon_snapshots_received_total{run="job"} 0.0' in plain.text
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    openmetrics = client.get("/metrics", headers=accept)
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


@pytest.mark.parametrize(("value", "wanted"), [(None, True), ("False", True), ("True", False), ("1", False)])
def test_openmetrics_has_starts_unless_the_variable_of_the_client_library_is_set(
    monkeypatch: pytest.MonkeyPatch, value: str | None, wanted: bool
) -> None:
    monkeypatch.delenv(CREATED, raising=False)
    if value is not None:
        monkeypatch.setenv(CREATED, value)
    registry = CollectorRegistry()
    metrics = Metrics(registry, {"version": "0"})
    server = WebServer("127.0.0.1:0", registry, {}, exposition=metrics.exposition)
    try:
        url = f"http://{server.address}/metrics"
        found = httpx.get(url, headers={"accept": "application/openmetrics-text; version=1.0.0"}, timeout=30.0).text
        assert ("koopmon_engine_failures_created " in found) is wanted
        assert "_created" not in httpx.get(url, timeout=30.0).text
    finally:
        server.close()


def test_metrics_are_compressed_for_who_takes_it(client: httpx.Client) -> None:
    packed = client.get("/metrics", headers={"accept-encoding": "gzip"})
    plain = client.get("/metrics", headers={"accept-encoding": "identity"})
    assert (packed.headers["content-encoding"], packed.headers["vary"]) == ("gzip", "accept-encoding")
    assert "content-encoding" not in plain.headers
    assert packed.text == plain.text
    assert packed.num_bytes_downloaded < len(plain.content) / 2


def test_the_index_links_to_the_pages(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for name in ("metrics", "healthz", "readyz", "alerts"):
        assert f'href="{name}"' in page.text
    assert client.get("/nothing").status_code == 404
    assert client.post("/metrics").status_code == 405


def test_alerts_has_the_runbook_of_each(client: httpx.Client) -> None:
    page = client.get("/alerts")
    assert page.headers["content-type"].startswith("text/html")
    for alert in ALERTS:
        assert page.text.count(f'id="{alert.name}"') == 1
        assert alert.expr in html.unescape(page.text)
    assert "<code>[policy] act_risk</code>" in page.text
    assert "{{" not in page.text


def test_closing_frees_the_port_and_ends_the_thread(server: WebServer) -> None:
    server.close()
    assert "koopmon-web" not in [thread.name for thread in threading.enumerate()]
    WebServer(server.address, CollectorRegistry(), {}).close()


def test_a_port_in_use_is_one_clear_line(server: WebServer) -> None:
    with pytest.raises(EndpointError, match=r"in use: choose another --http") as caught:
        WebServer(server.address, CollectorRegistry(), {})
    assert caught.value.exit_status == 2
    assert server.address in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:9464", "localhost:80", "127.9.9.9:1"])
def test_loopback_is_served(address: str) -> None:
    parse_address(address)


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "[::]:9464", "10.0.0.1:80", "192.168.1.1:0"])
def test_nothing_but_loopback_is_served(address: str) -> None:
    with pytest.raises(EndpointError, match="only loopback"):
        parse_address(address)


@pytest.mark.parametrize(
    "address", ["9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "::1:80", "a b:80", "example.org:80", ""]
)
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(EndpointError, match="expected HOST:PORT"):
        parse_address(address)


def test_ipv6_loopback_where_there_is_one() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 loopback here")
    server = WebServer("[::1]:0", CollectorRegistry(), {"healthz": lambda: True})
    try:
        assert httpx.get(f"http://{server.address}/healthz", timeout=30.0).status_code == 200
    finally:
        server.close()


def test_a_version_of_the_format_that_is_none_is_answered_in_the_plain_one(client: httpx.Client) -> None:
    """prometheus_client compares it as a number; found by fuzzing."""
    answer = client.get("/metrics", headers={"accept": "application/openmetrics-text;version=chunked/*;q=0.1"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
