"""The state in force in the training processes: one value that every rank holds, a pure function of the step."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from koopmon.wire.messages import Applied, Command, KssSettings, Step


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


class ControlState(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """All values that commands can change. Equal on all ranks at every step. `version` counts the changes."""

    version: int = 0
    lr_ramp: Ramp = Ramp(start=1.0, target=1.0)
    alpha_ramp: Ramp = Ramp()
    kss: KssSettings = KssSettings()
    cadence_steps: int = 0
    """The interval that the monitor requested; 0 for none."""
    cadence_until_step: int = -1
    stop: bool = False

    def lr_scale(self, step: int) -> float:
        return self.lr_ramp.geometric(step)

    def kss_alpha(self, step: int) -> float:
        return self.alpha_ramp.linear(step)

    def applied(self, step: int) -> Applied:
        """Return the values in force at `step`, for the wire."""
        return Applied(lr_scale=self.lr_scale(step), kss=msgspec.structs.replace(self.kss, alpha=self.kss_alpha(step)))

    def after(self, command: Command, step: int) -> ControlState:
        """Return the state after `command` is applied at optimizer step `step`."""
        if command.lr_scale is not None:
            return self.towards(step, command.ramp_steps, lr_scale=command.lr_scale)
        if command.kss is not None:
            return self.towards(step, command.ramp_steps, kss=command.kss)
        if command.cadence_steps is not None:
            until = (1 << 53) if command.cadence_until_step is None else command.cadence_until_step
            return self._changed(cadence_steps=command.cadence_steps, cadence_until_step=until)
        return self._changed(stop=True)

    def towards(
        self, step: int, num_steps: int, *, lr_scale: float | None = None, kss: KssSettings | None = None
    ) -> ControlState:
        """Return the state that moves to `lr_scale` and `kss` in `num_steps` steps, from `step` on.

        None keeps a value.
        """
        state = self
        if lr_scale is not None:
            ramp = Ramp(first_step=step, start=self.lr_scale(step - 1), target=lr_scale, num_steps=num_steps)
            state = state._changed(lr_ramp=ramp)
        if kss is not None:
            ramp = Ramp(first_step=step, start=self.kss_alpha(step - 1), target=kss.alpha, num_steps=num_steps)
            state = state._changed(alpha_ramp=ramp, kss=kss)
        return state

    def _changed(self, **fields: object) -> ControlState:
        return msgspec.structs.replace(self, version=self.version + 1, **fields)


class ControlUpdate(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Rank 0's message to all ranks at one step edge: launched after step `step`, in force from the next one on."""

    step: Step
    state: ControlState
    snapshots: tuple[int, int, int]
    """First, last and stride of the steps with a snapshot in their forward pass, until the next exchange."""
    next_step: Annotated[int, Meta(ge=1)]
    """The step after which the next exchange takes place."""

    def snapshot_steps(self) -> range:
        first, last, stride = self.snapshots
        return range(first, last + 1, stride)
