"""Preview of the policy's next action for a high and a severe risk.

`policy.decide` is a pure function, so a call with an assumed risk changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from koopmon import policy
from koopmon.views.run_view import PolicyStatus, RunView, command_words

PHASES = {
    "calm": "No command is in force.",
    "alert": "The risk is not calm; snapshots are dense.",
    "acting": "A command has no confirmed effect yet.",
    "backed_off": "The last command took effect and stays in force.",
    "recovering": "The learning rate rises to its schedule in steps.",
}


@dataclass(frozen=True, slots=True)
class PolicyPreview:
    """`phase` is the policy's phase; each of `lines` holds a condition and the policy's action."""

    phase: str
    meaning: str
    lines: tuple[tuple[str, str], ...]


def preview(view: RunView) -> PolicyPreview:
    """Preview for a run. Without an assessment by this monitor there is only one line, which gives the reason."""
    standing = view.standing
    if standing is None:
        known = view.decisions[-1].phase if view.decisions else "calm"
        line = ("Next", "Known once this monitor has judged a snapshot of the run.")
        return PolicyPreview(known, PHASES.get(known, ""), (line,))
    if view.state != "running":
        over = ("Now", f"The run is {view.state}: no command is sent.")
        return PolicyPreview(standing.state.phase, PHASES[standing.state.phase], (over,))
    lines = [*_not_sent(view, standing), *_actions(standing), *_return(standing), _budget(standing)]
    return PolicyPreview(standing.state.phase, PHASES[standing.state.phase], tuple(lines))


def _not_sent(view: RunView, standing: PolicyStatus) -> Iterator[tuple[str, str]]:
    """Yield the reason if no command would be sent."""
    if standing.policy.name == "observe":
        yield "Commands", "None is sent: the policy is observe, which only watches."
    elif standing.policy.dry_run:
        yield "Commands", "None is sent: this is a dry run, decisions are recorded only."
    elif not view.acts:
        yield "Commands", "None is sent: the agent is watch-only; see its log."
    elif not view.sends:
        yield "Commands", "None is sent: the monitor failed on a command of this run and only watches it; see its log."


def _actions(standing: PolicyStatus) -> Iterator[tuple[str, str]]:
    """Yield the action for a high and for a severe risk."""
    config = standing.policy
    if config.name == "observe":
        return
    acted_at = standing.state.acted_at
    until = 0 if acted_at is None else acted_at + config.cooldown_steps
    if standing.observation.step < until:
        yield "Cool-down", f"The policy waits until step {until} for the effect of its last action. Then:"
    for risk, name in ((config.act_risk, "high"), (config.severe_risk, "severe")):
        yield f"If the risk is {name}, {risk:g} or more", _next_action(standing, risk)


def _next_action(standing: PolicyStatus, risk: float) -> str:
    """Return the policy's action for one more snapshot with this risk, after the cool-down."""
    state, config = standing.state, standing.policy
    seen = replace(
        standing.observation,
        training=msgspec.structs.replace(
            standing.observation.training,
            step=max(standing.observation.step + 1, (state.acted_at or 0) + config.cooldown_steps),
            lr_scale=state.lr_scale,
            kss_alpha=state.kss.alpha,
        ),
        informative=True,
        non_finite=False,
    )
    decision = policy.decide(standing.now, state, seen, replace(standing.risk, value=risk), config, standing.kss)
    changes = "; ".join(command_words(action) for action in decision.commands if action.changes_training)
    if changes:
        return f"{changes[0].upper()}{changes[1:]}."
    if len(state.action_times) >= config.max_actions_per_hour:
        return f"Nothing: the budget of {config.max_actions_per_hour} actions per hour is spent."
    if config.name != "kss" and state.lr_scale <= config.min_lr_scale:
        return f"Nothing more: the scale is as low as it may be, {config.min_lr_scale:g}."
    if state.high_streak + 1 < config.confirm_snapshots:
        return f"Nothing yet: it takes {config.confirm_snapshots} high snapshots in a row."
    return "Nothing that changes the training."


def _return(standing: PolicyStatus) -> Iterator[tuple[str, str]]:
    """Yield the steps at which the values in force change back."""
    state, config = standing.state, standing.policy
    if state.lr_scale < 1.0 and config.name in ("auto", "lr", "kss+lr"):
        wait = config.hold_steps * max(1, state.num_cuts)
        target = f"learning rate × {min(1.0, state.lr_scale * config.rise_factor):.3g}."
        when = f"After {wait} calm steps" if state.calm_since is None else f"At step {state.calm_since + wait}"
        yield "If it stays calm", f"{when}: {target}"
    if state.held_layers:
        wait = standing.kss.calm_steps
        when = f"After {wait} calm steps" if state.calm_since is None else f"At step {state.calm_since + wait}"
        yield "Ceilings", f"On layers {', '.join(map(str, state.held_layers))}. {when} they are released."
    elif state.kss_on_at is not None:
        yield "KSS", f"Goes off at step {state.kss_on_at + config.kss_hold_steps}."
    if state.kss_barred:
        yield "KSS", "Barred: it harmed, or cannot reach this model."


def _budget(standing: PolicyStatus) -> tuple[str, str]:
    taken = sum(standing.now - at < policy.HOUR_SECONDS for at in standing.state.action_times)
    return "Budget", f"{taken} of {standing.policy.max_actions_per_hour} actions of the last hour are taken."
