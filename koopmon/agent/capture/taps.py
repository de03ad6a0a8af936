"""Taps on the residual stream, registered once: before the first block, and behind every block.

All candidate stacks are tapped until one training forward has shown which of them is a chain. The taps of the others
are then removed. A snapshot is taken in the first grad-enabled, training-mode forward after a step edge that requested
one. Idle hooks return after a check of a few flags.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from koopmon.agent.capture.sampler import RankSnapshot, Sampler
from koopmon.agent.circuit_breaker import CircuitBreaker, logger
from koopmon.agent.control.action import Injection
from koopmon.agent.parallelism import compiled_whole
from koopmon.agent.stats import AgentStats
from koopmon.api import Observable, Point, Stack
from koopmon.chain_verifier import ChainVerifier
from koopmon.discovery import not_verified
from koopmon.errors import PluginError
from koopmon.observables import declared
from koopmon.plugins import Selection, fall_back
from koopmon.wire.messages import TrainingStep

MAX_ATTEMPTS = 3
"""Failed verifications of the chain, one per training forward, before koopmon gives up."""
MAX_MISSED = 3
"""Consecutive snapshots missed by the taps before one warning."""
INSIDE_A_GRAPH = "blocks inside one compiled graph show nothing: compile them one by one, block = torch.compile(block)"


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

    def on_chain_verified(self, stack: Stack, width: int, update_exponent: float | None, fingerprint: int) -> None:
        """Handle the verified chain `stack`, with D = `width`.

        `update_exponent` is that of the growth of updates with the state, if known. `fingerprint` is of the states that
        entered the chain: equal on ranks that hold the same tokens.
        """

    def on_snapshot_ready(self, snapshot: RankSnapshot) -> None:
        """Handle a complete snapshot."""

    def adapter_replaced(self, selection: Selection) -> None:
        """Handle a new adapter: the one before has failed, or found no chain."""


def recomputing() -> bool:
    """Return True during a backward pass in this thread.

    A forward inside it is a recomputation by activation checkpointing.
    """
    return torch._C._current_graph_task_id() != -1


class ResidualTaps:
    """All module hooks of one agent. `step_edge` sets their work in the next step."""

    def __init__(
        self, model: nn.Module, selection: Selection, breaker: CircuitBreaker, stats: AgentStats, listener: TapEvents
    ) -> None:
        self.stack: Stack | None = None
        """The verified chain; None before the first verified forward."""
        self.failure = ""
        """The reason why no more snapshots are taken; empty while there is none."""
        self.width = 0
        self.num_forwards = 0
        """Training forwards since the last step edge."""
        self.readers = CircuitBreaker("reading the family's observables")
        self._model = weakref.ref(model)
        self._breaker = breaker
        self._stats = stats
        self._listener = listener
        self._phase = ForwardPhase.IDLE
        self._due: tuple[Sampler, TrainingStep] | None = None
        """The snapshot to take in the next training forward."""
        self._sampling: Sampler | None = None
        """Takes the snapshot of this forward."""
        self._injections: Sequence[Injection] = ()
        """Changes to the stream in this step."""
        self._num_missed = 0
        self._root_called = False
        self._mask: Tensor | None = None
        self._root_handles = [
            model.register_forward_pre_hook(breaker.hook(self._enter_root), with_kwargs=True),
            model.register_forward_hook(breaker.hook(self._leave_root)),
        ]
        self._watch(selection)

    def _watch(self, selection: Selection) -> None:
        """Tap the candidates of `selection`. The next training forward verifies which of them is a chain."""
        self._selection = selection
        self._adapter = selection.adapter
        self._verifier = ChainVerifier(selection.adapter, selection.candidates)
        self._num_attempts = 0
        self._handles: dict[str, list[Any]] = {}
        for stack in selection.candidates:
            # Readers come first, because the tap behind the last block completes the snapshot.
            handles = [self._read(stack, each) for each in declared(selection.families, stack)]
            self._handles[stack.name] = handles + [tap for point in stack.points for tap in self._tap(stack, point)]

    def _tap(self, stack: Stack, point: Point) -> list[Any]:
        first, selection = point.layer == 0, self._selection

        def enter_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            begins = first and (self._phase is ForwardPhase.SNAPSHOT or not self._root_called)
            if begins or self._phase is ForwardPhase.VERIFYING or self._injections:
                try:
                    state = selection.adapter.block_input(module, args, kwargs)
                except PluginError as error:
                    if not self._replace_adapter(error):
                        raise
                if self._selection is selection:  # a removed hook may still be called in this forward
                    self._enter(stack, point, state)

        def leave_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._sampling is not None or self._phase is ForwardPhase.VERIFYING or self._injections:
                try:
                    state = selection.adapter.block_output(module, output)
                except PluginError as error:
                    if not self._replace_adapter(error):
                        raise
                if self._selection is selection:
                    return self._leave(stack, point, output, state)
            return None

        return [
            point.entry.register_forward_pre_hook(self._breaker.hook(enter_block), with_kwargs=True),
            point.module.register_forward_hook(self._breaker.hook(leave_block)),
        ]

    def _read(self, stack: Stack, observable: Observable) -> Any:
        def leave_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if stack is self.stack and self._sampling is not None and not recomputing():
                started = time.perf_counter()
                self._sampling.readings.take(observable, args, kwargs, output)
                self._stats.capture_seconds += time.perf_counter() - started

        return observable.module.register_forward_hook(self.readers.hook(leave_module), with_kwargs=True)

    def _replace_adapter(self, reason: object) -> bool:
        """Change to koopmon's own adapter, if it claims the model and no chain is verified yet.

        Returns True on a change.
        """
        model = self._model()
        following = None if self.stack is not None or model is None else fall_back(self._selection, model, reason)
        if following is None:
            return False
        self._phase = ForwardPhase.IDLE
        for name in self._handles:
            self._untap(name)
        self._watch(following)
        self._listener.adapter_replaced(following)
        return True

    def remove(self, reason: str = "") -> None:
        """Remove every hook from the model. Idempotent."""
        self.failure = self.failure or reason
        self._phase, self._due, self._injections = ForwardPhase.IDLE, None, ()
        for handle in self._root_handles:
            handle.remove()
        for name in self._handles:
            self._untap(name)
        self._root_handles, self._handles = [], {}
        if self._sampling is not None:
            self._sampling.abandon()
            self._sampling = None

    def _untap(self, name: str) -> None:
        for handle in self._handles[name]:
            handle.remove()

    def _give_up(self, reason: str) -> None:
        self.remove(reason)
        self._stats.taps_missing += 1
        logger.warning("koopmon: no snapshots, training goes on: %s", reason)

    def forward_over(self) -> None:
        """End the forward before each step. If the loop bypasses the root, no hook sees the end of the forward."""
        if self._phase is ForwardPhase.VERIFYING:
            self._conclude()

    def step_edge(self, due: tuple[Sampler, TrainingStep] | None, injections: Sequence[Injection]) -> None:
        """Start a new optimizer step, in which `injections` change the stream.

        With `due` the sampler takes a snapshot of that step in the first training forward from here on.
        """
        if self.failure:
            return
        if self._due is not None or (self.stack is None and self.num_forwards == 0):
            self._missed()
        self.num_forwards = 0
        self._due = None if self.stack is None else due
        self._injections = injections

    def _missed(self) -> None:
        self._stats.taps_missing += 1
        self._num_missed += 1
        if self._num_missed == MAX_MISSED:
            logger.warning(
                "koopmon: %s trains, but %d snapshots were missed as taps did not fire: attach to the module that the"
                " loop calls, after any block has been replaced; %s",
                type(self._model()).__name__,
                MAX_MISSED,
                INSIDE_A_GRAPH,
            )

    # Hooks of the root model.

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing():
            return
        self._root_called = True
        self._begin_forward(module.training)
        if self.stack is not None and self._phase in (ForwardPhase.SNAPSHOT, ForwardPhase.INJECTING):
            self._mask = self._adapter.token_mask(module, args, kwargs, self.stack)

    def _begin_forward(self, training: bool) -> None:
        # The forward before this one may have raised, or may have bypassed the root: no hook has seen its end.
        self._end_forward()
        self._mask = None
        if not training or not torch.is_grad_enabled() or self.failure:
            return
        self._listener.on_forward()  # may end the step before, which counts its forwards
        self.num_forwards += 1
        if self.stack is None:
            self._verifier.reset()
            self._phase = ForwardPhase.VERIFYING
        elif self._due is not None:
            self._phase = ForwardPhase.SNAPSHOT
        elif self._injections:
            self._phase = ForwardPhase.INJECTING

    def _leave_root(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not recomputing():
            self._end_forward()

    def _end_forward(self) -> None:
        phase, self._phase = self._phase, ForwardPhase.IDLE
        if phase is ForwardPhase.VERIFYING:
            self._conclude()
        elif self._sampling is not None:  # the forward has left the chain before its end
            self._sampling.abandon()
            self._sampling = None
            self._missed()

    def _conclude(self) -> None:
        """Evaluate one observed forward: keep the stack that is a chain, or try again in the next forward."""
        self._phase = ForwardPhase.IDLE
        self._num_attempts += 1
        kept, reasons = self._verifier.verdict()
        exponent = None if kept is None else self._verifier.update_exponent(kept)
        fingerprint = 0 if kept is None else self._verifier.fingerprint(kept)
        self._verifier.reset()
        if kept is not None:
            self.stack = kept
            for name in set(self._handles) - {kept.name}:
                self._untap(name)
                del self._handles[name]
            self._listener.on_chain_verified(kept, self.width, exponent, fingerprint)
        elif self._num_attempts >= MAX_ATTEMPTS and (model := self._model()) is not None:
            blocks = [point.module for stack in self._selection.candidates for point in stack.points]
            compiled = f"{type(model).__name__}: {INSIDE_A_GRAPH}" if compiled_whole(model, blocks) else ""
            reason = compiled or not_verified(model, self._selection, reasons)
            if not self._replace_adapter(reason):
                self._give_up(reason)

    # Hooks of the blocks.

    def _enter(self, stack: Stack, point: Point, state: Tensor | None) -> None:
        again = recomputing()
        if point.layer == 0 and not again and not self._root_called:
            self._begin_forward(point.entry.training)
        if state is not None and hasattr(state, "to_local"):
            self._give_up(f"{point.name} takes a DTensor, whose rows lie on several ranks")
            return
        phase = ForwardPhase.INJECTING if again else self._phase
        if phase is ForwardPhase.VERIFYING:
            self._verifier.observe_input(stack, point.layer, state)
            if state is not None and state.dim():
                self.width = state.shape[-1]
        elif phase is not ForwardPhase.IDLE and stack is self.stack and state is not None:
            if phase is ForwardPhase.SNAPSHOT and point.layer == 0 and self._due is not None:
                self._begin_snapshot(*self._due, len(stack.points) + 1, state)
            for injection in self._injections:
                injection.enter(point.layer, state, self._mask)

    def _begin_snapshot(self, sampler: Sampler, training: TrainingStep, num_points: int, state: Tensor) -> None:
        self._due = None
        if state.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # every replay of a CUDA graph would repeat a captured copy
        started = time.perf_counter()
        if sampler.begin(training, num_points, state, self._mask):
            sampler.put(0, state)
            self._sampling = sampler
        self._stats.capture_seconds += time.perf_counter() - started

    def _leave(self, stack: Stack, point: Point, output: Any, state: Tensor | None) -> Any:
        again = recomputing()
        phase = ForwardPhase.INJECTING if again else self._phase
        if phase is ForwardPhase.VERIFYING:
            self._verifier.observe_output(stack, point.layer, state)
        elif phase is not ForwardPhase.IDLE and stack is self.stack and state is not None:
            if self._sampling is not None and not again:
                self._capture(self._sampling, point.layer + 1, len(stack.points), state)
            return self._inject(point, output, state)
        return None

    def _capture(self, sampler: Sampler, index: int, last: int, state: Tensor) -> None:
        started = time.perf_counter()
        if not sampler.put(index, state):
            self._sampling = None
            self._missed()
        elif index == last:
            self._sampling = None
            self._num_missed = 0
            snapshot = sampler.finish()
            if snapshot is not None:
                self._listener.on_snapshot_ready(snapshot)
        self._stats.capture_seconds += time.perf_counter() - started

    def _inject(self, point: Point, output: Any, state: Tensor) -> Any:
        """Return the output that replaces the block's `output`; None to keep it."""
        current = state
        for injection in self._injections:
            replaced = injection.leave(point.layer, current)
            current = current if replaced is None else replaced
        return None if current is state else self._adapter.with_block_output(point.module, output, current)
