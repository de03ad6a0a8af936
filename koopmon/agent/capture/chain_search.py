"""The search for the stack that is a chain, among the candidates of a model, over several training forwards."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from koopmon.agent.capture.compiled_stacks import INSIDE_A_GRAPH
from koopmon.agent.circuit_breaker import logger
from koopmon.agent.parallelism import compiled_whole
from koopmon.api import Stack
from koopmon.chain_verifier import ChainVerifier, trained_layers
from koopmon.discovery import not_verified
from koopmon.logs import log_for_job
from koopmon.plugins import Selection
from koopmon.state_position import SUM

MAX_ATTEMPTS = 3
"""Training forwards that contradict a chain before koopmon gives up."""
PATIENCE = 8
"""Training forwards with skipped blocks after which a block that no forward has called counts as skipped too."""
MAX_PARTIAL_ATTEMPTS = 24
"""Training forwards with skipped blocks before koopmon gives up."""
HOW_TO_NAME = "if another list of blocks is one, set [model] stack (or KOOPMON_MODEL__STACK) to its path"


@dataclass(slots=True)
class VerifiedChain:
    """The stack that is a chain, and the facts that the forward has shown in which it was verified."""

    stack: Stack
    width: int
    """D."""
    update_exponent: float | None
    """The exponent of the growth of updates with the state, if known."""
    fingerprint: int
    """Fingerprint of the states that entered the chain: equal on ranks that hold the same tokens."""
    in_gradients: bool
    """True if the traversal ran with gradients: one without is not the one that trains."""
    is_interleaved: bool
    """True if blocks are called for other inputs in between, as a block that takes two inputs in turn."""
    beside: tuple[Stack, ...]
    """Other stacks that train, found in the same forward."""
    later: tuple[Stack, ...]
    """Further stacks of the optimizers' parameters that did not train then."""
    form_obstacle: str
    """The reason in the stack's form why no action may change the stream; empty if one may."""
    in_graph: bool = False
    """True if the blocks run inside a compiled graph."""

    @property
    def obstacle(self) -> str:
        """The reason why no action may change the stream; empty if one may."""
        inside = "the blocks run inside a compiled graph, which it cannot change"
        return self.form_obstacle or (inside if self.in_graph else "")


class SearchResult(NamedTuple):
    """The chain; or the reason why there is none; or neither, if the next forward may show one."""

    chain: VerifiedChain | None = None
    reason: str = ""
    hopeless: bool = False
    """True if no later stage of the training can show a chain."""


class ChainSearch:
    """Evaluates what `verifier` has observed in each training forward."""

    def __init__(self, selection: Selection) -> None:
        self.verifier = ChainVerifier(selection.adapter, selection.candidates)
        self._selection = selection
        self._num_attempts = 0

    def judge(self, model: nn.Module, trained: Collection[int]) -> SearchResult:
        """Evaluate one forward. `trained` are the ids of the parameters that the optimizer updates."""
        verifier = self.verifier
        self._num_attempts += 1
        kept, reasons = verifier.verdict(trained, skips=self._num_attempts > PATIENCE)
        if verifier.is_partial and self._num_attempts <= PATIENCE:
            return SearchResult()  # every rank must keep the same stack, whichever blocks it has skipped so far
        if kept is None and verifier.is_unchanged and self._num_attempts <= MAX_PARTIAL_ATTEMPTS:
            return SearchResult()  # the values say nothing until the blocks have learned
        if kept is not None:
            return SearchResult(self._facts(kept))
        if self._num_attempts < (MAX_PARTIAL_ATTEMPTS if verifier.is_partial else MAX_ATTEMPTS):
            return SearchResult()
        blocks = [point.module for stack in self._selection.candidates for point in stack.points]
        unseen = compiled_whole(model, blocks) and not verifier.any_called
        compiled = f"{type(model).__name__}: {INSIDE_A_GRAPH}" if unseen else ""
        reason = compiled or not_verified(model, self._selection, reasons, HOW_TO_NAME)
        return SearchResult(None, reason, hopeless=bool(compiled or verifier.any_called))

    def _facts(self, kept: Stack) -> VerifiedChain:
        verifier = self.verifier
        chain = VerifiedChain(
            kept,
            verifier.width(kept),
            verifier.update_exponent(kept),
            verifier.fingerprint(kept),
            verifier.in_gradients(kept),
            verifier.is_interleaved(kept),
            verifier.beside,
            verifier.later,
            _form_obstacle(kept),
        )
        verifier.reset()
        return chain


def _form_obstacle(kept: Stack) -> str:
    if kept.form == "entries":
        return "the model adds the blocks' outputs to the state itself"
    if kept.position is not None and kept.position.left == SUM:
        return "the state is the sum of two tensors"
    if len({id(point.module) for point in kept.points}) < len(kept.points):
        return "one block is several layers, and it acts on single ones"
    return ""


def say_if_partly_trained(model: nn.Module, kept: Stack, trained: Collection[int]) -> None:
    """Log one line if the optimizer trains some blocks of `kept` only."""
    num_trained, num_layers = len(trained_layers(kept, trained)), len(kept.points)
    if num_trained == num_layers or not any(id(each) in trained for each in model.parameters()):
        return  # in the last case the optimizer holds other tensors for the same parameters
    name = kept.name or "the model"
    log_for_job(logger, f"watches {name}, of which the optimizer trains {num_trained} of {num_layers} blocks")
