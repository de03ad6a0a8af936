"""Applies commands on all ranks at one optimizer step.

Rank 0 checks each command against its own caps and computes the resulting state. It sends that state to all ranks in an
exchange that starts after one step and ends before the next. A process that trains alone skips the exchange. All ranks
therefore hold the same pure function of the step. No state goes beyond the user's own settings: the learning-rate scale
is at most 1, and the KSS weight returns to 0.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable
from enum import Enum

import msgspec

from koopmon.agent.capture.schedule import OverheadBudget, SnapshotSchedule
from koopmon.agent.comms.control_channel import CommandResult
from koopmon.agent.control.rank_group import RankGroup
from koopmon.agent.control.state import ControlState, ControlUpdate
from koopmon.agent.stats import AgentStats
from koopmon.config import Config
from koopmon.wire.messages import Applied, Command, KssSettings

EXCHANGE_SECONDS = 0.1
"""Target interval between two exchanges. A command waits at most this interval and one step."""
SHORT_STEP_SECONDS = 0.25
"""Steps shorter than this have no exchange in two consecutive steps.

On a busy machine an exchange costs the ranks a fraction of a millisecond.
"""
MAX_EXCHANGE_STEPS = 100
MAX_PENDING = 64
"""Commands that may wait for judgement."""
MAX_REMEMBERED = 4096
"""Command ids kept to recognise repeated commands."""


class _Request(Enum):
    RAMP_BACK = "go back to the user's own settings"


class Actuator:
    """The values in force on this rank.

    `rank0`: judges commands. `alone`: the process needs no exchange. `report` receives outcomes, to be acknowledged.
    """

    def __init__(
        self,
        config: Config,
        stats: AgentStats,
        budget: OverheadBudget,
        *,
        rank0: bool,
        alone: bool,
        report: Callable[[CommandResult], None],
    ) -> None:
        self.state = ControlState()
        self.acts = False
        """False in watch-only mode: every command is refused."""
        self.shielded = ""
        """The reason against KSS on this model; empty if its structure allows KSS."""
        self.group: RankGroup | None = None
        """The exchange with the other ranks, if there are any and this agent acts."""
        self._limits = config.limits
        self._control = config.control
        self._stats = stats
        self._budget = budget
        self._cadence = SnapshotSchedule(config.cadence)
        self._rank0 = rank0
        self._alone = alone
        self._report = report
        self._pending: deque[Command | Applied | _Request] = deque()
        self._underway: list[Applied | _Request | CommandResult] = []
        """Parts of the state in the exchange in flight."""
        self._remembered: dict[str, None] = {}
        self._action_times: deque[float] = deque()
        self._snapshots = range(0)
        self._agreed_until = -1

    # Called in the sender's thread.

    @property
    def ready(self) -> bool:
        """True while commands can be applied."""
        return self.acts and (self._alone or (self.group is not None and self.group.ready))

    @property
    def kss_refusal(self) -> str:
        """The reason against KSS; empty if KSS is allowed."""
        if self.group is not None and self.group.splits_tokens:
            return "KSS is refused: ranks that share one model hold different tokens of its data"
        return self.shielded

    def applied(self) -> Applied:
        """Return the values in force."""
        return self.state.applied(self._stats.step)

    def submit(self, command: Command) -> None:
        """Judge `command` at the next step edge, and report its outcome."""
        step = self._stats.step
        if not self.acts:
            self._report(CommandResult(command.id, "refused", step, "this agent is watch-only"))
        elif not self.ready:
            self._report(CommandResult(command.id, "failed", step, "control between the ranks is down"))
        elif len(self._pending) >= MAX_PENDING:
            self._report(CommandResult(command.id, "refused", step, f"{MAX_PENDING} commands are waiting already"))
        else:
            self._pending.append(command)

    def restore(self, applied: Applied) -> None:
        """Put in force the values of an earlier incarnation of the run."""
        self._pending.append(applied)

    def monitor_lost(self) -> None:
        """Return to the user's own settings, if the configuration requests it."""
        if self._control.on_monitor_lost == "ramp":
            self._pending.append(_Request.RAMP_BACK)

    # Called in the training thread.

    def before_step(self, step: int) -> None:
        """Put the pending decision in force, just before optimizer step `step`, counted from 0."""
        if self._alone:
            if self._pending:
                self.state = self._next_state(step)
                self._settle(step, in_force=True)
        elif self.group is not None and self.group.in_flight:
            exchange = self.group.receive()
            if exchange is not None and exchange.step != step:
                self.group.fail(f"rank 0 is at step {exchange.step}, this rank at step {step}")
                exchange = None
            if exchange is None:
                self._agreed_until = -1
            else:
                self.state = exchange.state
                self._snapshots, self._agreed_until = exchange.snapshot_steps(), exchange.next_step
            self._settle(step, in_force=exchange is not None)

    def after_step(self, step: int) -> bool:
        """Plan the work after `step` optimizer steps. Returns True if the next training forward is a snapshot."""
        if self._alone:
            return step in self._plan(step, step, self.state)
        if self.group is not None and self.group.is_due(step):
            self.group.launch(self._exchange(step) if self._rank0 else None)
        if step <= self._agreed_until:
            return step in self._snapshots
        if not self._cadence.unagreed(step, self.state):
            return False
        if not self._budget.affords:
            self._stats.drop("budget")
            return False
        return True

    def _plan(self, first: int, last: int, state: ControlState) -> range:
        planned, skipped = self._cadence.plan(first, last, state, self._budget.affords)
        if skipped:
            self._stats.drop("budget", skipped)
        return planned

    def _exchange(self, step: int) -> ControlUpdate:
        state = self._next_state(step)
        seconds = self._stats.step_seconds or EXCHANGE_SECONDS
        least = 2 if seconds < SHORT_STEP_SECONDS else 1
        following = step + min(max(least, math.ceil(EXCHANGE_SECONDS / seconds)), MAX_EXCHANGE_STEPS)
        planned = self._plan(step + 1, following, state)
        return ControlUpdate(
            step=step, state=state, snapshots=(planned.start, planned.stop - 1, planned.step), next_step=following
        )

    def _next_state(self, step: int) -> ControlState:
        """Return the state that the pending requests lead to, if it comes in force at `step`."""
        state = self.state
        while self._pending:
            request = self._pending.popleft()
            if isinstance(request, Command):
                judged, outcome = self._judge(request, state, step)
                state = judged or state
                # The outcome of a repetition must not precede that of the first command.
                if judged is None and not self._is_underway(request):
                    self._report(outcome)
                else:
                    self._underway.append(outcome)
            elif isinstance(request, Applied):
                if self.acts and state.version == 0:
                    lr_scale, kss = max(request.lr_scale, self._limits.min_lr_scale), self._capped(request.kss)
                    if self.kss_refusal:
                        kss = msgspec.structs.replace(kss, alpha=0.0)
                    state = state.towards(step, 0, lr_scale=lr_scale, kss=kss)
                self._underway.append(request)
            else:
                own = msgspec.structs.replace(state.kss, alpha=0.0)
                state = state.towards(step, self._control.ramp_back_steps, lr_scale=1.0, kss=own)
                self._underway.append(request)
        return state

    def _is_underway(self, command: Command) -> bool:
        return any(isinstance(each, CommandResult) and each.command_id == command.id for each in self._underway)

    def _settle(self, step: int, *, in_force: bool) -> None:
        """Report the requests underway. Their state is in force on all ranks, or on none."""
        underway, self._underway = self._underway, []
        for each in underway:
            if isinstance(each, CommandResult):
                if not in_force:
                    self._remembered.pop(each.command_id, None)  # the monitor may try it again
                    each = dataclasses.replace(each, outcome="failed", detail="the exchange between the ranks failed")
                self._report(dataclasses.replace(each, step=step))
            elif not in_force:
                self._pending.append(each)

    def _judge(self, command: Command, state: ControlState, step: int) -> tuple[ControlState | None, CommandResult]:
        """Return the state after `command`, None if it must not be applied, and its outcome."""
        if command.id in self._remembered:
            return None, CommandResult(command.id, "duplicate", step)
        if step > command.expires_step:
            return None, CommandResult(
                command.id, "expired", step, f"not to be applied after step {command.expires_step}"
            )
        if self.kss_refusal and command.kss is not None and command.kss.alpha > 0.0:
            return None, CommandResult(command.id, "refused", step, self.kss_refusal, shielded=True)
        detail = ""
        if command.lr_scale is not None and command.lr_scale < self._limits.min_lr_scale:
            command = msgspec.structs.replace(command, lr_scale=self._limits.min_lr_scale)
            detail = f"lr_scale capped at {command.lr_scale}"
        if command.kss is not None and (kss := self._capped(command.kss)) != command.kss:
            less = [f for f in kss.__struct_fields__ if getattr(kss, f) != getattr(command.kss, f)]
            detail = ", ".join(f"{field} capped at {getattr(kss, field)}" for field in less)
            command = msgspec.structs.replace(command, kss=kss)
        if _is_action(command) and not self._may_act():
            most = self._limits.max_actions_per_hour
            return None, CommandResult(
                command.id, "refused", step, f"{most} actions in the last hour, the most allowed"
            )
        self._remembered[command.id] = None
        if len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        return state.after(command, step), CommandResult(command.id, "applied", step, detail)

    def _capped(self, kss: KssSettings) -> KssSettings:
        limits = self._limits
        return msgspec.structs.replace(
            kss,
            alpha=min(kss.alpha, limits.max_kss_alpha),
            svd_rank=min(kss.svd_rank, limits.max_kss_svd_rank),
            num_samples=min(kss.num_samples, limits.max_kss_samples),
        )

    def _may_act(self) -> bool:
        """Use one action of the hourly allowance. Returns False if none is left."""
        now, times = time.monotonic(), self._action_times
        while times and times[0] <= now - 3600.0:
            times.popleft()
        if len(times) >= self._limits.max_actions_per_hour:
            return False
        times.append(now)
        return True


def _is_action(command: Command) -> bool:
    """Return True if `command` counts against the hourly allowance.

    A return to the user's own settings never counts.
    """
    if command.kind == "set_lr_scale":
        return command.lr_scale != 1.0
    return command.kind == "set_kss" and command.kss is not None and command.kss.alpha > 0.0
