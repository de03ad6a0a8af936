"""The parts of the agent, connected to one model and one optimizer."""

from __future__ import annotations

import itertools
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median_low
from typing import Any

import msgspec
from torch import nn
from torch.optim import Optimizer

from koopmon.agent.capture.graph_taps import MIN_ROWS
from koopmon.agent.capture.sampler import RankSnapshot, Sampler
from koopmon.agent.capture.schedule import OverheadBudget, SnapshotSchedule
from koopmon.agent.capture.step_scalars import StepScalars
from koopmon.agent.capture.taps import ResidualTaps
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.comms.control_channel import RankInfo
from koopmon.agent.comms.io_thread import IOThread
from koopmon.agent.control.action import ControlAction, NextForwards, Update
from koopmon.agent.control.actuator import Actuator, CommandResult
from koopmon.agent.control.all_actions import make_actions
from koopmon.agent.control.kept_settings import VARIABLE, KeptSettings
from koopmon.agent.control.loop_requests import LoopRequest
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rank_group import RankGroup, ReplicaFingerprint
from koopmon.agent.control.step_clock import StepClock, is_nested, stepping_optimizers
from koopmon.agent.lifecycle import (
    Acting,
    LifeCycle,
    RankedState,
    RankParts,
    Sender,
    StoodDown,
    Verifying,
    WaitingForRanks,
    Watching,
)
from koopmon.agent.notices import Notices
from koopmon.agent.parallelism import (
    UNKNOWN,
    DataRanks,
    ParallelLayout,
    Role,
    RoleDecision,
    data_ranks,
    decide_role,
    inspect_layout,
)
from koopmon.agent.rank_identity import RankContext, RunRendezvous, current_context, default_run_name, store_prefix
from koopmon.agent.stats import AgentStats
from koopmon.api import ArchitectureAdapter, Stack, StackForm
from koopmon.block_finder import canonical_name
from koopmon.config import Config
from koopmon.errors import raise_from_signal
from koopmon.logs import announced, log_for_job
from koopmon.plugins import Selection, source
from koopmon.run_names import stack_run_name
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.messages import Applied, CommandKind

logger = logging.getLogger("koopmon.agent")

MAX_STACKS = 4
"""Stacks of one model that are watched."""
STEPLESS_FORWARDS = 16
"""Training forwards without a step after which changed weights mean that the optimizer calls no hooks."""

_FORMS: dict[StackForm, str] = {
    "chain": "",
    "pairs": "; the model mixes between them: a transition is from a block's input to its output",
    "entries": "; the model adds their outputs itself: a transition is from a block's input to the next one's",
}


class AgentRuntime:
    """All hooks and threads of one attached training. `close` detaches them. The hooks keep it alive.

    It has one model and any number of optimizers, which `add_optimizer` may extend.

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
    ) -> None:
        self.endpoint = endpoint
        self.adapter = selection.adapter
        self.closed = False
        self.stats = AgentStats()
        self.notices = Notices(self.stats)
        self.breaker = CircuitBreaker("the agent", self.stand_down)
        self.actions = make_actions(config, self.stats, self.breaker)
        self._lasting = tuple(action for action in self.actions if action.lasting)
        self._others = tuple(action for action in self.actions if not action.lasting)
        self._loop_requests = {each.kind: each for each in self.actions if isinstance(each, LoopRequest)}
        self.lifecycle = LifeCycle(self.actions, self.stats, config.control)
        self._model = weakref.ref(model)
        self.optimizers = OptimizerSet()
        self._scalars = StepScalars(self.optimizers, self.stats)
        self._snapshot: RankSnapshot | None = None
        """The snapshot of this step. It is sent at the end of the step, with the loss and the gradient norm."""
        self._new_optimizers = False
        """True if optimizers were added since the last step."""
        self._wrappers: set[int] = set()
        """The ids of optimizers with hooks that wrap others."""
        self._clock = StepClock()
        self._num_stepless = 0
        """Training forwards before the first step."""
        self._first_versions: list[int] = []
        self._compiled_step = False
        """True if the step of an optimizer was compiled. Its hooks are not called: the weights show each step."""
        self._last_versions = 0
        self._last_steps = 0
        """Steps of the clock at the last forward, and the versions of the weights."""
        self._config = config
        self._run = run
        self._trust = trust
        self._make_io_thread = io_thread
        self._place = store_prefix(model, run)
        self._budget = OverheadBudget(config.cadence)
        self._num_forwards: deque[int] = deque(maxlen=3)
        """Training forwards of the last steps, without steps that had none."""
        self._pid = os.getpid()
        self._kept: KeptSettings | None = None
        self._restored: Applied | None = None
        self._role_reason = ""
        self._closables: list[IOThread | RankGroup] = []
        self._selection = selection
        self._num_models = 1
        self._beside: list[AgentRuntime] = []
        """Watch the other stacks of the model that train, each as a run of its own."""
        self._finalizer = weakref.finalize(self, _shut_down, self._pid, self._closables)
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
        )
        # Lasting actions have a breaker of their own, because they stay in force after the agent has failed.
        self._lasting_breaker = CircuitBreaker("learning-rate back-off")
        self._handles: list[Any] = []
        try:
            for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
                self.add_optimizer(optimizer)
            world = current_context()
            if world is not None:
                self._meet_ranks(world)
        except BaseException:
            self.close("")
            raise

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Follow one more optimizer of the model: same clock, same commands."""
        for other in self._beside:
            other.add_optimizer(optimizer)
        hook = self._lasting_breaker.hook
        self._new_optimizers = True
        for member in self.optimizers.add(optimizer):
            self._wrappers.discard(id(member))
            self._handles += [
                member.register_step_pre_hook(hook(self._before_call, self._trace_call)),
                member.register_step_post_hook(hook(self._after_call)),
            ]

    def _find_wrappers(self) -> None:
        """Replace the optimizers that wrap others. In their constructors, which add them, they do not hold these."""
        members = list(self.optimizers)
        for each in members:
            self.add_optimizer(each)
        self._wrappers |= set(map(id, members)) - set(map(id, self.optimizers))
        self._new_optimizers = False

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
        state = self.lifecycle.state
        return state.rank.sender.io_thread if isinstance(state, RankedState) and state.rank.sender else None

    # Changes of the life cycle's state.

    def _meet_ranks(self, world: RankContext) -> None:
        model, config = self._model(), self._config
        if model is None:
            return
        schedule = SnapshotSchedule(config.cadence, self._budget, self.stats)
        ranks = data_ranks(model, world)
        self.notices.meet(world.rank)
        rank = RankParts(world, ranks, self.stats, schedule, self._make_sender(world, ranks))
        if self._run and (directory := os.environ.get(VARIABLE)):
            self._kept = KeptSettings(directory, self._run, world.rank)
            self._restored = self._kept.read()
            weakref.finalize(self, self._kept.clear)
        self.lifecycle.enter(Verifying(rank))
        self._decide_role(rank, None)
        if rank.sender is not None:
            rank.sender.io_thread.start()

    def _make_sender(self, world: RankContext, ranks: DataRanks) -> Sender | None:
        sampling = self._config.sampling
        num_senders = min(ranks.size, sampling.max_senders)
        if not ranks.leads or ranks.rank >= num_senders:
            return None
        io_thread = self._make_io_thread(
            self.endpoint,
            self._config.control,
            self.stats,
            self.breaker,
            self.lifecycle,
            RunRendezvous(world, self._run, self._place).resolve,
            RankInfo(
                process_rank=world.rank,
                world_size=world.size,
                num_senders=num_senders,
                rate_sized_steps=self.optimizers.rate_sized_steps(),
                **_family(self.adapter, self.actions),
            ),
            self._trust,
        )
        self._closables.append(io_thread)
        share = -(-sampling.num_samples // num_senders)
        return Sender(io_thread, Sampler(sampling, ranks.rank, share, self.stats))

    def _decide_role(self, rank: RankParts, fingerprint: int | None) -> None:
        """Enter the state of the role that suits the layout, once that is known.

        `fingerprint` is that of the first verified forward, from inside which more can be seen; None before it.
        """
        model, in_forward = self._model(), fingerprint is not None
        if model is None or (rank.shares_model and not in_forward):
            return  # only the first forward shows if ranks that share a model also share its tokens
        layout = inspect_layout(model, rank.world, search=in_forward and self.taps.in_graph)
        layout = layout or (UNKNOWN if in_forward else None)
        if layout is None:
            return
        decision = decide_role(layout, self._config.limits.act)
        if self._compiled_step and decision.role is Role.ACT:
            decision = RoleDecision(Role.WATCH)  # its line is logged already
        if decision.role is Role.REFUSE:
            self._withdraw(rank, layout, decision.reason)
        elif isinstance(self.lifecycle.state, Verifying):
            if decision.reason:
                log_for_job(logger, f"watch-only: {decision.reason}", rank=rank.world.rank)
            acts, self._role_reason = decision.role is Role.ACT, decision.reason
            self.lifecycle.enter(self._acting(rank, layout, fingerprint) if acts else Watching(rank, layout))
            if not acts:
                self._end_actions()
            self._describe(acts=acts)

    def _acting(self, rank: RankParts, layout: ParallelLayout, fingerprint: int | None) -> Acting:
        group = None
        if rank.world.size > 1:
            share = ReplicaFingerprint(rank.data_ranks.rank, fingerprint or 0) if rank.shares_model else None
            group = RankGroup(rank.world, self._config.control, self.stats, self._place, share)
            self._closables.append(group)
        actuator = Actuator(
            self.actions,
            self._config,
            self.stats,
            rank.schedule,
            layout=layout,
            requests=self.lifecycle.requests,
            report=partial(_report, rank, self.notices),
            group=group,
            restored=self._restored,
        )
        return Acting(rank, layout, actuator)

    def _withdraw(self, rank: RankParts, layout: ParallelLayout, reason: str) -> None:
        """Stop watching this training: remove the taps, refuse commands, log one line."""
        self.taps.remove(reason)
        self.stand_down(reason, layout)
        log_for_job(logger, f"not attached, training goes on: {reason}", rank=rank.world.rank)

    def stand_down(self, reason: str, layout: ParallelLayout | None = None) -> None:
        """End snapshots and commands. The control state stays, equal on all ranks, and lasting actions apply it."""
        self._send_unfinished()
        self.lifecycle.enter(StoodDown(self.lifecycle.state, layout))
        self._end_actions()
        for closable in self._closables:
            closable.close(wait=False)
        for other in self._beside:
            other.stand_down(reason)

    def close(self, reason: str) -> None:
        """Remove every hook, restore the user's own values and send a goodbye. Waits less than a second. Idempotent."""
        self.closed = True
        for other in self._beside:
            other.close(reason)
        # torch iterates over the hooks of an optimizer that steps. Those stay, without an effect.
        # A change of the hooks of a compiled step would cause a new compilation.
        if next(stepping_optimizers(), None) is None and not self._compiled_step:
            for handle in self._handles:
                handle.remove()
        if self._kept is not None and not reason:
            self._kept.clear()
        self.taps.remove()
        self.notices.closed(self.lifecycle.applied(), self.breaker.reason or self.taps.failure)
        for action in self.actions:
            action.revert()
        if os.getpid() == self._pid:
            self._send_unfinished()
        self._scalars.close()
        self.lifecycle.enter(StoodDown(self.lifecycle.state))
        self._end_actions()
        if os.getpid() != self._pid:
            return  # in a forked child the threads belong to the parent
        for closable in self._closables:
            if isinstance(closable, IOThread):
                closable.close(reason)
            else:
                closable.close()

    def _end_actions(self) -> None:
        for action in self.actions:
            action.end()

    def _describe(self, **changes: Any) -> None:
        if (io_thread := self.io_thread) is not None:
            io_thread.describe(**changes)

    # Events of the taps.

    def on_forward(self) -> None:
        if self._clock.on_forward():
            self._end_step()
        if self._compiled_step:
            self._count_compiled_step()
        elif not self._clock.num_steps:
            self._check_steps_are_seen()
        self.on_graph_forward()

    def on_graph_forward(self) -> None:
        if isinstance(self.lifecycle.state, WaitingForRanks):
            world = current_context()
            if world is None:
                # The launcher announced ranks, but none were initialized: this process trains alone.
                self._run = f"{self._run or default_run_name()}-rank{announced()[0]}"
            self._meet_ranks(world or RankContext())
        for action in self.actions:
            action.on_forward()

    def _num_rows(self) -> int:
        """Return the number of tokens to copy in a compiled graph. A rank that sends none copies a few to verify."""
        state = self.lifecycle.state
        if not isinstance(state, RankedState):
            return self._config.sampling.num_samples
        return MIN_ROWS if state.rank.sender is None else state.rank.sender.sampler.share

    def _check_steps_are_seen(self) -> None:
        """Log one line if the weights change, and no attached optimizer has called its hooks."""
        self._num_stepless += 1
        if self._num_stepless == 1:
            self._first_versions = self._versions()
        elif self._num_stepless == STEPLESS_FORWARDS and self._first_versions != self._versions():
            log_for_job(
                logger,
                "no snapshots and no commands: the weights change, but the attached optimizer calls no hooks, as in "
                "torch.compile; compile the model or the loss, and not the optimizer's step",
            )

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
        self._last_versions, self._last_steps = self._version_sum(), self._clock.num_steps
        self.taps.follow_wrapper()
        state = self.lifecycle.state
        if isinstance(state, Acting):
            self.lifecycle.enter(Watching(state.rank, state.layout))
            self._end_actions()
            self._describe(acts=False)
            for closable in self._closables:
                if isinstance(closable, RankGroup):
                    closable.close(wait=False)
        log_for_job(logger, "watches, does not act: the optimizer's step is compiled; call it outside of torch.compile")

    def _count_compiled_step(self) -> None:
        """End a step if the weights have changed since the last forward, and no optimizer has called its hooks."""
        versions, steps = self._version_sum(), self._clock.num_steps
        if versions != self._last_versions and steps == self._last_steps:
            self.stats.measured["learning_rate"].put(self.optimizers.largest_rate())
            self.taps.forward_over()
            self._after_step()
        self._last_versions, self._last_steps = versions, steps

    def _version_sum(self) -> int:
        """Return the number of changes in place of all parameters."""
        parameters = (
            each for optimizer in self.optimizers for group in optimizer.param_groups for each in group["params"]
        )
        return sum(each._version for each in parameters if not each.is_inference())

    def _versions(self) -> list[int]:
        """Return the versions of a few parameters. An update in place increments them."""
        firsts = (next(iter(group["params"]), None) for each in self.optimizers for group in each.param_groups)
        return [each._version for each in itertools.islice(firsts, 8) if each is not None and not each.is_inference()]

    def on_chain_verified(self, stack: Stack, width: int, update_exponent: float | None, fingerprint: int) -> None:
        if isinstance(state := self.lifecycle.state, RankedState):
            self._decide_role(state.rank, fingerprint)
        if self.taps.failure:
            return
        self._describe(num_layers=stack.num_layers, width=width, update_exponent=update_exponent)
        blocks = f"{len(stack.points)} blocks of {stack.name or 'the model'}"
        logger.info("koopmon: taps %s, found by %s%s", blocks, source(self.adapter), _FORMS[stack.form])
        self._watch_beside(stack, self.taps.beside[: MAX_STACKS - 1])

    def _watch_beside(self, kept: Stack, stacks: Sequence[Stack]) -> None:
        """Watch further stacks of the model, each as a run of its own. Actions follow the risk of `kept` alone."""
        model, named = self._model(), self._run or default_run_name()
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
            )
            other.stats.step, other.stats.measured = self.stats.step, self.stats.measured
            other.stats.named = self.stats.named
            self._beside.append(other)
        self.share_budget(self._num_models)
        shown = ", ".join(f"{stack.name} as run {run}" for stack, run in zip(stacks, names, strict=True))
        log_for_job(
            logger,
            f"watches {kept.name}, and {shown}; actions follow {kept.name} alone, the stack that is "
            "deepest or nearest to the loss; [model] stack names another one",
            level=logging.INFO,
        )

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
        self._describe(**_family(self.adapter, self.actions))

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
            reason=self._role_reason,
        )

    def _send_unfinished(self) -> None:
        """Send the snapshot of a step that does not end any more."""
        if self._snapshot is not None:
            self._scalars.end()
            self._send_snapshot()

    # Hooks of the optimizers.

    def _before_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self.closed or is_nested(optimizer):
            return None
        clock = self._clock
        begins = clock.begins_step(optimizer, args, kwargs)
        if begins:
            if clock.open:
                self._end_step()
            if self._new_optimizers:
                self._find_wrappers()
            clock.begin_step(self.optimizers)
            self.breaker.hook(self._before_step)(optimizer, args, kwargs)
        clock.begin(optimizer)
        if id(optimizer) in self._wrappers:
            return None  # the optimizers that it holds are scaled
        self._scalars.before_call(optimizer, args, kwargs)
        update, control = Update(optimizer, args, kwargs), self.lifecycle.state.control
        for action in self._lasting:
            action.apply(control, clock.num_steps, update)
        kept = self._kept
        if begins and kept is not None and (control.version or kept.in_force):
            kept.keep(self.lifecycle.applied(clock.num_steps))
        unchanged = update.args is args and update.kwargs is kwargs
        return None if unchanged else (update.args, update.kwargs)

    def _after_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.closed or is_nested(optimizer):
            return
        for action in self._lasting:
            action.revert()
        self._scalars.after_call(optimizer, args, kwargs)
        if self._clock.end(optimizer):
            self._end_step()

    def _end_step(self) -> None:
        self._clock.end_step()
        for request in self._loop_requests.values():
            request.on_step_end()
        self.breaker.hook(self._after_step)()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        started = time.perf_counter()
        self.stats.measured["learning_rate"].put(self.optimizers.largest_rate())
        self.taps.forward_over()
        state, step = self.lifecycle.state, self.stats.step
        state.before_step(step)
        update = Update(optimizer, args, kwargs)
        for action in self._others:
            action.apply(state.control, step, update)
        self.stats.hook_seconds += time.perf_counter() - started

    def _after_step(self) -> None:
        self._scalars.end()
        self._send_snapshot()
        started = time.perf_counter()
        self._budget.earn(self.stats.on_step_edge(started))
        # Only snapshots are charged, because fewer of them make nothing else cheaper.
        self._budget.charge(self.stats.capture_seconds)
        for action in self._others:
            action.revert()
        if isinstance(state := self.lifecycle.state, RankedState):
            self._plan_step(state)
        self.stats.hook_seconds += time.perf_counter() - started

    def _plan_step(self, state: RankedState) -> None:
        """Tell the taps and the actions about the step that begins."""
        step, stack, sender = self.stats.step, self.taps.stack, state.rank.sender
        due = None
        if state.after_step(step) and stack is not None and sender is not None:
            if sender.io_thread.connected:
                due = sender.sampler, self.lifecycle.at_step(step)
            else:
                self.stats.drop("monitor_away")
        for action in self.actions:
            if action.hello_changed:
                action.hello_changed = False
                self._describe(**action.hello(self.adapter))
        if self.taps.num_forwards:
            self._num_forwards.append(self.taps.num_forwards)
        # The median leaves out the step after one that a GradScaler skipped, which has the forwards of both, and a step
        # with fewer microbatches at the end of an epoch.
        num_microbatches = median_low(self._num_forwards or [1])
        num_layers = 0 if stack is None else stack.num_layers
        forwards = NextForwards(num_layers, num_microbatches, state.rank.data_ranks.rank, self.taps.obstacle)
        changes = [action.before_forwards(state.control, step, forwards) for action in self.actions]
        if due is not None and (model := self._model()) is not None and isinstance(state, Watching):
            self._scalars.begin(model, state.layout)
        self.taps.step_edge(due, [change for change in changes if change is not None])


def _family(adapter: ArchitectureAdapter, actions: tuple[ControlAction, ...]) -> dict[str, Any]:
    """Return the adapter's part of hello."""
    fields: dict[str, Any] = {"adapter": adapter.name, "thresholds": dict(adapter.thresholds())}
    for action in actions:
        fields |= action.hello(adapter)
    return fields


def _report(rank: RankParts, notices: Notices, result: CommandResult) -> None:
    """Send the outcome of a command, and print it. No method: the I/O thread holds it, and must not hold the model."""
    rank.report(result)
    notices.changed(result)


def _say_end(notices: Notices, lifecycle: LifeCycle) -> None:
    """Print the closing line of a training that nobody closed."""
    notices.closed(lifecycle.applied(), "")


def _shut_down(pid: int, closables: list[IOThread | RankGroup]) -> None:
    """End the threads with the model or the interpreter. They must not outlive it. No effect in a forked child."""
    if os.getpid() == pid:
        for closable in closables:
            closable.close(wait=True)
