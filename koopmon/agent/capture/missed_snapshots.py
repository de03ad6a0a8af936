"""Snapshots that were due and were not taken: they wait for a step that trains the stack, or count as missed.

A step that trains other parts of the model, as the critic beside a generator, leaves no new gradient in the stack.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from koopmon.agent.capture.block_hooks import compiles
from koopmon.agent.capture.compiled_stacks import INSIDE_A_GRAPH
from koopmon.agent.capture.tapped_stacks import TappedStacks
from koopmon.agent.capture.training_forwards import TrainingForwards
from koopmon.agent.circuit_breaker import logger
from koopmon.agent.stats import AgentStats
from koopmon.api import Stack
from koopmon.logs import log_for_job

MAX_MISSED = 3
"""Consecutive snapshots missed by the taps before one warning."""
MAX_WAITED = 20
"""Steps that a snapshot waits for a call of the blocks, as those of a generator while its critic trains."""
_ATTACH = (
    "attach to the module that the loop calls, after any block has been replaced (`koopmon run` attaches when the"
    " optimizer is made)"
)


class MissedSnapshots:
    """Counts the missed snapshots of the model `name`, and logs the cause of MAX_MISSED consecutive ones.

    A stack that `may_pause` need not train in each step.
    """

    def __init__(
        self, name: str, forwards: TrainingForwards, stacks: TappedStacks, stats: AgentStats, *, may_pause: bool
    ) -> None:
        self.waits = False
        """True if a snapshot was due in the last step, and the step has called no block with gradients."""
        self.hooks_vanish = False
        """True if others have removed the hooks again and again."""
        self._name = name
        self._forwards = forwards
        self._stacks = stacks
        self._stats = stats
        self._may_pause = may_pause
        self._num_missed = 0
        self._num_waited = 0
        """Steps that the snapshot that is due has waited for a call of the blocks."""
        self._gradient: tuple[weakref.ref[Tensor], int] | None = None
        """A gradient of the stack when the snapshot became due, with its version."""

    def begin_step(self, stack: Stack) -> None:
        """Begin a step in which a snapshot of `stack` is due."""
        gradient = gradient_of(stack)
        self._gradient = None if gradient is None else (weakref.ref(gradient), _version(gradient))

    def end_step(self, due: bool) -> None:
        """End a step. `due`: a snapshot was due in it, and was not taken."""
        chain, forwards = self._stacks.chain, self._forwards
        learned = forwards.trains_in_eval and not forwards.count  # the next forward counts as training
        in_turn = due and chain is not None and self._trains_others(chain.stack)
        self.waits = in_turn and self._num_waited < MAX_WAITED
        if self.waits:
            self._num_waited += 1
        elif self._may_pause and (in_turn or chain is None):
            pass  # the stack may not train in this step, or not any more
        elif due or (chain is None and not forwards.count and not learned):
            self.add()

    def add(self) -> None:
        """Count a missed snapshot."""
        self._stats.taps_missing += 1
        self._num_missed += 1
        if self._num_missed == MAX_MISSED:
            log_for_job(logger, f"{self._name} trains, but {MAX_MISSED} snapshots were missed: {self._cause()}")

    def reset(self) -> None:
        """Note that a snapshot was taken."""
        self._num_missed = self._num_waited = 0

    def _trains_others(self, stack: Stack) -> bool:
        """Return True if the step has called no block of `stack` and given it no gradient."""
        if self._stacks.graphs.traced or compiles():
            return False
        gradient, before = gradient_of(stack), self._gradient
        if gradient is None:
            return True
        return before is not None and before[0]() is gradient and before[1] == _version(gradient)

    def _cause(self) -> str:
        """Return the cause of missed snapshots, and its remedy."""
        forwards, traced = self._forwards, self._stacks.graphs.traced
        if forwards.count == 0:
            if forwards.others["transformed"]:
                return "its forwards run under torch.func or a tracer, where koopmon takes no states"
            if forwards.others["without gradients"]:
                return "its forwards run without gradients; koopmon watches the model that the optimizer trains"
            if not traced and not compiles() and not forwards.others:
                return "neither it nor one of its blocks is called; attach to the module that the loop calls"
        if traced:
            return (
                "its blocks now run in a graph without taps, as after a second model of its class was compiled;"
                " compile the blocks one by one, block = torch.compile(block)"
            )
        if self.hooks_vanish:
            return "its hooks were removed again and again"
        if forwards.count and self._stacks.chain is None:
            methods = "call each as block(x): other methods have no hooks"
            return f"its blocks are not called: {_ATTACH}; {methods}; {INSIDE_A_GRAPH}"
        return f"taps did not fire: {_ATTACH}; {INSIDE_A_GRAPH}"


def gradient_of(stack: Stack) -> Tensor | None:
    """Return the first gradient in the middle block of `stack`."""
    middle = stack.points[len(stack.points) // 2]
    return next((each.grad for each in middle.parameters() if each.grad is not None), None)


def _version(gradient: Tensor) -> int:
    return 0 if gradient.is_inference() else gradient._version
