"""Rules for a training that is ruined: return it to a copy, ask for a checkpoint, stop it."""

from __future__ import annotations

import math
from dataclasses import replace

from koopmon.config import PolicyConfig
from koopmon.policy import rate_rules
from koopmon.policy.state import (
    LOWERS_RATE,
    MAX_RATE,
    NON_FINITE_SNAPSHOTS,
    Action,
    Case,
    PolicyState,
    Proposal,
)
from koopmon.risk.online_detector import Observation, OnlineRisk, normalization
from koopmon.wire.messages import Rewind


def _finite(value: float | None) -> bool | None:
    return None if value is None else math.isfinite(value)


def sign_of_ruin(state: PolicyState, seen: Observation, risk: OnlineRisk, config: PolicyConfig) -> str:
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
    spent = config.name in LOWERS_RATE and min(state.lr_scale, seen.training.lr_scale) <= config.min_lr_scale
    if not spent or risk.value < config.severe_risk or loss is None or first is None:
        return ""
    if not first > 0.0 or not loss >= config.stop_loss_ratio * first:
        return ""
    return f"the loss is {loss:.3g}, {loss / first:.2g} times its first value, at the lowest learning-rate scale"


def stop(case: Case) -> Proposal | None:
    """Stop a training that every snapshot of the last `stop_steps` steps shows as ruined.

    A back-off repairs no NaN, and a rewind may: the stop waits until a rewind underway has ended and none is left.
    """
    state, config, seen = case.state, case.config, case.seen
    since = state.ruined_since
    if not config.stop or since is None or state.ruined_streak < config.stop_snapshots:
        return None
    if seen.step - since < config.stop_steps or not case.settled or state.rewinding or may_rewind(case):
        return None
    action = Action(
        kind="stop",
        reason=f"stop: {sign_of_ruin(state, seen, case.risk, config)}, for {seen.step - since} steps",
        expires_in_steps=config.expires_in_steps,
    )
    return (action,), replace(state, stopping=True), ""


def may_rewind(case: Case) -> bool:
    """Return True if a further alarm leads to a rewind."""
    caps = case.can_rewind and normalization(case.seen) >= 0.5 and rate_rules.lower_cap(case) is not None
    return caps or may_restore(case)


def may_restore(case: Case) -> bool:
    """Return True if the states and the loss or the gradient norm are not finite, and the training can rewind.

    States alone may be NaN at padding tokens of a healthy model. Without a known rate, the only copy that counts is
    that of the start.
    """
    broken = case.seen.non_finite and bool(sign_of_ruin(case.state, case.seen, case.risk, case.config))
    return case.can_rewind and broken and case.seen.training.learning_rate is not None


def restore(case: Case) -> Proposal | None:
    """Return a training that stays without finite numbers to its last copy.

    The first time the rate stays: one bad batch may be the cause, and the data goes on behind it. A rate that explains
    it, and each further time, lower the rate. A refused rewind is no such time: the weights were finite.
    """
    state, config = case.state, case.config
    if not may_restore(case):
        return None
    if not case.may_cut or state.ruined_streak < NON_FINITE_SNAPSHOTS:  # a lower rate repairs no NaN: no other rule
        return (), state, f"{sign_of_ruin(state, case.seen, case.risk, config)}: waits for the rewind"
    lowers = state.num_rewound > 0 or (case.risk.excess_rate or 0.0) >= 1.0
    scale = max(config.min_lr_scale, rate_rules.lower_scale(case)) if lowers else state.lr_scale
    actions = [
        Action(
            kind="rewind",
            reason=f"{sign_of_ruin(state, case.seen, case.risk, config)}: back to the last copy",
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


def ask_for_checkpoint(now: float, case: Case) -> Proposal | None:
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
