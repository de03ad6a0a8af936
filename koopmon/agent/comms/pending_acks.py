"""Outcomes of commands, kept until the monitor has certainly read them."""

from __future__ import annotations

from koopmon.wire.messages import Ack

MAX_PENDING_ACKS = 256
"""Acks that are kept. The oldest are dropped first."""


class PendingAcks:
    """Acks that the monitor may not have read yet. They are sent again on a new connection.

    A decision must not lose its outcome with the monitor that received it. A reply to a heartbeat proves that the
    monitor has read all earlier messages.
    """

    def __init__(self) -> None:
        self._acks: dict[str, Ack] = {}
        self._sent: dict[str, int] = {}
        """For each command, the number of heartbeats sent on this connection before its ack."""
        self._num_heartbeats = 0
        self._num_replies = 0

    def add(self, ack: Ack, *, sent: bool) -> None:
        """Keep `ack`. `sent`: the transport has accepted it."""
        self._acks[ack.command_id] = ack
        if sent:
            self._sent[ack.command_id] = self._num_heartbeats
        while len(self._acks) > MAX_PENDING_ACKS:
            self._drop(next(iter(self._acks)))

    def unsent(self) -> list[Ack]:
        """Return the acks to send now."""
        return [ack for command_id, ack in self._acks.items() if command_id not in self._sent]

    def on_heartbeat_sent(self) -> None:
        """Count a heartbeat that was sent."""
        self._num_heartbeats += 1

    def on_heartbeat_reply(self) -> None:
        """Count a reply to a heartbeat, and drop the acks that it proves read."""
        self._num_replies += 1
        for command_id in [each for each, number in self._sent.items() if number < self._num_replies]:
            self._drop(command_id)

    def on_reconnect(self) -> None:
        """Mark all acks unsent: those that were not read are lost with the old connection."""
        self._sent.clear()
        self._num_heartbeats = self._num_replies = 0

    def _drop(self, command_id: str) -> None:
        self._acks.pop(command_id, None)
        self._sent.pop(command_id, None)
