"""The push of metrics, received by a small collector that decodes the protocol's own messages."""

from __future__ import annotations

import gzip
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from koopmon import __version__
from koopmon.monitor import otlp
from koopmon.monitor.otlp import OtlpPush, open_push
from koopmon.telemetry.metrics import Metrics

Until = Callable[[Callable[[], Any]], Any]
BOUNDED_SECONDS = 30.0


class Collector:
    """HTTP server on loopback that keeps each request; `status` is its answer."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], ExportMetricsServiceRequest]] = []
        self.status = 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if collector.status == 200 and self.path == "/v1/metrics":
                    read = ExportMetricsServiceRequest.FromString(body)
                    collector.requests.append(({key.lower(): value for key, value in self.headers.items()}, read))
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def values(self) -> dict[str, float]:
        """Return the last values, named as in the text format of Prometheus."""
        (resource,) = self.requests[-1][1].resource_metrics
        found = {}
        for metric in resource.scope_metrics[0].metrics:
            assert metric.unit == "", "Prometheus would append it to the name"
            data = getattr(metric, metric.WhichOneof("data"))
            name = f"{metric.name}_total" if metric.WhichOneof("data") == "sum" else metric.name
            for point in data.data_points:
                labels = ",".join(f'{each.key}="{each.value.string_value}"' for each in point.attributes)
                if metric.WhichOneof("data") == "histogram":
                    found[f"{name}_count"], found[f"{name}_sum"] = float(point.count), point.sum
                    assert sum(point.bucket_counts) == point.count
                    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
                else:
                    found[f"{name}{{{labels}}}" if labels else name] = point.as_double
        return found


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    yield made
    made.close()


def opened(registry: CollectorRegistry, **environ: str) -> OtlpPush | None:
    return open_push(registry, {**os.environ, **environ}, "host:9464")


def scraped(metrics: CollectorRegistry) -> dict[str, float]:
    return {
        sample.name + (f"{{{labels}}}" if labels else ""): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if "le" not in sample.labels
        for labels in [",".join(f'{key}="{value}"' for key, value in sample.labels.items())]
    }


def test_every_metric_is_received_under_the_name_of_a_scrape(
    collector: Collector, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "cluster=a")
    registry = CollectorRegistry()
    metrics = Metrics(registry, {"version": __version__})
    metrics.begin_run("mine")
    metrics.set("risk", 0.5, "mine")
    metrics.observe_duration(0.02)
    metrics.observe_duration(99.0)
    metrics.add("risk_alarms", "mine", amount=3)
    push = opened(registry)
    assert push is not None
    until(lambda: collector.requests)
    push.close()
    assert collector.values() == scraped(registry)
    assert collector.values()['koopmon_risk{run="mine"}'] == 0.5
    assert collector.values()['koopmon_risk_alarms_total{run="mine"}'] == 3
    headers, request = collector.requests[-1]
    assert headers["authorization"] == "Bearer secret"
    attributes = {each.key: each.value.string_value for each in request.resource_metrics[0].resource.attributes}
    expected = {
        "service.name": "koopmon",
        "service.version": __version__,
        "cluster": "a",
        "service.instance.id": "host:9464",
    }
    assert expected.items() <= attributes.items()


def test_a_series_disappears_with_its_run_and_counters_keep_their_start(
    collector: Collector, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    registry = CollectorRegistry()
    metrics = Metrics(registry, {})
    metrics.begin_run("mine")
    metrics.set("risk", 0.5, "mine")
    push = opened(registry)
    assert push is not None
    until(lambda: collector.requests)
    metrics.end_run("mine")
    push.close()
    assert 'koopmon_risk{run="mine"}' not in collector.values()
    starts, names = set(), set()
    for _, request in collector.requests:
        (resource,) = request.resource_metrics
        names |= {each.value.string_value for each in resource.resource.attributes if each.key == "service.name"}
        for metric in resource.scope_metrics[0].metrics:
            if metric.WhichOneof("data") == "sum":
                assert metric.sum.is_monotonic
                starts |= {point.start_time_unix_nano for point in metric.sum.data_points}
    assert len(starts) == 1
    assert names == {"ours"}


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ""),
        ({"OTEL_SDK_DISABLED": "TRUE"}, ""),
        ({"OTEL_METRICS_EXPORTER": "none"}, ""),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc', and koopmon has"),
    ],
    ids=str,
)
def test_the_variables_switch_it_off(
    collector: Collector, environ: dict[str, str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert opened(CollectorRegistry(), **environ) is None
    assert line in caplog.text
    assert bool(caplog.text) is bool(line)


def test_without_opentelemetry_one_line_has_the_command(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        assert opened(CollectorRegistry()) is None
    (line,) = caplog.messages
    assert line.endswith("no metrics are pushed: OpenTelemetry is not installed: pip install 'koopmon[otlp]'")


@pytest.mark.parametrize("given", ["soon", "0", "-5", "inf", "nan"])
def test_a_wrong_interval_is_a_line_and_the_default(
    collector: Collector, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert otlp._interval({otlp.INTERVAL: given}) == otlp.DEFAULT_INTERVAL_SECONDS
    assert f"{otlp.INTERVAL} is '{given}'" in caplog.text


def test_a_collector_that_fails_is_one_line_and_its_return_another(
    collector: Collector, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 401
    push = opened(CollectorRegistry())
    assert push is not None
    until(lambda: "were not pushed" in caplog.text)
    collector.status = 200
    until(lambda: "are pushed again" in caplog.text)
    push.close()
    assert len([line for line in caplog.messages if "otlp" in line]) == len(caplog.messages) == 2
    assert "401" in caplog.messages[0]


def test_an_error_in_the_registry_is_one_line(
    collector: Collector, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        calls = 0

        def collect(self) -> Iterator[GaugeMetricFamily]:
            self.calls += 1
            raise RuntimeError("no values")

    registry, broken = CollectorRegistry(), Broken()
    push = opened(registry)
    assert push is not None
    registry._collector_to_names[broken] = []  # type: ignore[index]
    until(lambda: broken.calls > 3)
    push.close()
    assert [line for line in caplog.messages if "no values" in line] == caplog.messages
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("kind", ["hanging", "dead"])
def test_the_monitor_is_unaffected_by_its_collector(
    kind: str, start_monitor: Callable[..., Any], connect: Callable[..., Any], until: Until, monkeypatch: Any
) -> None:
    """A hanging collector accepts and never answers; a dead one refuses the connection."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
        if kind == "dead":
            server.close()
        served = start_monitor()
        agent = connect(served.addresses.endpoint)
        agent.hello()
        until(lambda: any(thread.name == "koopmon-otlp" for thread in threading.enumerate()))
        if kind == "hanging":
            server.settimeout(BOUNDED_SECONDS)
            connection = stack.enter_context(server.accept()[0])
            assert connection.recv(4) == b"POST"
        for step in range(1, 4):
            agent.snapshot(step)
        until(lambda: any(name.startswith("near_unit_mass{") for name in served.samples()))
        since = time.monotonic()
        served.stop()
        assert time.monotonic() - since < BOUNDED_SECONDS


def test_a_monitor_pushes_its_last_values_at_its_end(
    collector: Collector, start_monitor: Callable[..., Any], connect: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "3600000")
    served = start_monitor()
    agent = connect(served.addresses.endpoint)
    agent.hello()
    agent.heartbeat(step=7)
    served.stop()
    assert len(collector.requests) == 1
    assert [value for name, value in collector.values().items() if name.startswith("koopmon_step{")] == [7.0]
