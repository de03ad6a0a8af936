"""Common base of the trainer callbacks: one koopmon session per training."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from koopmon.agent.attach import Agent, attach
from koopmon.config import Config
from koopmon.logs import log_for_job

logger = logging.getLogger("koopmon.integrations")


class SessionCallback:
    """Attaches at the beginning of a training and detaches at its end; each training is a new session.

    An agent that is already attached, for example by `koopmon run`, is reused and stays attached at the end. The
    arguments are those of `koopmon.attach`.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        run: str | None = None,
        config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.agent = Agent(None, "the training has not started")
        """The agent of the most recent training."""
        self._arguments: dict[str, Any] = {"endpoint": endpoint, "run": run, "config": config}

    def _begin(self, model: nn.Module, optimizers: Sequence[object], *, refused: str = "") -> None:
        """Attach `model` and its optimizers. With none, or a reason in `refused`, log one line instead.

        Raises the exceptions of `koopmon.attach` for `endpoint`, `run` and `config`, before the first step.
        """
        self._end()
        stepping = [each for each in optimizers if isinstance(each, Optimizer) and _moves_something(each)]
        if not stepping:
            refused = refused or "the trainer has no torch.optim.Optimizer"
        if refused:
            log_for_job(logger, f"not attached, training goes on: {refused}")
            self.agent = Agent(None, refused)
            return
        self.agent = attach(model, stepping, **self._arguments)
        atexit.register(self._interpreter_ends)

    def _end(self, reason: str = "") -> None:
        """Detach from the training, unless other code attached it. Idempotent."""
        atexit.unregister(self._interpreter_ends)
        if not self.agent.joined:
            self.agent.close(reason)

    def _interpreter_ends(self) -> None:
        # Some trainers do not report an exception to their callbacks; the interpreter stores an uncaught one in
        # sys.last_type.
        error = getattr(sys, "last_type", None)
        self._end("" if error is None else f"the training raised {error.__name__}")


def _moves_something(optimizer: Optimizer) -> bool:
    """Return False for the placeholder that a trainer creates when it was given no optimizer."""
    return any(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"])
