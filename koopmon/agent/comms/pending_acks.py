"""What became of commands, remembered until the monitor is known to have read it."""

from __future__ import annotations

from koopmon.wire.messages import Ack

MAX_PENDING_ACKS = 256
"""Acks that are remembered; the oldest give way."""


class PendingAcks:
    """Acks that the monitor may not have read yet, to be said again on a new connection: a decision must not lose its
    outcome with the monitor that took it. A reply to a heartbeat tells that what was said before it was read.
    """

    def __init__(self) -> None:
        self._acks: dict[str, Ack] = {}
        self._sent: dict[str, int] = {}
        """By command: how many heartbeats had been sent on this connection when its ack was."""
        self._num_heartbeats = 0
        self._num_replies = 0

    def add(self, ack: Ack, *, sent: bool) -> None:
        """Remember `ack`, and whether it was handed to the transport."""
        self._acks[ack.command_id] = ack
        if sent:
            self._sent[ack.command_id] = self._num_heartbeats
        while len(self._acks) > MAX_PENDING_ACKS:
            self._drop(next(iter(self._acks)))

    def unsent(self) -> list[Ack]:
        """Those to be said now."""
        return [ack for command_id, ack in self._acks.items() if command_id not in self._sent]

    def on_heartbeat_sent(self) -> None:
        """One more heartbeat was sent."""
        self._num_heartbeats += 1

    def on_heartbeat_reply(self) -> None:
        """One more heartbeat was answered."""
        self._num_replies += 1
        for command_id in [each for each, number in self._sent.items() if number < self._num_replies]:
            self._drop(command_id)

    def on_reconnect(self) -> None:
        """The connection is a new one: whatever was not read is lost with the old."""
        self._sent.clear()
        self._num_heartbeats = self._num_replies = 0

    def _drop(self, command_id: str) -> None:
        self._acks.pop(command_id, None)
        self._sent.pop(command_id, None)
