"""Requests to HTTP servers, with a limit on the time of the whole exchange and on the size of the answer.

It uses http.client, which follows no redirect, so that a secret stays with the configured host, and no proxy.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from koopmon.deadline import Deadline


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, reason and body of an answer. `complete` is False if the time ended within the body."""

    status: int
    reason: str
    body: bytes
    complete: bool


def exchange(
    method: str,
    url: str,
    *,
    seconds: float,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    max_bytes: int = 0,
    context: ssl.SSLContext | None = None,
) -> Answer:
    """Send one request and return the answer with at most `max_bytes` of its body.

    Raises OSError, which includes the TimeoutError after `seconds`, and http.client.HTTPException.
    """
    parts = urlsplit(url)
    path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    host = str(parts.hostname)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=seconds)
    with contextlib.closing(connection), Deadline(seconds) as deadline:
        connection.connect()
        opened = connection.sock  # http.client forgets it with the head of the answer
        deadline.watch(lambda: opened)
        connection.request(method, path, body, {"User-Agent": "koopmon", "Connection": "close", **(headers or {})})
        with contextlib.closing(connection.getresponse()) as answer:
            if deadline.passed:  # http.client takes a head that was cut off for a whole one
                raise TimeoutError
            text = answer.read(max_bytes)
            return Answer(answer.status, answer.reason, text, complete=not deadline.passed)
