"""Policy: what to do about a risk, as pure functions of observations and risk."""

from koopmon.policy.answers import acknowledge, ceilings_answered, kss_refused, rewound, stop_answered
from koopmon.policy.decide import HOUR_SECONDS, decide
from koopmon.policy.state import Action, Decision, PolicyState

__all__ = [
    "HOUR_SECONDS",
    "Action",
    "Decision",
    "PolicyState",
    "acknowledge",
    "ceilings_answered",
    "decide",
    "kss_refused",
    "rewound",
    "stop_answered",
]
