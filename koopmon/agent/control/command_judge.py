"""Judgement of commands: whether one may be applied, within the limits of the agent and of its action."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from koopmon.agent.control.action import Capability, ControlAction, RequestRefusedError, towards
from koopmon.agent.control.rank_group import RankGroup
from koopmon.agent.control.state import ControlState
from koopmon.agent.parallelism import ParallelLayout
from koopmon.config import LimitsConfig
from koopmon.wire.messages import AckOutcome, Command, CommandKind

MAX_REMEMBERED = 4096
"""Command ids kept to recognise repeated commands."""
_END_OF_RUN = 1 << 53


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The outcome of a command at optimizer step `step`, to be acknowledged."""

    command_id: str
    outcome: AckOutcome
    step: int
    detail: str = ""
    permanent: bool = False
    """True if the action can never work in this launch, so that the command would be refused again."""
    kind: CommandKind | None = None
    """The kind of an applied command."""
    reason: str = ""
    """The reason of an applied command."""
    completes: CommandKind | None = None
    """The kind of an action that completes the command at a later step edge."""
    corrects: bool = False
    """True for a correction of what is in force, which prints no line."""


class CommandJudge:
    """Judges commands against their expiry, the limits of their action, and the hourly allowance.

    `group` is the exchange with the other ranks; None if this process trains alone.
    """

    def __init__(
        self,
        actions: Mapping[CommandKind, ControlAction],
        limits: LimitsConfig,
        layout: ParallelLayout,
        group: RankGroup | None,
    ) -> None:
        self._actions = actions
        self._limits = limits
        self._layout = layout
        self._group = group
        self._remembered: dict[str, None] = {}
        """Ids of commands that were applied, oldest first."""
        self._action_times: deque[float] = deque()

    def judge(self, command: Command, state: ControlState, step: int) -> tuple[ControlState | None, CommandResult]:
        """Return the state after `command`, None if it must not be applied, and its outcome."""

        def rejected(
            outcome: AckOutcome, detail: str = "", *, permanent: bool = False
        ) -> tuple[ControlState | None, CommandResult]:
            return None, CommandResult(command.id, outcome, step, detail, permanent)

        if command.id in self._remembered:
            return rejected("duplicate")
        if step > command.expires_step:
            return rejected("expired", f"not to be applied after step {command.expires_step}")
        detail, completes, corrects = "", None, False
        if command.kind == "set_cadence":
            until = _END_OF_RUN if command.cadence_until_step is None else command.cadence_until_step
            state = state.changed(cadence_steps=command.cadence_steps, cadence_until_step=until)
        else:
            action = self._actions[command.kind]
            try:
                target = action.target(command, state, step)
            except RequestRefusedError as error:
                return rejected("refused", str(error))
            detail, completes = target.detail, action.kind if action.completes_at_edge else None
            corrects = target.corrects
            if target.acts:
                capability = self.capability(action)
                if not capability.acts:
                    return rejected("refused", capability.reason, permanent=True)
                if not target.corrects and not self._may_act():
                    most = self._limits.max_actions_per_hour
                    return rejected("refused", f"{most} actions in the last hour, the most allowed")
            state = towards(state, action, target, step, command.ramp_steps)
        self._remembered[command.id] = None
        if len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        known = {"kind": command.kind, "reason": command.reason, "completes": completes, "corrects": corrects}
        return state, CommandResult(command.id, "applied", step, detail, **known)  # type: ignore[arg-type]

    def forget(self, command_id: str) -> None:
        """Let a command be judged again that was not applied in the end."""
        self._remembered.pop(command_id, None)

    def capability(self, action: ControlAction) -> Capability:
        """Return whether `action` works in this training as the ranks have found it."""
        splits_tokens = self._group is not None and self._group.splits_tokens
        return action.capability(dataclasses.replace(self._layout, splits_tokens=splits_tokens))

    def _may_act(self) -> bool:
        """Use one action of the hourly allowance. Returns False if none is left."""
        now, times = time.monotonic(), self._action_times
        while times and times[0] <= now - 3600.0:
            times.popleft()
        if len(times) >= self._limits.max_actions_per_hour:
            return False
        times.append(now)
        return True
