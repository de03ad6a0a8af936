"""Steps in which the agent has no work at all: no snapshot, no action in force, no exchange between the ranks.

The hooks of the optimizer only count such a step. It is known at the step edge before how many of them follow, because
all work is planned in advance. A command, a change of the cadence, another optimizer or a failure ends them early.
"""

from __future__ import annotations

import time
from collections.abc import Sized
from typing import Any

from torch.optim import Optimizer

from koopmon.agent.capture.training_forwards import TrainingForwards
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.step_clock import StepClock
from koopmon.agent.lifecycle import LifeCycle, RankedState
from koopmon.agent.stats import AgentStats

MIN_STEPS = 2
"""Fewer quiet steps in a row are not worth the change of the hooks."""


class QuietSteps:
    """The quiet steps of a training with one optimizer. `on` is True until the last of them has ended."""

    def __init__(
        self,
        clock: StepClock,
        stats: AgentStats,
        optimizers: OptimizerSet,
        forwards: TrainingForwards,
        lifecycle: LifeCycle,
    ) -> None:
        self.on = False
        self._clock = clock
        self._stats = stats
        self._optimizers = optimizers
        self._rate = stats.measured["learning_rate"]
        self._forwards = forwards
        self._lifecycle = lifecycle
        self._requests: Sized = lifecycle.requests
        self._state = lifecycle.state
        self._limit = stats.stride_limit
        self._last_step = 0
        self._last_rate: Any = None
        self._counted = 0
        """The id of the optimizer whose call was counted last."""
        self._can_count = True
        """False once an update came without a new gradient: only the forwards show the steps of such a loop."""

    def begin(self, optimizer: Optimizer, next_step: int) -> None:
        """Begin quiet steps. The step edge `next_step` is the next one with work. `optimizer` is the only one."""
        if next_step - self._stats.step > MIN_STEPS and self._can_count and not self._requests:
            self._state, self._limit = self._lifecycle.state, self._stats.stride_limit
            self._last_step, self._last_rate = next_step - 1, None
            self._calls = self._clock.calls_of(optimizer)
            self.on = True
            self._forwards.rest(has_ranks=isinstance(self._state, RankedState) and self._state.rank.world.size > 1)

    def end(self) -> None:
        """End the quiet steps. The hooks see the forwards again."""
        self.on = False
        self._forwards.listen()

    def last(self, args: Any, kwargs: Any) -> bool:
        """Return True if the call `optimizer.step(*args[1:], **kwargs)` needs no work before it."""
        if (
            self._requests
            or kwargs
            or len(args) > 1
            or self._lifecycle.state is not self._state
            or self._stats.stride_limit is not self._limit
        ):
            return False
        rate = self._optimizers.largest_rate()
        if rate != self._last_rate or type(rate) is not float:
            self._rate.put(rate)
            self._last_rate = rate
        return True

    def has_counted(self, optimizer: Optimizer) -> bool:
        """Return True once for each call of `optimizer` that was counted: its hooks are in place."""
        counted, self._counted = self._counted, 0
        return counted == id(optimizer)

    def count(self, optimizer: Optimizer) -> None:
        """Count the step that ends with this call."""
        started = time.perf_counter()
        if not self._calls.advance(optimizer):
            self._can_count = False
            self.end()
            return
        stats = self._stats
        self._clock.num_steps += 1
        stats.on_step_edge(started)
        if stats.step >= self._last_step:
            self.on = False
        self._forwards.start_step()
        self._counted = id(optimizer)
        stats.hook_seconds += time.perf_counter() - started
