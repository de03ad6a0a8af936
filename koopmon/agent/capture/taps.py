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
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from koopmon.agent.capture.block_hooks import BlockHooks, compiles
from koopmon.agent.capture.chain_search import ChainSearch, say_if_partly_trained
from koopmon.agent.capture.compiled_stacks import INSIDE_A_GRAPH, CompiledStacks
from koopmon.agent.capture.forward_kind import has_values, in_checkpoint, recomputing
from koopmon.agent.capture.graph_taps import MIN_ROWS
from koopmon.agent.capture.hidden_hooks import add_hook, add_pre_hook
from koopmon.agent.capture.sampler import RankSnapshot, Sampler
from koopmon.agent.capture.snapshot_capture import SnapshotCapture
from koopmon.agent.capture.structure import Structure, same_blocks
from koopmon.agent.capture.tap_events import ForwardPhase, TapEvents
from koopmon.agent.circuit_breaker import CircuitBreaker, is_foreign, logger
from koopmon.agent.control.action import Injection
from koopmon.agent.parallelism import takes_uneven_inputs, wrappers
from koopmon.agent.stats import AgentStats
from koopmon.api import Observable, Point, Stack
from koopmon.errors import KoopmonError, PluginError
from koopmon.logs import log_for_job
from koopmon.no_gradients import without_gradients
from koopmon.plugins import Selection, fall_back
from koopmon.state_position import SUM, argument_tensors, block_input, block_output, is_state, with_block_output
from koopmon.wire.messages import TrainingStep

MAX_MISSED = 3
"""Consecutive snapshots missed by the taps before one warning."""
MAX_RESTED = 16
"""Forwards without a step after which the forwards are followed again."""
MAX_RESTORED = 16
"""Times that hooks are put back that others have removed."""
MAX_WAITED = 20
"""Steps that a snapshot waits for a call of the blocks, as those of a generator while its critic trains."""
MAX_CHANGES = 16
"""Changes of the blocks that are followed."""
MAX_UNVERIFIED = 3
"""Consecutive changes without a verified chain between them, as of a model that makes new blocks in each step."""
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
        self._find_again = find_again
        self._phase = ForwardPhase.IDLE
        self._capture = SnapshotCapture(stats, self._on_captured, self._missed)
        self._in_gradients = False
        """True if the verified traversal ran with gradients: one without is not the one that trains."""
        self.beside: tuple[Stack, ...] = ()
        """Other stacks that train, found with the verified one."""
        self.later: tuple[Stack, ...] = ()
        """Further stacks of the optimizers' parameters that did not train then."""
        self._begun: tuple[Stack, ...] = ()
        """Those of them that train since the last step: the next forward reports them."""
        self._obstacle = ""
        self.in_graph = False
        """True if the blocks run inside a compiled graph."""
        self._injections: Sequence[Injection] = ()
        """Changes to the stream in this step."""
        self._num_missed = 0
        self._num_changes = self._num_unverified = 0
        self._num_restored = 0
        """Times that hooks were put back that others had removed."""
        self._num_waited = 0
        """Steps that the snapshot that is due has waited for a call of the blocks."""
        self._gradient: tuple[weakref.ref[Tensor], int] | None = None
        """A gradient of the stack when the snapshot became due, with its version."""
        self.waits = False
        """True if a snapshot was due in the last step, and the step has called no block with gradients."""
        self._always_hooked = False
        """True if the hooks of the blocks stay in the steps without work for them."""
        self._resting = False
        """True in steps without work, whose forwards are not followed."""
        self._has_ranks = False
        self._num_rested = 0
        """Forwards of the root since the last step edge, while resting."""
        self._in_root = False
        self._root_trains: bool | None = None
        """The mode of a root that was called without gradients, until a block of it runs with some."""
        self._thread = 0
        """The thread of the forward that has entered the root."""
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
        if model is not None and self._graphs.traced:
            for wrapper in wrappers(model, torch._dynamo.OptimizedModule):
                if wrapper is not model:
                    self._root_handles.append(add_pre_hook(wrapper, self._breaker.hook(self._enter_root)))
                    self._root_handles.append(add_hook(wrapper, self._breaker.hook(self._leave_root)))

    @property
    def runs_unseen(self) -> bool:
        """True if the blocks run in a graph, and no module outside of it is called."""
        model = self._model()
        wrapper = model is not None and any(
            each is not model for each in wrappers(model, torch._dynamo.OptimizedModule)
        )
        return self._graphs.traced and not wrapper and not self.num_forwards

    def _watch(self, selection: Selection) -> None:
        """Tap the candidates of `selection`. The next training forward verifies which of them is a chain."""
        self._selection = selection
        self._adapter = selection.adapter
        self._search = ChainSearch(selection)
        self._structure = Structure(selection.candidates)
        if (model := self._model()) is not None:
            self._structure.note(model)
        self._graphs = CompiledStacks(selection.candidates, self._num_rows)
        self._hooks = {
            stack.name: BlockHooks(self, stack, selection, self._graphs, self._breaker, self.readers)
            for stack in selection.candidates
        }

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
        for name in self._hooks:
            self._untap(name)
        self._watch(following)
        self._listener.adapter_replaced(following)
        return True

    def _follow_change(self) -> bool:
        """Look for the stack again if blocks were added, removed or replaced. Returns True if it is searched."""
        model = self._model()
        if model is None or self._find_again is None:
            return False
        if self._num_changes == MAX_CHANGES or self._num_unverified == MAX_UNVERIFIED:
            return False
        if not self._structure.has_changed(model):
            return False
        self._structure.note(model)
        changed = f"the blocks of {type(model).__name__} have changed since koopmon attached"
        try:
            selection = self._find_again(model)
        except KoopmonError as error:
            log_for_job(logger, f"{changed}, and it watches those that it knows: {error}")
            return False
        if self.stack is not None and same_blocks(self.stack, selection.candidates):
            return False
        if all(len(each.points) == 1 for each in selection.candidates):
            log_for_job(logger, f"{changed} to single ones, and it watches those that it knows")
            return False
        if self._graphs.traced:
            log_for_job(
                logger, f"{changed}, in a compiled graph, and it watches those that it knows; attach afterwards"
            )
            return False
        if not self._num_unverified:
            log_for_job(logger, f"{changed}: looks for the stack again")
        self._num_changes += 1
        self._num_unverified += 1
        self._phase, self._capture.due = ForwardPhase.IDLE, None
        self._capture.abandon()
        for name in self._hooks:
            self._untap(name)
        self.stack, self.beside, self.later, self._begun, self.in_graph = None, (), (), (), False
        self._obstacle, self._injections, self._num_missed, self._num_waited = "", (), 0, 0
        self._watch(selection)
        self._listener.adapter_replaced(selection)
        return True

    def _restore_hooks(self) -> None:
        """Put the hooks back that others have removed, MAX_RESTORED times."""
        gone = [hook for hook in self._root_handles if hook.is_gone]
        if self._num_restored == MAX_RESTORED:
            return
        for hook in gone:
            hook.restore()
        restored = [each.restore() for each in self._hooks.values()]
        if gone or any(restored):
            self._num_restored += 1
            if self._num_restored == 1:
                log_for_job(logger, f"the hooks of {type(self._model()).__name__} were removed, and are back")

    def remove(self, reason: str = "") -> None:
        """Remove every hook from the model. Idempotent."""
        self.failure = self.failure or reason
        self._phase, self._capture.due, self._injections = ForwardPhase.IDLE, None, ()
        for handle in self._root_handles:
            handle.remove()
        for name in self._hooks:
            self._untap(name)
        self._root_handles, self._hooks = [], {}
        self._capture.abandon()

    def _untap(self, name: str) -> None:
        hooks = self._hooks[name]
        hooks.ended = True
        self._graphs.close(name)
        if not self._graphs.traced:  # without a hook of any module in the graph, a compiler would start again
            hooks.remove()

    def _give_up(self, reason: str) -> None:
        self.remove(reason)
        self._stats.taps_missing += 1
        self._listener.on_no_chain(reason)

    @property
    def due(self) -> bool:
        """True if the next training forward is a snapshot."""
        return self._capture.due is not None

    @property
    def is_free(self) -> bool:
        """True if a chain is verified, and the next forwards have no work."""
        has_work = self._capture.due is not None or self._injections or self._begun
        return self.stack is not None and not has_work and not self.failure

    @property
    def obstacle(self) -> str:
        """The reason why no action may change the stream; empty if one may."""
        inside = "the blocks run inside a compiled graph, which it cannot change"
        return self._obstacle or (inside if self.in_graph else "")

    def forward_over(self) -> None:
        """End the forward before each step. If the loop bypasses the root, no hook sees the end of the forward."""
        if not self._in_root:
            self._end_forward(complete=True)
        if not self.failure and self._graphs.traced:
            started = time.perf_counter()
            self._read_graphs()
            self._stats.capture_seconds += time.perf_counter() - started
        if not self.num_forwards and self._seen["in eval mode"] and not self.failure:
            self._trains_in_eval = self._has_gradients()

    def _read_graphs(self) -> None:
        """Take what the forwards of this step have left in the buffers of a graph."""
        if self.stack is None:
            found = self._graphs.read()
            if not self.num_forwards:
                self._search.verifier.reset()
                if found:
                    self._listener.on_graph_forward()
            try:
                for graph, copied in found:
                    graph.observe(copied, self._search.verifier)
                if found or self._search.verifier.any_called:
                    self._judge()
            except PluginError as error:
                if not self._replace_adapter(error):
                    raise
            if self.stack is None:
                for graph, _ in found:
                    graph.arm()
        elif self._capture.due is not None:
            states = self._graphs.states(self.stack, self._adapter)
            if states is not None:
                self._num_missed, self.in_graph = 0, True
                self._capture.take(self.stack, states)

    def _has_gradients(self) -> bool:
        return any(
            parameter.grad is not None
            for stack in self._selection.candidates
            for parameter in stack.points[-1].parameters()
        )

    def step_edge(self, due: tuple[Sampler, TrainingStep] | None, injections: Sequence[Injection]) -> None:
        """Start a new optimizer step, in which `injections` change the stream.

        With `due` the sampler takes a snapshot of that step in the first training forward from here on.
        """
        if self.failure:
            return
        uncalled = not self.num_forwards and not self._resting
        learned = self._trains_in_eval and not self.num_forwards  # the next forward counts as training
        in_turn = self._trains_in_turn()
        self.waits = in_turn and self._num_waited < MAX_WAITED
        if self.waits:
            self._num_waited += 1
        elif self._find_again is None and (in_turn or self.stack is None):
            pass  # a further stack may not train in this step, or not any more
        elif self._capture.due is not None or (self.stack is None and not self.num_forwards and not learned):
            self._missed()
        self.num_forwards, self._in_root, self._last_layer = 0, False, None
        self._seen.clear()
        looks = due is not None or (uncalled and not self._graphs.traced)
        if looks and self.stack is not None and self._follow_change():
            return
        if looks and not self._graphs.traced:
            self._restore_hooks()
        if self.later and self.stack is not None:
            self._look_later()
        self._capture.due = None if self.stack is None else due
        if self.stack is not None and due is not None:
            gradient = _gradient(self.stack)
            self._gradient = None if gradient is None else (weakref.ref(gradient), _version(gradient))
        self._injections = injections if injections and not self.obstacle else ()
        if self.stack is not None and due is not None and self._graphs.holds(self.stack):
            sampler, training = due
            started = time.perf_counter()
            self._graphs.arm(self.stack, functools.partial(sampler.choose, training.step))
            self._stats.capture_seconds += time.perf_counter() - started
        if self.stack is not None and not self._always_hooked:
            # A step without a forward of the root may have had one that began at a block.
            if due is not None or self._injections or uncalled:
                self.listen()
                self._hooks[self.stack.name].resume()
            elif compiles():
                self._hook_always()
            else:
                self._hooks[self.stack.name].pause()

    def _trains_in_turn(self) -> bool:
        """Return True if a snapshot is due, and the step has called no block and given it no gradient."""
        if self._capture.due is None or self.stack is None or self._graphs.traced or compiles():
            return False
        gradient, before = _gradient(self.stack), self._gradient
        if gradient is None:
            return True
        return before is not None and before[0]() is gradient and before[1] == _version(gradient)

    def _look_later(self) -> None:
        """Find further stacks once they have gradients, as a generator that trains in turn."""
        found = [stack for stack in self.later if _gradient(stack) is not None]
        if found:
            self.later = tuple(stack for stack in self.later if stack not in found)
            self._begun += tuple(found)

    def rest(self, *, has_ranks: bool = False) -> None:
        """Follow no forward until work is due, unless a compiled graph must find the hooks.

        With several ranks the begin of DDP's `join()` is work.
        """
        self._has_ranks = has_ranks
        if not self._always_hooked and not self._resting and not compiles():
            self._resting, self._num_rested = True, 0
            self._root_handles[1].pause()  # the other one sees a compiler before that traces the forward

    def listen(self) -> None:
        """Follow the forwards again. Idempotent."""
        if self._resting:
            self._resting = False
            self._root_handles[1].resume()

    def forget_forwards(self) -> None:
        """Start a step without work for the taps."""
        self.num_forwards, self._num_rested, self._last_layer = 0, 0, None

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
            if not self._graphs.traced and not compiles() and not self._seen:
                return "neither it nor one of its blocks is called; attach to the module that the loop calls"
        if self._graphs.traced:
            return (
                "its blocks now run in a graph without taps, as after a second model of its class was compiled;"
                " compile the blocks one by one, block = torch.compile(block)"
            )
        if self._num_restored == MAX_RESTORED:
            return "its hooks were removed again and again"
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
        if not self._always_hooked and compiles():
            self._hook_always()
        if self._resting:
            self._num_rested += 1
            uneven = self._has_ranks and takes_uneven_inputs(module)
            if self._num_rested > MAX_RESTED or uneven:  # the optimizer may be another one, or step without its hooks
                self._listener.on_no_step()
            return
        if recomputing() or self._is_elsewhere():
            return
        if is_foreign():
            self._seen["transformed"] += 1
            return
        self._begin_forward(module.training, torch.is_grad_enabled())
        self._root_trains = None if torch.is_grad_enabled() else module.training
        self._in_root, self._thread = True, threading.get_ident()
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
        if self._begun:  # not in the hook of an optimizer, whose other hooks are the same for all of its call
            begun, self._begun = self._begun, ()
            self._listener.on_stacks_train(begun)
        self.num_forwards += 1
        if self.stack is None:
            self._search.verifier.reset()
            self._phase = ForwardPhase.VERIFYING
        elif self._capture.due is not None:
            self._phase = ForwardPhase.SNAPSHOT
        elif self._injections:
            self._phase = ForwardPhase.INJECTING

    def _leave_root(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not recomputing() and not is_foreign() and not self._is_elsewhere():
            self._in_root = False
            self._end_forward(complete=True)
            if torch.is_grad_enabled():
                self._listener.on_output(output)

    def _end_forward(self, *, complete: bool) -> None:
        """End the forward. If it is `complete`, the blocks behind the last one called were skipped."""
        phase, self._phase = self._phase, ForwardPhase.IDLE
        if phase is ForwardPhase.IDLE and not self._capture.active:
            return
        if phase is ForwardPhase.VERIFYING:
            self._conclude()
        elif not complete:
            if self._capture.abandon():
                self._missed()
        elif self.stack is not None:
            self._capture.end(self.stack)

    def _dismiss(self) -> None:
        """Leave a forward alone that has begun on tensors without values."""
        self._phase = ForwardPhase.IDLE
        self.num_forwards -= 1
        self._seen["transformed"] += 1

    def _conclude(self) -> None:
        """End the forward that was observed."""
        self._phase = ForwardPhase.IDLE
        if not self._graphs.traced:  # `forward_over` reads what a graph holds
            self._judge()

    def _judge(self) -> None:
        """Evaluate what was observed: keep the stack that is a chain, or try again in the next forward."""
        model = self._model()
        if model is None:
            return
        trained = self._trained()
        kept, reason, hopeless = self._search.judge(model, trained)
        if kept is not None:
            self._keep(model, kept, trained)
        elif reason and not self._replace_adapter(reason) and not self._follow_change():
            if hopeless:
                self._give_up(reason)
            else:  # a later stage of the training may call them
                self._missed()

    def _keep(self, model: nn.Module, kept: Stack, trained: Collection[int]) -> None:
        verifier, self.stack = self._search.verifier, kept
        self._num_unverified = 0
        self.beside, self.later = verifier.beside, verifier.later
        self.width = verifier.width(kept)
        self._in_gradients, self._capture.interleaved = verifier.in_gradients(kept), verifier.is_interleaved(kept)
        if kept.form == "entries":
            self._obstacle = "the model adds the blocks' outputs to the state itself"
        elif kept.position is not None and kept.position.left == SUM:
            self._obstacle = "the state is the sum of two tensors"
        elif len({id(point.module) for point in kept.points}) < len(kept.points):
            self._obstacle = "one block is several layers, and it acts on single ones"
        for name in set(self._hooks) - {kept.name}:
            self._untap(name)
            del self._hooks[name]
        self.in_graph = self._graphs.was_called(kept)
        exponent, fingerprint = verifier.update_exponent(kept), verifier.fingerprint(kept)
        verifier.reset()
        self._always_hooked = self._always_hooked or self._hooks[kept.name].are_on(model)
        if self._find_again is not None:  # a further stack may be frozen in turn
            say_if_partly_trained(model, kept, trained)
        self._listener.on_chain_verified(kept, self.width, exponent, fingerprint)

    # Hooks of the blocks.

    def _hook_always(self) -> None:
        """Put the hooks of the blocks back, and leave them there also in the steps without work for them."""
        self._always_hooked = True
        self.listen()
        for hooks in self._hooks.values():
            hooks.resume()

    def on_enter(self, hooks: BlockHooks, point: Point, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        off = self._phase is ForwardPhase.IDLE and not self._injections
        if off and self._in_root and self._enables_gradients():
            training, self._root_trains = bool(self._root_trains), None
            self._begin_forward(training, True)
            off = self._phase is ForwardPhase.IDLE
        if off and (self._in_root or recomputing() or not self._is_new_forward(point)):
            return
        if self._hears(hooks):
            try:
                self._enter(hooks.stack, point, args, kwargs)
            except PluginError as error:
                if not self._replace_adapter(error):
                    raise

    def _enables_gradients(self) -> bool:
        """Return True for the first call with gradients in a forward whose root was called without them."""
        if self._root_trains is None or not torch.is_grad_enabled() or recomputing() or self._is_elsewhere():
            return False
        return not is_foreign()

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
        known = self._selection is hooks.selection and not hooks.ended
        return known and not is_foreign() and not self._is_elsewhere()

    def _is_elsewhere(self) -> bool:
        """Return True in another thread than that of the open forward, as for a validation beside the training."""
        return self._in_root and threading.get_ident() != self._thread

    def _enter(self, stack: Stack, point: Point, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        again, kept = recomputing(), self.stack
        read = block_input if kept is None or self._injections else _read_input
        state = read(self._adapter, kept or stack, point.entry, args, kwargs)
        if not again and not self._in_root and self._is_new_forward(point):
            gradients = torch.is_grad_enabled() or (state is not None and in_checkpoint())
            self._hook_always()  # the loop bypasses the root
            self._end_forward(complete=True)
            self._begin_forward(point.entry.training, gradients)
        if not again:
            self._last_layer = point.layer
        if self._phase is ForwardPhase.IDLE and not again:
            return
        tensors = [state] if state is not None else [tensor for _, tensor in argument_tensors(args, kwargs)]
        if not all(map(has_values, tensors)):
            self._dismiss()
            return
        if state is not None and hasattr(state, "to_local"):
            if kept is None and stack.form == "entries":
                return  # of the first layers of the blocks, while the blocks themselves may take a whole state
            self._give_up(f"{point.name} takes a DTensor, whose rows lie on several ranks")
            return
        if self._phase is ForwardPhase.VERIFYING and not again:
            self._search.verifier.observe_input(stack, point.layer, args, kwargs)
        elif kept is not None and self._keeps(stack) and state is not None and is_state(state):
            if self._phase is ForwardPhase.SNAPSHOT and not again:
                if torch.is_grad_enabled() or state.requires_grad or not self._in_gradients or in_checkpoint():
                    self._capture.begin(kept, state, self._mask)
                self._capture.enter(kept, point, state)
            for injection in self._injections:
                injection.enter(point.layer, state, self._mask)

    def _is_new_forward(self, point: Point) -> bool:
        """Return True for a call outside of the root if the loop has called no block, or one as deep, before it."""
        last = self._last_layer
        if self.stack is None:
            return self._phase is not ForwardPhase.VERIFYING
        return not self._capture.expects(point) and (last is None or point.layer <= last)

    def _leave(self, stack: Stack, point: Point, output: Any) -> Any:
        again, kept = recomputing(), self.stack
        phase = ForwardPhase.INJECTING if again else self._phase
        if phase is ForwardPhase.VERIFYING:
            self._search.verifier.observe_output(stack, point.layer, output)
        elif phase is not ForwardPhase.IDLE and kept is not None and self._keeps(stack):
            read = block_output if self._injections else _read_output
            state = read(self._adapter, kept, point.module, output)
            if state is None or not is_state(state):
                return None
            if not again:
                self._capture.leave(kept, point, state)
            return self._inject(kept, point, output, state)
        return None

    def _on_captured(self, snapshot: RankSnapshot | None) -> None:
        self._phase = ForwardPhase.INJECTING if self._injections else ForwardPhase.IDLE
        self._num_missed = self._num_waited = 0
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
        return with_block_output(self._adapter, kept, point.module, output, current)


def _gradient(stack: Stack) -> Tensor | None:
    """Return the first gradient in the middle block of `stack`."""
    middle = stack.points[len(stack.points) // 2]
    return next((each.grad for each in middle.parameters() if each.grad is not None), None)


def _version(gradient: Tensor) -> int:
    return 0 if gradient.is_inference() else gradient._version
