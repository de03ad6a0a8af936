"""The handle that `koopmon.attach` returns."""

from __future__ import annotations

import logging
from typing import Any, Self

import msgspec
from torch import Tensor

from koopmon.agent.runtime import AgentRuntime
from koopmon.agent.stats import AsyncScalar

logger = logging.getLogger("koopmon.agent")


class Agent:
    """One attached model and optimizer; `close`, or the end of a `with` block, lets go of them.

    No method raises or waits for anything but, in `close`, a goodbye of less than a second. A training that needs
    nothing of this may drop the agent: it lives as long as the model.
    """

    def __init__(self, runtime: AgentRuntime | None, reason: str = "", *, joined: bool = False) -> None:
        self._runtime = runtime
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
        runtime = self._runtime
        return runtime is not None and runtime.actuator is not None and runtime.actuator.state.stop

    def log(self, *, loss: float | Tensor | None = None, grad_norm: float | Tensor | None = None) -> None:
        """Tell the monitor the loss and the gradient's norm, in the user's own units; both optional, at any step.

        A number or a tensor with one element; one on a device is copied without synchronising.
        """
        runtime = self._runtime
        if runtime is None:
            return
        for name, box, value in (("loss", runtime.stats.loss, loss), ("grad_norm", runtime.stats.grad_norm, grad_norm)):
            if value is not None:
                self._put(name, box, value)

    def _put(self, name: str, box: AsyncScalar, value: float | Tensor) -> None:
        try:
            box.put(value)
        except Exception as error:
            if not self._complained:
                self._complained = True
                logger.warning("koopmon: log(%s=...) is ignored: %s", name, error)

    def status(self) -> dict[str, Any]:
        """What the agent is doing, as plain values; never synchronises with a device."""
        runtime = self._runtime
        reason = self._why_disabled()
        if runtime is None:
            return {"enabled": False, "reason": reason}
        stats, io_thread, actuator, stack = runtime.stats, runtime.io_thread, runtime.actuator, runtime.taps.stack
        identity = None if io_thread is None else io_thread.identity
        return {
            "enabled": not reason,
            "reason": reason,
            "endpoint": runtime.endpoint,
            "connected": io_thread is not None and io_thread.connected,
            "run": None if identity is None else identity.run,
            "incarnation": None if identity is None else identity.incarnation,
            "process_rank": None if runtime.world is None else runtime.world.rank,
            "world_size": None if runtime.world is None else runtime.world.size,
            "layout": None if runtime.layout is None else runtime.layout.name,
            "adapter": runtime.adapter.name,
            "stack": None if stack is None else stack.name,
            "num_layers": 0 if stack is None else len(stack.points),
            "width": runtime.width,
            "acts": actuator is not None and actuator.acts,
            "control_ready": actuator is not None and actuator.ready,
            "applied": None if actuator is None else msgspec.to_builtins(actuator.applied()),
            "step": stats.step,
            "step_seconds": stats.step_seconds,
            "overhead_ratio": stats.busy_seconds / stats.elapsed_seconds if stats.elapsed_seconds else 0.0,
            "sent": stats.sent,
            "dropped": dict(stats.dropped),
            "rejected": dict(stats.rejected),
            "taps_missing": stats.taps_missing,
            "kss_skipped": stats.kss_skipped.get() or 0.0,
            "learning_rate": stats.learning_rate.get(),
            "loss": stats.loss.get(),
            "grad_norm": stats.grad_norm.get(),
            "judgement": None if stats.judgement is None else msgspec.to_builtins(stats.judgement),
            "errors": runtime.breaker.num_errors,
        }

    def _why_disabled(self) -> str:
        if self._runtime is None:
            return self._reason
        return "closed" if self._runtime.closed else self._runtime.breaker.reason or self._runtime.taps.failure

    def close(self, reason: str = "") -> None:
        """Take koopmon off the training and say goodbye to the monitor. Idempotent."""
        runtime = self._runtime
        if runtime is None or runtime.closed:
            return
        try:
            runtime.close(reason)
        except Exception as error:
            runtime.breaker.trip("close", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("" if kind is None else f"the training raised {kind.__name__}")
