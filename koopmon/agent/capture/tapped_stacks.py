"""The hooks on the candidate stacks of a model, and on the chain alone once it is verified."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from koopmon.agent.capture.block_hooks import BlockEvents, BlockHooks
from koopmon.agent.capture.chain_search import ChainSearch, VerifiedChain
from koopmon.agent.capture.compiled_stacks import CompiledStacks
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.plugins import Selection


class TappedStacks:
    """The stacks of one selection at a time. `events` receives the calls of their blocks.

    `num_rows` returns the number of tokens that taps in a compiled graph copy.
    """

    def __init__(
        self, selection: Selection, events: BlockEvents, breaker: CircuitBreaker, num_rows: Callable[[], int]
    ) -> None:
        self.readers = CircuitBreaker("reading the family's observables")
        self._events = events
        self._breaker = breaker
        self._num_rows = num_rows
        self._hooks: dict[str, BlockHooks] = {}
        self.watch(selection)

    def watch(self, selection: Selection) -> None:
        """Tap the candidates of `selection` alone. The next training forward verifies which of them is a chain."""
        self.remove()
        self.chain: VerifiedChain | None = None
        """None before the first verified forward."""
        self.selection = selection
        self.adapter = selection.adapter
        self.search = ChainSearch(selection)
        self.graphs = CompiledStacks(selection.candidates, self._num_rows)
        self._hooks = {
            stack.name: BlockHooks(self._events, stack, selection, self.graphs, self._breaker, self.readers)
            for stack in selection.candidates
        }

    def keep(self, chain: VerifiedChain) -> None:
        """Tap `chain` alone."""
        self.chain = chain
        for name in set(self._hooks) - {chain.stack.name}:
            self._untap(name)
        chain.in_graph = self.graphs.was_called(chain.stack)

    def remove(self) -> None:
        """Remove all hooks. Idempotent."""
        for name in list(self._hooks):
            self._untap(name)

    def _untap(self, name: str) -> None:
        hooks = self._hooks.pop(name)
        hooks.ended = True
        self.graphs.close(name)
        if not self.graphs.traced:  # without a hook of any module in the graph, a compiler would start again
            hooks.remove()

    def pause(self) -> None:
        """Take the hooks out of the blocks. Idempotent."""
        for hooks in self._hooks.values():
            hooks.pause()

    def resume(self) -> None:
        """Put paused hooks back. Idempotent."""
        for hooks in self._hooks.values():
            hooks.resume()

    def restore(self) -> bool:
        """Put hooks back that others have removed. Returns True if there were any."""
        restored = [hooks.restore() for hooks in self._hooks.values()]
        return any(restored)

    def are_on(self, module: nn.Module) -> bool:
        """Return True if `module` has one of the hooks."""
        return any(hooks.are_on(module) for hooks in self._hooks.values())

    def have_gradients(self) -> bool:
        """Return True if the last block of a candidate has a gradient."""
        return any(
            parameter.grad is not None
            for stack in self.selection.candidates
            for parameter in stack.points[-1].parameters()
        )
