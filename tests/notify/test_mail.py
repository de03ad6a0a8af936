"""Delivery to a real mail server, with STARTTLS, TLS or in clear, that takes, refuses, hangs or answers slowly."""

from __future__ import annotations

import dataclasses
import email
import re
from email import policy

import pytest

from koopmon.config import NOTIFY_EVENTS
from koopmon.notify.mail import Mail
from koopmon.notify.notifier import reason_of
from koopmon.notify.target import NotAcceptedError
from tests.notify.conftest import notification
from tests.notify.servers import PASSWORD, MailServer
from tests.notify.test_message import HOSTILE

SENDER, TO = "koopmon@example.org", ("ops@example.org", "team+train@example.org")


def target(server: MailServer, **fields: object) -> Mail:
    mail = Mail("m", NOTIFY_EVENTS, "127.0.0.1", server.port, "none", SENDER, TO, timeout_seconds=5.0)
    return dataclasses.replace(mail, **fields)


def test_a_message_arrives(mail_server: MailServer) -> None:
    target(mail_server).send(notification(means="Größe ±2", did=".", page="http://127.0.0.1:1/runs/job"))
    (letter,) = mail_server.letters
    assert letter.recipients == list(TO)
    assert SENDER in letter.sender
    message = email.message_from_bytes(letter.content, policy=policy.default)
    assert message["Subject"] == "koopmon alarm: job"
    assert message["From"] == SENDER
    assert message["To"] == ", ".join(TO)
    assert message["Date"].datetime.timestamp() == 1.7e9
    assert message["Message-ID"].endswith("@example.org>")
    assert message["Auto-Submitted"] == "auto-generated"
    text = message.get_content()
    assert "Step 3: the risk is 0.90\n" in text.replace("\r", "")
    assert "Größe ±2" in text
    assert text.rstrip().endswith("http://127.0.0.1:1/runs/job")


@pytest.mark.parametrize("run", HOSTILE)
def test_a_hostile_name_adds_no_header_and_no_recipient(mail_server: MailServer, run: str) -> None:
    target(mail_server).send(notification(run))
    (letter,) = mail_server.letters
    assert letter.recipients == list(TO)
    message = email.message_from_bytes(letter.content, policy=policy.default)
    assert sorted(message.keys()) == sorted(
        ["Subject", "From", "To", "Date", "Message-ID", "Auto-Submitted", "Content-Type", "MIME-Version",
         "Content-Transfer-Encoding"]
    )  # fmt: skip
    assert message["Subject"].startswith("koopmon alarm: ")
    assert len(message["Subject"]) <= 150


@pytest.mark.process
@pytest.mark.needs("openssl")
@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_password_travels_under_tls_alone(trusted: tuple[str, str], security: str) -> None:
    server = MailServer(trusted, tls=security == "tls")
    try:
        target(server, security=security, user="koopmon", password=PASSWORD).send(notification())
        (letter,) = server.letters
        assert (letter.user, letter.encrypted) == ("koopmon", True)
        with pytest.raises(NotAcceptedError, match="it answers 535: bad credentials") as caught:
            target(server, security=security, user="koopmon", password="wrong-SECRET").send(notification())
        assert "SECRET" not in str(caught.value)
    finally:
        server.close()


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_a_certificate_that_is_not_trusted_is_refused(certificate: tuple[str, str]) -> None:
    server = MailServer(certificate)
    try:
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            target(server, security="starttls").send(notification())
        assert server.letters == []
    finally:
        server.close()


def test_a_server_without_starttls_gets_no_message(mail_server: MailServer) -> None:
    with pytest.raises(NotAcceptedError, match="STARTTLS extension not supported"):
        target(mail_server, security="starttls", user="koopmon", password=PASSWORD).send(notification())
    assert mail_server.letters == []


@pytest.mark.parametrize(
    ("verb", "answer", "permanent", "says"),
    [
        ("EHLO", "502 no", True, "it answers 5"),
        ("MAIL", "550 not you", True, "it answers 550: .*not you"),
        ("MAIL", "451 later", False, "it answers 451: .*later"),
        ("RCPT", "450 busy", False, "450|busy"),
        ("RCPT", "550 unknown", True, "it refuses 2 of 2 recipients, such as ops@example.org: 550"),
        ("DATA", "452 full", False, "it answers 452: .*full"),
        ("DATA.", "554 spam", True, "it answers 554: .*spam"),
        ("DATA.", "451 later", False, "it answers 451: .*later"),
        ("MAIL", "hang", False, "timed out|no complete answer"),
        ("MAIL", "drip", False, "no complete answer within 0.5 s"),
        ("greeting", "drip", False, "no complete answer within 0.5 s"),
    ],
)
def test_an_answer_decides_on_a_retry(
    mail_server: MailServer, verb: str, answer: str, permanent: bool, says: str
) -> None:
    mail_server.answers[verb] = answer
    if verb == "EHLO":
        mail_server.answers["HELO"] = answer
    with pytest.raises(Exception, match=r".") as caught:
        target(mail_server, timeout_seconds=0.5).send(notification())
    assert isinstance(caught.value, NotAcceptedError) == permanent, repr(caught.value)
    assert re.search(says, reason_of(caught.value))
    assert mail_server.letters == []


def test_one_refused_recipient_does_not_cost_the_others_their_message(mail_server: MailServer) -> None:
    with pytest.raises(NotAcceptedError, match=r"it refuses 1 of 3 recipients, such as nobody@example\.org: 550"):
        target(mail_server, recipients=(*TO, "nobody@example.org")).send(notification())
    assert len(mail_server.letters) == 1


def test_a_session_that_ends_badly_after_the_message_is_a_success(mail_server: MailServer) -> None:
    mail_server.answers["QUIT"] = "hang"
    target(mail_server, timeout_seconds=0.3).send(notification())
    assert len(mail_server.letters) == 1


def test_no_repr_contains_the_password(mail_server: MailServer) -> None:
    assert PASSWORD not in repr(target(mail_server, user="koopmon", password=PASSWORD))
