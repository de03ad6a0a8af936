"""Koopmon's scalars beside the user's own: in TensorBoard, Weights & Biases, or whatever takes a name and a number.

A mirror reads what the agent knows already, so it neither waits for a device nor for the monitor; what fails in a
tracker is one log line, and then that mirror is off. Nothing here imports a tracker that the user does not use.
"""

from __future__ import annotations

import logging
import os
import sys
from abc import ABC, abstractmethod
from typing import Any, Protocol

from koopmon.agent.attach import Agent
from koopmon.errors import raise_from_signal

logger = logging.getLogger("koopmon.integrations")

PREFIX = "koopmon/"
_JUDGED = ("risk", "forecast", "near_unit_mass", "divergence_probability")


class Writer(Protocol):
    """What is used of TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


def scalars(agent: Agent) -> dict[str, float]:
    """What is known now, by name: risk, forecast, near_unit_mass, divergence_probability (of the last snapshot that
    the monitor judged), lr_scale, kss_alpha, and overhead_ratio, the share of step time that the agent takes.

    Empty where koopmon is not attached. Ranks that send no snapshots know nothing of the monitor; rank 0 sends.
    """
    status = agent.status()
    if not status["enabled"]:
        return {}
    judgement, applied = status["judgement"] or {}, status["applied"] or {}
    found = {name: judgement.get(name) for name in _JUDGED}
    found["lr_scale"] = applied.get("lr_scale")
    found["kss_alpha"] = applied.get("kss", {}).get("alpha")
    found["overhead_ratio"] = status["overhead_ratio"]
    return {PREFIX + name: float(value) for name, value in found.items() if value is not None}


class Mirror(ABC):
    """Parent of the mirrors: `write` never raises."""

    def __init__(self) -> None:
        self.enabled = True

    def write(self, agent: Agent, step: int) -> None:
        """Show the scalars of `agent` at the trainer's own `step`."""
        if not self.enabled:
            return
        try:
            found = scalars(agent)
            if found:
                self._show(found, step)
        except BaseException as error:  # the tracker's own code
            raise_from_signal(error)
            self.enabled = False
            logger.warning("koopmon: %s is off, training goes on: %s", type(self).__name__, error)

    def close(self) -> None:  # noqa: B027 - most have nothing of their own to write down
        """Write down what is buffered, as far as it is ours. Idempotent."""

    @abstractmethod
    def _show(self, found: dict[str, float], step: int) -> None:
        """Put these into the tracker; may raise."""


class TensorBoardMirror(Mirror):
    """Into a SummaryWriter of the user's, or into one of its own in the run `koopmon` under the user's log directory.

    The directory is not shared: TensorBoard follows one file in each.
    """

    def __init__(self, writer: Writer | str | os.PathLike[str]) -> None:
        super().__init__()
        self._writer: Any = writer
        self._own = isinstance(writer, (str, os.PathLike))

    def _show(self, found: dict[str, float], step: int) -> None:
        if self._own and isinstance(self._writer, (str, os.PathLike)):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(os.path.join(self._writer, "koopmon"))
        for name, value in found.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.enabled and self._own and hasattr(self._writer, "close"):
            self._writer.close()


class WandbMirror(Mirror):
    """Into the run of Weights & Biases that is active, if one is, under the user's own step metric `step_name`.

    The values are sent with the next ones that the user logs when `step_name` is None.
    """

    def __init__(self, step_name: str | None = None) -> None:
        super().__init__()
        self._step_name = step_name

    def _show(self, found: dict[str, float], step: int) -> None:
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is None:
            return
        if self._step_name is None:
            run.log(found, commit=False)  # with a step of ours, the user's own next one could be refused
        else:
            run.log({**found, self._step_name: step})
