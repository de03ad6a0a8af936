"""Receivers of notifications, and a certificate for them that the default trust store of the test contains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from koopmon.notify.message import Notification
from tests.notify.servers import MailServer, WebhookServer, make_certificate

Until = Callable[[Callable[[], Any]], Any]


def notification(run: str = "job", **fields: Any) -> Notification:
    """Alarm at step 3."""
    values = {"events": ("alarm",), "at": 1.7e9, "step": 3, "risk": 0.9, "happened": "the risk is 0.90", **fields}
    return Notification(run=run, **values)


@pytest.fixture
def until() -> Until:
    """Return the first true value of a condition; fail after the time limit."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 30.0
        while not (value := condition()):
            assert time.monotonic() < deadline, "the condition stayed false"
            time.sleep(0.01)
        return value

    return wait


@pytest.fixture
def webhook() -> Iterator[WebhookServer]:
    server = WebhookServer()
    yield server
    server.close()


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    server = MailServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Create a self-signed certificate for 127.0.0.1, and its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def trusted(certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Add the certificate to the default trust store, as an operator does with SSL_CERT_FILE."""
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    return certificate


def secret_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.touch(mode)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)
