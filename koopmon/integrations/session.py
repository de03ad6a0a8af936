"""What the callbacks share: koopmon in one training of somebody's trainer, from its first step to its end."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from koopmon.agent.attach import Agent, attach
from koopmon.agent.rank_identity import rank_from_env
from koopmon.config import Config

logger = logging.getLogger("koopmon.integrations")


class Session:
    """Attaches at the beginning of a training, lets go at its end, and begins anew with the next.

    Where the training is attached already, as under `koopmon run`, the agent that is there is used, and left in place.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        run: str | None = None,
        config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    ) -> None:
        """As `koopmon.attach`."""
        self.agent = Agent(None, "the training has not begun")
        self._endpoint = endpoint
        self._run = run
        self._config = config

    def begin(self, model: nn.Module, optimizers: Sequence[object], *, refused: str = "") -> None:
        """Attach `model` and its one optimizer; more, none, or a reason why it is `refused` is one line.

        Raises what `koopmon.attach` raises for `endpoint`, `run` and `config`: before the first step.
        """
        self.end()
        stepping = [each for each in optimizers if isinstance(each, Optimizer) and _moves_something(each)]
        if not refused and len(stepping) != 1:
            counted = f"{len(stepping)} optimizers" if stepping else "no torch.optim.Optimizer"
            refused = f"the trainer has {counted}, and koopmon guards one"
        if refused:
            # One line per job: every rank has the same to say.
            level = logging.WARNING if rank_from_env() == 0 else logging.DEBUG
            logger.log(level, "koopmon: not attached, training goes on: %s", refused)
            self.agent = Agent(None, refused)
            return
        self.agent = attach(model, stepping[0], endpoint=self._endpoint, run=self._run, config=self._config)
        atexit.register(self._interpreter_ends)

    def log(self, loss: float | Tensor | None = None, grad_norm: float | Tensor | None = None) -> None:
        """Tell the monitor; a tensor on a device is copied without synchronising."""
        self.agent.log(loss=loss, grad_norm=grad_norm)

    def end(self, reason: str = "") -> None:
        """Let go of the training, unless somebody else attached it. Idempotent."""
        atexit.unregister(self._interpreter_ends)
        if not self.agent.joined:
            self.agent.close(reason)

    def _interpreter_ends(self) -> None:
        # Some trainers do not tell their callbacks of an exception; what nobody caught, the interpreter has kept.
        error = getattr(sys, "last_type", None)
        self.end("" if error is None else f"the training raised {error.__name__}")


def _moves_something(optimizer: Optimizer) -> bool:
    """False for what a trainer puts in the place of an optimizer that it was not given."""
    return any(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"])
