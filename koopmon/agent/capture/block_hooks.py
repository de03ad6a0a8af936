"""The hooks on the blocks of one candidate stack, and on the modules that its observables read."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from torch import nn

from koopmon.agent.capture.compiled_stacks import CompiledStacks
from koopmon.agent.capture.hidden_hooks import HiddenHook, add_hook, add_pre_hook, restore
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
        self.ended = False
        """True if the hooks do nothing more. Those that a graph has found stay in their modules."""
        self._paused = False
        # Readers come first, because the tap behind the last block completes the snapshot.
        self._handles = [self._read(events, each, readers) for each in declared(selection.families, stack)]
        for point in stack.points:
            self._handles += self._tap(events, point, graphs, breaker)

    def _tap(
        self, events: BlockEvents, point: Point, graphs: CompiledStacks, breaker: CircuitBreaker
    ) -> list[HiddenHook]:
        tap = graphs.tap(self.stack, point)

        def enter_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            events.on_enter(self, point, args, kwargs)

        def leave_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return events.on_leave(self, point, output)

        return [
            add_pre_hook(point.entry, breaker.hook(enter_block, None if tap is None else tap.enter)),
            add_hook(point.module, breaker.hook(leave_block, None if tap is None else tap.leave)),
        ]

    def _read(self, events: BlockEvents, observable: Observable, readers: CircuitBreaker) -> HiddenHook:
        def leave_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            events.on_read(self, observable, args, kwargs, output)

        return add_hook(observable.module, readers.hook(leave_module), with_kwargs=True)

    def are_on(self, module: nn.Module) -> bool:
        """Return True if `module` has one of the hooks."""
        return any(hook.module is module for hook in self._handles)

    def pause(self) -> None:
        """Take the hooks out of the modules. Idempotent."""
        if not self._paused:
            self._paused = True
            for hook in self._handles:
                hook.pause()

    def resume(self) -> None:
        """Put paused hooks back, in their order. Idempotent."""
        if self._paused:
            self._paused = False
            for hook in reversed(self._handles):
                hook.resume()

    def restore(self) -> bool:
        """Put hooks back that others have removed. Returns True if there were any."""
        return restore(self._handles)

    def remove(self) -> None:
        """Remove every hook. Idempotent."""
        for hook in self._handles:
            hook.remove()


def compiles() -> bool:
    """Return True if this process has called torch.compile, for any function. A graph must find the hooks in place."""
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return False
    backends = getattr(compiler, "cached_backends", None)  # the compiler notes None too, for functions that it skips
    return backends is None or any(map(callable, backends.values()))
