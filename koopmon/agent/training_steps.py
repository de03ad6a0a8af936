"""The optimizer steps of a training, with the agent's work before each update, after it, and between two steps.

The hooks of the optimizers show the steps. A compiled step calls none: then the training forwards show them.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from koopmon.agent.capture.sampler import RankSnapshot
from koopmon.agent.capture.schedule import OverheadBudget
from koopmon.agent.capture.step_scalars import StepScalars
from koopmon.agent.capture.taps import ResidualTaps
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.action import ControlAction, NextForwards, Update, overriding
from koopmon.agent.control.loop_requests import LoopRequest
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.step_clock import StepClock, is_nested, stepping_optimizers
from koopmon.agent.hooked_optimizers import HookedOptimizers
from koopmon.agent.lifecycle import LifeCycle, RankedState, Watching
from koopmon.agent.parallelism import takes_uneven_inputs
from koopmon.agent.quiet_steps import QuietSteps
from koopmon.agent.roles import Roles
from koopmon.agent.stats import AgentStats
from koopmon.agent.unhooked_steps import UnhookedSteps
from koopmon.errors import raise_from_signal
from koopmon.logs import log_for_job
from koopmon.wire.messages import CommandKind

logger = logging.getLogger("koopmon.agent")


class TrainingSteps:
    """The steps of one model, with any number of optimizers, which `add_optimizer` may extend.

    `beside` are the steps of the agents that watch further stacks of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: OptimizerSet,
        actions: tuple[ControlAction, ...],
        lifecycle: LifeCycle,
        roles: Roles,
        taps: ResidualTaps,
        budget: OverheadBudget,
        breaker: CircuitBreaker,
        stats: AgentStats,
    ) -> None:
        self.beside: list[TrainingSteps] = []
        self.snapshot: RankSnapshot | None = None
        """The snapshot of this step. It is sent at the end of the step, with the loss and the gradient norm."""
        self._model = weakref.ref(model)
        self._optimizers = optimizers
        self._actions = actions
        lasting = tuple(action for action in actions if action.lasting)
        others = tuple(action for action in actions if not action.lasting)
        self._lasting = overriding(lasting, "apply"), overriding(lasting, "revert")
        self._others = overriding(others, "apply"), overriding(others, "revert")
        """Methods to call before each update, and after it."""
        self._before_forwards = overriding(actions, "before_forwards")
        self._loop_requests = {each.kind: each for each in actions if isinstance(each, LoopRequest)}
        self._lifecycle = lifecycle
        self._roles = roles
        self._taps = taps
        self._budget = budget
        self._earned_seconds = 0.0
        """Time of the steps that the budget has earned."""
        self._breaker = breaker
        self._stats = stats
        self.scalars = StepScalars(optimizers, stats)
        self._num_forwards: deque[int] = deque(maxlen=3)
        """Training forwards of the last steps, without steps that had none."""
        self._closed = False
        self._stepped = False
        """True if one of the optimizers has stepped since the last training forward."""
        self._unkept = False
        """True from the begin of a step until the file for the next launch has its values."""
        self._clock = StepClock()
        self.quiet = QuietSteps(self._clock, stats, optimizers, taps.forwards, lifecycle)
        self._unhooked = UnhookedSteps(model, optimizers)
        self._compiled = False
        """True if the step of an optimizer was compiled. Its hooks are not called: the weights show each step."""
        # Lasting actions have a breaker of their own, because they stay in force after the agent has failed.
        self.lasting_breaker = CircuitBreaker("learning-rate back-off")
        hook = self.lasting_breaker.hook
        before, after = hook(self._before_call, self._trace_call), hook(self._after_call)
        self._hooked = HookedOptimizers(model, optimizers, before, after)

    def granted(self, kind: CommandKind) -> bool:
        """Return True while the loop should follow a request of this kind. Equal on all ranks after each step."""
        request = self._loop_requests[kind]
        request.was_read = True
        return request.granted

    def close(self) -> None:
        """Remove the hooks of the optimizers. A snapshot of a step that has not ended stays. Idempotent."""
        self._closed = True
        self.quiet.on = False
        # torch iterates over the hooks of an optimizer that steps. Those stay, without an effect.
        # A change of the hooks of a compiled step would cause a new compilation.
        if next(stepping_optimizers(), None) is None and not self._compiled:
            self._hooked.remove()

    # The optimizers.

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Follow one more optimizer of the model: same clock, same commands."""
        for each in (*self.beside, self):
            each.quiet.end()
            each._hooked.add(optimizer)

    def on_any_step(self, optimizer: Optimizer) -> None:
        """Follow an optimizer that has replaced the others of the model, or whose hooks the user has cleared."""
        if self.quiet.on:
            if self.quiet.has_counted(optimizer):
                return
            if not self._hooked.has_hooks(optimizer) and not self._hooked.is_foreign(optimizer):
                for each in (self, *self.beside):  # the next step of this optimizer comes after forwards that are seen
                    each.quiet.end()
        elif not self._closed and not self._compiled and not self._stepped and self._taps.forwards.count:
            self._breaker.run(self._take_over, optimizer)

    def _take_over(self, optimizer: Optimizer) -> None:
        if what := self._hooked.take_over(optimizer):
            for other in self.beside:
                other._hooked.take_over(optimizer)
            text = f"{what}: follows {type(optimizer).__name__} from its next step on"
            log_for_job(logger, text, level=logging.INFO)

    # Events of the forwards.

    def on_forward(self) -> None:
        """Handle the start of a training forward."""
        self._stepped = False
        if self._clock.on_forward():
            self._end_step()
        if self._compiled:
            if self._unhooked.changed(self._clock.num_steps):
                self._end_compiled_step()
        else:
            self._unhooked.check_hooks(self._clock.num_steps)
        if isinstance(state := self._lifecycle.state, RankedState) and state.rank.world.size > 1:
            self._meet_other_ranks(state)

    def on_output(self, output: Any) -> None:
        """Handle the output of the model in a training forward."""
        self._unhooked.forward_ended()
        self.scalars.note_output(output)

    def _meet_other_ranks(self, state: RankedState) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a recomputation of checkpointing
        if (model := self._model()) is not None and takes_uneven_inputs(model):
            self._roles.stop_acting("the ranks may take different numbers of steps inside join()")
        step = self._stats.step
        state.before_forward(step)
        self._follow_count(step)

    def _follow_count(self, step: int) -> None:
        """Note that this rank, which counted `step` steps, may follow rank 0's count now."""
        self._clock.num_steps += self._stats.step - step

    # Compiled steps.

    def _trace_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Replace `_before_call` in a compiled step."""
        self._note_compiled()

    def _note_compiled(self) -> int:
        """Stop acting, which is not possible inside a compiled step. Runs while the compiler traces."""
        if not self._compiled and not self._closed:
            try:
                self._watch_compiled()
            except Exception as error:
                raise_from_signal(error)
                self._breaker.trip("compiled step", error)
        return 0

    # What torch.compiler.assume_constant_result does. That function imports the compiler into every training.
    _note_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _watch_compiled(self) -> None:
        self._compiled = True
        self._unhooked.changed(self._clock.num_steps)
        if self._taps.follow_wrapper():
            self._roles.stop_acting("the optimizer's step is compiled; call it outside of torch.compile")
        else:
            reason = (
                "the model and the optimizer's step run inside compiled functions, which call no hooks;"
                " compile the model or the loss instead"
            )
            self._roles.stop_acting(reason, sees="no snapshots and no commands")

    def _end_compiled_step(self) -> None:
        """End a step whose optimizers have called no hooks."""
        self._stats.measured["learning_rate"].put(self._optimizers.largest_rate())
        self._taps.forward_over()
        self._after_step()

    # Hooks of the optimizers.

    def _before_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self.quiet.on:
            if self.quiet.last(args, kwargs):
                return None
            self.quiet.end()
        if self._closed or is_nested(optimizer):
            return None
        self._stepped = True
        clock, update = self._clock, Update(optimizer, args, kwargs)
        begins = clock.begins_step(optimizer, args, kwargs)
        if begins:
            if clock.open:
                self._end_step()
            if self._hooked.changed:
                self._hooked.find_wrappers()
            clock.begin_step(self._optimizers)
            self._breaker.run(self._before_step, update)
            self._unkept = True
        clock.begin(optimizer)
        if self._hooked.is_wrapper(optimizer):
            return None  # the optimizers that it holds are scaled
        if self.scalars.active:
            self.scalars.before_call(optimizer, args, kwargs)
        control = self._lifecycle.state.control
        for apply in self._lasting[0]:
            apply(control, clock.num_steps, update)
        kept = self._roles.kept
        if self._unkept and kept is not None and (control.version or kept.in_force):
            kept.keep(self._lifecycle.applied(clock.num_steps))
        self._unkept = False
        if update.args is args and update.kwargs is kwargs:
            return None
        return update.args, update.kwargs

    def _after_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.quiet.on:
            self.quiet.count(optimizer)
            return
        if self._closed or is_nested(optimizer):
            return
        self._hooked.come_last(optimizer)
        for revert in self._lasting[1]:
            revert()
        if self.scalars.active:
            self.scalars.after_call(optimizer, args, kwargs)
        if self._clock.end(optimizer):
            self._end_step()
            self._begin_quiet(optimizer)

    def _begin_quiet(self, optimizer: Optimizer) -> None:
        """Leave out the work of the steps that have none, up to the next snapshot, copy or exchange."""
        state = self._lifecycle.state
        watches = isinstance(state, Watching)
        if watches and self._taps.is_free and not self._compiled and self._hooked.is_only(optimizer):
            self.quiet.begin(optimizer, state.next_work(self._stats.step))

    # The work of each step.

    def _before_step(self, update: Update) -> None:
        started = time.perf_counter()
        self._taps.forward_over()
        state, step = self._lifecycle.state, self._stats.step
        state.before_step(step)
        self._follow_count(step)
        step = self._stats.step
        control = state.control
        for apply in self._others[0]:
            apply(control, step, update)
        self._stats.measured["learning_rate"].put(self._optimizers.largest_rate())  # within the bounds in force
        self._stats.hook_seconds += time.perf_counter() - started

    def _end_step(self) -> None:
        self._clock.end_step()
        for request in self._loop_requests.values():
            if request.granted:
                request.on_step_end()
        self._breaker.run(self._after_step)

    def _after_step(self) -> None:
        if self.scalars.active:
            self.scalars.end()
        if self.snapshot is not None:
            self._send_snapshot()
        started, stats = time.perf_counter(), self._stats
        stats.on_step_edge(started)
        elapsed = stats.elapsed_seconds
        self._budget.earn(elapsed - self._earned_seconds)
        self._earned_seconds = elapsed
        # Only snapshots are charged, because fewer of them make nothing else cheaper.
        self._budget.charge(stats.snapshot_seconds)
        for revert in self._others[1]:
            revert()
        if isinstance(state := self._lifecycle.state, RankedState):
            self._plan_step(state)
        stats.hook_seconds += time.perf_counter() - started

    def _plan_step(self, state: RankedState) -> None:
        """Tell the taps and the actions about the step that begins."""
        taps, step, sender = self._taps, self._stats.step, state.rank.sender
        chain = taps.stacks.chain
        due = None
        if (state.after_step(step) or taps.missed.waits) and chain is not None and sender is not None:
            if sender.io_thread.connected:
                due = sender.sampler, self._lifecycle.at_step(step)
            else:
                self._stats.drop("monitor_away")
        for action in self._actions:
            if action.hello_changed:
                action.hello_changed = False
                self._roles.describe(**action.hello(taps.stacks.adapter))
        if taps.forwards.count:
            self._num_forwards.append(taps.forwards.count)
        # The low median leaves out the step after one that a GradScaler skipped, which has the forwards of both, and a
        # step with fewer microbatches at the end of an epoch.
        ordered = sorted(self._num_forwards) or [1]
        num_microbatches = ordered[(len(ordered) - 1) // 2]
        stack = None if chain is None else chain.stack
        num_layers = 0 if stack is None else stack.num_layers
        forwards = NextForwards(num_layers, num_microbatches, state.rank.data_ranks.rank, taps.obstacle, stack)
        control = state.control
        changes = [each(control, step, forwards) for each in self._before_forwards]
        if due is not None and (model := self._model()) is not None and isinstance(state, Watching):
            self.scalars.begin(model, state.layout)
        taps.step_edge(due, [change for change in changes if change is not None])

    def _send_snapshot(self) -> None:
        """Send the snapshot of this step, if there is one, with the values that were measured in it."""
        snapshot, self.snapshot = self.snapshot, None
        if snapshot is not None and (io_thread := self._roles.io_thread) is not None:
            snapshot.measured = self._stats.readings()
            io_thread.post(snapshot)
            if (chain := self._taps.stacks.chain) is not None:
                self._roles.tell_attached(chain.stack, chain.width)

    def send_unfinished(self) -> None:
        """Send the snapshot of a step that does not end any more."""
        if self.snapshot is not None:
            self.scalars.end()
            self._send_snapshot()
