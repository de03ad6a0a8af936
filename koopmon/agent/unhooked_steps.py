"""Steps of optimizers that call no hooks: a compiled step, or an optimizer that koopmon cannot hook.

The versions of the weights show them: an update in place increments them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch.optim import Optimizer

from koopmon.agent.circuit_breaker import logger
from koopmon.logs import log_for_job

STEPLESS_FORWARDS = 16
"""Training forwards without a step after which changed weights mean that the optimizer calls no hooks."""


class UnhookedSteps:
    """The versions of the weights of `optimizers`, looked at in each training forward."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = optimizers
        self._num_stepless = 0
        """Training forwards before the first step."""
        self._first: list[int] = []
        self._last = 0
        self._last_steps = 0
        """Steps of the clock at the last forward."""

    def check_hooks(self) -> None:
        """Log one line if the weights change, and no attached optimizer has called its hooks."""
        self._num_stepless += 1
        if self._num_stepless == 1:
            self._first = self._versions()
        elif self._num_stepless == STEPLESS_FORWARDS and self._first != self._versions():
            log_for_job(
                logger,
                "no snapshots and no commands: the weights change, but the attached optimizer calls no hooks, as in "
                "torch.compile; compile the model or the loss, and not the optimizer's step",
            )

    def changed(self, num_steps: int) -> bool:
        """Return True if the weights have changed since the last call, and no optimizer has called its hooks.

        `num_steps` are the steps that the hooks have counted.
        """
        before, self._last = self._last, self._sum()
        steps_before, self._last_steps = self._last_steps, num_steps
        return before != self._last and steps_before == num_steps

    def _sum(self) -> int:
        """Return the number of changes in place of all parameters."""
        parameters = (
            each for optimizer in self._optimizers for group in optimizer.param_groups for each in group["params"]
        )
        return sum(each._version for each in parameters if not each.is_inference())

    def _versions(self) -> list[int]:
        """Return the versions of a few parameters."""
        firsts = (next(iter(group["params"]), None) for each in self._optimizers for group in each.param_groups)
        return [each._version for each in itertools.islice(firsts, 8) if each is not None and not each.is_inference()]
