"""Policy: `decide` maps (now, state, observation, risk, configuration) to commands, as a pure function.

docs/method.md, "Policy", has the rules; docs/evidence.md has the measurements behind them. A lower learning rate works
at once. KSS as published keeps small models from learning, and in bursts through the optimizer's moments it can make
them diverge. The policy therefore does the following:

- It lowers the LR scale first, by more at a severe risk, and again while the risk stays high. Where the rate is known
  to be above the critical one, the scale lands near a rate that runs survive, and later factors are gentle.
- It raises the scale in small steps while the run is calm. Each back-off makes the next rise slower.
- For normalised layers it caps the rate and goes back to a copy of the weights from before the rate was too high
  (policy "auto"). Such a rate ruins them within some tens of steps, and a lower rate does not repair them.
- It returns a training whose weights are not finite to a copy (policy "auto"). A lower rate repairs no NaN.
- It requests the end of a ruined run, if the configuration allows it, and a checkpoint at an alarm.
- It adds KSS by projection: ceilings on what layers write whose spectral radius exceeds the one that they had while
  calm (`koopmon/policy/projection.py`). A higher loss under KSS bars it for the rest of the run.
- It can add KSS as published instead: the unstable penalty alone, above the run's own calm radius, with a ramp in and
  out. A severe risk bars it too.

The LR scale never exceeds 1, the user's own rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from msgspec import Meta

from koopmon.config import KssConfig, PolicyConfig
from koopmon.policy import projection
from koopmon.risk.online_detector import Observation, OnlineRisk, normalization
from koopmon.wire.messages import (
    MAX_HELD_LAYERS,
    MAX_LAYERS,
    MAX_MODULUS,
    Ack,
    Applied,
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

_LOWERS_RATE = ("auto", "lr", "kss+lr")
"""Policies that lower the learning rate."""
HOUR_SECONDS = 3600.0
MIN_RATE, MAX_RATE = 1e-12, 1e6
"""Bounds on a cap of the learning rate, within those of the protocol."""
RESTORE_SNAPSHOTS = 2
"""Snapshots in a row that are not finite after which the training returns to a copy. One alone may be a bad batch."""
RATE_JUMP = 4.0
"""Ratio of the scheduled rate to that at the last snapshot that calls for dense snapshots. Chosen by hand.

A linear warm-up doubles it from step 1 to step 2.
"""
LATE_STEPS = 10_000
"""Steps by which a remembered step may exceed the step of a snapshot. A larger excess means that the count restarted.

A snapshot may be assessed after a heartbeat of a later step. The engine's queue is short, so the difference is far
smaller. Chosen by hand.
"""


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
    """Number of consecutive snapshots that show a ruined training (see `_ruin`)."""
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
class _Case:
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
        return self.config.name in _LOWERS_RATE

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
        return _acts_on_kss(self.config) and not self.state.kss_barred

    @property
    def severe(self) -> bool:
        return self.seen.non_finite or self.risk.value >= self.config.severe_risk

    @property
    def alarmed(self) -> bool:
        """True when the risk is severe, or high for `confirm_snapshots` snapshots."""
        return self.severe or self.state.high_streak >= self.config.confirm_snapshots

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


def decide(
    now: float,
    state: PolicyState,
    observation: Observation,
    risk: OnlineRisk,
    config: PolicyConfig,
    kss: KssConfig,
) -> Decision:
    """Decide after one snapshot: apply the first rule that fits (docs/method.md, "Policy").

    Args:
        now: seconds of a monotonic clock; only the hourly budget uses it.
        state: state after the previous decision.
        observation: the snapshot. Its step is the time of all rules.
        risk: the risk of that snapshot.
        config: the table [policy]. The policy "observe" decides no change of the training.
        kss: the table [kss].

    Returns:
        The new state, the commands and the reason. Commands beyond `max_actions_per_hour` are left out.
    """
    jumped = _jumped(state, observation)
    case = _Case(_remember(now, state, observation, risk, config, kss), observation, risk, config, kss, jumped)
    commands, following, _ = _look_closer(case) or ((), case.state, "")
    if following is not case.state:
        case = replace(case, state=following)
    if config.name != "observe" and (request := _ask_for_checkpoint(now, case)) is not None:
        commands, following = commands + request[0], request[1]
        case = replace(case, state=following)
    reason = "; ".join(action.reason for action in commands) or f"risk {risk.value:.2f}: nothing to do ({risk.reason})"
    # The order is the priority. Harm by KSS ends first, because KSS itself may cause the alarm; back-offs come second.
    # A run that is to stop gets no other command. Corrections of ceilings are due at most snapshots and come last.
    rules: tuple[Callable[[_Case], Proposal | None], ...] = (
        _stop,
        _bar_kss,
        _cap,
        _restore,
        _back_off,
        _shape,
        _stop_shaping,
        _release_layers,
        _rise,
        _confirm,
        _project,
    )
    for rule in rules if config.name != "observe" and not following.stopping else ():
        if (proposal := rule(case)) is None:
            continue
        actions, state, why = proposal
        reason = why or "; ".join(action.reason for action in actions)
        if any(action.changes_training for action in actions):
            if len(state.action_times) + len(actions) > config.max_actions_per_hour:
                reason = f"the budget of {config.max_actions_per_hour} actions per hour is spent; wanted: {reason}"
                break
            state = replace(state, action_times=state.action_times + (now,) * len(actions))
        commands, following = commands + actions, state
        break
    return Decision(state=following, commands=commands, reason=reason, took_effect=case.took_effect)


def acknowledge(state: PolicyState, ack: Ack) -> PolicyState:
    """Update the state after an acknowledgement of a command.

    An applied or duplicate command leaves the state unchanged. Otherwise the state takes the settings in force that the
    agent reports.
    """
    if ack.outcome in ("applied", "duplicate"):
        return state
    held = ack.applied
    shapes = _shapes(held)
    resting = held.lr_scale >= 1.0 and held.max_rate is None and not shapes
    return replace(
        state,
        lr_scale=held.lr_scale,
        max_rate=held.max_rate,
        kss=held.kss,
        held_layers=held.held_layers,
        kss_on_at=state.kss_on_at if shapes else None,
        acted_at=None,
        phase="calm" if resting else state.phase,
    )


def ceilings_answered(state: PolicyState, ack: Ack) -> PolicyState:
    """Update the state after the acknowledgement of ceilings: the next snapshot shows them."""
    if ack.outcome == "duplicate":
        return state
    if ack.outcome != "applied":
        return replace(acknowledge(state, ack), shown_from=ack.step + 1)
    return replace(state, held_layers=ack.applied.held_layers, shown_from=ack.step + 1)


def rewound(state: PolicyState, ack: Ack) -> PolicyState:
    """Update the state after the acknowledgement of a rewind: rules wait for the cooldown from its step on."""
    if ack.outcome == "duplicate":
        return state
    if ack.outcome != "applied":
        return replace(state, rewinding=False)
    return replace(state, rewinding=False, acted_at=ack.step, high_streak=0, calm_since=None)


def stop_answered(state: PolicyState, ack: Ack) -> PolicyState:
    """Update the state after the answer to a stop. One that was not applied may follow after a new streak."""
    if ack.outcome in ("applied", "duplicate"):
        return state
    return replace(state, stopping=False, ruined_streak=0, ruined_since=None)


def kss_shielded(state: PolicyState, ack: Ack) -> PolicyState:
    """Bar KSS after the agent reported that it can never be in force in this launch, as where the model is shielded.

    The command changed nothing, so it leaves the hourly budget. A later one would have the same result.
    """
    resting = state.lr_scale >= 1.0
    return replace(
        state,
        kss=ack.applied.kss,
        held_layers=ack.applied.held_layers,
        kss_on_at=state.kss_on_at if _shapes(ack.applied) else None,
        kss_barred=True,
        acted_at=None if resting else state.acted_at,
        phase="calm" if resting else state.phase,
        action_times=state.action_times[:-1],
    )


def _acts_on_kss(config: PolicyConfig) -> bool:
    return config.name in ("kss", "kss+lr")


def _shapes(applied: Applied) -> bool:
    """Return True if KSS is in force."""
    return applied.kss.alpha > 0.0 or bool(applied.held_layers)


def _remember(
    now: float, state: PolicyState, seen: Observation, risk: OnlineRisk, config: PolicyConfig, kss: KssConfig
) -> PolicyState:
    """Update the counters, the calm radii and the remembered steps with one snapshot, before any rule."""
    high = seen.non_finite or risk.value >= config.act_risk
    calm = seen.informative and risk.value < config.release_risk
    radius = state.calm_radius
    if calm and seen.max_spectral_radius is not None:
        # A running mean with the weight 0.1 for the newest radius, chosen by hand.
        radius = seen.max_spectral_radius if radius is None else 0.9 * radius + 0.1 * seen.max_spectral_radius
        if _acts_on_kss(config) and kss.method == "projection" and not state.held_layers:
            state = replace(state, calm_radii=projection.calm_radii(state.calm_radii, seen.spectral_radii))
    loss = seen.training.loss
    if state.first_loss is None and loss is not None and math.isfinite(loss):
        state = replace(state, first_loss=loss)
    rate = seen.training.learning_rate
    known = rate is not None and 0.0 < rate < math.inf
    ruined = bool(_ruin(state, seen, risk, config))
    return replace(
        state,
        ruined_streak=state.ruined_streak + 1 if ruined else 0,
        ruined_since=_no_later(state.ruined_since, seen.step, seen.step) if ruined else None,
        stopping=state.stopping and ruined,
        checkpoint_asked=state.checkpoint_asked and not calm,
        phase="calm" if calm and state.phase == "alert" else state.phase,
        high_streak=state.high_streak + 1 if high else 0,
        calm_since=_no_later(state.calm_since, seen.step, seen.step) if calm else None,
        acted_at=_no_later(state.acted_at, seen.step),
        kss_on_at=_no_later(state.kss_on_at, seen.step),
        shown_from=_no_later(state.shown_from, seen.step) or 0,
        scheduled_rate=rate if known else state.scheduled_rate,
        calm_radius=radius,
        action_times=tuple(t for t in state.action_times if 0.0 <= now - t < HOUR_SECONDS),
    )


def _jumped(state: PolicyState, seen: Observation) -> bool:
    rate, before = seen.training.learning_rate, state.scheduled_rate
    return rate is not None and before is not None and RATE_JUMP * before <= rate < math.inf


def _no_later(at: int | None, step: int, otherwise: int | None = None) -> int | None:
    """Return `at`, or `step` where `at` exceeds it by more than LATE_STEPS; `otherwise` where `at` is None.

    A larger excess means that the run's count of steps started again. Without the correction the policy would wait for
    steps that come much later.
    """
    return otherwise if at is None else at if at <= step + LATE_STEPS else step


def _look_closer(case: _Case) -> Proposal | None:
    """Request dense snapshots while the run is not calm, and renew the request before it expires.

    A jump of the rate is seen before its effect.
    """
    config, seen = case.config, case.seen
    # Half of `dense_steps` before the end is early enough for a new request and keeps the number of commands small.
    until = seen.step + config.dense_steps
    asked = seen.step + config.dense_steps // 2 < case.state.dense_until <= until
    calm = case.risk.value < config.release_risk
    if (calm and not case.rate_jumped) or asked:
        return None
    cause = f"the learning rate rose to {seen.training.learning_rate:.3g}" if calm else f"risk {case.risk.value:.2f}"
    action = Action(
        kind="set_cadence",
        reason=f"{cause}: a snapshot every {_steps(config.dense_every)} until step {until}",
        cadence_steps=config.dense_every,
        cadence_until_step=until,
        expires_in_steps=config.dense_steps,
    )
    phase: Phase = "alert" if case.state.phase == "calm" and not calm else case.state.phase
    return (action,), replace(case.state, dense_until=until, phase=phase), ""


def _steps(number: int) -> str:
    return "step" if number == 1 else f"{number} steps"


def _finite(value: float | None) -> bool | None:
    return None if value is None else math.isfinite(value)


def _ruin(state: PolicyState, seen: Observation, risk: OnlineRisk, config: PolicyConfig) -> str:
    """Return the sign that the training is ruined in this snapshot; empty without one.

    A wrong stop costs a training and a late one some minutes. The risk alone is therefore never a sign: it is an
    estimate. Each sign needs two facts of different sources.

    - The states are not finite, and the loss or the gradient norm is not finite either. States alone may be NaN at
      padding tokens of a healthy model. A loss alone may be NaN in a batch without labels.
    - All numbers are finite, but the policy has nothing left: the scale in force is as low as it may be, the risk is
      still severe, and the loss is `stop_loss_ratio` times the first loss. A model that has forgotten all is no worse
      than at its start.
    """
    loss, first = seen.training.loss, state.first_loss
    if seen.non_finite:
        broken = [name for name in ("loss", "grad_norm") if _finite(getattr(seen.training, name)) is False]
        return f"the states and the {broken[0].replace('_norm', 'ient norm')} are not finite" if broken else ""
    spent = config.name in _LOWERS_RATE and min(state.lr_scale, seen.training.lr_scale) <= config.min_lr_scale
    if not spent or risk.value < config.severe_risk or loss is None or first is None:
        return ""
    if not first > 0.0 or not loss >= config.stop_loss_ratio * first:
        return ""
    return f"the loss is {loss:.3g}, {loss / first:.2g} times its first value, at the lowest learning-rate scale"


def _stop(case: _Case) -> Proposal | None:
    """Stop a training that every snapshot of the last `stop_steps` steps shows as ruined.

    A back-off repairs no NaN, and a rewind may: the stop waits until a rewind underway has ended and none is left.
    """
    state, config, seen = case.state, case.config, case.seen
    since = state.ruined_since
    if not config.stop or since is None or state.ruined_streak < config.stop_snapshots:
        return None
    if seen.step - since < config.stop_steps or not case.settled or state.rewinding or _may_rewind(case):
        return None
    action = Action(
        kind="stop",
        reason=f"stop: {_ruin(state, seen, case.risk, config)}, for {seen.step - since} steps",
        expires_in_steps=config.expires_in_steps,
    )
    return (action,), replace(state, stopping=True), ""


def _may_rewind(case: _Case) -> bool:
    """Return True if a further alarm leads to a rewind."""
    caps = case.can_rewind and normalization(case.seen) >= 0.5 and _lower_cap(case) is not None
    return caps or _may_restore(case)


def _may_restore(case: _Case) -> bool:
    """Return True if the states and the loss or the gradient norm are not finite, and the training can rewind.

    States alone may be NaN at padding tokens of a healthy model. Without a known rate, the only copy that counts is
    that of the start.
    """
    broken = case.seen.non_finite and bool(_ruin(case.state, case.seen, case.risk, case.config))
    return case.can_rewind and broken and case.seen.training.learning_rate is not None


def _restore(case: _Case) -> Proposal | None:
    """Return a training that stays without finite numbers to its last copy.

    The first time the rate stays: one bad batch may be the cause, and the data goes on behind it. A rate that explains
    it, and each further time, lower the rate.
    """
    state, config = case.state, case.config
    if not _may_restore(case) or not case.may_cut or state.ruined_streak < RESTORE_SNAPSHOTS:
        return None
    lowers = state.num_rewinds > 0 or (case.risk.excess_rate or 0.0) >= 1.0
    scale = max(config.min_lr_scale, _lower_scale(case)) if lowers else state.lr_scale
    actions = [
        Action(
            kind="rewind",
            reason=f"{_ruin(state, case.seen, case.risk, config)}: back to the last copy",
            rewind=Rewind(max_rate=MAX_RATE, min_age_steps=config.rewind_age_steps, unless_finite=True),
            expires_in_steps=config.expires_in_steps,
        )
    ]
    if scale < state.lr_scale:
        lower = Action(
            kind="set_lr_scale",
            reason=f"risk {case.risk.value:.2f}: learning rate x {scale:g}; {case.risk.reason}",
            lr_scale=scale,
            expires_in_steps=config.expires_in_steps,
        )
        # The lower rate comes first: between two steps in which the ranks exchange, it alone may be in force.
        actions.insert(0, lower)
    following = case.acted(
        lr_scale=scale,
        num_cuts=state.num_cuts + (len(actions) > 1),
        num_rewinds=state.num_rewinds + 1,
        rewinding=True,
    )
    return tuple(actions), following, ""


def _ask_for_checkpoint(now: float, case: _Case) -> Proposal | None:
    """Request one checkpoint at an alarm, before the damage: while the states and the loss are finite."""
    state, config, seen = case.state, case.config, case.seen
    if not config.checkpoint or not case.alarmed or state.checkpoint_asked:
        return None
    if seen.non_finite or _finite(seen.training.loss) is False:
        return None
    if len(state.action_times) >= config.max_actions_per_hour:
        return None
    action = Action(
        kind="checkpoint",
        reason=f"risk {case.risk.value:.2f}: checkpoint",
        expires_in_steps=config.expires_in_steps,
    )
    following = replace(state, checkpoint_asked=True, action_times=(*state.action_times, now))
    return (action,), following, ""


def _cap(case: _Case) -> Proposal | None:
    """Cap the rate of normalised layers at an alarm, and go back to a copy from before it exceeded the cap.

    The cap lands where runs of such layers survive. Further alarms lower it, without a rewind when none is left.
    """
    state, config, seen = case.state, case.config, case.seen
    rewinds = case.can_rewind
    if config.name != "auto" or not case.may_cut or normalization(seen) < 0.5 or not (rewinds or state.max_rate):
        return None
    cap = _lower_cap(case)
    if cap is None:
        return None
    warmup = config.rewind_warmup_steps if rewinds else 0
    healthy = _healthy_rate(case, cap)
    # Without a warm-up the rate was not too high, and a back-off in force came from the same fault.
    scale = 1.0 if case.lacks_warmup and rewinds else state.lr_scale
    actions = [
        Action(
            kind="set_lr_scale",
            reason=f"risk {case.risk.value:.2f}: learning rate at most {cap:.3g}; {case.risk.reason}",
            lr_scale=scale,
            max_rate=cap,
            warmup_steps=warmup,
            expires_in_steps=config.expires_in_steps,
        )
    ]
    # The cap comes first: between two steps in which the ranks exchange, it alone may be in force.
    if rewinds:
        actions.append(
            Action(
                kind="rewind",
                reason=f"back to the last copy from before the learning rate exceeded {healthy:.3g}",
                rewind=Rewind(max_rate=healthy, min_age_steps=config.rewind_age_steps),
                expires_in_steps=config.expires_in_steps,
            )
        )
    following = case.acted(max_rate=cap, lr_scale=scale, num_rewinds=state.num_rewinds + rewinds, rewinding=rewinds)
    return tuple(actions), following, ""


def _lower_cap(case: _Case) -> float | None:
    """Compute the cap on the rate: the landing rate, and below the rate in force; later a share of the last cap.

    None where the rate does not explain the alarm: it is unknown, or no higher than the landing rate. A rewind would
    then cost steps without a remedy, for example after a single snapshot that is not finite.
    """
    scheduled, excess, config = case.seen.training.learning_rate, case.risk.excess_rate, case.config
    if case.state.max_rate is not None:
        # The rate in force is no bound here: during the warm-up under a cap it may be far below the cap.
        return max(case.state.max_rate * config.rewind_factor, MIN_RATE)
    if scheduled is None or excess is None or not 0.0 < scheduled < math.inf:
        return None
    in_force, landing = scheduled * case.seen.training.lr_scale, scheduled / excess * config.normalized_landing_rate
    if in_force > landing:
        landing = min(landing, config.rewind_factor * in_force)
    elif not case.lacks_warmup:
        return None
    return min(max(landing, MIN_RATE), MAX_RATE)


def _healthy_rate(case: _Case, cap: float) -> float:
    """Compute the largest rate up to which a copy counts as healthy.

    Without a warm-up, the rate in force has done the damage from the first update on.
    """
    scheduled = case.seen.training.learning_rate
    if scheduled is None or not case.lacks_warmup:
        return cap
    return max(min(cap, 0.5 * scheduled * case.seen.training.lr_scale), MIN_RATE)


def _back_off(case: _Case) -> Proposal | None:
    """Lower the LR scale at an alarm, when the last action is old enough and the scale is above `min_lr_scale`.

    It waits where a rewind can follow: a lower rate repairs no NaN.
    """
    state, config = case.state, case.config
    if not case.may_cut or state.lr_scale <= config.min_lr_scale or _may_restore(case):
        return None
    scale = max(config.min_lr_scale, _lower_scale(case))
    again = " (the last cut was not enough)" if state.phase == "acting" else ""
    action = Action(
        kind="set_lr_scale",
        reason=f"risk {case.risk.value:.2f}: learning rate x {scale:g}{again}; {case.risk.reason}",
        lr_scale=scale,
        expires_in_steps=config.expires_in_steps,
    )
    return (action,), case.acted(lr_scale=scale, num_cuts=state.num_cuts + 1), ""


def _lower_scale(case: _Case) -> float:
    """Compute the LR scale of a back-off.

    A rate known to be above the critical one explains the alarm by itself. The scale then lands near a rate that runs
    survive, and later back-offs are gentle, because each further factor costs learning. Other alarms get the full
    factor at once.
    """
    config, excess = case.config, case.risk.excess_rate
    # During a ramp the alarm belongs to the scale in force. The target of the ramp is not in force yet.
    flared = min(case.state.lr_scale, case.seen.training.lr_scale)
    if excess is None or excess < 1.0:
        return flared * (config.severe_factor if case.severe else config.backoff_factor)
    gently = flared * (config.gentle_severe_factor if case.severe else config.gentle_factor)
    # `excess` is the scheduled rate over the critical one, before koopmon's scale. A scale of landing / excess
    # therefore puts the rate in force at `landing` times the critical one.
    normalized = normalization(case.seen)
    landing = config.landing_rate ** (1.0 - normalized) * config.normalized_landing_rate**normalized
    return float(min(gently, landing / excess))


def _shape(case: _Case) -> Proposal | None:
    """Turn KSS as published on: at the alarm under the policy `kss`, beside each back-off under `kss+lr`."""
    state, config = case.state, case.config
    if not case.acts_on_kss or case.kss.method != "published" or state.kss.alpha > 0 or case.kss.alpha <= 0:
        return None
    due = case.alarmed and case.settled if config.name == "kss" else state.num_cuts > state.kss_cut
    if not due or case.seen.non_finite:
        return None
    radius = state.calm_radius or 1.0
    if radius >= MAX_MODULUS:
        why = f"KSS stays off: the run's calm spectral radius is {radius:.3g}, and tau_u is {MAX_MODULUS:g} at most"
        return (), replace(state, kss_barred=True), why
    # The threshold lies above the radius of this run while calm. The paper's 1.05 forbids growth that learning needs
    # (docs/method.md).
    tau_u = min(max(case.kss.min_tau_u, case.kss.radius_margin * radius), MAX_MODULUS)
    shared = set(KssSettings.__struct_fields__).intersection(KssConfig.__struct_fields__)
    settings = KssSettings(tau_u=tau_u, **{name: getattr(case.kss, name) for name in shared})
    action = Action(
        kind="set_kss",
        reason=f"risk {case.risk.value:.2f}: KSS on, alpha {settings.alpha:g} above modulus {tau_u:.2f}",
        kss=settings,
        ramp_steps=config.kss_ramp_steps,
        expires_in_steps=config.expires_in_steps,
    )
    following = replace(
        state,
        kss=settings,
        kss_on_at=case.seen.step,
        kss_cut=state.num_cuts,
        loss_at_kss=case.seen.training.loss,
        acted_at=case.seen.step if config.name == "kss" else state.acted_at,
        risk_at_action=case.risk.value if config.name == "kss" else state.risk_at_action,
        phase="acting",
    )
    return (action,), following, ""


def _without_kss(case: _Case, why: str, **changes: object) -> Proposal:
    """Turn KSS off for the reason `why`; `changes` are further fields of the following state."""
    if case.state.held_layers:
        action = Action(
            kind="set_ceilings",
            reason=f"ceilings released: {why}",
            ceilings={},
            expires_in_steps=case.config.expires_in_steps,
        )
        return (action,), replace(case.state, held_layers=(), kss_on_at=None, **changes), ""  # type: ignore[arg-type]
    action = Action(
        kind="set_kss",
        reason=f"KSS off: {why}",
        kss=KssSettings(),
        ramp_steps=case.config.kss_ramp_steps,
        expires_in_steps=case.config.expires_in_steps,
    )
    return (action,), replace(case.state, kss=KssSettings(), kss_on_at=None, **changes), ""  # type: ignore[arg-type]


def _bar_kss(case: _Case) -> Proposal | None:
    """Turn KSS off for good at a loss above `harm_ratio` times its value before. A loss of 0 or less has no such ratio.

    A severe risk in full force ends KSS as published too, whose gradients may be the cause. Ceilings have no such risk.
    """
    state, config = case.state, case.config
    if state.kss_on_at is None or case.seen.step - state.kss_on_at < config.kss_ramp_steps + config.cooldown_steps:
        return None
    before, after = state.loss_at_kss, case.seen.training.loss
    if case.severe and not state.held_layers:
        return _without_kss(case, f"the risk is {case.risk.value:.2f} in spite of it", kss_barred=True)
    if before is not None and after is not None and 0.0 < before * config.harm_ratio < after:
        return _without_kss(case, f"the loss rose from {before:.3g} to {after:.3g} under it", kss_barred=True)
    return None


def _stop_shaping(case: _Case) -> Proposal | None:
    """Turn KSS as published off after `kss_hold_steps`. Runs under it for longer learned less (`benchmarks.kss`)."""
    state, hold = case.state, case.config.kss_hold_steps
    if state.kss_on_at is None or state.held_layers or case.seen.step - state.kss_on_at < hold:
        return None
    return _without_kss(case, f"on for {hold} steps", phase=_phase_without_kss(state))


def _phase_without_kss(state: PolicyState) -> Phase:
    return "calm" if state.lr_scale >= 1.0 and state.phase != "acting" else state.phase


def _project(case: _Case) -> Proposal | None:
    """Set ceilings on what layers write at an alarm, and correct them at each snapshot that shows the last ones.

    The first ceilings of an alarm are an action. Corrections belong to it.
    """
    state, config, seen = case.state, case.config, case.seen
    if not case.acts_on_kss or case.kss.method != "projection" or seen.step < state.shown_from:
        return None
    first = not state.held_layers
    if first and not case.alarmed:
        return None
    factors = projection.ceiling_factors(seen.spectral_radii, state.calm_radii, state.held_layers, case.kss.min_tau)
    if not factors:
        return None
    radius, widest = max((seen.spectral_radii[layer], layer) for layer in factors)
    tau = projection.largest_radius(widest, state.calm_radii, case.kss.min_tau)
    held = f"ceilings on what {_blocks(tuple(factors))}: block {widest} from spectral radius {radius:.3g} to {tau:.3g}"
    action = Action(
        kind="set_ceilings",
        reason=f"risk {case.risk.value:.2f}: {held}; {case.risk.reason}",
        ceilings=factors,
        corrects=not first,
        expires_in_steps=config.expires_in_steps,
    )
    # Without an answer, as in a dry run, the command counts as lost once it has expired.
    following = replace(state, held_layers=tuple(factors), shown_from=seen.step + config.expires_in_steps)
    if not first:
        return (action,), following, ""
    own = config.name == "kss"
    following = replace(
        following,
        kss_on_at=seen.step,
        loss_at_kss=seen.training.loss,
        acted_at=seen.step if own else state.acted_at,
        risk_at_action=case.risk.value if own else state.risk_at_action,
        phase="acting",
    )
    return (action,), following, ""


def _blocks(layers: tuple[int, ...]) -> str:
    """Name a few of the blocks that write."""
    if len(layers) == 1:
        return f"block {layers[0]} writes"
    if len(layers) > 4:
        return f"{len(layers)} blocks write"
    return f"blocks {', '.join(map(str, layers[:-1]))} and {layers[-1]} write"


def _release_layers(case: _Case) -> Proposal | None:
    """Release all layers once the run has been calm for `calm_steps`."""
    if not case.state.held_layers or not case.calm_for(case.kss.calm_steps):
        return None
    return _without_kss(case, f"calm for {case.kss.calm_steps} steps", phase=_phase_without_kss(case.state))


def _confirm(case: _Case) -> Proposal | None:
    """Confirm once that the last action took effect. `_back_off` handles an action without an effect earlier."""
    state = case.state
    if state.phase != "acting" or not case.settled or case.risk.value >= case.config.act_risk:
        return None
    effect = f"risk {state.risk_at_action:.2f} -> {case.risk.value:.2f}"
    return (), replace(state, phase="backed_off"), f"the action at step {state.acted_at} took effect: {effect}"


def _rise(case: _Case) -> Proposal | None:
    """Raise the LR scale by `rise_factor` after each calm period. Each back-off makes the periods longer."""
    state, config = case.state, case.config
    wait = config.hold_steps * max(1, state.num_cuts)
    if state.lr_scale >= 1.0 or not case.calm_for(wait):
        return None
    target = min(1.0, state.lr_scale * config.rise_factor)
    action = Action(
        kind="set_lr_scale",
        reason=f"calm for {wait} steps: learning rate x {target:.3g} over {config.ramp_steps} steps",
        lr_scale=target,
        ramp_steps=config.ramp_steps,
        expires_in_steps=config.expires_in_steps,
    )
    back = target >= 1.0
    phase: Phase = "calm" if back and state.kss.alpha == 0 and not state.held_layers else "recovering"
    following = replace(
        state,
        lr_scale=target,
        phase=phase,
        calm_since=case.seen.step,
        num_cuts=0 if back else state.num_cuts,
        kss_cut=0 if back else state.kss_cut,
    )
    return (action,), following, ""
