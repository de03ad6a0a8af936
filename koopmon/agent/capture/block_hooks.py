"""The hooks on the blocks of one candidate stack, and on the modules that its observables read."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from koopmon.agent.capture.compiled_stacks import CompiledStacks
from koopmon.agent.capture.hidden_hooks import add_hook, add_pre_hook
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.api import Observable, Point, Stack
from koopmon.observables import declared
from koopmon.plugins import Selection


class BlockEvents(Protocol):
    """Receiver of the calls of blocks."""

    def on_enter(self, hooks: BlockHooks, point: Point, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Handle a call of the block of `point`."""

    def on_leave(self, hooks: BlockHooks, point: Point, output: Any) -> Any:
        """Handle the end of a call. Returns the value that replaces `output`; None to keep it."""

    def on_read(
        self, hooks: BlockHooks, observable: Observable, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Handle the end of a call of the module of `observable`."""


class BlockHooks:
    """The hooks of one stack of `selection`. A compiler puts the taps of `graphs` into its graph instead."""

    def __init__(
        self,
        events: BlockEvents,
        stack: Stack,
        selection: Selection,
        graphs: CompiledStacks,
        breaker: CircuitBreaker,
        readers: CircuitBreaker,
    ) -> None:
        self.stack = stack
        self.selection = selection
        # Readers come first, because the tap behind the last block completes the snapshot.
        self._handles = [self._read(events, each, readers) for each in declared(selection.families, stack)]
        for point in stack.points:
            self._handles += self._tap(events, point, graphs, breaker)

    def _tap(self, events: BlockEvents, point: Point, graphs: CompiledStacks, breaker: CircuitBreaker) -> list[Any]:
        tap = graphs.tap(self.stack, point)

        def enter_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            events.on_enter(self, point, args, kwargs)

        def leave_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return events.on_leave(self, point, output)

        return [
            add_pre_hook(point.entry, breaker.hook(enter_block, None if tap is None else tap.enter)),
            add_hook(point.module, breaker.hook(leave_block, None if tap is None else tap.leave)),
        ]

    def _read(self, events: BlockEvents, observable: Observable, readers: CircuitBreaker) -> Any:
        def leave_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            events.on_read(self, observable, args, kwargs, output)

        return add_hook(observable.module, readers.hook(leave_module), with_kwargs=True)

    def remove(self) -> None:
        """Remove every hook. Idempotent."""
        for handle in self._handles:
            handle.remove()
