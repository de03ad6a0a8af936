"""The ranks of the training, and the role that the agent has on this one."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from koopmon.agent.capture.sampler import Sampler
from koopmon.agent.capture.schedule import OverheadBudget, SnapshotSchedule
from koopmon.agent.circuit_breaker import CircuitBreaker, logger
from koopmon.agent.comms.control_channel import RankInfo
from koopmon.agent.comms.io_thread import IOThread
from koopmon.agent.control.action import ControlAction
from koopmon.agent.control.actuator import Actuator
from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.control.kept_settings import VARIABLE, KeptSettings
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rank_group import RankGroup, ReplicaFingerprint
from koopmon.agent.lifecycle import Acting, LifeCycle, RankedState, RankParts, Sender, Verifying, Watching
from koopmon.agent.notices import Notices
from koopmon.agent.parallelism import (
    UNKNOWN,
    DataRanks,
    ParallelLayout,
    Role,
    RoleDecision,
    collectives_counter,
    data_ranks,
    decide_role,
    inspect_layout,
)
from koopmon.agent.rank_identity import RankContext, RunRendezvous, store_prefix
from koopmon.agent.run_claims import claim
from koopmon.agent.stats import AgentStats
from koopmon.api import Stack
from koopmon.config import Config
from koopmon.logs import log_for_job
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.messages import Applied


class Roles:
    """Enters the states of `lifecycle` that the ranks and their layout lead to.

    `withdraw` is called with the layout and the reason if koopmon must do nothing in this layout.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: OptimizerSet,
        lifecycle: LifeCycle,
        actions: tuple[ControlAction, ...],
        stats: AgentStats,
        notices: Notices,
        breaker: CircuitBreaker,
        config: Config,
        endpoint: str,
        run: str | None,
        trust: AuthPolicy | None,
        io_thread: type[IOThread],
        withdraw: Callable[[ParallelLayout, str], None],
    ) -> None:
        self.run = run
        self.kept: KeptSettings | None = None
        """The file with the values in force, for the next launch; None without one."""
        self.reason = ""
        """The reason of the role."""
        self.closables: list[IOThread | RankGroup] = []
        self._restored: Applied | None = None
        self._may_not_act = False
        self._model = weakref.ref(model)
        self._optimizers = optimizers
        self._lifecycle = lifecycle
        self._actions = actions
        self._stats = stats
        self._notices = notices
        self._breaker = breaker
        self._config = config
        self._endpoint = endpoint
        self._trust = trust
        self._make_io_thread = io_thread
        self._withdraw = withdraw
        self._place = store_prefix(model, run)

    @property
    def io_thread(self) -> IOThread | None:
        """The I/O thread. None on a rank that sends no snapshots, and while the ranks are unknown."""
        state = self._lifecycle.state
        return state.rank.sender.io_thread if isinstance(state, RankedState) and state.rank.sender else None

    def describe(self, **changes: Any) -> None:
        """Change fields of this rank's description, and send it to the monitor."""
        if (io_thread := self.io_thread) is not None:
            io_thread.describe(**changes)

    def tell_attached(self, stack: Stack, width: int) -> None:
        """Print once what is watched: `stack`, with D = `width`."""
        state, io_thread, model = self._lifecycle.state, self.io_thread, self._model()
        identity = None if io_thread is None else io_thread.identity
        if not isinstance(state, RankedState) or identity is None or model is None:
            return
        self._notices.attached(
            identity.run,
            model,
            self._optimizers,
            stack=stack.name,
            num_layers=len(stack.points),
            width=width,
            num_ranks=state.rank.world.size,
            acts=state.acts,
            reason=self.reason,
        )

    def end_actions(self) -> None:
        """Free the memory of the actions. No command is applied any more."""
        for action in self._actions:
            action.end()

    def meet(self, world: RankContext, budget: OverheadBudget, family: dict[str, Any]) -> None:
        """Enter the first state in which the ranks are known. `family` is the adapter's part of hello."""
        model, config = self._model(), self._config
        if model is None:
            return
        directory = os.environ.get(VARIABLE)
        if self.run and directory and world.size == 1:
            self.run = claim(directory, self.run)
        schedule = SnapshotSchedule(config.cadence, budget, self._stats)
        ranks = data_ranks(model, world)
        self._notices.meet(world.rank)
        rank = RankParts(world, ranks, self._stats, schedule, self._make_sender(world, ranks, family))
        if self.run and directory:
            self.kept = KeptSettings(directory, self.run, world.rank)
            self._restored = self.kept.read()
            weakref.finalize(self, self.kept.clear)
        self._lifecycle.enter(Verifying(rank))
        self.decide(rank, None)
        if rank.sender is not None:
            rank.sender.io_thread.start()

    def _make_sender(self, world: RankContext, ranks: DataRanks, family: dict[str, Any]) -> Sender | None:
        sampling = self._config.sampling
        num_senders = min(ranks.size, sampling.max_senders)
        if not ranks.leads or ranks.rank >= num_senders:
            return None
        io_thread = self._make_io_thread(
            self._endpoint,
            self._config.control,
            self._stats,
            self._breaker,
            self._lifecycle,
            RunRendezvous(world, self.run, self._place).resolve,
            RankInfo(
                process_rank=world.rank,
                world_size=world.size,
                num_senders=num_senders,
                rate_sized_steps=self._optimizers.rate_sized_steps(),
                **family,
            ),
            self._trust,
        )
        self.closables.append(io_thread)
        share = -(-sampling.num_samples // num_senders)
        return Sender(io_thread, Sampler(sampling, ranks.rank, share, self._stats))

    def decide(self, rank: RankParts, fingerprint: int | None, *, in_graph: bool = False) -> None:
        """Enter the state of the role that suits the layout, once that is known.

        `fingerprint` is that of the first verified forward, from inside which more can be seen; None before it.
        `in_graph`: the blocks run inside a compiled graph.
        """
        model, in_forward = self._model(), fingerprint is not None
        if model is None or (rank.shares_model and not in_forward):
            return  # only the first forward shows if ranks that share a model also share its tokens
        layout = inspect_layout(model, rank.world, search=in_forward and in_graph)
        layout = layout or (UNKNOWN if in_forward else None)
        if layout is None:
            return
        decision = decide_role(layout, self._config.limits.act)
        if self._may_not_act and decision.role is Role.ACT:
            decision = RoleDecision(Role.WATCH)
        if decision.role is Role.REFUSE:
            self._withdraw(layout, decision.reason)
            log_for_job(logger, f"not attached, training goes on: {decision.reason}", rank=rank.world.rank)
        elif isinstance(self._lifecycle.state, Verifying):
            if decision.reason:
                log_for_job(logger, f"watch-only: {decision.reason}", rank=rank.world.rank)
            acts, self.reason = decision.role is Role.ACT, decision.reason or self.reason
            self._lifecycle.enter(self._acting(rank, layout, fingerprint) if acts else Watching(rank, layout))
            if not acts:
                self.end_actions()
            self.describe(acts=acts)

    def _acting(self, rank: RankParts, layout: ParallelLayout, fingerprint: int | None) -> Acting:
        group = None
        if rank.world.size > 1:
            share = ReplicaFingerprint(rank.data_ranks.rank, fingerprint or 0) if rank.shares_model else None
            collectives = collectives_counter()
            group = RankGroup(rank.world, self._config.control, self._stats, self._place, share, collectives)
            self.closables.append(group)
        actuator = Actuator(
            self._actions,
            self._config,
            self._stats,
            rank.schedule,
            layout=layout,
            requests=self._lifecycle.requests,
            report=partial(_report, rank, self._notices),
            keep=None if self.kept is None else self.kept.keep,
            group=group,
            restored=self._restored,
        )
        return Acting(rank, layout, actuator)

    def stop_acting(self, reason: str, *, sees: str = "watches, does not act") -> None:
        """Watch from now on, and refuse commands. All ranks do so in the same step.

        The first call prints `reason`, behind what the agent still `sees`.
        """
        if self._may_not_act:
            return
        self._may_not_act, self.reason = True, reason
        log_for_job(logger, f"{sees}: {reason}")
        state = self._lifecycle.state
        if isinstance(state, Acting):
            self._lifecycle.enter(Watching(state.rank, state.layout))
            self.end_actions()
            self.describe(acts=False)
            for closable in self.closables:
                if isinstance(closable, RankGroup):
                    closable.close(wait=False)


def _report(rank: RankParts, notices: Notices, result: CommandResult) -> None:
    """Send the outcome of a command, and print it. No method: the I/O thread holds it, and must not hold the model."""
    rank.report(result)
    notices.changed(result)
