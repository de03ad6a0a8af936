"""`koopmon monitor --test-notify` with real receivers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from koopmon.cli import main
from tests.notify.servers import MailServer, WebhookServer

Verb = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """Run the verb with a configuration; return its status and the lines of its output, which has no secret."""
    monkeypatch.delenv("KOOPMON_CONFIG", raising=False)
    monkeypatch.delenv("KOOPMON_NOTIFY_WEBHOOK", raising=False)

    def run(text: str) -> tuple[int, list[str]]:
        (tmp_path / "k.toml").write_text(text)
        status = main(["monitor", "--test-notify", "--config", str(tmp_path / "k.toml")])
        said = capsys.readouterr()
        assert "SECRET" not in said.out + said.err
        return status, said.err.splitlines()

    return run


def test_each_target_gets_a_test_and_a_line(verb: Verb, webhook: WebhookServer, mail_server: MailServer) -> None:
    mail = f"""
[[notify.mail]]
server = "127.0.0.1"
port = {mail_server.port}
security = "none"
sender = "koopmon@example.org"
to = ["ops@example.org"]
"""
    hook = f'[[notify.webhooks]]\nurl = "{webhook.url}"\n'
    assert verb(hook + mail) == (
        0,
        ["koopmon: notify.webhooks[0] (127.0.0.1): sent", "koopmon: notify.mail[0] (127.0.0.1): sent"],
    )
    (text,) = webhook.texts
    assert text.startswith("*koopmon alarm: test*\nThis is a test")
    assert len(mail_server.letters) == 1
    webhook.faults.append(403)
    assert verb(hook + mail) == (
        1,
        [
            "koopmon: notify.webhooks[0] (127.0.0.1): not sent: it answers 403 Forbidden",
            "koopmon: notify.mail[0] (127.0.0.1): sent",
        ],
    )


def test_a_configuration_without_a_target_is_one_line(verb: Verb) -> None:
    assert verb("") == (
        2,
        ["koopmon: notify.webhooks, notify.mail: expected at least one target for --test-notify"],
    )


def test_the_environment_names_a_webhook(verb: Verb, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOOPMON_NOTIFY_WEBHOOK", webhook.url)
    assert verb("[[notify.webhooks]]\n")[0] == 0
    assert len(webhook.requests) == 1
