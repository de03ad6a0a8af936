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
from collections.abc import Callable
from dataclasses import replace

from koopmon.config import KssConfig, PolicyConfig
from koopmon.policy import kss_rules, projection, rate_rules, ruin_rules
from koopmon.policy.state import USES_KSS, Action, Case, Decision, Phase, PolicyState, Proposal
from koopmon.risk.online_detector import Observation, OnlineRisk

HOUR_SECONDS = 3600.0
RATE_JUMP = 4.0
"""Ratio of the scheduled rate to that at the last snapshot that calls for dense snapshots. Chosen by hand.

A linear warm-up doubles it from step 1 to step 2.
"""
LATE_STEPS = 10_000
"""Steps by which a remembered step may exceed the step of a snapshot. A larger excess means that the count restarted.

A snapshot may be assessed after a heartbeat of a later step. The engine's queue is short, so the difference is far
smaller. Chosen by hand.
"""


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
    case = Case(_remember(now, state, observation, risk, config, kss), observation, risk, config, kss, jumped)
    commands, following, _ = _look_closer(case) or ((), case.state, "")
    if following is not case.state:
        case = replace(case, state=following)
    if config.name != "observe" and (request := ruin_rules.ask_for_checkpoint(now, case)) is not None:
        commands, following = commands + request[0], request[1]
        case = replace(case, state=following)
    reason = "; ".join(action.reason for action in commands) or f"risk {risk.value:.2f}: nothing to do ({risk.reason})"
    # The order is the priority. Harm by KSS ends first, because KSS itself may cause the alarm; back-offs come second.
    # A run that is to stop gets no other command. Corrections of ceilings are due at most snapshots and come last.
    rules: tuple[Callable[[Case], Proposal | None], ...] = (
        ruin_rules.stop,
        kss_rules.bar_kss,
        rate_rules.cap,
        ruin_rules.restore,
        rate_rules.back_off,
        kss_rules.shape,
        kss_rules.stop_shaping,
        kss_rules.release_layers,
        rate_rules.rise,
        _confirm,
        kss_rules.project,
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


def _remember(
    now: float, state: PolicyState, seen: Observation, risk: OnlineRisk, config: PolicyConfig, kss: KssConfig
) -> PolicyState:
    """Update the counters, the calm radii and the remembered steps with one snapshot, before any rule."""
    high = seen.non_finite or risk.value >= config.act_risk
    calm = seen.informative and risk.value < config.release_risk
    radius = state.calm_radius
    if calm and seen.max_spectral_radius is not None:
        radius = projection.calm_mean(radius, seen.max_spectral_radius)
        if config.name in USES_KSS and kss.method == "projection" and not state.held_layers:
            state = replace(state, calm_radii=projection.calm_radii(state.calm_radii, seen.spectral_radii))
    loss = seen.training.loss
    if state.first_loss is None and loss is not None and math.isfinite(loss):
        state = replace(state, first_loss=loss)
    rate = seen.training.learning_rate
    known = rate is not None and 0.0 < rate < math.inf
    ruined = bool(ruin_rules.sign_of_ruin(state, seen, risk, config))
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
        harm_streak=state.harm_streak + 1 if kss_rules.is_harmed(state, seen, config) else 0,
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


def _look_closer(case: Case) -> Proposal | None:
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


def _confirm(case: Case) -> Proposal | None:
    """Confirm once that the last action took effect. `back_off` handles an action without an effect earlier."""
    state = case.state
    if state.phase != "acting" or not case.settled or case.risk.value >= case.config.act_risk:
        return None
    effect = f"risk {state.risk_at_action:.2f} -> {case.risk.value:.2f}"
    return (), replace(state, phase="backed_off"), f"the action at step {state.acted_at} took effect: {effect}"
