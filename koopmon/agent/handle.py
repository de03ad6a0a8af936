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
    """Handle of one attached model and optimizer. `close`, or the end of a `with` block, detaches them.

    No method raises. No method waits, except `close`: it waits less than a second to send the goodbye. The handle may
    be dropped, because the agent lives as long as the model.
    """

    def __init__(self, runtime: AgentRuntime | None, reason: str = "", *, joined: bool = False) -> None:
        self._runtime = runtime
        self._reason = reason
        self.joined = joined
        """True if the training was attached before, as by `koopmon run`. The first caller then closes the agent."""
        self._complained = False

    @property
    def enabled(self) -> bool:
        """False when koopmon is not attached, has failed or was closed. `status()["reason"]` gives the reason."""
        return not self._why_disabled()

    @property
    def should_stop(self) -> bool:
        """True after a stop command of the monitor, from the same step on all ranks. The loop may read it."""
        runtime = self._runtime
        return runtime is not None and runtime.actuator is not None and runtime.actuator.state.stop

    def log(self, *, loss: float | Tensor | None = None, grad_norm: float | Tensor | None = None) -> None:
        """Report the loss and the gradient's norm to the monitor, in the user's own units.

        Both are optional, at any step.

        Each is a number or a tensor with one element. A tensor on a device is copied without synchronising.
        """
        runtime = self._runtime
        if runtime is None:
            return
        for name, value in {"loss": loss, "grad_norm": grad_norm}.items():
            if value is not None:
                self._put(name, runtime.stats.measured[name], value)

    def _put(self, name: str, box: AsyncScalar, value: float | Tensor) -> None:
        try:
            box.put(value)
        except Exception as error:
            if not self._complained:
                self._complained = True
                logger.warning("koopmon: log(%s=...) is ignored: %s", name, error)

    def status(self) -> dict[str, Any]:
        """Return the state of the agent as plain values. Never synchronises with a device."""
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
            **{name: scalar.get() for name, scalar in stats.measured.items()},
            "judgement": None if stats.judgement is None else msgspec.to_builtins(stats.judgement),
            "errors": runtime.breaker.num_errors,
        }

    def _why_disabled(self) -> str:
        if self._runtime is None:
            return self._reason
        return "closed" if self._runtime.closed else self._runtime.breaker.reason or self._runtime.taps.failure

    def close(self, reason: str = "") -> None:
        """Detach koopmon from the training and send a goodbye to the monitor. Idempotent."""
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
