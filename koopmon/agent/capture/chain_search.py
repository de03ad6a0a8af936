"""The search for the stack that is a chain, among the candidates of a model, over several training forwards."""

from __future__ import annotations

from collections.abc import Collection
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

MAX_ATTEMPTS = 3
"""Training forwards that contradict a chain before koopmon gives up."""
PATIENCE = 8
"""Training forwards with skipped blocks after which a block that no forward has called counts as skipped too."""
MAX_PARTIAL_ATTEMPTS = 24
"""Training forwards with skipped blocks before koopmon gives up."""
HOW_TO_NAME = "set [model] stack (or KOOPMON_MODEL__STACK) to the path of the list of blocks that is one"


class SearchResult(NamedTuple):
    """The chain; or the reason why there is none; or neither, if the next forward may show one."""

    kept: Stack | None = None
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
            return SearchResult(kept)
        if self._num_attempts < (MAX_PARTIAL_ATTEMPTS if verifier.is_partial else MAX_ATTEMPTS):
            return SearchResult()
        blocks = [point.module for stack in self._selection.candidates for point in stack.points]
        unseen = compiled_whole(model, blocks) and not verifier.any_called
        compiled = f"{type(model).__name__}: {INSIDE_A_GRAPH}" if unseen else ""
        reason = compiled or not_verified(model, self._selection, reasons, HOW_TO_NAME)
        return SearchResult(None, reason, hopeless=bool(compiled or verifier.any_called))


def say_if_partly_trained(model: nn.Module, kept: Stack, trained: Collection[int]) -> None:
    """Log one line if the optimizer trains some blocks of `kept` only."""
    num_trained, num_layers = len(trained_layers(kept, trained)), len(kept.points)
    if num_trained == num_layers or not any(id(each) in trained for each in model.parameters()):
        return  # in the last case the optimizer holds other tensors for the same parameters
    name = kept.name or "the model"
    log_for_job(logger, f"watches {name}, of which the optimizer trains {num_trained} of {num_layers} blocks")
