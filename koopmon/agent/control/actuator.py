"""Applies commands on all ranks at one optimizer step.

Rank 0 checks each command against its own caps and computes the resulting state. It sends that state to all ranks in an
exchange that starts after one step and ends before the next. A process that trains alone skips the exchange. All ranks
therefore hold the same pure function of the step.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum

import msgspec

from koopmon.agent.capture.schedule import SnapshotSchedule
from koopmon.agent.control.action import ControlAction, RequestRefusedError, overriding, towards
from koopmon.agent.control.command_judge import CommandJudge, CommandResult
from koopmon.agent.control.rank_group import RankGroup
from koopmon.agent.control.state import ControlState, ControlUpdate
from koopmon.agent.parallelism import ParallelLayout
from koopmon.agent.stats import AgentStats
from koopmon.config import Config
from koopmon.wire.messages import Applied, Command, CommandKind

logger = logging.getLogger("koopmon.agent")

EXCHANGE_SECONDS = 0.05
"""Target interval between two exchanges. A command waits at most this interval and one step.

On a busy machine an exchange costs the ranks a fraction of a millisecond.
"""
MAX_EXCHANGE_STEPS = 100
MAX_CALM_STEPS = 16
"""Longest interval between two exchanges while no snapshot comes, in steps.

A command follows a snapshot. The longer the last one is ago, the less an exchange is urgent: the interval is
CALM_GROWTH times as long.
"""
CALM_GROWTH = 4
MAX_PENDING = 64
"""Commands that may wait for judgement."""


class RampBack(Enum):
    """The request to return to the user's own settings."""

    REQUESTED = 0


Request = Command | Applied | RampBack


class Actuator:
    """Applies the commands that its judge allows, and holds the state in force on this rank.

    `group` is the exchange with the other ranks; None if this process trains alone. `restored` is in force from the
    first step on, and equal on all ranks. `requests` may be filled in any
    thread. `report` receives the outcomes of commands. `keep` is called with the values in force before a command is
    reported as applied. Only `submit` and `ready` are for the I/O thread.
    """

    def __init__(
        self,
        actions: Sequence[ControlAction],
        config: Config,
        stats: AgentStats,
        schedule: SnapshotSchedule,
        *,
        layout: ParallelLayout,
        requests: deque[Request],
        report: Callable[[CommandResult], None],
        keep: Callable[[Applied], None] | None = None,
        group: RankGroup | None = None,
        restored: Applied | None = None,
    ) -> None:
        self.state = ControlState()
        self._actions = {action.kind: action for action in actions}
        self._tuned = overriding(actions, "tuned")
        self._at_edge = [(at_edge.__self__.kind, at_edge) for at_edge in overriding(actions, "at_edge")]
        self._judge = CommandJudge(self._actions, config.limits, layout, group)
        self._ramp_back_steps = config.control.ramp_back_steps
        self._stats = stats
        self._schedule = schedule
        self._requests = requests
        self._report = report
        self._keep = keep
        self._group = group
        self._underway: list[Applied | RampBack | CommandResult] = []
        """Parts of the state in the exchange in flight."""
        self._incomplete: dict[CommandKind, CommandResult] = {}
        """Commands in force that their action completes at a later step edge."""
        self._snapshots = range(0)
        self._agreed_until = -1
        self._renumbered = False
        self._forward_since_launch = False
        """True once a forward has begun since the exchange in flight was launched."""
        if restored is not None:
            self.state = self._restore(restored, self.state, stats.step)
            if group is None or group.leads:
                self._log_restored(stats.step)

    @property
    def ready(self) -> bool:
        """True while commands can be applied."""
        return self._group is None or self._group.ready

    def submit(self, command: Command) -> None:
        """Judge `command` at the next step edge, and report its outcome."""
        step = self._stats.step
        if not self.ready:
            self._report(CommandResult(command.id, "failed", step, "control between the ranks is down"))
        elif len(self._requests) >= MAX_PENDING:
            self._report(CommandResult(command.id, "refused", step, f"{MAX_PENDING} commands are waiting already"))
        else:
            self._requests.append(command)

    def before_step(self, step: int) -> None:
        """Put the pending decision in force, just before optimizer step `step`, counted from 0."""
        group = self._group
        if group is None:
            self.state = self._next_state(step)
            if self._underway:
                self._settle(step, in_force=True)
        elif group.in_flight:
            self._receive(group, step)

    def _receive(self, group: RankGroup, step: int) -> None:
        update = group.receive()
        if update is not None and (flaw := self._flaw(update, step)):
            group.fail(flaw)
            update = None
        if update is None:
            self._agreed_until = -1
        else:
            if update.step != step:
                self._renumber(update.step)
                step = update.step
            self.state = update.state
            self._snapshots, self._agreed_until = update.snapshot_steps(), update.next_step
        self._settle(step, in_force=update is not None)

    def _flaw(self, update: ControlUpdate, step: int) -> str:
        """Return the reason why this rank must not apply `update` at `step`; empty if there is none."""
        if update.step != step and not (self._group is not None and self._group.steps_may_differ):
            return f"rank 0 is at step {update.step}, this rank at step {step}"
        try:
            for action in self._actions.values():
                msgspec.convert(action.applied(update.state, step), Applied)
        except msgspec.ValidationError as error:
            return f"rank 0 sends a state out of bounds: {error}"
        return ""

    def _renumber(self, step: int) -> None:
        """Follow rank 0's count of steps."""
        message = "koopmon: this rank follows rank 0, which has taken %d steps and not %d; commands reach both at once"
        logger.log(logging.DEBUG if self._renumbered else logging.INFO, message, step, self._stats.step)
        self._renumbered = True
        self._stats.step = step
        for action in self._actions.values():
            action.on_renumbered()

    def before_forward(self, step: int) -> None:
        """Take part in the exchanges of the other ranks, before a training forward, while this rank does not step."""
        group = self._group
        if group is None:
            return
        if group.in_flight:
            if not self._forward_since_launch:
                self._forward_since_launch = True
                return
            self._receive(group, step)  # the other ranks may go on to the next exchange
        if group.is_overdue(step):
            group.launch(self._exchange(step) if group.leads else None)
            self._forward_since_launch = True

    def after_step(self, step: int) -> bool:
        """Plan the work after `step` optimizer steps. Returns True if the next training forward is a snapshot."""
        self._complete(step)
        group = self._group
        if group is None:
            return step in self._schedule.plan(step, step, self.state)
        if group.is_due(step):
            group.launch(self._exchange(step) if group.leads else None)
            self._forward_since_launch = False
        if step <= self._agreed_until:
            return step in self._snapshots
        return self._schedule.unagreed(step, self.state)

    def next_work(self, step: int) -> int:
        """Return the first step after `step` with work in `before_step` or `after_step`, if no request comes."""
        if self._incomplete or self._underway or self._requests:
            return step + 1
        following = min(action.next_work(self.state, step) for action in self._actions.values())
        if self._group is None:
            return min(following, self._schedule.next_due(step, self.state))
        exchange = self._group.next_exchange
        if exchange is None or exchange > self._agreed_until:
            return step + 1
        return min(following, exchange, *(each for each in self._snapshots if each > step))

    def _complete(self, step: int) -> None:
        for kind, at_edge in self._at_edge:
            done = at_edge(self.state, step, self._agree)
            if done is None or (result := self._incomplete.pop(kind, None)) is None:
                continue
            # The last update with the values in force has the number `step` - 1.
            outcome = {"outcome": done.outcome, "detail": done.detail, "permanent": done.permanent}
            self._report(dataclasses.replace(result, step=max(result.step, step - 1), **outcome))

    def _agree(self, value: bool) -> bool:
        return value if self._group is None else self._group.agree(value)

    def _exchange(self, step: int) -> ControlUpdate:
        state = self._next_state(step)
        seconds = self._stats.step_seconds or EXCHANGE_SECONDS
        usual = min(math.ceil(EXCHANGE_SECONDS / seconds), MAX_EXCHANGE_STEPS)
        calm = min(CALM_GROWTH * self._schedule.steps_since(step), MAX_CALM_STEPS)
        soon = self._schedule.next_due(step, state) - step + usual  # after the next snapshot
        following = step + max(usual, min(calm, soon))
        planned = self._schedule.plan(step + 1, following, state)
        return ControlUpdate(
            step=step, state=state, snapshots=(planned.start, planned.stop - 1, planned.step), next_step=following
        )

    def _next_state(self, step: int) -> ControlState:
        """Return the state that the pending requests lead to, if it comes in force at `step`."""
        state = self.state
        for tuned in self._tuned:
            state = tuned(state)
        while self._requests:
            request = self._requests.popleft()
            match request:
                case Command():
                    state = self._apply_command(request, state, step)
                case Applied() if state.version == 0:  # a command since the start is newer than what is restored
                    self._underway.append(request)
                    state = self._restore(request, state, step)
                case RampBack():
                    state = self._apply_ramp_back(request, state, step)
        return state

    def _apply_command(self, command: Command, state: ControlState, step: int) -> ControlState:
        following, result = self._judge.judge(command, state, step)
        known = (*self._underway, *self._incomplete.values())
        same = [each for each in known if isinstance(each, CommandResult) and each.command_id == command.id]
        if any(each.completes is not None for each in same):
            return state  # the outcome comes at a later edge, and the monitor takes the first answer
        underway = bool(same)
        # The outcome of a repetition must not precede that of the first command.
        if following is None and not underway:
            self._report(result)
        else:
            self._underway.append(result)
        return state if following is None else following

    def _restore(self, applied: Applied, state: ControlState, step: int) -> ControlState:
        for action in self._actions.values():
            try:
                target = action.target(applied, state, step)
            except RequestRefusedError as error:
                logger.warning("koopmon: a value of the earlier launch is not restored: %s", error)
                continue
            if not self._judge.capability(action).acts:
                target = dataclasses.replace(target, strength=action.neutral)
            state = towards(state, action, target, step, num_steps=0)
        return state

    def _apply_ramp_back(self, request: RampBack, state: ControlState, step: int) -> ControlState:
        self._underway.append(request)
        for action in self._actions.values():
            start = action.effective(state, step - 1)
            state = towards(state, action, action.released(state), step, self._ramp_back_steps, start=start)
        return state

    def _settle(self, step: int, *, in_force: bool) -> None:
        """Report the requests underway. Their state is in force on all ranks, or on none."""
        underway, self._underway = self._underway, []
        if in_force and underway and self._keep is not None:
            # A kill may follow the report at once. The next launch must not begin with older values than it says.
            self._keep(self._applied(step))
        for each in underway:
            if isinstance(each, CommandResult):
                if not in_force:
                    self._judge.forget(each.command_id)  # the monitor may try it again
                    each = dataclasses.replace(each, outcome="failed", detail="the exchange between the ranks failed")
                each = dataclasses.replace(each, step=step)
                if in_force and each.completes is not None:
                    if (before := self._incomplete.get(each.completes)) is not None:
                        self._report(
                            dataclasses.replace(before, outcome="failed", detail="a later command replaced it")
                        )
                    self._incomplete[each.completes] = each
                else:
                    self._report(each)
            elif not in_force:
                self._requests.append(each)
            elif isinstance(each, Applied):
                self._log_restored(step)
            else:
                logger.warning(
                    "koopmon: the monitor is lost: the settings return to the user's own in %d steps",
                    self._ramp_back_steps,
                )

    def _applied(self, step: int) -> Applied:
        values = {
            name: value for action in self._actions.values() for name, value in action.applied(self.state, step).items()
        }
        return Applied(**values)

    def _log_restored(self, step: int) -> None:
        applied = self._applied(step)
        parts = [f"learning rate x {applied.lr_scale:.3g}"] if applied.lr_scale != 1.0 else []
        parts += [f"peak rate at most {applied.max_rate:.3g}"] if applied.max_rate is not None else []
        parts += (
            [f"parameter groups with a bound on their rate: {bound}"] if (bound := len(applied.rate_shares)) else []
        )
        parts += [f"KSS weight {applied.kss.alpha:.3g}"] if applied.kss.alpha else []
        if parts:
            logger.warning("koopmon: in force again, as when the launch before was killed: %s", ", ".join(parts))
