"""The parts of the agent, connected to one model and one optimizer."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from torch import nn
from torch.optim import Optimizer

from koopmon.agent.capture.chain_search import VerifiedChain
from koopmon.agent.capture.graph_taps import MIN_ROWS
from koopmon.agent.capture.sampler import RankSnapshot
from koopmon.agent.capture.schedule import OverheadBudget
from koopmon.agent.capture.taps import ResidualTaps
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.comms.io_thread import IOThread
from koopmon.agent.control.action import ControlAction, overriding
from koopmon.agent.control.all_actions import make_actions
from koopmon.agent.control.new_optimizers import ignore, listen
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rank_group import RankGroup
from koopmon.agent.lifecycle import LifeCycle, RankedState, StoodDown, WaitingForRanks
from koopmon.agent.notices import Notices
from koopmon.agent.parallelism import ParallelLayout
from koopmon.agent.rank_identity import RankContext, current_context, default_run_name
from koopmon.agent.roles import Roles
from koopmon.agent.stats import AgentStats
from koopmon.agent.training_steps import TrainingSteps
from koopmon.api import ArchitectureAdapter, Stack, StackForm
from koopmon.block_finder import canonical_name
from koopmon.config import Config
from koopmon.logs import announced, log_for_job
from koopmon.plugins import Selection, select, source
from koopmon.run_names import stack_run_name
from koopmon.wire.auth_policy import AuthPolicy

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

    It has one model and any number of optimizers. The `first` one of a model watches further stacks by others, and
    follows changes of the blocks.

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
        self._on_forward = overriding(self.actions, "on_forward")
        self.lifecycle = LifeCycle(self.actions, self.stats, config.control)
        self._model = weakref.ref(model)
        self.optimizers = OptimizerSet()
        self._config = config
        self._trust = trust
        self._make_io_thread = io_thread
        self._budget = OverheadBudget(config.cadence)
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
        self.steps = TrainingSteps(
            model,
            self.optimizers,
            self.actions,
            self.lifecycle,
            self._roles,
            self.taps,
            self._budget,
            self.breaker,
            self.stats,
        )
        try:
            for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
                self.steps.add_optimizer(optimizer)
            world = current_context()
            if world is not None:
                self._meet_ranks(world)
        except BaseException:
            self.close("")
            raise
        if first:
            listen(self.steps)

    @property
    def present(self) -> bool:
        """True while this training is attached: not closed, and not inherited by a forked child."""
        return not self.closed and os.getpid() == self._pid

    @property
    def why_disabled(self) -> str:
        """The reason why the agent is off; empty while it is on."""
        return "closed" if self.closed else self.breaker.reason or self.taps.failure

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
        self.steps.send_unfinished()
        self.lifecycle.enter(StoodDown(self.lifecycle.state, layout))
        self._roles.end_actions()
        for closable in self._roles.closables:
            closable.close(wait=False)
        for other in self._beside:
            other.stand_down(reason)

    def close(self, reason: str) -> None:
        """Remove every hook, restore the user's own values and send a goodbye. Waits less than a second. Idempotent."""
        self.closed = True
        for other in self._beside:
            other.close(reason)
        ignore(self.steps)
        self.steps.close()
        if (kept := self._roles.kept) is not None and not reason:
            kept.clear()
        self.taps.remove()
        self.notices.closed(self.lifecycle.applied(), self.breaker.reason or self.taps.failure)
        for action in self.actions:
            action.revert()
        if os.getpid() == self._pid:
            self.steps.send_unfinished()
        self.steps.scalars.close()
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
        self.steps.on_forward()
        self.on_graph_forward()

    def on_output(self, output: Any) -> None:
        self.steps.on_output(output)

    def on_no_step(self) -> None:
        self.steps.quiet.end()

    def on_graph_forward(self) -> None:
        if isinstance(self.lifecycle.state, WaitingForRanks):
            world = current_context()
            if world is None:
                # The launcher announced ranks, but none were initialized: this process trains alone.
                self._roles.run = f"{self._roles.run or default_run_name()}-rank{announced()[0]}"
            self._meet_ranks(world or RankContext())
        for on_forward in self._on_forward:
            on_forward()

    def on_chain_verified(self, chain: VerifiedChain) -> None:
        if isinstance(state := self.lifecycle.state, RankedState):
            self._roles.decide(state.rank, chain.fingerprint, in_graph=chain.in_graph)
        if self.taps.failure:
            return
        for action in self.actions:  # a command may arrive before the next forwards are planned
            action.set_obstacle(self.taps.obstacle)
        stack = chain.stack
        self._roles.describe(num_layers=stack.num_layers, width=chain.width, update_exponent=chain.update_exponent)
        blocks = f"{len(stack.points)} blocks of {stack.name or 'the model'}"
        logger.info("koopmon: taps %s, found by %s%s", blocks, source(self.adapter), _FORMS[stack.form])
        if self.late_beside:
            self._tell_beside(self.late_beside, f"{stack.name} as run {self._roles.run}")
        self._watch_beside(stack, chain.beside[: MAX_STACKS - 1])

    def on_no_chain(self, reason: str) -> None:
        if self._is_first:
            log_for_job(logger, f"no snapshots, training goes on: {reason}")
            return
        names = ", ".join(stack.name for stack in self._selection.candidates)
        log_for_job(logger, f"no snapshots of {names}, which trains too, as run {self._roles.run}: {reason}")
        self.stand_down(reason)

    def on_stacks_train(self, stacks: tuple[Stack, ...]) -> None:
        if (chain := self.taps.stacks.chain) is not None:
            self._watch_beside(chain.stack, stacks[: MAX_STACKS - 1 - len(self._beside)], verified=False)

    def on_snapshot_ready(self, snapshot: RankSnapshot) -> None:
        self.steps.snapshot = snapshot
        self._budget.spend(0.0, snapshot.states.nbytes)

    def adapter_replaced(self, selection: Selection) -> None:
        self.adapter, self._selection = selection.adapter, selection
        if (model := self._model()) is not None:
            for action in self.actions:
                action.inspect(model, self.optimizers, selection)
        self._roles.describe(**_family(self.adapter, self.actions))

    def _num_rows(self) -> int:
        """Return the number of tokens to copy in a compiled graph. A rank that sends none copies a few to verify."""
        state = self.lifecycle.state
        if not isinstance(state, RankedState):
            return self._config.sampling.num_samples
        return MIN_ROWS if state.rank.sender is None else state.rank.sender.sampler.share

    # Further stacks of the model.

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
            other.late_beside = "" if verified else kept.name
            self._beside.append(other)
            self.steps.beside.append(other.steps)
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

    def _find_again(self, model: nn.Module) -> Selection:
        """Return the candidates of the model, whose blocks have changed. The runs of further stacks end."""
        selection = select(model, self._config.model.adapter, self._config.model.stack)
        for other in self._beside:
            other.close("")
        self._beside.clear()
        self.steps.beside.clear()
        return selection

    def share_budget(self, num_models: int) -> None:
        """Share the budget of overhead with the agents of `num_models` models, this one among them."""
        self._num_models = num_models
        for each in (self, *self._beside):
            each._budget.num_sharers = num_models * (1 + len(self._beside))


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
