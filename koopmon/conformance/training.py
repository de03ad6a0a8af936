"""Trains an example model with or without koopmon's agent, identically in all other respects.

The agent is the complete one of `koopmon.attach`, except for its I/O thread. `Notebook` replaces that thread and stores
its outgoing items; `Attached` submits the commands. Every check is therefore a pure function of its seeds.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Self
from unittest import SkipTest

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from koopmon import config as configuration
from koopmon.agent.capture.forward_kind import recomputing
from koopmon.agent.capture.sampler import RankSnapshot
from koopmon.agent.comms.io_thread import IOThread
from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.runtime import AgentRuntime
from koopmon.api import Stack
from koopmon.conformance.harness import Bench, at_points, seeded
from koopmon.conformance.result import demand
from koopmon.plugins import select
from koopmon.wire.messages import Command

RUN = "conformance"
SEED = 5
NUM_SAMPLES = 64
LEARNING_RATE = 1e-3
CONFIG = configuration.from_mapping(
    {
        "sampling": {"num_samples": NUM_SAMPLES, "seed": SEED},
        "cadence": {
            "warmup_steps": 1_000_000,
            "budget_ratio": 0.5,
            "initial_credit_seconds": 604_800.0,
            "max_bytes_per_second": 1e15,
        },
        "limits": {"act": "always", "max_kss_alpha": 1000.0, "max_actions_per_hour": 100_000},
    }
)
"""A snapshot at every step, and all commands allowed."""


class Training:
    """Gradient descent with momentum; microbatch m of step s uses the seed 1 + s * microbatches + m."""

    def __init__(
        self,
        bench: Bench,
        *,
        dtype: torch.dtype | None = None,
        microbatches: int = 1,
        learning_rate: float = LEARNING_RATE,
        checkpointing: bool = False,
    ) -> None:
        self.bench = bench
        self.model = bench.build(dtype)
        if checkpointing:
            _checkpoint_blocks(self.model, bench.stack(self.model))
        self.parameters = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=learning_rate, momentum=0.9 if learning_rate else 0.0)
        self.step = 0
        self.losses: list[Tensor] = []
        self.random_states: list[Tensor] = []
        """States of torch's generator after each microbatch."""
        self._dtype = dtype
        self._microbatches = microbatches

    def penalty(self) -> Tensor | None:
        """Return a term to add to the loss of the last forward pass; None for no term."""
        return None

    def backward(self) -> None:
        """Compute the gradient of the mean loss over the microbatches, plus `penalty`."""
        self.optimizer.zero_grad()
        for index in range(self._microbatches):
            seed = 1 + self.step * self._microbatches + index
            batch = self.bench.batch(seed, self._dtype)
            with seeded(seed):
                loss = self.bench.loss(self.model, batch)
                self.losses.append(loss.detach().clone())
                penalty = self.penalty()
                whole = loss if penalty is None else loss + penalty
                (whole / self._microbatches).backward()  # type: ignore[no-untyped-call]
                self.random_states.append(torch.get_rng_state())

    def update(self) -> None:
        """Run the optimizer step."""
        self.optimizer.step()
        self.step += 1

    def run(self, num_steps: int) -> None:
        """Train for `num_steps` optimizer steps."""
        for _ in range(num_steps):
            self.backward()
            self.update()

    def evaluate(self) -> None:
        """Run a forward pass in eval mode, and one without gradients."""
        for training in (False, True):
            self.model.train(training)
            with seeded(99), torch.no_grad():
                self.bench.loss(self.model, self.bench.batch(99, self._dtype))
        self.model.train()

    def gradient(self) -> Tensor:
        """Return all gradients as one vector, with zeros for missing ones."""
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in self.parameters]
        return torch.cat([each.detach().flatten() for each in found])

    def values(self) -> Tensor:
        """Return all parameters as one vector."""
        return torch.cat([each.detach().flatten() for each in self.parameters])


@dataclass
class Seen:
    """One training forward: `states` (..., T, D), h_0 first, and the number of calls of each block."""

    mask: Tensor | None
    states: list[Tensor] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)


class Witness:
    """Records copies of all states in every training forward; `graph` keeps them in the graph."""

    def __init__(self, bench: Bench, model: nn.Module, stack: Stack, *, graph: bool = False) -> None:
        self.forwards: list[Seen] = []
        adapter = bench.adapter

        def looks(module: nn.Module) -> bool:
            return model.training and torch.is_grad_enabled() and not recomputing()

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if looks(module):
                mask = adapter.token_mask(module, args, kwargs, stack)
                self.forwards.append(Seen(mask, calls={point.name: 0 for point in stack.points}))

        def keep(state: Tensor | None) -> None:
            if state is not None:
                self.forwards[-1].states.append(state.clone() if graph else state.detach().clone())

        def enter(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if looks(module) and layer == 0:
                keep(adapter.block_input(module, args, kwargs))

        def leave(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if looks(module):
                self.forwards[-1].calls[stack.points[layer].name] += 1
                keep(adapter.block_output(module, output))

        model.register_forward_pre_hook(begin, with_kwargs=True)
        at_points(stack, enter, leave)


@dataclass(frozen=True)
class Kept:
    """One snapshot: `states` (P, N, D), P = L + 1, of the valid tokens; `observed` by name and layer."""

    step: int
    states: Tensor
    observed: dict[tuple[str, int], float]


class Notebook(IOThread):
    """Replacement of the I/O thread: stores outgoing items at once and is always connected."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.snapshots: list[Kept] = []
        self.outcomes: list[CommandResult] = []

    def start(self) -> None:
        self.connected = True

    def post(self, item: RankSnapshot | CommandResult) -> None:
        if isinstance(item, CommandResult):
            self.outcomes.append(item)
            return
        if item.ready is not None:
            item.ready.synchronize()
        valid = item.states if item.num_valid is None else item.states[:, : int(item.num_valid)]
        values = () if item.observations is None else item.observations.tolist()
        self.snapshots.append(Kept(item.training.step, valid.clone(), dict(zip(item.observed, values, strict=True))))
        item.slot.release()

    def close(self, reason: str = "", *, wait: bool = True) -> None:
        self.connected = False
        self._wakeup.close()


class Attached:
    """Context manager that attaches the agent to a training. `check` raises ConformanceError if the agent has stopped.

    `through_shielded` allows KSS to reach the modules that a family shields.
    """

    def __init__(self, training: Training, *, through_shielded: bool = False) -> None:
        selection = select(training.model, training.bench.adapter)
        config = replace(CONFIG, kss=replace(CONFIG.kss, through_shielded=through_shielded))
        self.runtime = AgentRuntime(
            training.model, training.optimizer, selection, config, f"ipc://{RUN}", RUN, io_thread=Notebook
        )
        io_thread = self.runtime.io_thread
        assert isinstance(io_thread, Notebook)
        self.notebook = io_thread
        self.runtime.notices.silence()

    def command(self, kind: Any, **fields: Any) -> None:
        """Submit a command; it takes effect at the next optimizer step."""
        fields |= {"run": RUN, "incarnation": "c0f0c0f0", "id": secrets.token_hex(8), "reason": "a check"}
        self.runtime.lifecycle.submit(Command(kind=kind, expires_step=1 << 40, **fields))

    @property
    def lr_scale(self) -> float:
        """LR scale in force in the most recent step."""
        return self.runtime.lifecycle.applied(self.runtime.stats.step - 1).lr_scale

    @property
    def alpha(self) -> float:
        """KSS alpha in force in the next forward pass."""
        return self.runtime.lifecycle.applied().kss.alpha

    def check(self) -> None:
        breaker, taps = self.runtime.breaker, self.runtime.taps
        demand(not breaker.reason, f"the agent switches itself off: {breaker.reason}")
        demand(not taps.failure, f"the agent gives up: {taps.failure}")
        demand(taps.stacks.chain is not None, "the agent verifies no chain in a training forward")
        refused = [each.detail or each.outcome for each in self.notebook.outcomes if each.outcome != "applied"]
        demand(not refused, f"a command is not applied: {'; '.join(refused)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runtime.close("")


def _checkpoint_blocks(model: nn.Module, stack: Stack) -> None:
    """Enable non-reentrant checkpointing of whole calls including hooks, by the model's own switch if it has one."""
    if any(point.entry is not point.module for point in stack.points):
        raise SkipTest("its blocks are no modules of their own, to be repeated in the backward pass")
    switches = (getattr(model, f"{what}_checkpointing_enable", None) for what in ("activation", "gradient"))
    switch = next(filter(callable, switches), None)
    if switch is not None and getattr(model, "supports_gradient_checkpointing", False):
        switch({"use_reentrant": False})
        return
    for point in stack.points:
        _checkpoint(point.module)


def _checkpoint(module: nn.Module) -> None:
    """Make each call of `module` a checkpointed one, including its hooks; the class name stays the same."""
    kind = type(module)

    def repeated(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda *a, **k: kind.__call__(self, *a, **k), *args, use_reentrant=False, **kwargs)

    body = {"__call__": repeated, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (kind,), body)
