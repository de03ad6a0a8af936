"""Requests to the training loop, which the loop may read after each step: to stop, and to write a checkpoint.

A rank that leaves its loop alone leaves the others in a collective for ever. All ranks therefore vote at the step edge
that follows the command, and the request is granted on all of them or on none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from koopmon.agent.control.action import NEVER, Completion, ControlAction, RequestRefusedError, Target
from koopmon.agent.control.state import ControlState
from koopmon.wire.messages import Applied, Command


class LoopRequest(ControlAction):
    """A request that all ranks see from the same step on. Its parameter `at_step` is the step of the last command."""

    neutral = 0.0
    completes_at_edge = True
    stays: ClassVar[bool]
    """True if the request stays until the end of the training, False if it ends with the next step."""

    def __init__(self) -> None:
        self.granted = False
        """True while the loop should follow the request."""
        self.was_read = False
        """True once the script has read it."""

    def target(self, request: Command | Applied, state: ControlState, step: int) -> Target:
        if isinstance(request, Applied):
            return self.released(state)
        if self.parameters(state).get("at_step") == step:
            raise RequestRefusedError(f"no second {self.kind}: another one comes in force at this step")
        return Target(1.0, {"at_step": step})

    def on_step_end(self) -> None:
        """End a request of the step before. Called at every step, also after the agent has failed on this rank."""
        self.granted = self.granted and self.stays

    def next_work(self, state: ControlState, step: int) -> int:
        return step + 1 if self.granted or self.parameters(state).get("at_step", -1) >= step else NEVER

    def at_edge(self, state: ControlState, step: int, agree: Callable[[bool], bool]) -> Completion | None:
        if self.kind not in state.actions or self.parameters(state).get("at_step") != step - 1:
            return None
        if not agree(True):
            return Completion("failed", "the ranks did not agree on it")
        self.granted = True
        return Completion("applied", "" if self.was_read else f"the script has not read agent.should_{self.kind}")


class StopRequest(LoopRequest):
    """`Agent.should_stop`."""

    kind = "stop"
    stays = True


class CheckpointRequest(LoopRequest):
    """`Agent.should_checkpoint`."""

    kind = "checkpoint"
    stays = False
