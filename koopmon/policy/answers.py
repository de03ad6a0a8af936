"""Changes of the policy's state by the answers of the agents."""

from __future__ import annotations

from dataclasses import replace

from koopmon.policy.state import PolicyState
from koopmon.wire.messages import Ack, Applied


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
    num_rewound = state.num_rewound + 1
    return replace(state, num_rewound=num_rewound, rewinding=False, acted_at=ack.step, high_streak=0, calm_since=None)


def stop_answered(state: PolicyState, ack: Ack) -> PolicyState:
    """Update the state after the answer to a stop. One that was not applied may follow after a new streak."""
    if ack.outcome in ("applied", "duplicate"):
        return state
    return replace(state, stopping=False, ruined_streak=0, ruined_since=None)


def kss_refused(state: PolicyState, ack: Ack) -> PolicyState:
    """Bar KSS after a permanent refusal: it can never be in force in this launch, as where the model is shielded.

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


def _shapes(applied: Applied) -> bool:
    """Return True if KSS is in force."""
    return applied.kss.alpha > 0.0 or bool(applied.held_layers)
