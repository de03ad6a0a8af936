"""Frozen records of a run, the same for the live page, the report and the command line.

A record is built either from a row of the history or from a live event. It is safe to read while the monitor runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import msgspec

from koopmon.risk.band import Band
from koopmon.risk.online_detector import foresight
from koopmon.wire.messages import AtStep

if TYPE_CHECKING:
    from koopmon.config import KssConfig, PolicyConfig
    from koopmon.history.rows import AssessmentRow, DecisionRow, HeartbeatRow
    from koopmon.policy import Action, PolicyState
    from koopmon.risk.online_detector import Observation, OnlineRisk
    from koopmon.views.action_effects import Effect
    from koopmon.views.spectra import Column, Spectrum
    from koopmon.wire.messages import Command, TrainingStep


class LoggedReading(Protocol):
    """One value of a logged scalar with its band, from an event or from the history."""

    @property
    def step(self) -> int: ...
    @property
    def value(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


TRAINING_KINDS = ("set_lr_scale", "set_kss", "set_ceilings", "rewind", "stop", "checkpoint")
"""Kinds of commands that reach the training; the others change only the observation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """One scalar of a `TrainingStep` on the pages. A new scalar needs one entry in SCALARS."""

    name: str
    title: str
    digits: int = 3
    chart: str
    """CSS class of its line."""
    unit_scale: bool = False
    """True for a chart from 0 to 1; otherwise the chart fits the data."""
    held: bool = False
    """True for a setting, which keeps its value until the next step; its line is drawn in steps."""
    in_force: bool = False
    """True for a rate that is multiplied by the LR scale."""
    idle: float | None = None
    """The chart is left out while all values equal this one."""
    banded: bool = False
    """True for a scalar with a band of its own history, which it leaves upwards alone."""

    @property
    def heading(self) -> str:
        """Title within a row of lower-case titles; an abbreviation keeps its letters."""
        return self.title if self.title[:2].isupper() else self.title[0].lower() + self.title[1:]

    def of(self, point: TimelinePoint) -> float | None:
        """Value at one point; None where it is unknown or not finite."""
        training = point.training
        value: float | None = getattr(training, self.name)
        if self.in_force and value is not None:
            value *= training.lr_scale
        return None if value is None or not math.isfinite(value) else value

    def is_shown(self, points: Iterable[TimelinePoint]) -> bool:
        """Return False if the values at all points are unknown or the idle one."""
        return any(value not in (None, self.idle) for value in map(self.of, points))


MAX_BANDED = 5000
"""Maximum number of points with a band."""


def upper_limits(points: Sequence[TimelinePoint], scalar: Scalar) -> list[tuple[TimelinePoint, float]]:
    """Return the points of the latest launch with the upper limit of the scalar's own band, as far as it has one.

    The monitor computes the same band for its alert on the loss.
    """
    band, found = Band(upper_only=True), []
    for point in points[-MAX_BANDED:]:
        if point.incarnation == points[-1].incarnation:
            value: float | None = getattr(point.training, scalar.name)
            reading = None if value is None else band.read_measured(point.step, value)
            if reading is not None and reading.high is not None:
                found.append((point, reading.high))
    return found


SCALARS = (
    Scalar(name="loss", title="Loss", digits=4, chart="loss", banded=True),
    Scalar(name="learning_rate", title="LR in force", chart="rate", in_force=True),
    Scalar(name="grad_norm", title="Gradient norm", chart="norm"),
    Scalar(name="lr_scale", title="LR scale", chart="scale", unit_scale=True, held=True),
    Scalar(name="kss_alpha", title="KSS alpha", chart="kss", held=True, idle=0.0),
    Scalar(name="kss_held_layers", title="Held layers", chart="held", held=True, idle=0.0),
    Scalar(name="update_rms", title="Update RMS", chart="update"),
    Scalar(name="log_partition", title="Log-partition", chart="partition"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelinePoint(AtStep):
    """One snapshot with its assessment. `time` is Unix seconds; `risk` and `forecast` are in [0, 1]."""

    incarnation: str
    training: TrainingStep
    time: float
    risk: float
    forecast: float | None
    reason: str
    informative: bool
    non_finite: bool

    @property
    def broken(self) -> bool:
        """True if the states or the loss were not finite."""
        loss = self.training.loss
        return self.non_finite or (loss is not None and not math.isfinite(loss))

    @classmethod
    def of_row(cls, row: AssessmentRow) -> Self:
        return cls(
            incarnation=row.incarnation,
            training=row.training,
            time=row.time,
            risk=row.risk,
            forecast=_forecast(row.components, non_finite=row.non_finite),
            reason=row.reason,
            informative=row.informative,
            non_finite=row.non_finite,
        )

    @classmethod
    def of_assessment(cls, incarnation: str, time: float, observation: Observation, risk: OnlineRisk) -> Self:
        return cls(
            incarnation=incarnation,
            training=observation.training,
            time=time,
            risk=risk.value,
            forecast=_forecast(risk.components, non_finite=observation.non_finite),
            reason=risk.reason,
            informative=observation.informative,
            non_finite=observation.non_finite,
        )

    def to_dict(self) -> dict[str, Any]:
        """Flat plain values for JSON."""
        plain = msgspec.to_builtins(self)
        return dict(plain.pop("training"), **plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedPoint:
    """Values that the user's loop logged, by name, each with the band of its own history."""

    incarnation: str
    step: int
    readings: Mapping[str, LoggedReading]

    @classmethod
    def of(cls, incarnation: str, readings: Mapping[str, LoggedReading]) -> Self | None:
        """Return the point of the latest step among `readings`; None without any."""
        step = max((each.step for each in readings.values()), default=None)
        return None if step is None else cls(incarnation=incarnation, step=step, readings=readings)

    @classmethod
    def of_rows(cls, rows: Iterable[HeartbeatRow]) -> list[Self]:
        """Points of recorded heartbeats, without repeated ones."""
        points = (cls.of(row.incarnation, row.logged) for row in rows)
        known = [point for point in points if point is not None]
        return [point for before, point in zip([None, *known], known, strict=False) if not point.repeats(before)]

    def repeats(self, other: LoggedPoint | None) -> bool:
        """Return True if both points have the same steps and names."""
        return other is not None and self.incarnation == other.incarnation and self.steps == other.steps

    @property
    def steps(self) -> dict[str, int]:
        """Step of each name."""
        return {name: each.step for name, each in self.readings.items()}


def _forecast(components: Mapping[str, float | None], *, non_finite: bool) -> float | None:
    """Forecast from the components of a risk; None where they do not suffice, as in a snapshot without information."""
    known = {name: value for name, value in components.items() if value is not None}
    if "prior" in known and ("growth" in known or "loss" in known):
        return foresight(known)
    return 1.0 if non_finite else None


Direction = Literal["restrain", "release", "observe"]
"""A command restrains the training (back-off, KSS, stop), releases it, or changes only the observation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandView:
    """One command: `outcome` as in the history, `step` is the step of its ack."""

    command: Command
    outcome: str
    step: int | None = None
    detail: str = ""
    direction: Direction | None = None
    """None before `with_effects`."""
    effect: Effect | None = None
    """Set by `with_effects` for an applied command that restrained the training."""

    @property
    def words(self) -> str:
        """Description of the command."""
        return command_words(self.command)

    @property
    def changes_training(self) -> bool:
        """True for a command that reaches the training. Corrections belong to an earlier one."""
        return self.command.kind in TRAINING_KINDS and not self.command.corrects

    @property
    def applied_step(self) -> int | None:
        """Step at which all ranks applied the command; None if they did not."""
        return self.step if self.outcome == "applied" else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        command = self.command
        return {
            "id": command.id,
            "kind": command.kind,
            "what": self.words,
            "reason": command.reason,
            "lr_scale": command.lr_scale,
            "kss_alpha": None if command.kss is None else command.kss.alpha,
            "outcome": self.outcome,
            "step": self.step,
            "detail": self.detail,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionView:
    """One decision of the policy with the outcomes of its commands."""

    incarnation: str
    step: int
    time: float
    phase: str
    reason: str
    risk: float
    commands: tuple[CommandView, ...] = ()

    @classmethod
    def of_row(cls, row: DecisionRow) -> Self:
        commands = tuple(
            CommandView(command=each.command, outcome=each.outcome, step=each.acked_step, detail=each.detail or "")
            for each in row.commands
        )
        return cls(**{each.name: getattr(row, each.name) for each in fields(row)} | {"commands": commands})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("incarnation", "step", "time", "phase", "reason", "risk")
        return {name: getattr(self, name) for name in names} | {"commands": [each.to_dict() for each in self.commands]}


def training_commands(decisions: Sequence[DecisionView]) -> Iterator[tuple[CommandView, int]]:
    """Yield the commands that change training, each with the step of its ack, else of its decision."""
    for decision in decisions:
        for each in decision.commands:
            if each.changes_training:
                yield each, decision.step if each.step is None else each.step


def command_words(command: Command | Action) -> str:
    """Describe the effect of a command."""
    if command.max_rate is not None:
        return f"learning rate at most {command.max_rate:.3g}"
    if command.rewind is not None:
        return "back to earlier weights"
    if command.lr_scale is not None:
        return f"learning rate × {command.lr_scale:.3g}"
    if command.kss is not None:
        return f"KSS alpha {command.kss.alpha:.3g}" if command.kss.alpha else "KSS off"
    if command.ceilings is not None:
        layers = ", ".join(map(str, command.ceilings))
        return f"ceilings on layers {layers}" if command.ceilings else "ceilings released"
    if command.cadence_steps is not None:
        every = "every step" if command.cadence_steps == 1 else f"every {command.cadence_steps} steps"
        until = "" if command.cadence_until_step is None else f" until step {command.cadence_until_step}"
        return f"a snapshot {every}{until}"
    return _REQUESTS.get(command.kind, command.kind)


_REQUESTS = {"stop": "request to stop", "checkpoint": "request for a checkpoint"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentHealth:
    """Health of the agents. `dropped` counts snapshots by reason, including those lost inside the monitor."""

    num_ranks: int = 0
    world_size: int = 0
    overhead_ratio: float | None = None
    step_seconds: float | None = None
    taps_missing: int = 0
    control_ready: bool = True
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """State of detector and policy after the last snapshot, the input of `preview`. `now` is on the policy's clock."""

    now: float
    state: PolicyState
    observation: Observation
    risk: OnlineRisk
    policy: PolicyConfig
    kss: KssConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Data of one run's page at one moment. Times are Unix seconds.

    `state` is "running", "ended", "vanished", or "recorded" for a run known only from the history. `revision` grows
    with every change of any run.
    """

    name: str
    incarnation: str
    revision: int = 0
    state: str = "recorded"
    adapter: str = ""
    width: int = 0
    num_layers: int = 0
    acts: bool = False
    sends: bool = False
    hostname: str = ""
    step: int = 0
    last_heard: float = 0.0
    lr_scale: float = 1.0
    kss_alpha: float = 0.0
    num_held_layers: int = 0
    num_received: int = 0
    health: AgentHealth = field(default_factory=AgentHealth)
    points: tuple[TimelinePoint, ...] = ()
    logged: tuple[LoggedPoint, ...] = ()
    columns: tuple[Column, ...] = ()
    spectrum: Spectrum | None = None
    decisions: tuple[DecisionView, ...] = ()
    standing: PolicyStatus | None = None

    @property
    def latest(self) -> TimelinePoint | None:
        return self.points[-1] if self.points else None

    @property
    def last_decision(self) -> DecisionView | None:
        return self.decisions[-1] if self.decisions else None
