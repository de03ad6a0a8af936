"""State of the policy for one run, its decisions, and the input of its rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from msgspec import Meta

from koopmon.config import KssConfig, PolicyConfig
from koopmon.risk.online_detector import Observation, OnlineRisk
from koopmon.wire.messages import (
    MAX_HELD_LAYERS,
    MAX_LAYERS,
    CommandKind,
    Count,
    Fraction,
    KssSettings,
    LayerIndex,
    LrScale,
    Rate,
    Rewind,
    Step,
)

Phase = Literal["calm", "alert", "acting", "backed_off", "recovering"]
"""Phase of the policy for one run.

calm: nothing is in force. alert: the run is not calm and gets dense snapshots. acting: a command has no confirmed
effect yet. backed_off: the command took effect and stays in force. recovering: the LR scale rises.
"""
LOWERS_RATE = ("auto", "lr", "kss+lr")
"""Policies that lower the learning rate."""
USES_KSS = ("kss", "kss+lr")
"""Policies that use KSS."""
NON_FINITE_SNAPSHOTS = 2
"""Number of consecutive snapshots with a high risk, the last of which is not finite, before an action.

One alone may be a batch that the loop drops, as GradScaler does. NaN is no early warning: the next snapshot follows
within steps, and the copies are from before both.
"""
MIN_RATE, MAX_RATE = 1e-12, 1e6
"""Bounds on a cap of the learning rate, within those of the protocol."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One command of a decision; the daemon adds an id and sends it.

    Fields that `kind` does not use keep their default.
    """

    kind: CommandKind
    reason: str
    lr_scale: float | None = None
    max_rate: float | None = None
    warmup_steps: int = 0
    rewind: Rewind | None = None
    kss: KssSettings | None = None
    ceilings: Mapping[int, float] | None = None
    corrects: bool = False
    """True for a correction of ceilings in force."""
    ramp_steps: int = 0
    cadence_steps: int | None = None
    cadence_until_step: int | None = None
    expires_in_steps: int = 50

    @property
    def changes_training(self) -> bool:
        """True for commands that count in the hourly budget.

        False for a change of the snapshot cadence, and for a correction of what is in force.
        """
        return self.kind != "set_cadence" and not self.corrects


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyState:
    """State of the policy for one run. `lr_scale` and `kss` are the targets of the last commands; ramps lead to them.

    The bounds are checked when the monitor reads a history after a restart, because the file may be damaged or forged.
    """

    phase: Phase = "calm"
    lr_scale: LrScale = 1.0
    num_cuts: Count = 0
    """Number of back-offs since the LR scale was last 1."""
    max_rate: Rate | None = None
    """Cap on the learning rate in force; None without one."""
    num_rewinds: Count = 0
    """Number of rewinds commanded."""
    num_rewound: Count = 0
    """Number of rewinds carried out."""
    rewinding: bool = False
    """True from the command of a rewind until its acknowledgement or expiry."""
    kss: KssSettings = field(default_factory=KssSettings)
    high_streak: Count = 0
    """Number of consecutive snapshots with a risk of at least `act_risk`."""
    calm_since: Step | None = None
    """First step of the current sequence of snapshots below `release_risk`; None while the run is not calm."""
    acted_at: Step | None = None
    """Step of the last back-off or of the last command that turned KSS on."""
    risk_at_action: Fraction = 0.0
    """Risk at that step, in [0, 1]."""
    kss_on_at: Step | None = None
    """Step of the command that turned KSS on; None while it is off."""
    kss_cut: Count = 0
    """Value of `num_cuts` when KSS was last turned on. KSS accompanies each back-off once."""
    loss_at_kss: float | None = None
    """Loss at `kss_on_at`."""
    harm_streak: Count = 0
    """Number of consecutive snapshots under KSS with a loss above `harm_ratio` times `loss_at_kss`."""
    kss_barred: bool = False
    """True when KSS stays off for the rest of the run."""
    calm_radius: Annotated[float, Meta(ge=0.0)] | None = None
    """Slow average of the largest spectral radius over calm snapshots; None before the first one."""
    calm_radii: Annotated[tuple[Annotated[float, Meta(ge=0.0)], ...], Meta(max_length=MAX_LAYERS)] = ()
    """The same of each layer, for KSS by projection."""
    held_layers: Annotated[tuple[LayerIndex, ...], Meta(max_length=MAX_HELD_LAYERS)] = ()
    """Layers under ceilings, as commanded."""
    shown_from: Step = 0
    """First step whose snapshot shows the last ceilings. One from before would correct them twice."""
    first_loss: float | None = None
    """First finite loss of the launch."""
    ruined_streak: Count = 0
    """Number of consecutive snapshots that show a ruined training (see `sign_of_ruin`)."""
    ruined_since: Step | None = None
    """Step of the first of these snapshots."""
    stopping: bool = False
    """True after the command to stop, while its rank 0 has not rejected it and the training is ruined."""
    checkpoint_asked: bool = False
    """True from the request for a checkpoint until the alarm is over."""
    dense_until: Step = 0
    """Last step of the dense snapshots asked for."""
    scheduled_rate: Annotated[float, Meta(gt=0.0)] | None = None
    """Scheduled rate at the last snapshot at which it was known and positive."""
    action_times: Annotated[tuple[float, ...], Meta(max_length=100_000)] = ()
    """Times of the actions of the last hour, in seconds of the clock of `now`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Decision after one snapshot. `commands` may be empty; `reason` never is."""

    state: PolicyState
    commands: tuple[Action, ...]
    reason: str
    took_effect: bool | None = None
    """Effect of the last action as of this snapshot; None while it is open, or was decided before."""

    @property
    def phase(self) -> Phase:
        return self.state.phase


@dataclass(frozen=True, slots=True)
class Case:
    """Input of a rule: one snapshot, the state, the risk and the configuration."""

    state: PolicyState
    seen: Observation
    risk: OnlineRisk
    config: PolicyConfig
    kss: KssConfig
    rate_jumped: bool
    """True when the scheduled rate has risen by a factor of at least RATE_JUMP since the last snapshot."""

    @property
    def acts_on_lr(self) -> bool:
        return self.config.name in LOWERS_RATE

    @property
    def may_cut(self) -> bool:
        """True when a lower rate is due: the policy acts on it, the run is alarmed, and no action is open."""
        return self.acts_on_lr and self.alarmed and self.settled and not self.state.rewinding

    @property
    def can_rewind(self) -> bool:
        """True when the policy and the agents have a rewind left."""
        left = self.seen.rewinds and self.state.num_rewinds < self.config.max_rewinds
        return self.config.name == "auto" and left

    @property
    def acts_on_kss(self) -> bool:
        return self.config.name in USES_KSS and not self.state.kss_barred

    @property
    def severe(self) -> bool:
        if self.seen.non_finite:
            return self.state.high_streak >= NON_FINITE_SNAPSHOTS
        return self.risk.value >= self.config.severe_risk

    @property
    def alarmed(self) -> bool:
        """True when the risk is severe, or high for `confirm_snapshots` finite snapshots."""
        return self.severe or (not self.seen.non_finite and self.state.high_streak >= self.config.confirm_snapshots)

    @property
    def lacks_warmup(self) -> bool:
        """True when the rate is not too high, but came too early."""
        return "warmup" in self.risk.causes

    @property
    def settled(self) -> bool:
        """True when the last action is at least `cooldown_steps` old, or there is none."""
        at = self.state.acted_at
        return at is None or self.seen.step - at >= self.config.cooldown_steps

    @property
    def took_effect(self) -> bool | None:
        """Effect of the last action as of this snapshot; None while it is open."""
        if self.state.phase != "acting" or self.state.acted_at is None or not self.settled:
            return None
        return False if self.alarmed else True if self.risk.value < self.config.act_risk else None

    def acted(self, **changes: object) -> PolicyState:
        """Return the state after an action on the learning rate; `changes` are further fields."""
        return replace(
            self.state,
            phase="acting",
            acted_at=self.seen.step,
            risk_at_action=self.risk.value,
            calm_since=None,
            high_streak=0,
            **changes,  # type: ignore[arg-type]
        )

    def calm_for(self, steps: int) -> bool:
        """Return True when the run has been calm for at least `steps` steps."""
        since = self.state.calm_since
        return since is not None and self.seen.step - since >= steps


Proposal = tuple[tuple[Action, ...], PolicyState, str]
"""Actions, the following state, and the reason. An empty reason means the joined reasons of the actions."""
