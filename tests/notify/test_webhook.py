"""Delivery to a real HTTP server that takes, refuses, redirects, fails, hangs or answers byte by byte."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from koopmon.config import NOTIFY_EVENTS
from koopmon.notify.message import slack_body
from koopmon.notify.notifier import reason_of
from koopmon.notify.target import NotAcceptedError
from koopmon.notify.webhook import Webhook
from tests.notify.conftest import notification
from tests.notify.servers import WebhookServer


def target(server: WebhookServer, **fields: object) -> Webhook:
    return dataclasses.replace(
        Webhook(label="w", events=NOTIFY_EVENTS, url=server.url, body=slack_body, timeout_seconds=5.0), **fields
    )


def test_a_notification_arrives_with_its_token(webhook: WebhookServer) -> None:
    target(webhook, token="t0ken").send(notification())
    target(webhook).send(notification())
    first, second = webhook.requests
    assert first.path == "/services/T0/SECRET?key=SECRET"
    assert first.body == {"text": "*koopmon alarm: job*\nStep 3: the risk is 0.90"}
    assert first.headers["authorization"] == "Bearer t0ken"
    assert first.headers["content-type"] == "application/json"
    assert "authorization" not in second.headers


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (301, "it answers 301 Moved Permanently, and redirects are not followed"),
        (302, "redirects are not followed"),
        (307, "redirects are not followed"),
        (308, "redirects are not followed"),
        (400, "it answers 400 Bad Request"),
        (401, "it answers 401"),
        (403, "it answers 403"),
        (404, "it answers 404 Not Found"),
        (410, "it answers 410"),
        (413, "it answers 413"),
    ],
)
def test_an_answer_that_a_retry_would_not_change(webhook: WebhookServer, status: int, says: str) -> None:
    webhook.faults.append(status)
    with pytest.raises(NotAcceptedError, match=says) as caught:
        target(webhook).send(notification())
    assert len(webhook.requests) == 1, "a redirect must not be followed"
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "close", "hang", "drip"])
def test_a_failure_that_may_pass(webhook: WebhookServer, fault: int | str) -> None:
    webhook.faults.append(fault)
    with pytest.raises(Exception, match=r".") as caught:
        target(webhook, timeout_seconds=0.3).send(notification())
    assert not isinstance(caught.value, NotAcceptedError)
    why = reason_of(caught.value)
    assert "SECRET" not in why
    assert why.isprintable()
    if fault == "drip":
        assert why == "no complete answer within 0.3 s", "each byte came within the socket timeout"


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/SECRET"
    with pytest.raises(ConnectionRefusedError) as caught:
        Webhook(label="w", events=NOTIFY_EVENTS, url=url, body=slack_body).send(notification())
    assert reason_of(caught.value) == "Connection refused"


def test_no_repr_contains_the_secret(webhook: WebhookServer) -> None:
    shown = repr(target(webhook, token="t0ken"))
    assert "SECRET" not in shown
    assert "t0ken" not in shown


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_tls_needs_a_certificate_of_the_trust_store(
    certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = WebhookServer(certificate)
    try:
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            target(server).send(notification())
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        target(server).send(notification())
        assert len(server.requests) == 1
    finally:
        server.close()
