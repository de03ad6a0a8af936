"""Snapshot schedule: dense in warm-up and on the monitor's request, sparse otherwise, within a measured budget."""

from __future__ import annotations

import math

from koopmon.agent.control.state import ControlState
from koopmon.agent.stats import AgentStats
from koopmon.config import CadenceConfig

_LEAST_CAPACITY_SECONDS = 0.1
RESERVE = 0.5
"""Share of the initial credit that is left to the snapshots that the monitor requests.

In a long run the calm cadence uses all that is earned. Without it nothing would be left for a closer look at a risk.
"""
_EMPTY = range(0)
LAST = 1 << 62
"""A step that never comes."""


class OverheadBudget:
    """Two token buckets: seconds that snapshots use in this process, as a share of the step time, and bytes sent.

    Spending may overdraw a bucket, because the cost of a snapshot is known only afterwards. An overdrawn bucket affords
    nothing until it has filled again. A part of the first bucket is kept for the snapshots that the monitor requests.
    """

    def __init__(self, config: CadenceConfig) -> None:
        self._ratio = config.budget_ratio
        self._capacity_seconds = max(config.initial_credit_seconds, _LEAST_CAPACITY_SECONDS)
        self._reserve_seconds = RESERVE * config.initial_credit_seconds
        self._bytes_per_second = config.max_bytes_per_second
        self.credit_seconds = config.initial_credit_seconds
        self.credit_bytes = config.max_bytes_per_second
        self._charged_seconds = 0.0
        self.num_sharers = 1
        """Agents of this process that share the step time and the bytes."""

    def earn(self, elapsed_seconds: float) -> None:
        """Add the credit of a step of `elapsed_seconds`."""
        share = elapsed_seconds / self.num_sharers
        self.credit_seconds = min(self.credit_seconds + self._ratio * share, self._capacity_seconds)
        self.credit_bytes = min(self.credit_bytes + self._bytes_per_second * share, self._bytes_per_second)

    def spend(self, seconds: float, nbytes: int = 0) -> None:
        """Charge `seconds` of this process and `nbytes` sent."""
        self.credit_seconds -= seconds
        self.credit_bytes -= nbytes

    def charge(self, total_seconds: float) -> None:
        """Charge what was added to a running total since the last charge."""
        if total_seconds != self._charged_seconds:
            self.spend(total_seconds - self._charged_seconds)
            self._charged_seconds = total_seconds

    def affords(self, *, requested: bool) -> bool:
        """Return True if both buckets hold credit for another snapshot, which the monitor has requested or not."""
        least = 0.0 if requested else self._reserve_seconds
        return self.credit_seconds > least and self.credit_bytes > 0.0


class SnapshotSchedule:
    """Plans snapshots, in optimizer steps. A snapshot that is due but not affordable is counted as dropped."""

    def __init__(self, config: CadenceConfig, budget: OverheadBudget, stats: AgentStats) -> None:
        self._config = config
        self._budget = budget
        self._stats = stats
        self._last: int | None = None
        """The last snapshot that was due."""
        self._last_taken: int | None = None

    def stride(self, step: int, state: ControlState) -> int:
        """Return the steps between snapshots at `step`: the schedule's, or the monitor's request if that is denser.

        It is a multiple of that which is not less than what the monitor can judge.
        """
        config = self._config
        every = config.dense_every if step < config.warmup_steps else config.calm_every
        if _is_requested(step, state):
            every = min(every, max(state.cadence_steps, config.dense_every))
        return every * math.ceil(self._stats.stride_limit.at(step) / every)

    def steps_since(self, step: int) -> int:
        """Return the number of steps since the last snapshot that was planned and affordable; 0 before the first one.

        It is negative if that snapshot is still to come.
        """
        return 0 if self._last_taken is None else step - self._last_taken

    def next_change(self, step: int, state: ControlState) -> int:
        """Return the first step after `step` from which on the interval may be another one, or `LAST` for none."""
        known = (self._config.warmup_steps, state.cadence_until_step + 1, self._stats.stride_limit.from_step)
        return min((each for each in known if each > step), default=LAST)

    def next_due(self, step: int, state: ControlState) -> int:
        """Return the first step after `step` for which `plan` may return a snapshot."""
        following = step + 1
        due = following if self._last is None else self._last + self.stride(following, state)
        return max(following, min(due, self.next_change(following, state)))

    def plan(self, first: int, last: int, state: ControlState) -> range:
        """Return the snapshot steps within first..last."""
        stride = self.stride(first, state)
        due = range(first if self._last is None else max(first, self._last + stride), last + 1, stride)
        if not due:
            return _EMPTY
        self._last = due[-1]
        return due if self._affords(due, state) else _EMPTY

    def unagreed(self, step: int, state: ControlState) -> bool:
        """Return True if `step` is a snapshot while no exchange connects the ranks.

        All ranks find the same steps due, because they depend on `step` and on values that are equal on all ranks. If
        a rank does not know the monitor's limit yet, the steps of the others are among its own.
        """
        if step % self.stride(step, state):
            return False
        self._last = step
        return self._affords(range(step, step + 1), state)

    def _affords(self, due: range, state: ControlState) -> bool:
        if not self._budget.affords(requested=_is_requested(due[0], state)):
            self._stats.drop("budget", len(due))
            return False
        self._last_taken = due[-1]
        return True


def _is_requested(step: int, state: ControlState) -> bool:
    """Return True if the monitor requests snapshots at `step`."""
    return bool(state.cadence_steps) and step <= state.cadence_until_step
