"""Interface of a target of notifications."""

from __future__ import annotations

from typing import Protocol

from koopmon.config import NotifyEvent
from koopmon.notify.message import Notification


class NotAcceptedError(Exception):
    """A target rejects a notification in a way that a retry would not change."""


class NotifyTarget(Protocol):
    """One receiver. `label` is its place in the configuration and its host, without a secret."""

    @property
    def channel(self) -> str:
        """Label of its metric: `webhook` or `mail`."""

    @property
    def label(self) -> str:
        """Name in log lines."""

    @property
    def events(self) -> tuple[NotifyEvent, ...]:
        """Events that it receives."""

    def send(self, notification: Notification) -> None:
        """Deliver within its time limit. Raises NotAcceptedError, or another error if a retry may succeed."""
