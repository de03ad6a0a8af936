"""koopmon for Lightning's Trainer::

from koopmon.integrations.lightning import KoopmonCallback

trainer = Trainer(callbacks=[KoopmonCallback()])
"""

from __future__ import annotations

import logging
import os
from typing import Any

from koopmon.agent.attach import Agent
from koopmon.errors import MissingExtraError
from koopmon.integrations.mirrors import Mirror
from koopmon.integrations.session import SessionCallback
from koopmon.logs import log_for_job

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    raise MissingExtraError(__name__, "lightning", "koopmon[lightning]") from None

__all__ = ["KoopmonCallback"]

logger = logging.getLogger("koopmon.integrations")


class KoopmonCallback(SessionCallback, Callback):  # type: ignore[misc] # mypy sees no types of the library
    """Attaches koopmon when `fit` begins to train, and detaches at its end or on an exception.

    `endpoint`, `run` and `config` are those of `koopmon.attach`, which raises errors in them before the first step.
    Without `endpoint` the callback uses the environment's endpoint; without that the training runs unmonitored.

    The callback writes koopmon's own scalars to the trainer's loggers every `log_every_n_steps`. On a stop request from
    the monitor (opt-in), the trainer stops. On a checkpoint request (opt-in), it saves `koopmon-step=N.ckpt` in the
    directory of its first ModelCheckpoint.
    """

    _loggers: Mirror | None = None
    _saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, trainer.optimizers)
        self._loggers = _Loggers(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._loggers is not None:
            self._loggers.write(self.agent, trainer.global_step)
        if self.agent.should_stop:
            trainer.should_stop = True
        if self.agent.should_checkpoint:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Save a checkpoint, on all ranks. The request is true for each batch of an accumulated step."""
        directory = next((each.dirpath for each in trainer.checkpoint_callbacks if hasattr(each, "dirpath")), None)
        if directory is None:
            log_for_job(logger, "no checkpoint at the monitor's request: the trainer has no ModelCheckpoint")
        elif trainer.global_step != self._saved_step:
            trainer.save_checkpoint(os.path.join(directory, f"koopmon-step={trainer.global_step}.ckpt"))
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(f"the training raised {type(exception).__name__}")


class _Loggers(Mirror):
    """Writes to all loggers of the trainer; they ignore ranks other than 0."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self._trainer = trainer
        self._last_step = trainer.global_step

    def write(self, agent: Agent, step: int) -> None:
        every = self._trainer.log_every_n_steps
        if step != self._last_step and every > 0 and step % every == 0:  # one write per step, not per batch
            self._last_step = step
            super().write(agent, step)

    def _show(self, found: dict[str, float], step: int) -> None:
        for each in self._trainer.loggers:
            each.log_metrics(found, step=step)
