"""The interface of actions: each kind of change to a training is one class, in a file of its own.

`all_actions.py` lists the kinds. Rank 0 turns a command into a target within the agent's own limits. The target becomes
part of the control state that all ranks hold, and each rank applies that state in its own training thread.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.state import ActionState, ControlState, Ramp
from koopmon.agent.parallelism import ParallelLayout
from koopmon.api import ArchitectureAdapter, Stack
from koopmon.plugins import Selection
from koopmon.wire.messages import AckOutcome, Applied, Command, CommandKind

NEVER = sys.maxsize
"""A step that never comes."""


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
    detail: str = ""
    """The caps that changed the request."""
    acts: bool = True
    """False for the way back to the user's own values, which is always open."""
    corrects: bool = False
    """True for a correction of what is in force. It uses none of the hourly allowance, and prints no line."""


class RequestRefusedError(Exception):
    """An action refuses a request; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The outcome of a command that is complete only at a step edge."""

    outcome: AckOutcome
    detail: str
    permanent: bool = False
    """True if the action can never work in this launch, so that the command would be refused again."""


@dataclass(slots=True)
class Update:
    """One call of `optimizer.step(*args, **kwargs)`. An action may replace `args` and `kwargs`."""

    optimizer: Optimizer
    args: Any
    kwargs: Any


class NextForwards(NamedTuple):
    """The forwards of the next step: the verified chain's depth (0 before that), and this rank's part of the data."""

    num_layers: int
    num_microbatches: int
    data_rank: int
    obstacle: str = ""
    """The reason why no action can change the stream; empty if one can."""
    stack: Stack | None = None
    """The verified chain; None before that."""


class Injection(Protocol):
    """Changes the residual stream behind a block, in training forwards and again in their recomputation."""

    def enter(self, layer: int, state: Tensor, mask: Tensor | None) -> None:
        """Look at `state`, the input of block `layer`."""

    def leave(self, layer: int, state: Tensor) -> Tensor | None:
        """Return the state that replaces `state`, the output of block `layer`; None to keep it."""


def overriding(actions: Iterable[ControlAction], method: str) -> tuple[Any, ...]:
    """Return the bound `method` of the actions that have one of their own. The default does nothing."""
    default = getattr(ControlAction, method)
    return tuple(getattr(each, method) for each in actions if getattr(type(each), method) is not default)


class ControlAction(ABC):
    """One kind of change to the training.

    In each optimizer step the runtime calls `before_forwards`, `on_forward` for each training forward, `apply` just
    before the update, and `revert` after it. While commands can be applied, `at_edge` follows.
    """

    kind: ClassVar[CommandKind]
    """The command that sets it, and the key of its part of the control state."""
    neutral: ClassVar[float]
    """The strength that leaves the user's own values."""
    lasting: ClassVar[bool] = False
    """True if the action stays in force after the agent has failed, so that all ranks keep the same values."""

    completes_at_edge: ClassVar[bool] = False
    """True if a command of this kind is acknowledged with the result of `at_edge`."""
    hello_changed = False
    """Set by an action whose `hello` has changed. The runtime clears it."""

    @abstractmethod
    def target(self, request: Command | Applied, state: ControlState, step: int) -> Target:
        """Return the target that `request` asks for from `step` on, within the agent's own limits.

        Raises RequestRefusedError.
        """

    def released(self, state: ControlState) -> Target:
        """Return the target of the way back to the user's own values."""
        return Target(self.neutral, dict(self.parameters(state)), acts=False)

    def set_obstacle(self, reason: str) -> None:  # noqa: B027 - most actions do not change the stream
        """Note, when the chain is verified, why no action can change the stream; empty if one can."""

    def applied(self, state: ControlState, step: int) -> Mapping[str, Any]:
        """Return the fields of `Applied` that hold the values in force at `step`."""
        return {}

    def training(self, state: ControlState, step: int) -> Mapping[str, float]:
        """Return the fields of `TrainingStep` that hold the values in force at `step`."""
        return {}

    def parameters(self, state: ControlState) -> Mapping[str, int | float]:
        """Return the parameters in force."""
        part = state.actions.get(self.kind)
        return {} if part is None else part.parameters

    def strength(self, state: ControlState, step: int) -> float:
        """Return the strength in force at `step`. Its ramp is linear by default."""
        part = state.actions.get(self.kind)
        return self.neutral if part is None else part.ramp.linear(step)

    def effective(self, state: ControlState, step: int) -> float:
        """Return the strength with the effect of the parameters on it."""
        return self.strength(state, step)

    def tuned(self, state: ControlState) -> ControlState:
        """Return `state` with parameters that no command sets. Called on rank 0, which decides for all ranks."""
        return state

    def capability(self, layout: ParallelLayout) -> Capability:
        """Return if the action works in this training."""
        return ACTS

    def inspect(self, model: nn.Module, optimizers: OptimizerSet, selection: Selection) -> None:  # noqa: B027 - optional
        """Look at the modules of `model`: at the start, and again if another adapter takes over."""

    def hello(self, adapter: ArchitectureAdapter) -> Mapping[str, Any]:
        """Return the fields of hello that tell the monitor about this action."""
        return {}

    def facts(self) -> Mapping[str, Any]:
        """Return this action's share of `Agent.status()`."""
        return {}

    def apply(self, state: ControlState, step: int, update: Update) -> None:  # noqa: B027 - optional
        """Put `state` in force for `update`, the optimizer's update number `step`, counted from 0."""

    def revert(self) -> None:  # noqa: B027 - optional
        """Restore the user's own values. Idempotent. Also called when the agent is closed."""

    def at_edge(self, state: ControlState, step: int, agree: Callable[[bool], bool]) -> Completion | None:
        """Work between two steps: `step` updates are done, and the next forward has not begun.

        `agree` returns True if all ranks pass True. It waits for them: call it on all ranks or on none. Returns the
        outcome of a command that has come in force, if `completes_at_edge`. None asks again at the next edge.
        """
        return None

    def next_work(self, state: ControlState, step: int) -> int:
        """Return the first step after `step` before or after which the action has work, if `state` stays in force."""
        part = state.actions.get(self.kind)
        if part is None:
            return NEVER
        ramp = part.ramp
        is_over = ramp.target == self.neutral and step >= ramp.first_step + ramp.num_steps
        return NEVER if is_over and not part.parameters else step + 1

    def end(self) -> None:  # noqa: B027 - optional
        """Free memory. No command is applied any more. Idempotent."""

    def before_forwards(self, state: ControlState, step: int, forwards: NextForwards) -> Injection | None:
        """Prepare the next step; `step` updates are done. Returns its change to the stream, None for no change."""
        return None

    def on_renumbered(self) -> None:  # noqa: B027 - optional
        """Forget what belongs to a number of a step. This rank follows another count from now on."""

    def on_forward(self) -> None:  # noqa: B027 - optional
        """Handle the start of a training forward."""


def towards(
    state: ControlState,
    action: ControlAction,
    target: Target,
    step: int,
    num_steps: int,
    *,
    start: float | None = None,
) -> ControlState:
    """Return the state that moves `action` to `target` in `num_steps` steps, from `step` on.

    `start` is by default the strength in the step before.
    """
    start = action.strength(state, step - 1) if start is None else start
    ramp = Ramp(first_step=step, start=start, target=target.strength, num_steps=num_steps)
    part = ActionState(ramp=ramp, parameters=target.parameters)
    return state.changed(actions={**state.actions, action.kind: part})
