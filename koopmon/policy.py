"""When to act and how: `decide`, a pure function of (now, state, observation, risk, configuration).

The evidence behind the rules (docs/method.md, "Policy"; docs/evidence.md): backing the learning rate off works at
once; KSS as published forbids small models to learn, and in bursts through the optimizer's moments it can kill. So
the rate is backed off first, by more when the risk is severe, and again while it stays high; gently where the rate is
known to be above the critical one, since that alone explains the alarm. Calm brings it back in small notches, each
flare-up makes the next return slower. KSS joins as the unstable penalty alone, above the run's own calm radius, ramps
in from zero and out again, and is barred when the loss says that it harms. Nothing ever becomes more aggressive than
the user's own settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from msgspec import Meta

from koopmon.config import KssConfig, PolicyConfig
from koopmon.risk.online_detector import Observation, OnlineRisk, normalization
from koopmon.wire.messages import MAX_MODULUS, Ack, CommandKind, Count, Fraction, KssSettings, LrScale, Step

Phase = Literal["calm", "alert", "acting", "backed_off", "recovering"]
"""acting: a command has yet to show its effect; backed_off: it has, and what it changed is held; recovering: on the
way back."""

HOUR_SECONDS = 3600.0
LATE_STEPS = 10_000
"""A snapshot may be judged after a heartbeat of a later step, but never by so many steps: the engine's queue is
short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One command that the policy wants; the daemon gives it an id and sends it."""

    kind: CommandKind
    reason: str
    lr_scale: float | None = None
    kss: KssSettings | None = None
    ramp_steps: int = 0
    cadence_steps: int | None = None
    cadence_until_step: int | None = None
    expires_in_steps: int = 50

    @property
    def changes_training(self) -> bool:
        return self.kind != "set_cadence"


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyState:
    """What the policy remembers of one run. Scale and KSS are the targets commanded last; ramps lead to them.

    The bounds are checked when a history is read after a restart: it may be damaged or forged.
    """

    phase: Phase = "calm"
    lr_scale: LrScale = 1.0
    num_cuts: Count = 0
    """Back-offs since the scale was last 1."""
    kss: KssSettings = field(default_factory=KssSettings)
    high_streak: Count = 0
    """Snapshots in a row with a risk of at least `act_risk`."""
    calm_since: Step | None = None
    """First step of the present stretch of snapshots below `release_risk`; None while not calm."""
    acted_at: Step | None = None
    """Step of the last back-off or of the last command that turned KSS on."""
    risk_at_action: Fraction = 0.0
    kss_on_at: Step | None = None
    kss_cut: Count = 0
    """The back-off, counted by `num_cuts`, that KSS last accompanied: it accompanies each but once."""
    loss_at_kss: float | None = None
    kss_barred: bool = False
    calm_radius: Annotated[float, Meta(ge=0.0)] | None = None
    """The run's own largest spectral radius while calm: a slow average."""
    dense_until: Step = 0
    action_times: Annotated[tuple[float, ...], Meta(max_length=100_000)] = ()
    """When the actions of the last hour were taken, in the clock of `now`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do now and why. `commands` is empty when nothing is to be done; `reason` never is."""

    state: PolicyState
    commands: tuple[Action, ...]
    reason: str
    phase: Phase
    took_effect: bool | None = None
    """What this snapshot says of the last action; None while that has yet to show, or has shown it before."""


@dataclass(frozen=True, slots=True)
class _Case:
    """One snapshot before the policy, with everything that a rule may look at."""

    state: PolicyState
    seen: Observation
    risk: OnlineRisk
    config: PolicyConfig
    kss: KssConfig

    @property
    def acts_on_lr(self) -> bool:
        return self.config.name in ("lr", "kss+lr")

    @property
    def acts_on_kss(self) -> bool:
        return self.config.name in ("kss", "kss+lr") and not self.state.kss_barred

    @property
    def severe(self) -> bool:
        return self.seen.non_finite or self.risk.value >= self.config.severe_risk

    @property
    def alarmed(self) -> bool:
        """High for long enough, or severe."""
        return self.severe or self.state.high_streak >= self.config.confirm_snapshots

    @property
    def settled(self) -> bool:
        """The last action has had its time to show an effect."""
        at = self.state.acted_at
        return at is None or self.seen.step - at >= self.config.cooldown_steps

    @property
    def took_effect(self) -> bool | None:
        """What this snapshot says of the last action, if anything."""
        if self.state.phase != "acting" or self.state.acted_at is None or not self.settled:
            return None
        return False if self.alarmed else True if self.risk.value < self.config.act_risk else None

    def calm_for(self, steps: int) -> bool:
        since = self.state.calm_since
        return since is not None and self.seen.step - since >= steps


Proposal = tuple[tuple[Action, ...], PolicyState, str]
"""Actions, the following state, and the reason; an empty reason stands for those of the actions."""


def decide(
    now: float,
    state: PolicyState,
    observation: Observation,
    risk: OnlineRisk,
    config: PolicyConfig,
    kss: KssConfig,
) -> Decision:
    """Decide after one snapshot. `now` is in seconds of a monotonic clock; steps are the observation's."""
    case = _Case(_remember(now, state, observation, risk, config), observation, risk, config, kss)
    closer = _look_closer(case)
    extra, case = ((), case) if closer is None else (closer[0], replace(case, state=closer[1]))
    rules: tuple[Callable[[_Case], Proposal | None], ...] = (
        _bar_kss,
        _back_off,
        _shape,
        _stop_shaping,
        _rise,
        _confirm,
    )
    for rule in rules if config.name != "observe" else ():
        proposal = rule(case)
        if proposal is None:
            continue
        actions, following, why = proposal
        wanted = why or "; ".join(action.reason for action in actions)
        if any(a.changes_training for a in actions):
            if len(case.state.action_times) + len(actions) > config.max_actions_per_hour:
                reason = f"the budget of {config.max_actions_per_hour} actions per hour is spent; wanted: {wanted}"
                return Decision(
                    state=case.state,
                    commands=extra,
                    reason=reason,
                    phase=case.state.phase,
                    took_effect=case.took_effect,
                )
            following = replace(following, action_times=following.action_times + (now,) * len(actions))
        return Decision(
            state=following,
            commands=extra + actions,
            reason=wanted,
            phase=following.phase,
            took_effect=case.took_effect,
        )
    reason = "; ".join(action.reason for action in extra) or f"risk {risk.value:.2f}: nothing to do ({risk.reason})"
    return Decision(
        state=case.state,
        commands=extra,
        reason=reason,
        phase=case.state.phase,
        took_effect=case.took_effect,
    )


def acknowledge(now: float, state: PolicyState, ack: Ack) -> PolicyState:
    """When a command was not applied, take over what the agent says is in force."""
    if ack.outcome in ("applied", "duplicate"):
        return state
    held = ack.applied
    resting = held.lr_scale >= 1.0 and held.kss.alpha == 0.0
    return replace(
        state,
        lr_scale=held.lr_scale,
        kss=held.kss,
        kss_on_at=state.kss_on_at if held.kss.alpha > 0 else None,
        acted_at=None,
        phase="calm" if resting else state.phase,
    )


def kss_shielded(state: PolicyState, ack: Ack) -> PolicyState:
    """The model is shielded from KSS: that was no action and showed nothing, and will be no other next time, so it is
    barred."""
    resting = state.lr_scale >= 1.0
    return replace(
        state,
        kss=ack.applied.kss,
        kss_on_at=state.kss_on_at if ack.applied.kss.alpha > 0 else None,
        kss_barred=True,
        acted_at=None if resting else state.acted_at,
        phase="calm" if resting else state.phase,
        action_times=state.action_times[:-1],
    )


def _remember(now: float, state: PolicyState, seen: Observation, risk: OnlineRisk, config: PolicyConfig) -> PolicyState:
    high = seen.non_finite or risk.value >= config.act_risk
    calm = seen.informative and risk.value < config.release_risk
    radius = state.calm_radius
    if calm and seen.max_spectral_radius is not None:
        radius = seen.max_spectral_radius if radius is None else 0.9 * radius + 0.1 * seen.max_spectral_radius
    return replace(
        state,
        phase="calm" if calm and state.phase == "alert" else state.phase,
        high_streak=state.high_streak + 1 if high else 0,
        calm_since=_no_later(state.calm_since, seen.step, seen.step) if calm else None,
        acted_at=_no_later(state.acted_at, seen.step),
        kss_on_at=_no_later(state.kss_on_at, seen.step),
        calm_radius=radius,
        action_times=tuple(t for t in state.action_times if 0.0 <= now - t < HOUR_SECONDS),
    )


def _no_later(at: int | None, step: int, otherwise: int | None = None) -> int | None:
    """`at`; but `step` where it is so much smaller that the run's count of steps must have started again."""
    return otherwise if at is None else at if at <= step + LATE_STEPS else step


def _look_closer(case: _Case) -> Proposal | None:
    """Ask for dense snapshots while the run is not calm, renewed before the last request runs out."""
    config, seen = case.config, case.seen
    until = seen.step + config.dense_steps
    asked = seen.step + config.dense_steps // 2 < case.state.dense_until <= until
    if case.risk.value < config.release_risk or asked:
        return None
    action = Action(
        kind="set_cadence",
        reason=f"risk {case.risk.value:.2f}: snapshots every {config.dense_every} steps until step {until}",
        cadence_steps=config.dense_every,
        cadence_until_step=until,
        expires_in_steps=config.dense_steps,
    )
    phase: Phase = "alert" if case.state.phase == "calm" else case.state.phase
    return (action,), replace(case.state, dense_until=until, phase=phase), ""


def _back_off(case: _Case) -> Proposal | None:
    state, config = case.state, case.config
    if not (case.acts_on_lr and case.alarmed and case.settled) or state.lr_scale <= config.min_lr_scale:
        return None
    scale = max(config.min_lr_scale, _lower_scale(case))
    again = " (the last cut was not enough)" if state.phase == "acting" else ""
    action = Action(
        kind="set_lr_scale",
        reason=f"risk {case.risk.value:.2f}: learning rate x {scale:g}{again}; {case.risk.reason}",
        lr_scale=scale,
        expires_in_steps=config.expires_in_steps,
    )
    following = replace(
        state,
        phase="acting",
        lr_scale=scale,
        num_cuts=state.num_cuts + 1,
        acted_at=case.seen.step,
        risk_at_action=case.risk.value,
        calm_since=None,
        high_streak=0,
    )
    return (action,), following, ""


def _lower_scale(case: _Case) -> float:
    """What to go down to.

    A rate known to be above the critical one explains the alarm: land where runs have a chance, and from there on feel
    for what is bearable, since every factor too many costs learning. Anything else gets the whole cut at once.
    """
    config, excess = case.config, case.risk.excess_rate
    # While a ramp is under way the scale in force is what flared up, not the target that it leads to.
    flared = min(case.state.lr_scale, case.seen.lr_scale)
    if excess is None or excess < 1.0:
        return flared * (config.severe_factor if case.severe else config.backoff_factor)
    gently = flared * (config.gentle_severe_factor if case.severe else config.gentle_factor)
    normalized = normalization(case.seen)
    landing = config.landing_rate ** (1.0 - normalized) * config.normalized_landing_rate**normalized
    return float(min(gently, landing / excess))


def _shape(case: _Case) -> Proposal | None:
    """Turn KSS on: at the alarm under `kss`; under `kss+lr` beside a back-off that has been made."""
    state, config = case.state, case.config
    if not case.acts_on_kss or state.kss.alpha > 0 or case.kss.alpha <= 0:
        return None
    due = case.alarmed and case.settled if config.name == "kss" else state.num_cuts > state.kss_cut
    if not due or case.seen.non_finite:
        return None
    radius = state.calm_radius or 1.0
    if radius >= MAX_MODULUS:
        why = f"KSS stays off: the run's calm spectral radius is {radius:.3g}, and tau_u is {MAX_MODULUS:g} at most"
        return (), replace(state, kss_barred=True), why
    tau_u = min(max(case.kss.min_tau_u, case.kss.radius_margin * radius), MAX_MODULUS)
    settings = KssSettings(
        alpha=case.kss.alpha,
        temperature=case.kss.temperature,
        tau_u=tau_u,
        gamma=case.kss.gamma,
        beta=case.kss.beta,
        svd_rank=case.kss.svd_rank,
        num_samples=case.kss.num_samples,
        every=case.kss.every,
        layer_fraction=case.kss.layer_fraction,
    )
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
        loss_at_kss=case.seen.loss,
        acted_at=case.seen.step if config.name == "kss" else state.acted_at,
        risk_at_action=case.risk.value if config.name == "kss" else state.risk_at_action,
        phase="acting",
    )
    return (action,), following, ""


def _without_kss(case: _Case, why: str, **changes: object) -> Proposal:
    action = Action(
        kind="set_kss",
        reason=f"KSS off: {why}",
        kss=KssSettings(),
        ramp_steps=case.config.kss_ramp_steps,
        expires_in_steps=case.config.expires_in_steps,
    )
    return (action,), replace(case.state, kss=KssSettings(), kss_on_at=None, **changes), ""  # type: ignore[arg-type]


def _bar_kss(case: _Case) -> Proposal | None:
    """Revert KSS when, once in full force, the risk is still severe or the logged loss has clearly risen."""
    state, config = case.state, case.config
    if state.kss_on_at is None or case.seen.step - state.kss_on_at < config.kss_ramp_steps + config.cooldown_steps:
        return None
    before, after = state.loss_at_kss, case.seen.loss
    if case.severe:
        return _without_kss(case, f"the risk is {case.risk.value:.2f} in spite of it", kss_barred=True)
    if before is not None and after is not None and after > before * config.harm_ratio:
        return _without_kss(case, f"the loss rose from {before:.3g} to {after:.3g} under it", kss_barred=True)
    return None


def _stop_shaping(case: _Case) -> Proposal | None:
    """KSS is a companion for a while, not a regime: under it for long, runs learned less (benchmarks.kss)."""
    state, hold = case.state, case.config.kss_hold_steps
    if state.kss_on_at is None or case.seen.step - state.kss_on_at < hold:
        return None
    phase: Phase = "calm" if state.lr_scale >= 1.0 and state.phase != "acting" else state.phase
    return _without_kss(case, f"on for {hold} steps", phase=phase)


def _confirm(case: _Case) -> Proposal | None:
    """Say once that the last action took effect; when it did not, `_back_off` has gone further."""
    state = case.state
    if state.phase != "acting" or not case.settled or case.risk.value >= case.config.act_risk:
        return None
    effect = f"risk {state.risk_at_action:.2f} -> {case.risk.value:.2f}"
    return (), replace(state, phase="backed_off"), f"the action at step {state.acted_at} took effect: {effect}"


def _rise(case: _Case) -> Proposal | None:
    """Return towards the user's own rate, one notch after each calm stretch; each back-off makes the stretches
    longer."""
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
    phase: Phase = "calm" if back and state.kss.alpha == 0 else "recovering"
    following = replace(
        state,
        lr_scale=target,
        phase=phase,
        calm_since=case.seen.step,
        num_cuts=0 if back else state.num_cuts,
        kss_cut=0 if back else state.kss_cut,
    )
    return (action,), following, ""
