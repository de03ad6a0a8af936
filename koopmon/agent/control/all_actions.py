"""List of the kinds of actions. A new kind is a new file and one line here."""

from __future__ import annotations

from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.action import ControlAction
from koopmon.agent.control.ceilings import Ceilings
from koopmon.agent.control.kss.action import KssAction
from koopmon.agent.control.loop_requests import CheckpointRequest, StopRequest
from koopmon.agent.control.lr_backoff import LrBackoff
from koopmon.agent.control.rewind import CREDIT, RewindAction
from koopmon.agent.stats import AgentStats
from koopmon.config import Config


def make_actions(config: Config, stats: AgentStats, breaker: CircuitBreaker) -> tuple[ControlAction, ...]:
    """Return one of each kind. `breaker` is the agent's: a failure behind it ends every action but the lasting ones."""
    backoff = LrBackoff(config.limits)
    credit_seconds = CREDIT * config.cadence.initial_credit_seconds
    return (
        backoff,
        KssAction(config, stats, breaker),
        Ceilings(config.limits),
        RewindAction(config.limits, stats, backoff, credit_seconds=credit_seconds),
        StopRequest(),
        CheckpointRequest(),
    )
