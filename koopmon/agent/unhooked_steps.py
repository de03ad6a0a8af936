"""Steps of optimizers that call no hooks: a compiled step, or an optimizer that koopmon cannot hook.

The versions of the weights show them: an update in place increments them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from koopmon.agent.circuit_breaker import logger
from koopmon.logs import log_for_job

STEPLESS_FORWARDS = 16
"""Training forwards without a step after which changed weights mean that no attached optimizer updates them."""
NUM_LOOKED_AT = 8
"""Weights whose versions are compared."""


class UnhookedSteps:
    """The versions of the weights of `model` and `optimizers`, looked at in training forwards."""

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._model = weakref.ref(model)
        self._optimizers = optimizers
        self._num_stepless = 0
        """Training forwards since the last step."""
        self._was_told = False
        self._weights: list[weakref.ref[Tensor]] = []
        self._ended: list[int | None] = []
        """Their versions at the end of the last forward: a forward may write weights itself, as normalised ones."""
        self._has_changed = False
        """True if they have changed between two forwards since the last step."""
        self._last = 0
        self._last_steps = 0
        """Steps of the clock at the last forward."""

    def check_hooks(self, num_steps: int) -> None:
        """Log one line if the weights change, and no attached optimizer calls its hooks.

        `num_steps` are the steps that the hooks have counted.
        """
        if self._was_told:
            return
        if num_steps != self._last_steps:
            self._num_stepless, self._last_steps, self._has_changed = 0, num_steps, False
        self._num_stepless += 1
        if not 1 < self._num_stepless <= STEPLESS_FORWARDS:  # most steps have one forward
            return
        before, self._ended = self._ended, self._versions()
        self._has_changed |= self._num_stepless > 2 and before != self._ended
        if self._num_stepless == STEPLESS_FORWARDS and self._has_changed:
            self._was_told = True
            log_for_job(
                logger,
                "no snapshots and no commands: the weights change, but no attached optimizer steps; attach the one "
                "that does; a step inside torch.compile calls no hooks: compile the model or the loss instead",
            )

    def forward_ended(self) -> None:
        """Note the end of the forward that `check_hooks` has seen begin."""
        if 1 < self._num_stepless < STEPLESS_FORWARDS and not self._was_told:
            self._ended = self._versions(look=False)

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

    def _versions(self, *, look: bool = True) -> list[int | None]:
        """Return the versions of a few weights that train; None for one that is gone."""
        model = self._model()
        if look and model is not None and self._num_stepless == 2:
            trained = (each for each in model.parameters() if each.requires_grad and not each.is_inference())
            self._weights = [weakref.ref(each) for each in itertools.islice(trained, NUM_LOOKED_AT)]
        return [None if (each := weight()) is None else each._version for weight in self._weights]
