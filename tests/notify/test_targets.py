"""Targets from the configuration. A mistake is one line without a secret."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from koopmon.config import NOTIFY_EVENTS, from_mapping
from koopmon.errors import ConfigError
from koopmon.notify.mail import Mail
from koopmon.notify.message import json_body, slack_body
from koopmon.notify.target import NotifyTarget
from koopmon.notify.targets import read_targets
from koopmon.notify.webhook import Webhook
from tests.notify.conftest import secret_file

URL = "https://hooks.example.org/services/T0/SECRET"
MAIL = {"server": "mail.example.org", "sender": "a@example.org", "to": ["b@example.org"]}


def read(environ: dict[str, str] | None = None, **tables: Any) -> tuple[NotifyTarget, ...]:
    return read_targets(from_mapping({"notify": tables}).notify, environ or {})


def test_there_is_no_target_by_default() -> None:
    assert read({"KOOPMON_NOTIFY_WEBHOOK": URL, "KOOPMON_NOTIFY_PASSWORD": "x"}) == ()


def test_every_key_reaches_its_target(tmp_path: Path) -> None:
    url_file, token = secret_file(tmp_path / "url", f"{URL}/2\n"), secret_file(tmp_path / "token", "t0ken\n")
    password = secret_file(tmp_path / "password", "pass word\n")
    found = read(
        {"KOOPMON_NOTIFY_WEBHOOK": f"{URL}/3", "KOOPMON_NOTIFY_PASSWORD": "other"},
        timeout_seconds=3.0,
        webhooks=[
            {"url": URL, "events": ["alarm", "lost"]},
            {"url_file": url_file, "format": "json", "token_file": token},
            {},
        ],
        mail=[{**MAIL, "user": "u", "password_file": password}, {**MAIL, "user": "u", "security": "tls", "port": 465}],
    )
    label = "notify.webhooks[{}] (hooks.example.org)".format
    assert found == (
        Webhook(label(0), ("alarm", "lost"), URL, slack_body, "", 3.0),
        Webhook(label(1), NOTIFY_EVENTS, f"{URL}/2", json_body, "t0ken", 3.0),
        Webhook(label(2), NOTIFY_EVENTS, f"{URL}/3", slack_body, "", 3.0),
        Mail("notify.mail[0] (mail.example.org)", NOTIFY_EVENTS, "mail.example.org", 587, "starttls", "a@example.org",
             ("b@example.org",), "u", "pass word", 3.0),
        Mail("notify.mail[1] (mail.example.org)", NOTIFY_EVENTS, "mail.example.org", 465, "tls", "a@example.org",
             ("b@example.org",), "u", "other", 3.0),
    )  # fmt: skip
    assert "SECRET" not in repr(found)
    assert "pass word" not in repr(found)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"webhooks": [{}]}, "notify.webhooks[0].url, or KOOPMON_NOTIFY_WEBHOOK: expected https://"),
    ({"webhooks": [{"url": "hooks.example.org/SECRET"}]}, "expected https://HOST[:PORT]/PATH"),
    ({"webhooks": [{"url": "ftp://hooks.example.org/SECRET"}]}, "expected https://"),
    ({"webhooks": [{"url": "https://user:SECRET@example.org/"}]}, "without user and password"),
    ({"webhooks": [{"url": "https://example.org/SECRET\r\nHost: evil"}]}, "expected https://"),
    ({"webhooks": [{"url": "https://example.org/a SECRET"}]}, "expected https://"),
    ({"webhooks": [{"url": "https://example.org:99999/SECRET"}]}, "expected https://"),
    ({"webhooks": [{"url": "https://[::1/SECRET"}]}, "expected https://"),
    ({"webhooks": [{"url": f"{URL}#x"}]}, "expected https://"),
    ({"webhooks": [{"url": URL, "url_file": "/x"}]}, "expected one of the two"),
    ({"webhooks": [{"url_file": "/no/such/file"}]}, "notify.webhooks[0].url_file = '/no/such/file': No such file"),
    ({"webhooks": [{"url": URL, "token_file": "/no/such"}]}, "notify.webhooks[0].token_file = '/no/such': No such"),
    ({"webhooks": [{"url": [URL]}]}, "notify.webhooks[0].url = (not shown): expected `str`, got `array`"),
    ({"webhooks": {"url": URL}}, "notify.webhooks = (not shown): expected `array`, got `object`"),
    ({"webhooks": [{"ulr": URL}]}, "there is no field notify.webhooks[0].ulr, did you mean url?"),
    ({"webhooks": [{"url": URL, "events": ["alert"]}]}, "expected one of 'action', 'alarm', 'end', 'lost', 'return'"),
    ({"webhooks": [{"url": URL, "events": []}]}, "notify.webhooks[0].events = (not shown): expected `array` of length"),
    ({"mail": [{**MAIL, "user": "u"}]}, "the user needs a password, in a file of mode 0600 or in KOOPMON_NOTIFY_PASSW"),
    ({"mail": [{**MAIL, "user": "u", "security": "none"}]}, "no password in clear"),
    ({"mail": [{**MAIL, "password_file": "/x"}]}, "notify.mail[0].user = '': a password needs its user"),
    ({"mail": [{**MAIL, "to": ["b@example.org\nBcc: eve@example.org"]}]}, "notify.mail[0].to[0] = (not shown)"),
    ({"mail": [{**MAIL, "to": []}]}, "notify.mail[0].to = (not shown): expected `array` of length >= 1"),
    ({"mail": [{**MAIL, "sender": "koopmon"}]}, "notify.mail[0].sender = (not shown): expected `str` matching"),
    ({"mail": [{**MAIL, "server": "a b"}]}, "notify.mail[0].server = (not shown): expected `str` matching"),
    ({"mail": [{**MAIL, "port": 65536}]}, "notify.mail[0].port = 65536: expected `int` >= 1 and <= 65535"),
    ({"mail": [{"server": "x"}]}, "notify.mail[0] = (not shown): object missing required field `sender`"),
]


@pytest.mark.parametrize(("tables", "says"), MISTAKES, ids=[says[:60] for _, says in MISTAKES])
def test_a_mistake_is_one_line_without_a_secret(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**tables)
    text = str(caught.value)
    assert says in text
    assert text.isprintable()
    assert "SECRET" not in text


def test_others_must_not_read_a_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"notify\.webhooks\[0\]\.url_file = .* lets others read it; chmod 600"):
        read(webhooks=[{"url_file": secret_file(tmp_path / "url", URL, 0o644)}])
    with pytest.raises(ConfigError, match="expected a password in ASCII") as caught:
        read({"KOOPMON_NOTIFY_PASSWORD": "pässword"}, mail=[{**MAIL, "user": "u"}])
    assert "ssword\u00e4" not in str(caught.value)


def test_a_webhook_of_another_host_without_tls_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    read(webhooks=[{"url": "http://127.0.0.1:1/SECRET"}, {"url": "http://hooks.example.org/SECRET"}])
    assert caplog.messages == [
        "notify.webhooks[1]: hooks.example.org has no TLS: others on the network can read the notifications"
    ]
