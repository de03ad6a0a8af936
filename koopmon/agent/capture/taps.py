"""Taps on the residual stream, registered once: before and behind every block.

All candidate stacks are tapped until a training forward has shown which of them is a chain. The taps of the others are
then removed. A snapshot is taken in the first training forward after a step edge that requested one, from the first
traversal of the stack. Idle hooks return after a check of a few flags.

A training forward runs with gradients and in training mode. A loop that trains in eval mode is known by its updates:
the parameters had gradients, and no forward in training mode came before. A forward begins at the root, or at the first
block where the loop bypasses the root.
"""

from __future__ import annotations

import functools
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum, auto
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from koopmon.agent.capture.graph_taps import MIN_ROWS, GraphTaps, supported
from koopmon.agent.capture.hidden_hooks import add_hook, add_pre_hook
from koopmon.agent.capture.sampler import RankSnapshot, Sampler
from koopmon.agent.circuit_breaker import CircuitBreaker, is_foreign, logger
from koopmon.agent.control.action import Injection
from koopmon.agent.parallelism import compiled_whole, wrappers
from koopmon.agent.stats import AgentStats
from koopmon.api import Observable, Point, Stack
from koopmon.chain_verifier import MIN_SHARE_CALLED, ChainVerifier, trained_layers
from koopmon.discovery import not_verified
from koopmon.errors import PluginError
from koopmon.logs import log_for_job
from koopmon.observables import declared
from koopmon.plugins import Selection, fall_back
from koopmon.state_position import SUM, argument_tensors, block_input, block_output, is_state, with_block_output
from koopmon.walk import Walk
from koopmon.wire.messages import TrainingStep

MAX_ATTEMPTS = 3
"""Training forwards that contradict a chain before koopmon gives up."""
PATIENCE = 8
"""Training forwards with skipped blocks after which a block that no forward has called counts as skipped too."""
MAX_PARTIAL_ATTEMPTS = 24
"""Training forwards with skipped blocks before koopmon gives up."""
MAX_MISSED = 3
"""Consecutive snapshots missed by the taps before one warning."""
MAX_UNCALLED = 20
"""Consecutive snapshots without a call of some block before one warning."""
HOW_TO_NAME = "set [model] stack (or KOOPMON_MODEL__STACK) to the path of the list of blocks that is one"
INSIDE_A_GRAPH = (
    "blocks inside a graph that was compiled before show nothing: attach before the first forward pass, or"
    " compile them one by one, block = torch.compile(block)"
    if supported()
    else "blocks inside one compiled graph show nothing: compile them one by one, block = torch.compile(block)"
)
MAX_GRAPH_STACKS = 4
"""Candidate stacks that are tapped inside a compiled graph. A graph keeps its taps also if another stack is kept."""


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

    def on_graph_forward(self) -> None:
        """Handle the end of a step whose forwards ran in a compiled graph, where no hook sees them."""

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


def _in_checkpoint() -> bool:
    """Return True inside the forward of an autograd function, such as a reentrant checkpoint.

    It runs without gradients, although its arguments have some.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return True
        frame = frame.f_back
    return False


def _has_values(state: Tensor) -> bool:
    """Return False for a meta or fake tensor, which has a shape alone."""
    return not (state.is_meta or isinstance(state, torch._subclasses.fake_tensor.FakeTensor))


def _outermost(candidates: Sequence[Stack]) -> list[Stack]:
    """Return the first stacks that do not lie inside a block of another one; none if no graph can be tapped."""
    found: list[Stack] = []
    for stack in candidates if supported() else ():
        first = stack.points[0].module
        blocks = [point.module for each in found for point in each.points]
        if len(found) < MAX_GRAPH_STACKS and not any(first is each for block in blocks for each in block.modules()):
            found.append(stack)
    return found


class ResidualTaps:
    """All module hooks of one agent. `step_edge` sets their work in the next step.

    `trained` returns the ids of the parameters that the optimizer updates. `num_rows` returns the number of tokens that
    taps in a compiled graph copy.
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
        self._trained = trained
        self._num_rows = num_rows
        self._phase = ForwardPhase.IDLE
        self._due: tuple[Sampler, TrainingStep] | None = None
        """The snapshot to take in the next training forward."""
        self._sampling: Sampler | None = None
        """Takes the snapshot of this forward."""
        self._walk: Walk | None = None
        """The place of this forward in the chain, while a snapshot is taken."""
        self._in_gradients = False
        """True if the verified traversal ran with gradients: one without is not the one that trains."""
        self._interleaved = False
        """True if blocks are called for other inputs in between, as a block that takes two inputs in turn."""
        self.beside: tuple[Stack, ...] = ()
        """Other stacks that train, found with the verified one."""
        self._obstacle = ""
        self.in_graph = False
        """True if the blocks run inside a compiled graph."""
        self._injections: Sequence[Injection] = ()
        """Changes to the stream in this step."""
        self._num_missed = 0
        self._uncalled: dict[int, int] = {}
        """Consecutive snapshots without a call, by layer."""
        self._in_root = False
        self._last_layer: int | None = None
        """The layer that was called last by a loop that bypasses the root; None after a step edge."""
        self._trains_in_eval = False
        self._seen: Counter[str] = Counter()
        """Forwards that were no training forwards, by their kind, since the last step edge."""
        self._mask: Tensor | None = None
        self._root_handles = [
            add_pre_hook(model, breaker.hook(self._enter_root)),
            add_hook(model, breaker.hook(self._leave_root)),
        ]
        self._watch(selection)

    def follow_wrapper(self) -> None:
        """Hook the compiled wrapper of the model as well, if there is one. The model's own hooks are in its graph."""
        model = self._model()
        if model is not None and any(graph.traced for graph in self._graphs.values()):
            for wrapper in wrappers(model, torch._dynamo.OptimizedModule):
                if wrapper is not model:
                    self._root_handles.append(add_pre_hook(wrapper, self._breaker.hook(self._enter_root)))
                    self._root_handles.append(add_hook(wrapper, self._breaker.hook(self._leave_root)))

    def _watch(self, selection: Selection) -> None:
        """Tap the candidates of `selection`. The next training forward verifies which of them is a chain."""
        self._selection = selection
        self._adapter = selection.adapter
        self._verifier = ChainVerifier(selection.adapter, selection.candidates)
        self._num_attempts = 0
        self._handles: dict[str, list[Any]] = {}
        self._graphs = {stack.name: GraphTaps(stack, self._num_rows) for stack in _outermost(selection.candidates)}
        for stack in selection.candidates:
            # Readers come first, because the tap behind the last block completes the snapshot.
            handles = [self._read(stack, each) for each in declared(selection.families, stack)]
            self._handles[stack.name] = handles + [tap for point in stack.points for tap in self._tap(stack, point)]

    def _tap(self, stack: Stack, point: Point) -> list[Any]:
        selection, idle = self._selection, ForwardPhase.IDLE
        graph = self._graphs.get(stack.name)
        tap = None if graph is None else graph.taps[stack.points.index(point)]

        def enter_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            off = self._phase is idle and not self._injections
            if off and (self._in_root or recomputing() or not self._is_new_forward(point)):
                return
            # A removed hook may still be called in this forward.
            if self._selection is selection and not is_foreign() and not (graph and graph.closed):
                try:
                    self._enter(stack, point, args, kwargs)
                except PluginError as error:
                    if not self._replace_adapter(error):
                        raise

        def leave_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._phase is idle and not self._injections:
                return None
            if self._selection is selection and not is_foreign() and not (graph and graph.closed):
                try:
                    return self._leave(stack, point, output)
                except PluginError as error:
                    if not self._replace_adapter(error):
                        raise
            return None

        return [
            add_pre_hook(point.entry, self._breaker.hook(enter_block, None if tap is None else tap.enter)),
            add_hook(point.module, self._breaker.hook(leave_block, None if tap is None else tap.leave)),
        ]

    def _read(self, stack: Stack, observable: Observable) -> Any:
        def leave_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._sampling is not None and self._keeps(stack) and not recomputing() and not is_foreign():
                started = time.perf_counter()
                self._sampling.readings.take(observable, args, kwargs, output)
                self._stats.capture_seconds += time.perf_counter() - started

        return add_hook(observable.module, self.readers.hook(leave_module), with_kwargs=True)

    def _keeps(self, stack: Stack) -> bool:
        return self.stack is not None and self.stack.name == stack.name

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
        self._abandon()

    def _untap(self, name: str) -> None:
        graph = self._graphs.get(name)
        if graph is not None:
            graph.close()
            if graph.traced:
                return  # without these hooks the compiler would start again
        for handle in self._handles[name]:
            handle.remove()

    def _give_up(self, reason: str) -> None:
        self.remove(reason)
        self._stats.taps_missing += 1
        log_for_job(logger, f"no snapshots, training goes on: {reason}")

    @property
    def obstacle(self) -> str:
        """The reason why no action may change the stream; empty if one may."""
        inside = "the blocks run inside a compiled graph, which it cannot change"
        return self._obstacle or (inside if self.in_graph else "")

    def forward_over(self) -> None:
        """End the forward before each step. If the loop bypasses the root, no hook sees the end of the forward."""
        if not self._in_root:
            self._end_forward(complete=True)
        if not self.failure and any(graph.traced for graph in self._graphs.values()):
            started = time.perf_counter()
            self._read_graphs()
            self._stats.capture_seconds += time.perf_counter() - started
        if self._seen["in eval mode"] and not self.num_forwards and not self.failure:
            self._trains_in_eval = self._has_gradients()

    def _read_graphs(self) -> None:
        """Take what the forwards of this step have left in the buffers of a graph."""
        if self.stack is None:
            found = [(graph, copied) for graph in self._graphs.values() if (copied := graph.read()) is not None]
            if not self.num_forwards:
                self._verifier.reset()
                if found:
                    self._listener.on_graph_forward()
            try:
                for graph, copied in found:
                    graph.observe(copied, self._verifier)
                if found or self._verifier.any_called:
                    self._judge()
            except PluginError as error:
                if not self._replace_adapter(error):
                    raise
            if self.stack is None:
                for graph, _ in found:
                    graph.arm()
        elif self._due is not None and (kept := self._graphs.get(self.stack.name)) is not None:
            copied = kept.read()
            states = None if copied is None else kept.states(copied, self._adapter, self.stack)
            if states is not None:
                self._sample_graph(*self._due, states)

    def _sample_graph(self, sampler: Sampler, training: TrainingStep, states: list[Tensor]) -> None:
        self._due, self._num_missed, self.in_graph = None, 0, True
        if self.stack is not None and sampler.begin(training, self.stack, states[0], None):
            if not all(sampler.put(point, state) for point, state in enumerate(states)):
                self._missed()
            elif (snapshot := sampler.finish()) is not None:
                self._listener.on_snapshot_ready(snapshot)

    def _has_gradients(self) -> bool:
        return any(
            parameter.grad is not None
            for stack in self._selection.candidates
            for parameter in stack.points[-1].module.parameters()
        )

    def step_edge(self, due: tuple[Sampler, TrainingStep] | None, injections: Sequence[Injection]) -> None:
        """Start a new optimizer step, in which `injections` change the stream.

        With `due` the sampler takes a snapshot of that step in the first training forward from here on.
        """
        if self.failure:
            return
        learned = self._trains_in_eval and not self.num_forwards  # the next forward counts as training
        if self._due is not None or (self.stack is None and not self.num_forwards and not learned):
            self._missed()
        self.num_forwards, self._in_root, self._last_layer = 0, False, None
        self._seen.clear()
        self._due = None if self.stack is None else due
        self._injections = () if self.obstacle else injections
        if self._due is not None:
            self._arm_graph(*self._due)

    def _arm_graph(self, sampler: Sampler, training: TrainingStep) -> None:
        graph = None if self.stack is None else self._graphs.get(self.stack.name)
        if graph is not None and graph.traced:
            started = time.perf_counter()
            graph.arm(functools.partial(sampler.choose, training.step))
            self._stats.capture_seconds += time.perf_counter() - started

    def _missed(self) -> None:
        self._stats.taps_missing += 1
        self._num_missed += 1
        if self._num_missed == MAX_MISSED:
            log_for_job(
                logger,
                f"{type(self._model()).__name__} trains, but {MAX_MISSED} snapshots were missed: {self._cause()}",
            )

    def _cause(self) -> str:
        """Return the cause of missed snapshots, and its remedy."""
        if self.num_forwards == 0:
            if self._seen["transformed"]:
                return "its forwards run under torch.func or a tracer, where koopmon takes no states"
            if self._seen["without gradients"]:
                return "its forwards run without gradients; koopmon watches the model that the optimizer trains"
        if any(graph.traced for graph in self._graphs.values()):
            return (
                "its blocks now run in a graph without taps, as after a second model of its class was compiled;"
                " compile the blocks one by one, block = torch.compile(block)"
            )
        if self.num_forwards and self.stack is None:
            return (
                "its blocks are not called: attach to the module that the loop calls, after any block has been replaced"
                " (`koopmon run` attaches when the optimizer is made); call each as block(x): other methods have no"
                f" hooks; {INSIDE_A_GRAPH}"
            )
        return (
            "taps did not fire: attach to the module that the loop calls, after any block has been replaced"
            f" (`koopmon run` attaches when the optimizer is made); {INSIDE_A_GRAPH}"
        )

    # Hooks of the root model.

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing():
            return
        if is_foreign():
            self._seen["transformed"] += 1
            return
        self._begin_forward(module.training, torch.is_grad_enabled())
        self._in_root = True
        if self.stack is not None and self._phase in (ForwardPhase.SNAPSHOT, ForwardPhase.INJECTING):
            self._mask = self._adapter.token_mask(module, args, kwargs, self.stack)

    def _begin_forward(self, training: bool, gradients: bool) -> None:
        # The forward before this one may have raised: no hook has seen its end.
        self._end_forward(complete=False)
        self._mask = None
        if not gradients or self.failure:
            self._seen["without gradients"] += 1
            return
        if not training and not self._trains_in_eval:
            self._seen["in eval mode"] += 1
            return
        self._trains_in_eval = not training
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
        if not recomputing() and not is_foreign():
            self._in_root = False
            self._end_forward(complete=True)

    def _end_forward(self, *, complete: bool) -> None:
        """End the forward. If it is `complete`, the blocks behind the last one called were skipped."""
        phase, self._phase = self._phase, ForwardPhase.IDLE
        if phase is ForwardPhase.VERIFYING:
            self._conclude()
        elif self._sampling is not None and self._walk is not None:
            if complete:
                self._end_sampling(self._sampling, self._walk)
            else:
                self._abandon()
                self._missed()

    def _end_sampling(self, sampler: Sampler, walk: Walk) -> None:
        """End the snapshot of a traversal that is over. Most blocks must have been called."""
        num_layers = 0 if self.stack is None else len(self.stack.points)
        if walk.inside is None and len(walk.called) >= MIN_SHARE_CALLED * num_layers:
            self._finish(sampler, walk)
        else:
            self._abandon()
            self._missed()

    def _abandon(self) -> None:
        if self._sampling is not None:
            self._sampling.abandon()
        self._sampling = self._walk = None

    def _dismiss(self) -> None:
        """Leave a forward alone that has begun on tensors without values."""
        self._phase = ForwardPhase.IDLE
        self.num_forwards -= 1
        self._seen["transformed"] += 1

    def _conclude(self) -> None:
        """End the forward that was observed."""
        self._phase = ForwardPhase.IDLE
        if not any(graph.traced for graph in self._graphs.values()):  # `forward_over` reads what a graph holds
            self._judge()

    def _judge(self) -> None:
        """Evaluate what was observed: keep the stack that is a chain, or try again in the next forward."""
        model, verifier = self._model(), self._verifier
        if model is None:
            return
        self._num_attempts += 1
        trained = self._trained()
        kept, reasons = verifier.verdict(trained, skips=self._num_attempts > PATIENCE)
        if verifier.is_partial and self._num_attempts <= PATIENCE:
            return  # every rank must keep the same stack, whichever blocks it has skipped so far
        if kept is None and verifier.is_unchanged and self._num_attempts <= MAX_PARTIAL_ATTEMPTS:
            return  # the values say nothing until the blocks have learned
        if kept is not None:
            self._keep(kept, trained)
        elif self._num_attempts >= (MAX_PARTIAL_ATTEMPTS if verifier.is_partial else MAX_ATTEMPTS):
            blocks = [point.module for stack in self._selection.candidates for point in stack.points]
            unseen = compiled_whole(model, blocks) and not verifier.any_called
            compiled = f"{type(model).__name__}: {INSIDE_A_GRAPH}" if unseen else ""
            reason = compiled or not_verified(model, self._selection, reasons, HOW_TO_NAME)
            if self._replace_adapter(reason):
                return
            if compiled or verifier.any_called:
                self._give_up(reason)
            else:  # a later stage of the training may call them
                self._missed()

    def _keep(self, kept: Stack, trained: Collection[int]) -> None:
        verifier, self.stack = self._verifier, kept
        self.beside = verifier.beside
        self.width = verifier.width(kept)
        self._in_gradients, self._interleaved = verifier.in_gradients(kept), verifier.is_interleaved(kept)
        if kept.form == "entries":
            self._obstacle = "the model adds the blocks' outputs to the state itself"
        elif kept.position is not None and kept.position.left == SUM:
            self._obstacle = "the state is the sum of two tensors"
        elif len({id(point.module) for point in kept.points}) < len(kept.points):
            self._obstacle = "one block is several layers, and it acts on single ones"
        for name in set(self._handles) - {kept.name}:
            self._untap(name)
            del self._handles[name]
        graph = self._graphs.get(kept.name)
        self.in_graph = graph is not None and graph.read() is not None
        exponent, fingerprint = verifier.update_exponent(kept), verifier.fingerprint(kept)
        verifier.reset()
        self._say_if_partly_trained(kept, trained)
        self._listener.on_chain_verified(kept, self.width, exponent, fingerprint)

    def _say_if_partly_trained(self, kept: Stack, trained: Collection[int]) -> None:
        num_trained, num_layers = len(trained_layers(kept, trained)), len(kept.points)
        model = self._model()
        if num_trained == num_layers or model is None or not any(id(each) in trained for each in model.parameters()):
            return  # in the last case the optimizer holds other tensors for the same parameters
        name = kept.name or "the model"
        log_for_job(logger, f"watches {name}, of which the optimizer trains {num_trained} of {num_layers} blocks")

    # Hooks of the blocks.

    def _enter(self, stack: Stack, point: Point, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        again, kept = recomputing(), self.stack
        state = block_input(self._adapter, kept or stack, point.entry, args, kwargs)
        if not again and not self._in_root and self._is_new_forward(point):
            gradients = torch.is_grad_enabled() or (state is not None and state.requires_grad and _in_checkpoint())
            self._end_forward(complete=True)
            self._begin_forward(point.entry.training, gradients)
        if not again:
            self._last_layer = point.layer
        if self._phase is ForwardPhase.IDLE and not again:
            return
        tensors = [state] if state is not None else [tensor for _, tensor in argument_tensors(args, kwargs)]
        if not all(map(_has_values, tensors)):
            self._dismiss()
            return
        if state is not None and hasattr(state, "to_local"):
            self._give_up(f"{point.name} takes a DTensor, whose rows lie on several ranks")
            return
        if self._phase is ForwardPhase.VERIFYING and not again:
            self._verifier.observe_input(stack, point.layer, args, kwargs)
        elif kept is not None and self._keeps(stack) and state is not None and is_state(state):
            if self._phase is ForwardPhase.SNAPSHOT and not again:
                self._sample_entry(kept, point, state)
            for injection in self._injections:
                injection.enter(point.layer, state, self._mask)

    def _is_new_forward(self, point: Point) -> bool:
        """Return True for a call outside of the root if the loop has called no block, or one as deep, before it."""
        last, walk = self._last_layer, self._walk
        if self.stack is None:
            return self._phase is not ForwardPhase.VERIFYING
        if walk is not None and walk.inside is None and (self._interleaved or walk.following(point) is not None):
            return False
        return last is None or point.layer <= last

    def _sample_entry(self, kept: Stack, point: Point, state: Tensor) -> None:
        if self._due is not None and (torch.is_grad_enabled() or state.requires_grad or not self._in_gradients):
            self._begin_snapshot(*self._due, kept, state)
        walk, sampler = self._walk, self._sampling
        if walk is None or sampler is None:
            return
        layer = walk.following(point)
        if layer is None:
            if walk.inside is None and not self._interleaved:
                self._end_sampling(sampler, walk)  # another traversal begins
            return
        started = time.perf_counter()
        # Blocks were skipped between the last one and this one: the state went by them.
        first = kept.entry_place(walk.position) + kept.chained  # in a chain it was put when it left a block
        if all(sampler.put(place, state) for place in range(first, kept.entry_place(layer) + 1)):
            walk.enter(layer)
        else:
            self._sampling = self._walk = None
            self._missed()
        self._stats.capture_seconds += time.perf_counter() - started

    def _begin_snapshot(self, sampler: Sampler, training: TrainingStep, kept: Stack, state: Tensor) -> None:
        self._due = None
        if state.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # every replay of a CUDA graph would repeat a captured copy
        started = time.perf_counter()
        if sampler.begin(training, kept, state, self._mask):
            if kept.chained:
                sampler.put(0, state)
            self._sampling, self._walk = sampler, Walk(kept)
        self._stats.capture_seconds += time.perf_counter() - started

    def _leave(self, stack: Stack, point: Point, output: Any) -> Any:
        again, kept = recomputing(), self.stack
        phase = ForwardPhase.INJECTING if again else self._phase
        if phase is ForwardPhase.VERIFYING:
            self._verifier.observe_output(stack, point.layer, output)
        elif phase is not ForwardPhase.IDLE and kept is not None and self._keeps(stack):
            state = block_output(self._adapter, kept, point.module, output)
            if state is None or not is_state(state):
                return None
            if self._sampling is not None and self._walk is not None and not again:
                self._capture(self._sampling, self._walk, point, state)
            return self._inject(kept, point, output, state)
        return None

    def _capture(self, sampler: Sampler, walk: Walk, point: Point, state: Tensor) -> None:
        layer = walk.leave(point)
        if layer is None:
            return
        started = time.perf_counter()
        assert self.stack is not None
        if self.stack.form != "entries" and not sampler.put(self.stack.entry_place(layer) + 1, state):
            self._sampling = self._walk = None
            self._missed()
        elif layer + 1 == len(self.stack.points):
            self._finish(sampler, walk)
        self._stats.capture_seconds += time.perf_counter() - started

    def _finish(self, sampler: Sampler, walk: Walk) -> None:
        """Complete the snapshot. The blocks behind the last one called were skipped."""
        assert self.stack is not None
        self._sampling = self._walk = None
        self._phase = ForwardPhase.INJECTING if self._injections else ForwardPhase.IDLE
        self._num_missed = 0
        sampler.repeat_to_end()
        self._count_uncalled(self.stack, walk)
        snapshot = sampler.finish()
        if snapshot is not None:
            self._listener.on_snapshot_ready(snapshot)

    def _count_uncalled(self, kept: Stack, walk: Walk) -> None:
        """Log once the blocks that no forward calls any more. A replaced block looks like a skipped one."""
        if not self._uncalled and len(walk.called) == len(kept.points):
            return
        skipped = {point.layer for point in kept.points}.difference(walk.called)
        self._uncalled = {layer: self._uncalled.get(layer, 0) + 1 for layer in skipped}
        absent = [kept.points[layer].name for layer, count in self._uncalled.items() if count == MAX_UNCALLED]
        if absent:
            log_for_job(
                logger,
                f"{', '.join(sorted(absent))}: not called in {MAX_UNCALLED} snapshots, counts as skipped; if it was"
                " replaced, attach after that (`koopmon run` attaches when the optimizer is made)",
            )

    def _inject(self, kept: Stack, point: Point, output: Any, state: Tensor) -> Any:
        """Return the output that replaces the block's `output`; None to keep it."""
        current = state
        for injection in self._injections:
            replaced = injection.leave(point.layer, current)
            current = current if replaced is None else replaced
        if current is state:
            return None
        return with_block_output(self._adapter, kept, point.module, output, current)
