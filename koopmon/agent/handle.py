"""The handle that `koopmon.attach` returns."""

from __future__ import annotations

import logging
from typing import Any, Self

import msgspec
from torch import Tensor

from koopmon.agent.runtime import AgentRuntime
from koopmon.wire.messages import MAX_LOGGED

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
        self._complained: set[str] = set()

    @property
    def enabled(self) -> bool:
        """False when koopmon is not attached, has failed or was closed. `status()["reason"]` gives the reason."""
        return not self._why_disabled()

    @property
    def should_stop(self) -> bool:
        """True after a stop command of the monitor, from the end of the same step on all ranks.

        A loop that reads it after each step and then leaves ends the training in good order.
        """
        return self._runtime is not None and self._runtime.steps.granted("stop")

    @property
    def should_checkpoint(self) -> bool:
        """True for one step after a checkpoint command of the monitor: the same step on all ranks.

        A loop that reads it once per step, after the update, sees each request once.
        """
        return self._runtime is not None and self._runtime.steps.granted("checkpoint")

    def log(
        self,
        /,
        *,
        loss: float | Tensor | None = None,
        grad_norm: float | Tensor | None = None,
        **scalars: float | Tensor | None,
    ) -> None:
        """Report scalars of the training to the monitor, in the user's own units, at any step.

        The agent measures `loss` and `grad_norm` itself in the steps with a snapshot. From the first call on, the
        logged value replaces that measurement. Any further name is shown with a band of its own history: `kl`,
        `entropy`, `reward`. A name has 1 to 40 lower-case letters, digits and underscores; the first 32 names are sent.

        Each value is a number or a tensor with one element. A tensor on a device is copied without synchronising.
        Heartbeats send the latest value of each name, from the lowest rank that logs it.
        """
        for name, value in {"loss": loss, "grad_norm": grad_norm, **scalars}.items():
            if self._runtime is not None and value is not None:
                try:
                    self._runtime.stats.log(name, value)
                except Exception as error:
                    if name not in self._complained and len(self._complained) < MAX_LOGGED:
                        self._complained.add(name)
                        logger.warning("koopmon: log(%s=...) is ignored: %s", name, error)

    def status(self) -> dict[str, Any]:
        """Return the state of the agent as plain values. Never synchronises with a device."""
        runtime = self._runtime
        reason = self._why_disabled()
        if runtime is None:
            return {"enabled": False, "reason": reason}
        stats, state, chain = runtime.stats, runtime.lifecycle.state, runtime.taps.stacks.chain
        return {
            "enabled": not reason,
            "reason": reason,
            "endpoint": runtime.endpoint,
            **state.facts(),
            "adapter": runtime.adapter.name,
            "stack": chain and chain.stack.name,
            "num_layers": chain.stack.num_layers if chain else 0,
            "width": chain.width if chain else 0,
            "acts": state.acts,
            "control_ready": state.ready,
            "applied": msgspec.to_builtins(runtime.lifecycle.applied()),
            "step": stats.step,
            "step_seconds": stats.step_seconds,
            "overhead_ratio": stats.busy_seconds / stats.elapsed_seconds if stats.elapsed_seconds else 0.0,
            "sent": stats.sent,
            "min_stride": stats.stride_limit.at(stats.step),
            "dropped": dict(stats.dropped),
            "rejected": dict(stats.rejected),
            "taps_missing": stats.taps_missing,
            **{name: scalar.get() for name, scalar in stats.measured.items()},
            "logged": {name: each.value for name, each in stats.logged_scalars().items()},
            "judgement": msgspec.to_builtins(stats.judgement),
            "errors": runtime.breaker.num_errors,
            **{name: value for action in runtime.actions for name, value in action.facts().items()},
        }

    def _why_disabled(self) -> str:
        return self._reason if self._runtime is None else self._runtime.why_disabled

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
