"""What became of commands, remembered until the monitor is known to have read it."""

from __future__ import annotations

from koopmon.wire.messages import Ack

MAX_ANSWERS = 256
"""Acks that are remembered; the oldest give way."""


class Answers:
    """Acks that the monitor may not have read yet, to be said again on a new connection: a decision must not lose its
    outcome with the monitor that took it. A reply to a heartbeat tells that what was said before it was read.
    """

    def __init__(self) -> None:
        self._acks: dict[str, Ack] = {}
        self._said: dict[str, int] = {}
        """By command: how many heartbeats had been sent on this connection when its ack was."""
        self._num_heartbeats = 0
        self._num_replies = 0

    def keep(self, ack: Ack, *, said: bool) -> None:
        """Remember `ack`, and whether it was handed to the transport."""
        self._acks[ack.command_id] = ack
        if said:
            self._said[ack.command_id] = self._num_heartbeats
        while len(self._acks) > MAX_ANSWERS:
            self._drop(next(iter(self._acks)))

    def unsaid(self) -> list[Ack]:
        """Those to be said now."""
        return [ack for command_id, ack in self._acks.items() if command_id not in self._said]

    def heartbeat(self) -> None:
        """One more heartbeat was sent."""
        self._num_heartbeats += 1

    def reply(self) -> None:
        """One more heartbeat was answered."""
        self._num_replies += 1
        for command_id in [each for each, number in self._said.items() if number < self._num_replies]:
            self._drop(command_id)

    def start_over(self) -> None:
        """The connection is a new one: whatever was not read is lost with the old."""
        self._said.clear()
        self._num_heartbeats = self._num_replies = 0

    def _drop(self, command_id: str) -> None:
        self._acks.pop(command_id, None)
        self._said.pop(command_id, None)
