"""The handle that `koopmon.attach` returns."""

from __future__ import annotations

import logging
from typing import Any, Self

import msgspec
from torch import Tensor

from koopmon.agent.runtime import Guest
from koopmon.agent.stats import ScalarBox

logger = logging.getLogger("koopmon.agent")


class Agent:
    """One attached model and optimizer; `close`, or the end of a `with` block, lets go of them.

    No method raises or waits for anything but, in `close`, a goodbye of less than a second. A training that needs
    nothing of this may drop the agent: it lives as long as the model.
    """

    def __init__(self, guest: Guest | None, reason: str = "", *, joined: bool = False) -> None:
        self._guest = guest
        self._reason = reason
        self.joined = joined
        """Whether the training was attached before, as by `koopmon run`: then whoever did that closes it."""
        self._complained = False

    @property
    def enabled(self) -> bool:
        """False when koopmon is not attached, has failed or was closed: `status()["reason"]` tells why."""
        return not self._why_disabled()

    @property
    def should_stop(self) -> bool:
        """True once the monitor has asked the training to stop; at the same step on all ranks. The loop may look."""
        guest = self._guest
        return guest is not None and guest.actuator is not None and guest.actuator.state.stop

    def log(self, *, loss: float | Tensor | None = None, grad_norm: float | Tensor | None = None) -> None:
        """Tell the monitor the loss and the gradient's norm, in the user's own units; both optional, at any step.

        A number or a tensor with one element; one on a device is copied without synchronising.
        """
        guest = self._guest
        if guest is None:
            return
        for name, box, value in (("loss", guest.ledger.loss, loss), ("grad_norm", guest.ledger.grad_norm, grad_norm)):
            if value is not None:
                self._put(name, box, value)

    def _put(self, name: str, box: ScalarBox, value: float | Tensor) -> None:
        try:
            box.put(value)
        except Exception as error:
            if not self._complained:
                self._complained = True
                logger.warning("koopmon: log(%s=...) is ignored: %s", name, error)

    def status(self) -> dict[str, Any]:
        """What the agent is doing, as plain values; never synchronises with a device."""
        guest = self._guest
        reason = self._why_disabled()
        if guest is None:
            return {"enabled": False, "reason": reason}
        ledger, sender, actuator, stack = guest.ledger, guest.sender, guest.actuator, guest.taps.stack
        identity = None if sender is None else sender.identity
        return {
            "enabled": not reason,
            "reason": reason,
            "endpoint": guest.endpoint,
            "connected": sender is not None and sender.connected,
            "run": None if identity is None else identity.run,
            "incarnation": None if identity is None else identity.incarnation,
            "process_rank": None if guest.world is None else guest.world.rank,
            "world_size": None if guest.world is None else guest.world.size,
            "layout": None if guest.layout is None else guest.layout.name,
            "adapter": guest.adapter.name,
            "stack": None if stack is None else stack.name,
            "num_layers": 0 if stack is None else len(stack.points),
            "width": guest.width,
            "acts": actuator is not None and actuator.acts,
            "control_ready": actuator is not None and actuator.ready,
            "applied": None if actuator is None else msgspec.to_builtins(actuator.applied()),
            "step": ledger.step,
            "step_seconds": ledger.step_seconds,
            "overhead_ratio": ledger.busy_seconds / ledger.elapsed_seconds if ledger.elapsed_seconds else 0.0,
            "sent": ledger.sent,
            "dropped": dict(ledger.dropped),
            "rejected": dict(ledger.rejected),
            "taps_missing": ledger.taps_missing,
            "kss_skipped": ledger.kss_skipped.get() or 0.0,
            "learning_rate": ledger.learning_rate.get(),
            "loss": ledger.loss.get(),
            "grad_norm": ledger.grad_norm.get(),
            "judgement": None if ledger.judgement is None else msgspec.to_builtins(ledger.judgement),
            "errors": guest.fence.num_errors,
        }

    def _why_disabled(self) -> str:
        if self._guest is None:
            return self._reason
        return "closed" if self._guest.closed else self._guest.fence.reason or self._guest.taps.failure

    def close(self, reason: str = "") -> None:
        """Take koopmon off the training and say goodbye to the monitor. Idempotent."""
        guest = self._guest
        if guest is None or guest.closed:
            return
        try:
            guest.close(reason)
        except Exception as error:
            guest.fence.trip("close", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("" if kind is None else f"the training raised {kind.__name__}")
