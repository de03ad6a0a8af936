"""When to take a snapshot: dense in warm-up and where the monitor asks, sparse when calm, within a measured budget."""

from __future__ import annotations

from koopmon.agent.control.state import ControlState
from koopmon.config import CadenceConfig

_LEAST_CAPACITY_SECONDS = 0.1
_EMPTY = range(0)


class OverheadBudget:
    """Two token buckets: seconds that snapshots take in the training thread, a share of its step time; and bytes sent.

    What is spent may overdraw a bucket, since one snapshot's cost is known only afterwards; nothing more is afforded
    then until it has filled again.
    """

    def __init__(self, config: CadenceConfig) -> None:
        self._ratio = config.budget_ratio
        self._capacity_seconds = max(config.initial_credit_seconds, _LEAST_CAPACITY_SECONDS)
        self._bytes_per_second = config.max_bytes_per_second
        self.credit_seconds = config.initial_credit_seconds
        self.credit_bytes = config.max_bytes_per_second

    def earn(self, elapsed_seconds: float) -> None:
        """A step took so long."""
        self.credit_seconds = min(self.credit_seconds + self._ratio * elapsed_seconds, self._capacity_seconds)
        self.credit_bytes = min(self.credit_bytes + self._bytes_per_second * elapsed_seconds, self._bytes_per_second)

    def spend(self, seconds: float, nbytes: int = 0) -> None:
        """The hooks took so long in the training thread; so many bytes were handed to the sender."""
        self.credit_seconds -= seconds
        self.credit_bytes -= nbytes

    @property
    def affords(self) -> bool:
        """Whether another snapshot may be taken."""
        return self.credit_seconds > 0.0 and self.credit_bytes > 0.0


class SnapshotSchedule:
    """Plans snapshots, in optimizer steps."""

    def __init__(self, config: CadenceConfig) -> None:
        self._config = config
        self._last: int | None = None

    def stride(self, step: int, state: ControlState) -> int:
        """Steps between snapshots at `step`: what the schedule says, or the monitor asks if that is denser."""
        config = self._config
        every = config.dense_every if step < config.warmup_steps else config.calm_every
        if state.cadence_steps and step <= state.cadence_until_step:
            every = min(every, max(state.cadence_steps, config.dense_every))
        return every

    def plan(self, first: int, last: int, state: ControlState, affords: bool) -> tuple[range, int]:
        """The snapshot steps within first..last, and how many were due and could not be afforded."""
        stride = self.stride(first, state)
        due = range(first if self._last is None else max(first, self._last + stride), last + 1, stride)
        if not due:
            return _EMPTY, 0
        self._last = due[-1]
        return (due, 0) if affords else (_EMPTY, len(due))

    def unagreed(self, step: int, state: ControlState) -> bool:
        """Whether `step` is a snapshot when ranks cannot ask each other: a pure function of what they all hold."""
        taken = step % self.stride(step, state) == 0
        if taken:
            self._last = step
        return taken
