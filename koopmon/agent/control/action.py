"""The interface of actions: each kind of change to a training is one class, in a file of its own.

`all_actions.py` lists the kinds. Rank 0 turns a command into a target within the agent's own limits. The target becomes
part of the control state that all ranks hold, and each rank applies that state in its own training thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from koopmon.agent.control.state import ControlState
from koopmon.agent.parallelism import ParallelLayout
from koopmon.api import ArchitectureAdapter
from koopmon.plugins import Selection
from koopmon.wire.messages import CommandKind


@dataclass(frozen=True, slots=True)
class Capability:
    """`acts`: the action works in this training. Otherwise the agent refuses its commands, with `reason`."""

    acts: bool
    reason: str = ""


ACTS = Capability(True)


@dataclass(frozen=True, slots=True)
class Target:
    """The strength and the parameters that an action moves to."""

    strength: float
    parameters: dict[str, int | float] = field(default_factory=dict)


@dataclass(slots=True)
class Update:
    """One call of `optimizer.step(*args, **kwargs)`. An action may replace `args` and `kwargs`."""

    optimizer: Optimizer
    args: Any
    kwargs: Any


@dataclass(frozen=True, slots=True)
class NextForwards:
    """The forwards of the next step: the verified chain's depth (0 before that), and this rank's part of the data."""

    num_layers: int
    num_microbatches: int
    data_rank: int


class Injection(Protocol):
    """Changes the residual stream behind a block, in training forwards and again in their recomputation."""

    def enter(self, layer: int, state: Tensor, mask: Tensor | None) -> None:
        """Look at `state`, the input of block `layer`."""

    def leave(self, layer: int, state: Tensor) -> Tensor | None:
        """Return the state that replaces `state`, the output of block `layer`; None to keep it."""


class ControlAction(ABC):
    """One kind of change to the training.

    In each optimizer step the runtime calls `before_forwards`, `on_forward` for each training forward, `apply` just
    before the update, and `revert` after it.
    """

    kind: ClassVar[CommandKind]
    """The command that sets it, and the key of its part of the control state."""
    field: ClassVar[str]
    """The field of `Command` and of `Applied` that holds its value."""
    neutral: ClassVar[float]
    """The strength that leaves the user's own values."""
    lasting: ClassVar[bool] = False
    """True if the action stays in force after the agent has failed, so that all ranks keep the same values."""

    @abstractmethod
    def within_limits(self, value: Any) -> tuple[Target, str]:
        """Return the target that `value` asks for, within the agent's own limits, and the caps that changed it."""

    def value(self, state: ControlState, step: int) -> Any:
        """Return the value in force at `step`, as `Applied` holds it: the strength by default.

        Raises msgspec.ValidationError if the state has numbers out of the protocol's bounds.
        """
        return self.strength(state, step)

    def strength(self, state: ControlState, step: int) -> float:
        """Return the strength in force at `step`. Its ramp is linear by default."""
        part = state.actions.get(self.kind)
        return self.neutral if part is None else part.ramp.linear(step)

    def capability(self, layout: ParallelLayout) -> Capability:
        """Return if the action works in this training."""
        return ACTS

    def inspect(self, model: nn.Module, selection: Selection) -> None:  # noqa: B027 - optional
        """Look at the modules of `model`: at the start, and again if another adapter takes over."""

    def hello(self, adapter: ArchitectureAdapter) -> Mapping[str, Any]:
        """Return the fields of hello that tell the monitor about this action."""
        return {}

    def facts(self) -> Mapping[str, Any]:
        """Return this action's share of `Agent.status()`."""
        return {}

    @abstractmethod
    def apply(self, state: ControlState, step: int, update: Update) -> None:
        """Put `state` in force for `update`, the optimizer's update number `step`, counted from 0."""

    @abstractmethod
    def revert(self) -> None:
        """Restore the user's own values. Idempotent. Also called when the agent is closed."""

    def before_forwards(self, state: ControlState, step: int, forwards: NextForwards) -> Injection | None:
        """Prepare the next step; `step` updates are done. Returns its change to the stream, None for no change."""
        return None

    def on_forward(self) -> None:  # noqa: B027 - optional
        """Handle the start of a training forward."""
