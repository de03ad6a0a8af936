"""Life cycle of the agent on one rank. It is always in one state:

waiting for ranks -> verifying -> watching or acting -> stood down

- waiting for ranks: a launcher has announced ranks that torch.distributed does not know yet.
- verifying: the ranks are known. Only the first forward shows in which layout they train.
- watching: the agent takes snapshots and refuses commands.
- acting: it also applies commands.
- stood down: it has failed, was refused or was closed. The values in force stay.

No state refers to the model, because the I/O thread holds the life cycle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from koopmon.agent.capture.sampler import Sampler
from koopmon.agent.capture.schedule import SnapshotSchedule
from koopmon.agent.comms.io_thread import IOThread
from koopmon.agent.control.action import ControlAction
from koopmon.agent.control.actuator import Actuator, RampBack, Request
from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.control.state import ControlState
from koopmon.agent.parallelism import DataRanks, ParallelLayout
from koopmon.agent.rank_identity import RankContext
from koopmon.agent.stats import AgentStats
from koopmon.config import ControlConfig
from koopmon.wire.messages import Applied, Command, TrainingStep


@dataclass(frozen=True, slots=True)
class Sender:
    """The parts of a rank that sends snapshots."""

    io_thread: IOThread
    sampler: Sampler


@dataclass(frozen=True, slots=True)
class RankParts:
    """The parts that exist once the ranks are known. `sender` is None on a rank that sends no snapshots."""

    world: RankContext
    data_ranks: DataRanks
    stats: AgentStats
    schedule: SnapshotSchedule
    sender: Sender | None

    @property
    def shares_model(self) -> bool:
        """True if several ranks hold parts of one model and train on the same data."""
        return self.world.size > self.data_ranks.size

    def report(self, result: CommandResult) -> None:
        """Send the outcome of a command to the monitor."""
        if self.sender is not None:
            self.sender.io_thread.post(result)

    def facts(self) -> dict[str, Any]:
        """Return these parts' share of `Agent.status()`."""
        facts: dict[str, Any] = {"process_rank": self.world.rank, "world_size": self.world.size}
        if self.sender is not None:
            facts["connected"] = self.sender.io_thread.connected
            if (identity := self.sender.io_thread.identity) is not None:
                facts |= {"run": identity.run, "incarnation": identity.incarnation}
        return facts


class LifeCycleState:
    """Base of the states: no command is accepted, and no step is a snapshot."""

    acts = False

    @property
    def ready(self) -> bool:
        """True while commands can be applied."""
        return False

    @property
    def control(self) -> ControlState:
        """The control state in force."""
        return ControlState()

    def facts(self) -> dict[str, Any]:
        """Return this state's share of `Agent.status()`. None is unknown."""
        return dict.fromkeys(("run", "incarnation", "process_rank", "world_size", "layout")) | {"connected": False}

    def submit(self, command: Command) -> None:
        """Take a command, in the I/O thread. Its outcome is reported."""

    def before_step(self, step: int) -> None:
        """Put the pending decision in force, just before optimizer step `step`, counted from 0."""

    def before_forward(self, step: int) -> None:
        """Take part in what all ranks do, before a training forward that follows `step` optimizer steps."""

    def after_step(self, step: int) -> bool:
        """Plan the work after `step` optimizer steps. Returns True if the next training forward is a snapshot."""
        return False

    def next_work(self, step: int) -> int:
        """Return the first step after `step` with work in `before_step` or `after_step`, if no request comes."""
        return step + 1


class WaitingForRanks(LifeCycleState):
    """The state before the ranks are known. It ends with the first training forward at the latest."""


class RankedState(LifeCycleState):
    """Base of the states in which the ranks are known and the agent is alive."""

    def __init__(self, rank: RankParts) -> None:
        self.rank = rank

    def facts(self) -> dict[str, Any]:
        return super().facts() | self.rank.facts()

    def submit(self, command: Command) -> None:
        self.rank.report(CommandResult(command.id, "refused", self.rank.stats.step, "this agent is watch-only"))


class Verifying(RankedState):
    """The state before the role is known. It ends with the first verified forward."""


class Watching(RankedState):
    """The state of an agent that takes snapshots and refuses commands."""

    def __init__(self, rank: RankParts, layout: ParallelLayout) -> None:
        super().__init__(rank)
        self.layout = layout

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"layout": self.layout.name}

    def after_step(self, step: int) -> bool:
        if self.rank.world.size == 1:
            return step in self.rank.schedule.plan(step, step, self.control)
        return self.rank.schedule.unagreed(step, self.control)

    def next_work(self, step: int) -> int:
        return self.rank.schedule.next_due(step, self.control)


class Acting(Watching):
    """The state of an agent that also applies commands."""

    acts = True

    def __init__(self, rank: RankParts, layout: ParallelLayout, actuator: Actuator) -> None:
        super().__init__(rank, layout)
        self._actuator = actuator

    @property
    def ready(self) -> bool:
        return self._actuator.ready

    @property
    def control(self) -> ControlState:
        return self._actuator.state

    def submit(self, command: Command) -> None:
        self._actuator.submit(command)

    def before_step(self, step: int) -> None:
        self._actuator.before_step(step)

    def before_forward(self, step: int) -> None:
        self._actuator.before_forward(step)

    def after_step(self, step: int) -> bool:
        return self._actuator.after_step(step)

    def next_work(self, step: int) -> int:
        return self._actuator.next_work(step)


class StoodDown(LifeCycleState):
    """The last state. The control state stays as it was, equal on all ranks; lasting actions still apply it."""

    def __init__(self, before: LifeCycleState, layout: ParallelLayout | None = None) -> None:
        self._control = before.control
        self._facts = before.facts() | {"connected": False}
        if layout is not None:
            self._facts["layout"] = layout.name

    @property
    def control(self) -> ControlState:
        return self._control

    def facts(self) -> dict[str, Any]:
        return self._facts


class LifeCycle:
    """The state of the moment. It handles the monitor's messages for the I/O thread."""

    def __init__(self, actions: Sequence[ControlAction], stats: AgentStats, config: ControlConfig) -> None:
        self.state: LifeCycleState = WaitingForRanks()
        self.requests: deque[Request] = deque()
        """Requests that the state of acting serves. One that arrives earlier waits for it."""
        self._actions = actions
        self._stats = stats
        self._ramp_on_loss = config.on_monitor_lost == "ramp"

    def enter(self, state: LifeCycleState) -> None:
        """Enter `state`. The last state is never left."""
        if not isinstance(self.state, StoodDown):
            self.state = state

    @property
    def ready(self) -> bool:
        """True while commands can be applied."""
        return self.state.ready

    def applied(self, step: int | None = None) -> Applied:
        """Return the values in force at `step`; None takes the current step."""
        control, step = self.state.control, self._stats.step if step is None else step
        return Applied(
            **{name: value for action in self._actions for name, value in action.applied(control, step).items()}
        )

    def at_step(self, step: int | None = None) -> TrainingStep:
        """Return the scalars at `step` that are known without a measurement; None takes the current step."""
        control, step = self.state.control, self._stats.step if step is None else step
        known = {name: value for action in self._actions for name, value in action.training(control, step).items()}
        return TrainingStep(step=step, **known)

    def submit(self, command: Command) -> None:
        """Apply `command` at the next opportunity, and report the outcome."""
        self.state.submit(command)

    def restore(self, applied: Applied) -> None:
        """Put in force the values of an earlier launch of the run."""
        self.requests.append(applied)

    def monitor_lost(self) -> None:
        """Return to the user's own settings, if the configuration requests it."""
        if self._ramp_on_loss:
            self.requests.append(RampBack.REQUESTED)
