"""The state in force in the training processes: one value that every rank holds, a pure function of the step."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from koopmon.wire.messages import Step


class Ramp(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A value that moves from `start` to `target` in `num_steps` optimizer steps. The first of them is `first_step`."""

    first_step: int = 0
    start: float = 0.0
    target: float = 0.0
    num_steps: int = 0

    def _fraction(self, step: int) -> float:
        if step < self.first_step:
            return 0.0
        done = step - self.first_step + 1
        return 1.0 if done >= self.num_steps else done / self.num_steps

    def linear(self, step: int) -> float:
        """Return the value at `step`. It is exactly `target` from the last step of the ramp on."""
        fraction = self._fraction(step)
        return self.target if fraction == 1.0 else self.start + (self.target - self.start) * fraction

    def geometric(self, step: int) -> float:
        """Return the value at `step` if equal steps multiply by equal factors. Both ends must be positive."""
        fraction = self._fraction(step)
        return self.target if fraction == 1.0 else float(self.start * (self.target / self.start) ** fraction)


class ActionState(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One action's part of the state: a strength that moves along a ramp, and parameters that switch at once."""

    ramp: Ramp
    parameters: dict[str, int | float] = {}


class ControlState(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """All values that commands can change. Equal on all ranks at every step. `version` counts the changes."""

    version: int = 0
    actions: dict[str, ActionState] = {}
    """Keys are kinds of commands. An action that is absent leaves the user's own values."""
    cadence_steps: int = 0
    """The interval that the monitor requested; 0 for none."""
    cadence_until_step: int = -1

    def changed(self, **fields: object) -> ControlState:
        """Return a state of the next version with these fields."""
        return msgspec.structs.replace(self, version=self.version + 1, **fields)


class ControlUpdate(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Rank 0's message to all ranks at one step edge: launched after step `step`, in force from the next one on."""

    step: Step
    state: ControlState
    snapshots: tuple[int, int, int]
    """First, last and stride of the steps with a snapshot in their forward pass, until the next exchange."""
    next_step: Annotated[int, Meta(ge=1)]
    """The step after which the next exchange takes place."""
    next_count: int = 0
    """The number of collectives after which it takes place, if that is the ranks' common time."""

    def snapshot_steps(self) -> range:
        first, last, stride = self.snapshots
        return range(first, last + 1, stride)
