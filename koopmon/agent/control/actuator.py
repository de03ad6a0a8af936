"""From commands to one and the same change on all ranks at one optimizer step.

Rank 0 judges each command against its own caps, works out the state that it leads to, and hands that state to all ranks
in an exchange that is launched after one step and received before the next; a process that trains alone skips the
exchange. What every rank holds is therefore the same pure function of the step. Nothing here ever asks for more than
the user's own settings: a learning-rate scale of at most 1, a KSS weight that goes back to 0.
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
"""Aimed at between two exchanges: so long and one step, at most, does a command wait to be applied..."""
SHORT_STEP_SECONDS = 0.25
"""...but no two exchanges follow each other where a step is shorter than this: on a busy machine an exchange costs
the ranks a fraction of a millisecond.
"""
MAX_EXCHANGE_STEPS = 100
MAX_PENDING = 64
"""Commands that may wait to be judged."""
MAX_REMEMBERED = 4096
"""Ids by which repeated commands are recognised."""


class _Request(Enum):
    RAMP_BACK = "go back to the user's own settings"


class Actuator:
    """What is in force on this rank.

    `rank0` judges commands; a process that trains `alone` needs no exchange; `report` takes outcomes, to be
    acknowledged.
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
        """False: watch-only, every command is refused."""
        self.shielded = ""
        """Why KSS must not act on this model; empty where its structure allows it."""
        self.group: RankGroup | None = None
        """Reaches the other ranks, where there are any and this agent acts."""
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
        """What the state in the exchange in flight was made of."""
        self._remembered: dict[str, None] = {}
        self._action_times: deque[float] = deque()
        self._snapshots = range(0)
        self._agreed_until = -1

    # From the sender's thread.

    @property
    def ready(self) -> bool:
        """Whether commands can be applied."""
        return self.acts and (self._alone or (self.group is not None and self.group.ready))

    @property
    def kss_refusal(self) -> str:
        """Why KSS must not act; empty where it may."""
        if self.group is not None and self.group.splits_tokens:
            return "KSS is refused: ranks that share one model hold different tokens of its data"
        return self.shielded

    def applied(self) -> Applied:
        """What is in force."""
        return self.state.applied(self._stats.step)

    def submit(self, command: Command) -> None:
        """Judge `command` at the next step edge; its outcome is reported."""
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
        """Put in force what an earlier incarnation of the run had."""
        self._pending.append(applied)

    def monitor_lost(self) -> None:
        """Go back to the user's own settings, if the configuration says so."""
        if self._control.on_monitor_lost == "ramp":
            self._pending.append(_Request.RAMP_BACK)

    # From the training thread.

    def before_step(self, step: int) -> None:
        """Optimizer step `step`, counted from 0, is about to run: what was decided comes in force."""
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
        """`step` optimizer steps are done. Returns whether the first training forward from here on is a snapshot."""
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
        """The state that what is pending leads to, if it comes in force at `step`."""
        state = self.state
        while self._pending:
            request = self._pending.popleft()
            if isinstance(request, Command):
                judged, outcome = self._judge(request, state, step)
                state = judged or state
                # A repetition is not answered before what it repeats.
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
        """The state that was underway is in force on all ranks, or on none."""
        underway, self._underway = self._underway, []
        for each in underway:
            if isinstance(each, CommandResult):
                if not in_force:
                    self._remembered.pop(each.command_id, None)  # it may be tried again
                    each = dataclasses.replace(each, outcome="failed", detail="the exchange between the ranks failed")
                self._report(dataclasses.replace(each, step=step))
            elif not in_force:
                self._pending.append(each)

    def _judge(self, command: Command, state: ControlState, step: int) -> tuple[ControlState | None, CommandResult]:
        """The state after `command`, None when it is not to be applied, and its outcome."""
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
        """Take one action out of the hour's allowance, if there is one left."""
        now, times = time.monotonic(), self._action_times
        while times and times[0] <= now - 3600.0:
            times.popleft()
        if len(times) >= self._limits.max_actions_per_hour:
            return False
        times.append(now)
        return True


def _is_action(command: Command) -> bool:
    """Whether a command counts against the hour's allowance: going back to the user's own settings always may."""
    if command.kind == "set_lr_scale":
        return command.lr_scale != 1.0
    return command.kind == "set_kss" and command.kss is not None and command.kss.alpha > 0.0
