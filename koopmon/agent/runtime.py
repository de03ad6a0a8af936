"""The parts of the agent, connected to one model and one optimizer."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import nn
from torch.optim import Optimizer

from koopmon.agent.capture.graph_taps import MIN_ROWS
from koopmon.agent.capture.sampler import RankSnapshot
from koopmon.agent.capture.schedule import OverheadBudget
from koopmon.agent.capture.step_scalars import StepScalars
from koopmon.agent.capture.taps import ResidualTaps
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.comms.io_thread import IOThread
from koopmon.agent.control.action import ControlAction, NextForwards, Update, overriding
from koopmon.agent.control.all_actions import make_actions
from koopmon.agent.control.loop_requests import LoopRequest
from koopmon.agent.control.new_optimizers import listen
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rank_group import RankGroup
from koopmon.agent.control.step_clock import StepClock, is_nested, stepping_optimizers
from koopmon.agent.hooked_optimizers import HookedOptimizers
from koopmon.agent.lifecycle import LifeCycle, RankedState, StoodDown, WaitingForRanks, Watching
from koopmon.agent.notices import Notices
from koopmon.agent.parallelism import ParallelLayout, takes_uneven_inputs
from koopmon.agent.quiet_steps import QuietSteps
from koopmon.agent.rank_identity import RankContext, current_context, default_run_name
from koopmon.agent.roles import Roles
from koopmon.agent.stats import AgentStats
from koopmon.agent.unhooked_steps import UnhookedSteps
from koopmon.api import ArchitectureAdapter, Stack, StackForm
from koopmon.block_finder import canonical_name
from koopmon.config import Config
from koopmon.errors import raise_from_signal
from koopmon.logs import announced, log_for_job
from koopmon.plugins import Selection, select, source
from koopmon.run_names import stack_run_name
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.messages import CommandKind

logger = logging.getLogger("koopmon.agent")

MAX_STACKS = 4
"""Stacks of one model that are watched."""

_FORMS: dict[StackForm, str] = {
    "chain": "",
    "pairs": "; the model mixes between them: a transition is from a block's input to its output",
    "entries": "; the model adds their outputs itself: a transition is from a block's input to the next one's",
}


class AgentRuntime:
    """All hooks and threads of one attached training. `close` detaches them. The hooks keep it alive.

    It has one model and any number of optimizers, which `add_optimizer` may extend. The `first` one of a model watches
    further stacks by others, and follows changes of the blocks.

    The parts that depend on the ranks belong to `lifecycle.state`: a model may be attached before its ranks are known.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Iterable[Optimizer],
        selection: Selection,
        config: Config,
        endpoint: str,
        run: str | None,
        trust: AuthPolicy | None = None,
        *,
        io_thread: type[IOThread] = IOThread,
        first: bool = True,
    ) -> None:
        self.endpoint = endpoint
        self.adapter = selection.adapter
        self.closed = False
        self.stats = AgentStats()
        self.notices = Notices(self.stats)
        self.breaker = CircuitBreaker("the agent", self.stand_down)
        self.actions = make_actions(config, self.stats, self.breaker)
        lasting = tuple(action for action in self.actions if action.lasting)
        others = tuple(action for action in self.actions if not action.lasting)
        self._lasting = overriding(lasting, "apply"), overriding(lasting, "revert")
        self._others = overriding(others, "apply"), overriding(others, "revert")
        """Methods to call before each update, and after it."""
        self._before_forwards = overriding(self.actions, "before_forwards")
        self._on_forward = overriding(self.actions, "on_forward")
        self._loop_requests = {each.kind: each for each in self.actions if isinstance(each, LoopRequest)}
        self.lifecycle = LifeCycle(self.actions, self.stats, config.control)
        self._model = weakref.ref(model)
        self.optimizers = OptimizerSet()
        self._scalars = StepScalars(self.optimizers, self.stats)
        self._snapshot: RankSnapshot | None = None
        """The snapshot of this step. It is sent at the end of the step, with the loss and the gradient norm."""
        self._stepped = False
        """True if one of them has stepped since the last training forward."""
        self._clock = StepClock()
        self._unkept = False
        """True from the begin of a step until the file for the next launch has its values."""
        self._unhooked = UnhookedSteps(model, self.optimizers)
        self._compiled_step = False
        """True if the step of an optimizer was compiled. Its hooks are not called: the weights show each step."""
        self._config = config
        self._trust = trust
        self._make_io_thread = io_thread
        self._budget = OverheadBudget(config.cadence)
        self._num_forwards: deque[int] = deque(maxlen=3)
        """Training forwards of the last steps, without steps that had none."""
        self._pid = os.getpid()
        self._selection = selection
        self._num_models = 1
        self._is_first = first
        self._beside: list[AgentRuntime] = []
        """Watch the other stacks of the model that train, each as a run of its own."""
        self.late_beside = ""
        """The stack beside which this one is watched, for a line once it is verified; else empty."""
        self._roles = Roles(
            model,
            self.optimizers,
            self.lifecycle,
            self.actions,
            self.stats,
            self.notices,
            self.breaker,
            config,
            endpoint,
            run,
            trust,
            io_thread,
            self._withdraw,
        )
        self._finalizer = weakref.finalize(self, _shut_down, self._pid, self._roles.closables)
        weakref.finalize(self, _say_end, self.notices, self.lifecycle)
        for action in self.actions:
            action.inspect(model, self.optimizers, selection)
        self.taps = ResidualTaps(
            model,
            selection,
            self.breaker,
            self.stats,
            self,
            trained=lambda: self.optimizers.parameters,
            num_rows=self._num_rows,
            find_again=self._find_again if first else None,
        )
        self._quiet = QuietSteps(self._clock, self.stats, self.optimizers, self.taps, self.lifecycle)
        self._earned_seconds = 0.0
        """Time of the steps that the budget has earned."""
        # Lasting actions have a breaker of their own, because they stay in force after the agent has failed.
        self._lasting_breaker = CircuitBreaker("learning-rate back-off")
        hook = self._lasting_breaker.hook
        before, after = hook(self._before_call, self._trace_call), hook(self._after_call)
        self._hooked = HookedOptimizers(model, self.optimizers, before, after)
        try:
            for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
                self.add_optimizer(optimizer)
            world = current_context()
            if world is not None:
                self._meet_ranks(world)
        except BaseException:
            self.close("")
            raise
        if first:
            listen(self)

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Follow one more optimizer of the model: same clock, same commands."""
        for other in self._beside:
            other.add_optimizer(optimizer)
        self._quiet.end()
        self._hooked.add(optimizer)

    def on_any_step(self, optimizer: Optimizer) -> None:
        """Follow an optimizer that has replaced the others of the model, or whose hooks the user has cleared."""
        if self._quiet.on:
            if self._quiet.has_counted(optimizer):
                return
            if not self._hooked.has_hooks(optimizer) and not self._hooked.is_foreign(optimizer):
                for each in (self, *self._beside):  # the next step of this optimizer comes after forwards that are seen
                    each._quiet.end()
        elif not self.closed and not self._compiled_step and not self._stepped and self.taps.num_forwards:
            self.breaker.run(self._take_over, optimizer)

    def _take_over(self, optimizer: Optimizer) -> None:
        if what := self._hooked.take_over(optimizer):
            for other in self._beside:
                other._hooked.take_over(optimizer)
            text = f"{what}: follows {type(optimizer).__name__} from its next step on"
            log_for_job(logger, text, level=logging.INFO)

    @property
    def present(self) -> bool:
        """True while this training is attached: not closed, and not inherited by a forked child."""
        return not self.closed and os.getpid() == self._pid

    @property
    def why_disabled(self) -> str:
        """The reason why the agent is off; empty while it is on."""
        return "closed" if self.closed else self.breaker.reason or self.taps.failure

    def granted(self, kind: CommandKind) -> bool:
        """Return True while the loop should follow a request of this kind. Equal on all ranks after each step."""
        request = self._loop_requests[kind]
        request.was_read = True
        return request.granted

    @property
    def io_thread(self) -> IOThread | None:
        """The I/O thread. None on a rank that sends no snapshots, and while the ranks are unknown."""
        return self._roles.io_thread

    # Changes of the life cycle's state.

    def _meet_ranks(self, world: RankContext) -> None:
        self._roles.meet(world, self._budget, _family(self.adapter, self.actions))

    def _withdraw(self, layout: ParallelLayout, reason: str) -> None:
        """Stop watching this training: remove the taps, refuse commands."""
        self.taps.remove(reason)
        self.stand_down(reason, layout)

    def stand_down(self, reason: str, layout: ParallelLayout | None = None) -> None:
        """End snapshots and commands. The control state stays, equal on all ranks, and lasting actions apply it."""
        self._send_unfinished()
        self.lifecycle.enter(StoodDown(self.lifecycle.state, layout))
        self._roles.end_actions()
        for closable in self._roles.closables:
            closable.close(wait=False)
        for other in self._beside:
            other.stand_down(reason)

    def close(self, reason: str) -> None:
        """Remove every hook, restore the user's own values and send a goodbye. Waits less than a second. Idempotent."""
        self.closed = True
        self._quiet.on = False
        for other in self._beside:
            other.close(reason)
        # torch iterates over the hooks of an optimizer that steps. Those stay, without an effect.
        # A change of the hooks of a compiled step would cause a new compilation.
        if next(stepping_optimizers(), None) is None and not self._compiled_step:
            self._hooked.remove()
        if (kept := self._roles.kept) is not None and not reason:
            kept.clear()
        self.taps.remove()
        self.notices.closed(self.lifecycle.applied(), self.breaker.reason or self.taps.failure)
        for action in self.actions:
            action.revert()
        if os.getpid() == self._pid:
            self._send_unfinished()
        self._scalars.close()
        self.lifecycle.enter(StoodDown(self.lifecycle.state))
        self._roles.end_actions()
        if os.getpid() != self._pid:
            return  # in a forked child the threads belong to the parent
        for closable in self._roles.closables:
            if isinstance(closable, IOThread):
                closable.close(reason)
            else:
                closable.close()

    # Events of the taps.

    def on_forward(self) -> None:
        self._stepped = False
        if self._clock.on_forward():
            self._end_step()
        if self._compiled_step:
            if self._unhooked.changed(self._clock.num_steps):
                self._end_compiled_step()
        else:
            self._unhooked.check_hooks(self._clock.num_steps)
        if isinstance(state := self.lifecycle.state, RankedState) and state.rank.world.size > 1:
            self._meet_other_ranks(state)
        self.on_graph_forward()

    def _meet_other_ranks(self, state: RankedState) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a recomputation of checkpointing
        if (model := self._model()) is not None and takes_uneven_inputs(model):
            self._roles.stop_acting("the ranks may take different numbers of steps inside join()")
        step = self.stats.step
        state.before_forward(step)
        self._follow_count(step)

    def _follow_count(self, step: int) -> None:
        """Note that this rank, which counted `step` steps, may follow rank 0's count now."""
        self._clock.num_steps += self.stats.step - step

    def on_output(self, output: Any) -> None:
        self._unhooked.forward_ended()
        self._scalars.note_output(output)

    def on_graph_forward(self) -> None:
        if isinstance(self.lifecycle.state, WaitingForRanks):
            world = current_context()
            if world is None:
                # The launcher announced ranks, but none were initialized: this process trains alone.
                self._roles.run = f"{self._roles.run or default_run_name()}-rank{announced()[0]}"
            self._meet_ranks(world or RankContext())
        for on_forward in self._on_forward:
            on_forward()

    def _num_rows(self) -> int:
        """Return the number of tokens to copy in a compiled graph. A rank that sends none copies a few to verify."""
        state = self.lifecycle.state
        if not isinstance(state, RankedState):
            return self._config.sampling.num_samples
        return MIN_ROWS if state.rank.sender is None else state.rank.sender.sampler.share

    def _trace_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Replace `_before_call` in a compiled step."""
        self._note_compiled_step()

    def _note_compiled_step(self) -> int:
        """Stop acting, which is not possible inside a compiled step. Runs while the compiler traces."""
        if not self._compiled_step and not self.closed:
            try:
                self._watch_compiled_step()
            except Exception as error:
                raise_from_signal(error)
                self.breaker.trip("compiled step", error)
        return 0

    # What torch.compiler.assume_constant_result does. That function imports the compiler into every training.
    _note_compiled_step._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _watch_compiled_step(self) -> None:
        self._compiled_step = True
        self._unhooked.changed(self._clock.num_steps)
        self.taps.follow_wrapper()
        if self.taps.runs_unseen:
            reason = (
                "the model and the optimizer's step run inside compiled functions, which call no hooks;"
                " compile the model or the loss instead"
            )
            self._roles.stop_acting(reason, sees="no snapshots and no commands")
        else:
            self._roles.stop_acting("the optimizer's step is compiled; call it outside of torch.compile")

    def _end_compiled_step(self) -> None:
        """End a step whose optimizers have called no hooks."""
        self.stats.measured["learning_rate"].put(self.optimizers.largest_rate())
        self.taps.forward_over()
        self._after_step()

    def on_chain_verified(self, stack: Stack, width: int, update_exponent: float | None, fingerprint: int) -> None:
        if isinstance(state := self.lifecycle.state, RankedState):
            self._roles.decide(state.rank, fingerprint, in_graph=self.taps.in_graph)
        if self.taps.failure:
            return
        for action in self.actions:  # a command may arrive before the next forwards are planned
            action.set_obstacle(self.taps.obstacle)
        self._roles.describe(num_layers=stack.num_layers, width=width, update_exponent=update_exponent)
        blocks = f"{len(stack.points)} blocks of {stack.name or 'the model'}"
        logger.info("koopmon: taps %s, found by %s%s", blocks, source(self.adapter), _FORMS[stack.form])
        if self.late_beside:
            self._tell_beside(self.late_beside, f"{stack.name} as run {self._roles.run}")
        self._watch_beside(stack, self.taps.beside[: MAX_STACKS - 1])

    def _watch_beside(self, kept: Stack, stacks: Sequence[Stack], *, verified: bool = True) -> None:
        """Watch further stacks of the model, each as a run of its own. Actions follow the risk of `kept` alone.

        Those that are not `verified` are told once they are.
        """
        model, named = self._model(), self._roles.run or default_run_name()
        if model is None or not stacks:
            return
        limits = msgspec.structs.replace(self._config.limits, act="never")
        names = [stack_run_name(named, canonical_name(stack.name)) for stack in stacks]
        for stack, run in zip(stacks, names, strict=True):
            other = AgentRuntime(
                model,
                list(self.optimizers),
                replace(self._selection, candidates=(stack,), fallback=None),
                msgspec.structs.replace(self._config, limits=limits),
                self.endpoint,
                run,
                self._trust,
                io_thread=self._make_io_thread,
                first=False,
            )
            other.stats.step, other.stats.measured = self.stats.step, self.stats.measured
            other.stats.named = self.stats.named
            self._beside.append(other)
            other.late_beside = "" if verified else kept.name
        self.share_budget(self._num_models)
        if verified:
            shown = ", ".join(f"{stack.name} as run {run}" for stack, run in zip(stacks, names, strict=True))
            self._tell_beside(kept.name, shown)

    def _tell_beside(self, kept: str, shown: str) -> None:
        log_for_job(
            logger,
            f"watches {kept}, and {shown}; actions follow {kept} alone, the stack that is "
            "deepest or nearest to the loss; [model] stack names another one",
            level=logging.INFO,
        )

    def on_no_chain(self, reason: str) -> None:
        if self._is_first:
            log_for_job(logger, f"no snapshots, training goes on: {reason}")
            return
        names = ", ".join(stack.name for stack in self._selection.candidates)
        log_for_job(logger, f"no snapshots of {names}, which trains too, as run {self._roles.run}: {reason}")
        self.stand_down(reason)

    def on_stacks_train(self, stacks: tuple[Stack, ...]) -> None:
        if (kept := self.taps.stack) is not None:
            self._watch_beside(kept, stacks[: MAX_STACKS - 1 - len(self._beside)], verified=False)

    def _find_again(self, model: nn.Module) -> Selection:
        """Return the candidates of the model, whose blocks have changed. The runs of further stacks end."""
        selection = select(model, self._config.model.adapter, self._config.model.stack)
        for other in self._beside:
            other.close("")
        self._beside = []
        return selection

    def share_budget(self, num_models: int) -> None:
        """Share the budget of overhead with the agents of `num_models` models, this one among them."""
        self._num_models = num_models
        for each in (self, *self._beside):
            each._budget.num_sharers = num_models * (1 + len(self._beside))

    def adapter_replaced(self, selection: Selection) -> None:
        self.adapter, self._selection = selection.adapter, selection
        if (model := self._model()) is not None:
            for action in self.actions:
                action.inspect(model, self.optimizers, selection)
        self._roles.describe(**_family(self.adapter, self.actions))

    def on_snapshot_ready(self, snapshot: RankSnapshot) -> None:
        self._snapshot = snapshot
        self._budget.spend(0.0, snapshot.states.nbytes)

    def _send_snapshot(self) -> None:
        """Send the snapshot of this step, if there is one, with the values that were measured in it."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None and (io_thread := self.io_thread) is not None:
            snapshot.measured = self.stats.readings()
            io_thread.post(snapshot)
            self._tell_attached(io_thread)

    def _tell_attached(self, io_thread: IOThread) -> None:
        state, stack, model, identity = self.lifecycle.state, self.taps.stack, self._model(), io_thread.identity
        if not isinstance(state, RankedState) or stack is None or model is None or identity is None:
            return
        self.notices.attached(
            identity.run,
            model,
            self.optimizers,
            stack=stack.name,
            num_layers=len(stack.points),
            width=self.taps.width or 0,
            num_ranks=state.rank.world.size,
            acts=state.acts,
            reason=self._roles.reason,
        )

    def _send_unfinished(self) -> None:
        """Send the snapshot of a step that does not end any more."""
        if self._snapshot is not None:
            self._scalars.end()
            self._send_snapshot()

    # Hooks of the optimizers.

    def _before_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._quiet.on:
            if self._quiet.last(args, kwargs):
                return None
            self._quiet.end()
        if self.closed or is_nested(optimizer):
            return None
        self._stepped = True
        clock, update = self._clock, Update(optimizer, args, kwargs)
        begins = clock.begins_step(optimizer, args, kwargs)
        if begins:
            if clock.open:
                self._end_step()
            if self._hooked.changed:
                self._hooked.find_wrappers()
            clock.begin_step(self.optimizers)
            self.breaker.run(self._before_step, update)
            self._unkept = True
        clock.begin(optimizer)
        if self._hooked.is_wrapper(optimizer):
            return None  # the optimizers that it holds are scaled
        if self._scalars.active:
            self._scalars.before_call(optimizer, args, kwargs)
        control = self.lifecycle.state.control
        for apply in self._lasting[0]:
            apply(control, clock.num_steps, update)
        kept = self._roles.kept
        if self._unkept and kept is not None and (control.version or kept.in_force):
            kept.keep(self.lifecycle.applied(clock.num_steps))
        self._unkept = False
        if update.args is args and update.kwargs is kwargs:
            return None
        return update.args, update.kwargs

    def _after_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._quiet.on:
            self._quiet.count(optimizer)
            return
        if self.closed or is_nested(optimizer):
            return
        self._hooked.come_last(optimizer)
        for revert in self._lasting[1]:
            revert()
        if self._scalars.active:
            self._scalars.after_call(optimizer, args, kwargs)
        if self._clock.end(optimizer):
            self._end_step()
            self._begin_quiet(optimizer)

    def on_no_step(self) -> None:
        self._quiet.end()

    def _begin_quiet(self, optimizer: Optimizer) -> None:
        """Leave out the work of the steps that have none, up to the next snapshot, copy or exchange."""
        state, taps = self.lifecycle.state, self.taps
        watches = isinstance(state, Watching)
        if watches and taps.is_free and not self._compiled_step and self._hooked.is_only(optimizer):
            self._quiet.begin(optimizer, state.next_work(self.stats.step))

    def _end_step(self) -> None:
        self._clock.end_step()
        for request in self._loop_requests.values():
            if request.granted:
                request.on_step_end()
        self.breaker.run(self._after_step)

    def _before_step(self, update: Update) -> None:
        started = time.perf_counter()
        self.stats.measured["learning_rate"].put(self.optimizers.largest_rate())
        self.taps.forward_over()
        state, step = self.lifecycle.state, self.stats.step
        state.before_step(step)
        self._follow_count(step)
        step = self.stats.step
        control = state.control
        for apply in self._others[0]:
            apply(control, step, update)
        self.stats.hook_seconds += time.perf_counter() - started

    def _after_step(self) -> None:
        if self._scalars.active:
            self._scalars.end()
        if self._snapshot is not None:
            self._send_snapshot()
        started = time.perf_counter()
        self.stats.on_step_edge(started)
        elapsed = self.stats.elapsed_seconds
        self._budget.earn(elapsed - self._earned_seconds)
        self._earned_seconds = elapsed
        # Only snapshots are charged, because fewer of them make nothing else cheaper.
        self._budget.charge(self.stats.capture_seconds)
        for revert in self._others[1]:
            revert()
        if isinstance(state := self.lifecycle.state, RankedState):
            self._plan_step(state)
        self.stats.hook_seconds += time.perf_counter() - started

    def _plan_step(self, state: RankedState) -> None:
        """Tell the taps and the actions about the step that begins."""
        step, stack, sender = self.stats.step, self.taps.stack, state.rank.sender
        due = None
        if (state.after_step(step) or self.taps.waits) and stack is not None and sender is not None:
            if sender.io_thread.connected:
                due = sender.sampler, self.lifecycle.at_step(step)
            else:
                self.stats.drop("monitor_away")
        for action in self.actions:
            if action.hello_changed:
                action.hello_changed = False
                self._roles.describe(**action.hello(self.adapter))
        if self.taps.num_forwards:
            self._num_forwards.append(self.taps.num_forwards)
        # The low median leaves out the step after one that a GradScaler skipped, which has the forwards of both, and a
        # step with fewer microbatches at the end of an epoch.
        ordered = sorted(self._num_forwards) or [1]
        num_microbatches = ordered[(len(ordered) - 1) // 2]
        num_layers = 0 if stack is None else stack.num_layers
        forwards = NextForwards(num_layers, num_microbatches, state.rank.data_ranks.rank, self.taps.obstacle)
        control = state.control
        changes = [each(control, step, forwards) for each in self._before_forwards]
        if due is not None and (model := self._model()) is not None and isinstance(state, Watching):
            self._scalars.begin(model, state.layout)
        self.taps.step_edge(due, [change for change in changes if change is not None])


def _family(adapter: ArchitectureAdapter, actions: tuple[ControlAction, ...]) -> dict[str, Any]:
    """Return the adapter's part of hello."""
    fields: dict[str, Any] = {"adapter": adapter.name, "thresholds": dict(adapter.thresholds())}
    for action in actions:
        fields |= action.hello(adapter)
    return fields


def _say_end(notices: Notices, lifecycle: LifeCycle) -> None:
    """Print the closing line of a training that nobody closed."""
    notices.closed(lifecycle.applied(), "")


def _shut_down(pid: int, closables: list[IOThread | RankGroup]) -> None:
    """End the threads with the model or the interpreter. They must not outlive it. No effect in a forked child."""
    if os.getpid() == pid:
        for closable in closables:
            closable.close(wait=True)
