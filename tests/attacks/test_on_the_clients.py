"""Servers that never end an answer: each client of koopmon gives up within its time limit, with one line."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from koopmon.doctor.http_checks import Pages
from koopmon.errors import GrafanaUnreachableError
from koopmon.grafana.access import GrafanaAccess
from koopmon.grafana.annotations import Annotations
from koopmon.monitor import otlp
from tests.slow_server import ANSWERS, slow_server

LONG_SECONDS = 20.0
"""Far above every limit that a test sets, far below the time of the whole answer."""
every_answer = pytest.mark.parametrize("answer", ANSWERS)


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < until, "the client still waits"
        time.sleep(0.01)


@every_answer
def test_doctor(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koopmon.doctor.http_checks.HTTP_SECONDS", 0.3)
    with slow_server(answer) as url:
        began = time.monotonic()
        (finding,) = Pages(url).findings()
    assert time.monotonic() - began < LONG_SECONDS
    assert finding.found.startswith(f"no answer at {url}: "), finding


@every_answer
def test_annotations(answer: str, caplog: pytest.LogCaptureFixture) -> None:
    with slow_server(answer) as url:
        told = Annotations(GrafanaAccess(f"{url}/", "token", 0.3), 10)
        told.add(1.0, (), "text")
        if answer in ("body", "chunk size"):  # the status has come: the annotation is posted
            wait_for(lambda: not told._queue)
        else:
            wait_for(lambda: "annotations are not posted: no complete answer within 0.3 s" in caplog.text)
        told.close()


@every_answer
def test_a_push_to_grafana(answer: str) -> None:
    pytest.importorskip("grafana_client")
    from koopmon.grafana.push import PushOptions, push_to

    with slow_server(answer) as url:
        began = time.monotonic()
        with pytest.raises(GrafanaUnreachableError, match=r"no answer within 0\.5 s"):
            push_to(GrafanaAccess(f"{url}/", "token", 0.5), PushOptions(dry_run=True))
    assert time.monotonic() - began < LONG_SECONDS


@every_answer
def test_a_push_to_a_collector(answer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setattr(otlp, "PUSH_SECONDS", 0.3)
    with slow_server(answer) as url:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_METRIC_EXPORT_INTERVAL": "100"}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with caplog.at_level(logging.WARNING):
            push = otlp.open_push(CollectorRegistry(), environ, "host")
            assert push is not None
            wait_for(lambda: "the metrics were not pushed" in caplog.text)
            push.close()
