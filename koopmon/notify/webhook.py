"""Delivery of a notification to a webhook.

No message of an error contains the path of the address or the body of an answer, because both may contain the secret
of the webhook.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from koopmon.config import NotifyEvent
from koopmon.http_client import exchange
from koopmon.notify.message import Notification
from koopmon.notify.target import NotAcceptedError

RETRIED = (408, 425, 429)
"""Statuses below 500 that a later attempt may not get."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """A target that takes POST requests. `label` contains no secret."""

    channel: ClassVar[str] = "webhook"
    label: str
    events: tuple[NotifyEvent, ...]
    url: str = field(repr=False)
    body: Callable[[Notification], bytes]
    token: str = field(default="", repr=False)
    timeout_seconds: float = 10.0

    def send(self, notification: Notification) -> None:
        """Deliver. Raises NotAcceptedError if a retry would fail too, and any other error if it may succeed."""
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        body = self.body(notification)
        status = exchange("POST", self.url, body=body, headers=headers, seconds=self.timeout_seconds).status
        if 200 <= status < 300:
            return
        said = f"it answers {status} {http.client.responses.get(status, '')}".strip()
        if status >= 500 or status in RETRIED:
            raise http.client.HTTPException(said)
        raise NotAcceptedError(f"{said}, and redirects are not followed" if 300 <= status < 400 else said)
