"""The phases of a forward that is tapped, and the events that the taps report."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any, Protocol

from koopmon.agent.capture.chain_search import VerifiedChain
from koopmon.agent.capture.sampler import RankSnapshot
from koopmon.api import Stack
from koopmon.plugins import Selection


class ForwardPhase(Enum):
    """The work of the taps in the forward that runs now."""

    IDLE = auto()
    """None: no training forward runs, or nothing is due in it."""
    VERIFYING = auto()
    """Show which candidate stack is a chain."""
    SNAPSHOT = auto()
    """Take a snapshot, and let the actions change the stream."""
    INJECTING = auto()
    """Let the actions change the stream."""


class TapEvents(Protocol):
    """Receiver of the taps' events. All methods are called in the training thread."""

    def on_forward(self) -> None:
        """Handle the start of a training forward."""

    def on_output(self, output: Any) -> None:
        """Handle the output of the model in a training forward."""

    def on_graph_forward(self) -> None:
        """Handle the end of a step whose forwards ran in a compiled graph, where no hook sees them."""

    def on_chain_verified(self, chain: VerifiedChain) -> None:
        """Handle the verified chain."""

    def on_no_chain(self, reason: str) -> None:
        """Handle the end of the search, which has found no chain."""

    def on_stacks_train(self, stacks: tuple[Stack, ...]) -> None:
        """Handle further stacks that have begun to train since the chain was verified."""

    def on_no_step(self) -> None:
        """Handle many forwards without a step, while they were not followed."""

    def on_snapshot_ready(self, snapshot: RankSnapshot) -> None:
        """Handle a complete snapshot."""

    def adapter_replaced(self, selection: Selection) -> None:
        """Handle a new adapter: the one before has failed, or found no chain."""
