"""Mirrors koopmon's scalars to TensorBoard, Weights & Biases, MLflow, Comet, or another tracker of named numbers.

A mirror reads values that the agent already holds, so it waits neither for a device nor for the monitor. An exception
in a tracker causes one log line and disables that mirror. The module imports a tracker only when the user uses it.
"""

from __future__ import annotations

import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from koopmon.agent.attach import Agent
from koopmon.errors import raise_from_signal

logger = logging.getLogger("koopmon.integrations")

PREFIX = "koopmon/"
_JUDGED = ("risk", "forecast", "near_unit_mass", "divergence_probability")


class Writer(Protocol):
    """The methods of TensorBoard's SummaryWriter that the mirror uses."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


def scalars(agent: Agent) -> dict[str, float]:
    """Return the currently known scalars by name.

    The last assessed snapshot gives risk, forecast, near_unit_mass and divergence_probability. The agent gives
    lr_scale, kss_alpha and overhead_ratio, its share of step time. The result is empty when koopmon is not attached.
    Ranks that send no snapshots receive no assessments; rank 0 always sends.
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
    """Base class of the mirrors; `write` never raises."""

    def __init__(self) -> None:
        self.enabled = True

    def write(self, agent: Agent, step: int) -> None:
        """Write the scalars of `agent` at the trainer's own `step`."""
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

    def close(self) -> None:  # noqa: B027 - most mirrors buffer nothing
        """Flush buffered values of our own writer. Idempotent."""

    @abstractmethod
    def _show(self, found: dict[str, float], step: int) -> None:
        """Write the scalars to the tracker; may raise."""


class TensorBoardMirror(Mirror):
    """Writes to a SummaryWriter of the user, or to its own writer in the run `koopmon` under the user's log directory.

    Its own writer has a separate directory because TensorBoard follows one file per directory.
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
    """Writes to the active run of Weights & Biases, if any, with the user's own step metric `step_name`.

    When `step_name` is None, wandb sends the values with the user's next log call.
    """

    def __init__(self, step_name: str | None = None) -> None:
        super().__init__()
        self._step_name = step_name

    def _show(self, found: dict[str, float], step: int) -> None:
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is None:
            return
        if self._step_name is None:
            run.log(found, commit=False)  # with an explicit step, wandb could reject the user's next one
        else:
            run.log({**found, self._step_name: step})


class CallMirror(Mirror):
    """Calls `log(scalars, step=step)`, such as `trackio.log` or Aim's `run.track`."""

    def __init__(self, log: Callable[..., Any]) -> None:
        super().__init__()
        self._log = log

    def _show(self, found: dict[str, float], step: int) -> None:
        self._log(found, step=step)


def log_to_mlflow(found: dict[str, float], step: int) -> None:
    """Log to the active run of MLflow, if any; its own queue sends the values."""
    mlflow: Any = sys.modules.get("mlflow")
    if mlflow is not None and mlflow.active_run() is not None:  # without one, MLflow would start a run
        mlflow.log_metrics(found, step=step, synchronous=False)


def log_to_comet(found: dict[str, float], step: int) -> None:
    """Log to the running experiment of Comet, if any."""
    comet: Any = sys.modules.get("comet_ml")
    if comet is not None and (experiment := comet.get_running_experiment()) is not None:
        experiment.log_metrics(found, step=step)
