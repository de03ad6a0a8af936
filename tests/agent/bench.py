"""A training in this process with the complete agent on it. No monitor is there: tests send the commands themselves."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.optim import AdamW, Optimizer

from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.runtime import AgentRuntime
from koopmon.config import from_mapping
from koopmon.conformance.training import Notebook
from koopmon.plugins import select
from koopmon.wire.messages import Command
from tests.agent.models import build, train_step


def attached(model: nn.Module, optimizers: Any, **tables: dict[str, Any]) -> AgentRuntime:
    """Attach an agent that keeps what it would send. `tables` are tables of the configuration."""
    config = from_mapping(tables)
    return AgentRuntime(model, optimizers, select(model), config, "ipc://bench", "job", io_thread=Notebook)


def submit(runtime: AgentRuntime, kind: Any, **fields: Any) -> str:
    """Hand a command to the agent, which applies it in the next steps; return its id."""
    name = {"run": "job", "incarnation": "c0f0c0f0", "id": secrets.token_hex(8), "reason": "a test"}
    command = Command(**{"kind": kind, "expires_step": 1 << 40, **name, **fields})
    runtime.lifecycle.submit(command)
    return command.id


def outcomes(runtime: AgentRuntime) -> list[CommandResult]:
    """Return the outcomes of commands so far."""
    notebook: Any = runtime.io_thread
    return list(notebook.outcomes)


class Bench:
    """A training with an agent; `optimizer` makes one of the parameters, and `limits` is the table of that name."""

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Callable[[Any], Optimizer] = lambda parameters: AdamW(parameters, lr=0.01),
        **limits: Any,
    ) -> None:
        self.model: Any = build() if model is None else model
        self.optimizer = optimizer(self.model.parameters())
        self.runtime = attached(self.model, self.optimizer, limits=limits)
        self.step = 0

    @property
    def outcomes(self) -> list[CommandResult]:
        return outcomes(self.runtime)

    def train(self, steps: int) -> list[float]:
        """Train; return the losses."""
        losses = [train_step(self.model, self.optimizer, step) for step in range(self.step, self.step + steps)]
        self.step += steps
        return losses

    def submit(self, kind: Any, **fields: Any) -> str:
        return submit(self.runtime, kind, **fields)

    def command(self, kind: Any, **fields: Any) -> CommandResult:
        """Submit a command and train one step; return its outcome."""
        asked = self.submit(kind, **fields)
        self.train(1)
        result = self.outcomes[-1]
        assert result.command_id == asked
        return result


B = TypeVar("B", bound=Bench)


@contextmanager
def benches(kind: type[B]) -> Iterator[Callable[..., B]]:
    """Give a function that makes benches, and close their agents at the end."""
    made: list[B] = []

    def make(*args: Any, **options: Any) -> B:
        made.append(kind(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.runtime.close("")
