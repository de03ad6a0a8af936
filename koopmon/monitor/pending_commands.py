"""Commands of one run that await an ack of rank 0.

A command is resent until its ack arrives, it expires, or a newer command of its kind replaces it. Settled commands are
kept for a while, because agents repeat acks after a reconnection, and an ack may be forged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from koopmon.wire.messages import Command, CommandKind

RESEND_SECONDS = 1.0
MAX_REPLACED = 64
"""Maximum number of replaced commands of one run that still wait for an ack."""
MAX_SETTLED = 256
"""Maximum number of settled commands of one run that are kept to identify late acks."""


@dataclass(slots=True)
class Pending:
    """A command without an ack. A `replaced` command is not resent, and its ack does not change the policy."""

    command: Command
    offered_at: float
    sent: bool = False
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """Command that matches an ack.

    `first` is True if the command had no ack before, `counts` if no outcome of it was counted before.
    """

    kind: CommandKind
    first: bool
    counts: bool


class PendingCommands:
    """Pending and settled commands by id. Times are seconds of the caller's clock."""

    def __init__(self) -> None:
        self._pending: dict[str, Pending] = {}
        self._settled: OrderedDict[str, tuple[CommandKind, bool]] = OrderedDict()

    def __bool__(self) -> bool:
        """Return True while a command waits for its ack and is resent."""
        return any(not pending.replaced for pending in self._pending.values())

    def __len__(self) -> int:
        """Number of commands without an ack, with the replaced ones."""
        return len(self._pending)

    def add(self, now: float, commands: Iterable[Command]) -> list[Command]:
        """Add the commands of one decision; return the commands that they replace."""
        commands = list(commands)
        kinds = {command.kind for command in commands}
        replaced = [each for each in self._pending.values() if each.command.kind in kinds and not each.replaced]
        for pending in replaced:
            pending.replaced = True
        self._pending |= {command.id: Pending(command, now) for command in commands}
        return [pending.command for pending in replaced]

    def due(self, now: float) -> list[Command]:
        """Return the commands to resend now; each is next due after RESEND_SECONDS."""
        due = [each for each in self._pending.values() if not each.replaced and now - each.offered_at >= RESEND_SECONDS]
        for pending in due:
            pending.offered_at = now
        return [pending.command for pending in due]

    def mark_sent(self, command: Command) -> bool:
        """Note that `command` was sent. Returns True the first time."""
        pending = self._pending.get(command.id)
        first = pending is not None and not pending.sent
        if pending is not None:
            pending.sent = True
        return first

    def acknowledge(self, command_id: str) -> tuple[Answered, Command | None] | None:
        """Settle the command of an ack; None for an unknown id.

        Returns the match, and the command if the ack is about the newest command of its kind.
        """
        pending = self._pending.pop(command_id, None)
        if pending is not None:
            self._settle(pending.command, acked=True)
            newest = None if pending.replaced else pending.command
            return Answered(pending.command.kind, first=True, counts=True), newest
        if command_id not in self._settled:
            return None
        kind, acked = self._settled[command_id]
        self._settled[command_id] = kind, True
        return Answered(kind, first=not acked, counts=False), None

    def expire(self, now: float, step: int) -> list[Pending]:
        """Remove and return the commands whose last step is before `step`, and the oldest replaced ones."""
        replaced = [each.command.id for each in self._pending.values() if each.replaced]
        too_many = replaced[: max(0, len(replaced) - MAX_REPLACED)]
        # The ack may arrive after the heartbeat that carries the step.
        expired = [
            each
            for each in self._pending.values()
            if each.command.id in too_many
            or (step > each.command.expires_step and now - each.offered_at >= RESEND_SECONDS)
        ]
        for pending in expired:
            del self._pending[pending.command.id]
            self._settle(pending.command, acked=False)
        return expired

    def abandon(self) -> list[Command]:
        """Remove and return all pending commands, for example at the end of the run."""
        commands = [pending.command for pending in self._pending.values()]
        for command in commands:
            self._settle(command, acked=False)
        self._pending.clear()
        return commands

    def _settle(self, command: Command, *, acked: bool) -> None:
        self._settled[command.id] = command.kind, acked
        while len(self._settled) > MAX_SETTLED:
            self._settled.popitem(last=False)
