"""Delivery of a notification by SMTP."""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any, ClassVar, Literal

from koopmon.config import NotifyEvent
from koopmon.deadline import Deadline
from koopmon.errors import one_line
from koopmon.notify.message import Notification, plain_text
from koopmon.notify.target import NotAcceptedError

MAX_SUBJECT = 150


class _Smtp(smtplib.SMTP):
    """A session that the deadline can end while the constructor waits for the server's greeting."""

    def __init__(self, deadline: Deadline, server: str, port: int, **options: Any) -> None:
        deadline.watch(lambda: self.sock)
        super().__init__(server, port, **options)


class _SmtpTls(_Smtp, smtplib.SMTP_SSL):
    pass


@dataclass(frozen=True, slots=True)
class Mail:
    """A mail server and the addresses of one message. `label` contains no secret."""

    channel: ClassVar[str] = "mail"
    label: str
    events: tuple[NotifyEvent, ...]
    server: str
    port: int
    security: Literal["starttls", "tls", "none"]
    sender: str
    recipients: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    timeout_seconds: float = 10.0

    def send(self, notification: Notification) -> None:
        """Deliver. Raises NotAcceptedError if a retry would fail too, and any other error if it may succeed."""
        message = self._message(notification)
        try:
            refused = self._deliver(message)
        except smtplib.SMTPRecipientsRefused as error:
            refused = error.recipients
            if all(code < 500 for code, _ in refused.values()):
                raise
        except smtplib.SMTPResponseException as error:
            said = f"it answers {error.smtp_code}: {_text(error.smtp_error)}"
            if error.smtp_code < 500:
                raise OSError(said) from None
            raise NotAcceptedError(said) from None
        except smtplib.SMTPNotSupportedError as error:
            raise NotAcceptedError(one_line(error, 200)) from None
        if refused:
            first, (code, text) = next(iter(refused.items()))
            raise NotAcceptedError(
                f"it refuses {len(refused)} of {len(self.recipients)} recipients, such as {first}: {code} {_text(text)}"
            )

    def _deliver(self, message: EmailMessage) -> dict[str, tuple[int, bytes]]:
        """Send; returns the recipients that the server refused, if it took others."""
        context = ssl.create_default_context()
        with Deadline(self.timeout_seconds) as deadline, contextlib.closing(self._connect(context, deadline)) as smtp:
            if self.security == "starttls":
                smtp.starttls(context=context)
            if self.user:
                smtp.login(self.user, self.password)
            refused = smtp.send_message(message, self.sender, list(self.recipients))
            with contextlib.suppress(OSError):  # the message is delivered, also if the end of the session fails
                smtp.quit()
            return refused

    def _connect(self, context: ssl.SSLContext, deadline: Deadline) -> smtplib.SMTP:
        # smtplib would look up the name of this host in the DNS, which can take long.
        options = {"local_hostname": socket.gethostname(), "timeout": self.timeout_seconds}
        if self.security == "tls":
            return _SmtpTls(deadline, self.server, self.port, context=context, **options)
        return _Smtp(deadline, self.server, self.port, **options)

    def _message(self, notification: Notification) -> EmailMessage:
        message = EmailMessage()
        message["Subject"] = one_line(notification.title, MAX_SUBJECT)
        message["From"] = self.sender
        message["To"] = ", ".join(self.recipients)
        message["Date"] = formatdate(notification.at)
        message["Message-ID"] = make_msgid(domain=self.sender.rpartition("@")[2])
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(plain_text(notification))
        return message


def _text(answer: bytes | str) -> str:
    return one_line(answer.decode("utf-8", "replace") if isinstance(answer, bytes) else answer, 160)
