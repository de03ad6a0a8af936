"""Rules for the learning rate: cap and rewind, back-off, rise."""

from __future__ import annotations

import math
from dataclasses import replace

from koopmon.policy.state import MAX_RATE, MIN_RATE, Action, Case, Phase, Proposal
from koopmon.risk.online_detector import normalization
from koopmon.wire.messages import Rewind


def cap(case: Case) -> Proposal | None:
    """Cap the rate of normalised layers at an alarm, and go back to a copy from before it exceeded the cap.

    The cap lands where runs of such layers survive. Further alarms lower it, without a rewind when none is left.
    """
    state, config, seen = case.state, case.config, case.seen
    rewinds = case.can_rewind
    if config.name != "auto" or not case.may_cut or normalization(seen) < 0.5 or not (rewinds or state.max_rate):
        return None
    cap = lower_cap(case)
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


def lower_cap(case: Case) -> float | None:
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


def _healthy_rate(case: Case, cap: float) -> float:
    """Compute the largest rate up to which a copy counts as healthy.

    Without a warm-up, the rate in force has done the damage from the first update on.
    """
    scheduled = case.seen.training.learning_rate
    if scheduled is None or not case.lacks_warmup:
        return cap
    return max(min(cap, 0.5 * scheduled * case.seen.training.lr_scale), MIN_RATE)


def back_off(case: Case) -> Proposal | None:
    """Lower the LR scale at an alarm, when the last action is old enough and the scale is above `min_lr_scale`."""
    state, config = case.state, case.config
    if not case.may_cut or state.lr_scale <= config.min_lr_scale:
        return None
    scale = max(config.min_lr_scale, lower_scale(case))
    again = " (the last cut was not enough)" if state.phase == "acting" else ""
    action = Action(
        kind="set_lr_scale",
        reason=f"risk {case.risk.value:.2f}: learning rate x {scale:g}{again}; {case.risk.reason}",
        lr_scale=scale,
        expires_in_steps=config.expires_in_steps,
    )
    return (action,), case.acted(lr_scale=scale, num_cuts=state.num_cuts + 1), ""


def lower_scale(case: Case) -> float:
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


def rise(case: Case) -> Proposal | None:
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
