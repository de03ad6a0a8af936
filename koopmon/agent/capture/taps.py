"""Taps on the residual stream: the work of the hooks before and behind every block.

All candidate stacks are tapped until a training forward has shown which of them is a chain. A snapshot is taken in the
first training forward after a step edge that requested one, from the first traversal of the stack. Idle hooks return
after a check of a few flags.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from koopmon.agent.capture.block_hooks import BlockHooks, compiles
from koopmon.agent.capture.chain_search import VerifiedChain, say_if_partly_trained
from koopmon.agent.capture.forward_kind import has_values, in_checkpoint, recomputing
from koopmon.agent.capture.graph_taps import MIN_ROWS
from koopmon.agent.capture.missed_snapshots import MissedSnapshots, gradient_of
from koopmon.agent.capture.sampler import RankSnapshot, Sampler
from koopmon.agent.capture.snapshot_capture import SnapshotCapture
from koopmon.agent.capture.structure import BlockChanges
from koopmon.agent.capture.tap_events import ForwardPhase, TapEvents
from koopmon.agent.capture.tapped_stacks import TappedStacks
from koopmon.agent.capture.training_forwards import TrainingForwards
from koopmon.agent.circuit_breaker import CircuitBreaker, is_foreign, logger
from koopmon.agent.control.action import Injection
from koopmon.agent.stats import AgentStats
from koopmon.api import Observable, Point, Stack
from koopmon.errors import PluginError
from koopmon.logs import log_for_job
from koopmon.no_gradients import without_gradients
from koopmon.plugins import Selection, fall_back
from koopmon.state_position import argument_tensors, block_input, block_output, is_state, with_block_output
from koopmon.wire.messages import TrainingStep

MAX_RESTORED = 16
"""Times that hooks are put back that others have removed."""
# A node in the graph of gradients that no backward pass needs would count as one before all later ones of its thread.
_read_input, _read_output = without_gradients(block_input), without_gradients(block_output)


class ResidualTaps:
    """All module hooks of one agent. `step_edge` sets their work in the next step.

    `trained` returns the ids of the parameters that the optimizer updates. `num_rows` returns the number of tokens that
    taps in a compiled graph copy. `find_again` returns the candidates of a model whose blocks have changed; without it
    they are not followed.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        breaker: CircuitBreaker,
        stats: AgentStats,
        listener: TapEvents,
        trained: Callable[[], Collection[int]] = frozenset,
        num_rows: Callable[[], int] = lambda: MIN_ROWS,
        find_again: Callable[[nn.Module], Selection] | None = None,
    ) -> None:
        self.failure = ""
        """The reason why no more snapshots are taken; empty while there is none."""
        self.forwards = TrainingForwards(model, breaker, self, listener)
        self.stacks = TappedStacks(selection, self, breaker, num_rows)
        self.missed = MissedSnapshots(
            type(model).__name__, self.forwards, self.stacks, stats, may_pause=find_again is None
        )
        self._model = weakref.ref(model)
        self._stats = stats
        self._listener = listener
        self._trained = trained
        self._changes = BlockChanges(find_again)
        self._changes.watch(model, selection.candidates)
        self._is_first = find_again is not None
        """False for a further stack of the model, which was not announced."""
        self._phase = ForwardPhase.IDLE
        self._capture = SnapshotCapture(stats, self._on_captured, self.missed.add)
        self._injections: Sequence[Injection] = ()
        """Changes to the stream in this step."""
        self._mask: Tensor | None = None
        self._begun: tuple[Stack, ...] = ()
        """Further stacks that train since the last step: the next forward reports them."""
        self._num_restored = 0
        """Times that hooks were put back that others had removed."""

    @property
    def due(self) -> bool:
        """True if the next training forward is a snapshot."""
        return self._capture.due is not None

    @property
    def is_free(self) -> bool:
        """True if a chain is verified, and the next forwards have no work."""
        has_work = self._capture.due is not None or self._injections or self._begun
        return self.stacks.chain is not None and not has_work and not self.failure

    @property
    def obstacle(self) -> str:
        """The reason why no action may change the stream; empty if one may."""
        chain = self.stacks.chain
        return "" if chain is None else chain.obstacle

    def follow_wrapper(self) -> bool:
        """Follow the compiled wrapper of the model, whose own hooks are in its graph.

        Returns False if the forwards call no module outside of a graph.
        """
        return not self.stacks.graphs.traced or self.forwards.follow_wrapper() or self.forwards.count > 0

    def remove(self, reason: str = "") -> None:
        """Remove every hook from the model. Idempotent."""
        self.failure = self.failure or reason
        self._phase, self._capture.due, self._injections = ForwardPhase.IDLE, None, ()
        self.forwards.remove()
        self.stacks.remove()
        self._capture.abandon()

    def _give_up(self, reason: str) -> None:
        self.remove(reason)
        self._stats.taps_missing += 1
        self._listener.on_no_chain(reason)

    # The edge between two steps.

    def forward_over(self) -> None:
        """End the forward before each step. If the loop bypasses the root, no hook sees the end of the forward."""
        if not self.forwards.in_root:
            self.on_end(complete=True)
        if not self.failure and self.stacks.graphs.traced:
            started = time.perf_counter()
            self._read_graphs()
            self._stats.capture_seconds += time.perf_counter() - started
        if not self.forwards.count and self.forwards.others["in eval mode"] and not self.failure:
            self.forwards.trains_in_eval = self.stacks.have_gradients()

    def _read_graphs(self) -> None:
        """Take what the forwards of this step have left in the buffers of a graph."""
        chain = self.stacks.chain
        if chain is None:
            self._verify_in_graphs()
        elif self._capture.due is not None:
            states = self.stacks.graphs.states(chain.stack, self.stacks.adapter)
            if states is not None:
                self.missed.reset()
                chain.in_graph = True
                self._capture.take(chain.stack, states)

    def _verify_in_graphs(self) -> None:
        found, verifier = self.stacks.graphs.read(), self.stacks.search.verifier
        if not self.forwards.count:
            verifier.reset()
            if found:
                self._listener.on_graph_forward()
        try:
            for graph, copied in found:
                graph.observe(copied, verifier)
            if found or verifier.any_called:
                self._judge()
        except PluginError as error:
            if not self._replace_adapter(error):
                raise
        if self.stacks.chain is None:
            for graph, _ in found:
                graph.arm()

    def step_edge(self, due: tuple[Sampler, TrainingStep] | None, injections: Sequence[Injection]) -> None:
        """Start a new optimizer step, in which `injections` change the stream.

        With `due` the sampler takes a snapshot of that step in the first training forward from here on.
        """
        if self.failure:
            return
        uncalled = not self.forwards.count and not self.forwards.resting
        self.missed.end_step(due=self.due)
        self.forwards.start_step()
        looks = due is not None or (uncalled and not self.stacks.graphs.traced)
        if looks and self.stacks.chain is not None and self._follow_change():
            return
        if looks and not self.stacks.graphs.traced:
            self._restore_hooks()
        chain = self.stacks.chain
        self._capture.due = None if chain is None else due
        self._injections = injections if injections and not self.obstacle else ()
        if chain is None:
            return
        if chain.later:
            self._look_later(chain)
        if due is not None:
            self.missed.begin_step(chain.stack)
            if self.stacks.graphs.holds(chain.stack):
                sampler, training = due
                started = time.perf_counter()
                self.stacks.graphs.arm(chain.stack, functools.partial(sampler.choose, training.step))
                self._stats.capture_seconds += time.perf_counter() - started
        if not self.forwards.always_hooked:
            # A step without a forward of the root may have had one that began at a block.
            if due is not None or self._injections or uncalled:
                self.forwards.listen()
                self.stacks.resume()
            elif compiles():
                self.hook_always()
            else:
                self.stacks.pause()

    def _look_later(self, chain: VerifiedChain) -> None:
        """Find further stacks once they have gradients, as a generator that trains in turn."""
        found = [stack for stack in chain.later if gradient_of(stack) is not None]
        if found:
            chain.later = tuple(stack for stack in chain.later if stack not in found)
            self._begun += tuple(found)

    def _restore_hooks(self) -> None:
        """Put the hooks back that others have removed, MAX_RESTORED times."""
        if self._num_restored == MAX_RESTORED:
            return
        if any([self.forwards.restore(), self.stacks.restore()]):
            self._num_restored += 1
            self.missed.hooks_vanish = self._num_restored == MAX_RESTORED
            if self._num_restored == 1:
                log_for_job(logger, f"the hooks of {type(self._model()).__name__} were removed, and are back")

    def hook_always(self) -> None:
        """Put the hooks back, and leave them there also in the steps without work for them."""
        self.forwards.always_hooked = True
        self.forwards.listen()
        self.stacks.resume()

    # The choice of the stack.

    def _judge(self) -> None:
        """Evaluate what was observed: keep the stack that is a chain, or try again in the next forward."""
        model = self._model()
        if model is None:
            return
        trained = self._trained()
        chain, reason, hopeless = self.stacks.search.judge(model, trained)
        if chain is not None:
            self._keep(model, chain, trained)
        elif reason and not self._replace_adapter(reason) and not self._follow_change():
            if hopeless:
                self._give_up(reason)
            else:  # a later stage of the training may call them
                self.missed.add()

    def _keep(self, model: nn.Module, chain: VerifiedChain, trained: Collection[int]) -> None:
        self.stacks.keep(chain)
        self._changes.note_verified()
        self._capture.interleaved = chain.is_interleaved
        if self.stacks.are_on(model):
            self.forwards.always_hooked = True
        if self._is_first:  # a further stack may be frozen in turn
            say_if_partly_trained(model, chain.stack, trained)
        self._listener.on_chain_verified(chain)

    def _replace_adapter(self, reason: object) -> bool:
        """Change to koopmon's own adapter, if it claims the model and no chain is verified yet.

        Returns True on a change.
        """
        model, stacks = self._model(), self.stacks
        selection = None if stacks.chain is not None or model is None else fall_back(stacks.selection, model, reason)
        return self._watch(model, selection)

    def _follow_change(self) -> bool:
        """Look for the stack again if blocks were added, removed or replaced. Returns True if it is searched."""
        model, chain = self._model(), self.stacks.chain
        if model is None:
            return False
        kept = None if chain is None else chain.stack
        selection = self._changes.find(model, kept, traced=self.stacks.graphs.traced)
        if not self._watch(model, selection):
            return False
        self._capture.due, self._injections, self._begun = None, (), ()
        self._capture.abandon()
        self.missed.reset()
        return True

    def _watch(self, model: nn.Module | None, selection: Selection | None) -> bool:
        """Tap the candidates of `selection` in place of those before. Returns False if there are none."""
        if model is None or selection is None:
            return False
        self._phase = ForwardPhase.IDLE
        self._changes.watch(model, selection.candidates)
        self.stacks.watch(selection)
        self._listener.adapter_replaced(selection)
        return True

    # Forwards.

    def on_begin(self) -> None:
        if self._begun:  # not in the hook of an optimizer, whose other hooks are the same for all of its call
            begun, self._begun = self._begun, ()
            self._listener.on_stacks_train(begun)
        if self.stacks.chain is None:
            self.stacks.search.verifier.reset()
            self._phase = ForwardPhase.VERIFYING
        elif self._capture.due is not None:
            self._phase = ForwardPhase.SNAPSHOT
        elif self._injections:
            self._phase = ForwardPhase.INJECTING

    def on_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chain = self.stacks.chain
        if chain is not None and self._phase in (ForwardPhase.SNAPSHOT, ForwardPhase.INJECTING):
            self._mask = self.stacks.adapter.token_mask(module, args, kwargs, chain.stack)

    def on_end(self, *, complete: bool) -> None:
        if not complete:
            self._mask = None
        phase, self._phase = self._phase, ForwardPhase.IDLE
        if phase is ForwardPhase.IDLE and not self._capture.active:
            return
        if phase is ForwardPhase.VERIFYING:
            if not self.stacks.graphs.traced:  # `forward_over` reads what a graph holds
                self._judge()
        elif not complete:
            if self._capture.abandon():
                self.missed.add()
        elif (chain := self.stacks.chain) is not None:
            self._capture.end(chain.stack)

    # Calls of the blocks.

    def on_enter(self, hooks: BlockHooks, point: Point, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        off = self._phase is ForwardPhase.IDLE and not self._injections
        if off and self.forwards.in_root and self.forwards.begin_inside():
            off = self._phase is ForwardPhase.IDLE
        if off and (self.forwards.in_root or recomputing() or not self._is_new_forward(point)):
            return
        if self._hears(hooks):
            try:
                self._enter(hooks.stack, point, args, kwargs)
            except PluginError as error:
                if not self._replace_adapter(error):
                    raise

    def on_leave(self, hooks: BlockHooks, point: Point, output: Any) -> Any:
        if (self._phase is ForwardPhase.IDLE and not self._injections) or not self._hears(hooks):
            return None
        try:
            return self._leave(hooks.stack, point, output)
        except PluginError as error:
            if not self._replace_adapter(error):
                raise
        return None

    def on_read(
        self, hooks: BlockHooks, observable: Observable, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        readings = self._capture.readings
        if readings is not None and self._keeps(hooks.stack) and not recomputing() and not is_foreign():
            started = time.perf_counter()
            readings.take(observable, args, kwargs, output)
            self._stats.capture_seconds += time.perf_counter() - started

    def _hears(self, hooks: BlockHooks) -> bool:
        """Return False for a removed hook, which may still be called in this forward, and in a foreign forward."""
        return not hooks.ended and not is_foreign() and not self.forwards.is_elsewhere()

    def _keeps(self, stack: Stack) -> bool:
        chain = self.stacks.chain
        return chain is not None and chain.stack.name == stack.name

    def _enter(self, stack: Stack, point: Point, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        again, chain, forwards = recomputing(), self.stacks.chain, self.forwards
        kept = None if chain is None else chain.stack
        read = block_input if kept is None or self._injections else _read_input
        state = read(self.stacks.adapter, kept or stack, point.entry, args, kwargs)
        if not again and not forwards.in_root and self._is_new_forward(point):
            gradients = torch.is_grad_enabled() or (state is not None and in_checkpoint())
            self.hook_always()  # the loop bypasses the root
            self.on_end(complete=True)
            forwards.begin(point.entry.training, gradients)
        if not again:
            forwards.last_layer = point.layer
        if self._phase is ForwardPhase.IDLE and not again:
            return
        tensors = [state] if state is not None else [tensor for _, tensor in argument_tensors(args, kwargs)]
        if not all(map(has_values, tensors)):
            self._phase = ForwardPhase.IDLE
            forwards.dismiss()
            return
        if state is not None and hasattr(state, "to_local"):
            if kept is None and stack.form == "entries":
                return  # of the first layers of the blocks, while the blocks themselves may take a whole state
            self._give_up(f"{point.name} takes a DTensor, whose rows lie on several ranks")
            return
        if self._phase is ForwardPhase.VERIFYING and not again:
            self.stacks.search.verifier.observe_input(stack, point.layer, args, kwargs)
        elif chain is not None and self._keeps(stack) and state is not None and is_state(state):
            if self._phase is ForwardPhase.SNAPSHOT and not again:
                if torch.is_grad_enabled() or state.requires_grad or not chain.in_gradients or in_checkpoint():
                    self._capture.begin(chain.stack, state, self._mask)
                self._capture.enter(chain.stack, point, state)
            for injection in self._injections:
                injection.enter(point.layer, state, self._mask)

    def _is_new_forward(self, point: Point) -> bool:
        """Return True for a call outside of the root if the loop has called no block, or one as deep, before it."""
        last = self.forwards.last_layer
        if self.stacks.chain is None:
            return self._phase is not ForwardPhase.VERIFYING
        return not self._capture.expects(point) and (last is None or point.layer <= last)

    def _leave(self, stack: Stack, point: Point, output: Any) -> Any:
        again, chain = recomputing(), self.stacks.chain
        phase = ForwardPhase.INJECTING if again else self._phase
        if phase is ForwardPhase.VERIFYING:
            self.stacks.search.verifier.observe_output(stack, point.layer, output)
        elif phase is not ForwardPhase.IDLE and chain is not None and self._keeps(stack):
            read = block_output if self._injections else _read_output
            state = read(self.stacks.adapter, chain.stack, point.module, output)
            if state is None or not is_state(state):
                return None
            if not again:
                self._capture.leave(chain.stack, point, state)
            return self._inject(chain.stack, point, output, state)
        return None

    def _on_captured(self, snapshot: RankSnapshot | None) -> None:
        self._phase = ForwardPhase.INJECTING if self._injections else ForwardPhase.IDLE
        self.missed.reset()
        if snapshot is not None:
            self._listener.on_snapshot_ready(snapshot)

    def _inject(self, kept: Stack, point: Point, output: Any, state: Tensor) -> Any:
        """Return the output that replaces the block's `output`; None to keep it."""
        current = state
        for injection in self._injections:
            replaced = injection.leave(point.layer, current)
            current = current if replaced is None else replaced
        if current is state:
            return None
        return with_block_output(self.stacks.adapter, kept, point.module, output, current)
