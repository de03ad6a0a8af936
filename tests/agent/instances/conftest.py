"""Runs a case of a battery alone and watched."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from koopmon.agent.runtime import AgentRuntime
from tests.agent.instances.battery import Case, Watch
from tests.agent.scripted_monitor import ScriptedMonitor

EVERY_STEP = {"cadence": {"dense_every": 1, "warmup_steps": 1000}, "sampling": {"num_samples": 16}}


@dataclass
class Outcome:
    """The losses of a case, its snapshots and its log lines."""

    alone: list[str] = field(default_factory=list)
    """Losses, exactly."""
    watched: list[str] = field(default_factory=list)
    snapshots: Counter[str] = field(default_factory=Counter)
    """Snapshots of each stack, by its name."""
    last: int = -1
    """Losses before the last snapshot."""
    layers: dict[str, int] = field(default_factory=dict)
    """In the last snapshot of each stack."""
    reasons: list[str] = field(default_factory=list)
    errors: int = 0
    lines: list[str] = field(default_factory=list)


@pytest.fixture
def observe(
    monitor: ScriptedMonitor,
    agents: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Case], Outcome]:
    def losses(case: Case, watch: Watch, into: list[str]) -> list[str]:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        torch.manual_seed(0)
        into.extend(float(loss).hex() for loss in case.script(watch))
        return into

    def run(case: Case) -> Outcome:
        outcome, made = Outcome(losses(case, lambda *_: None, [])), []
        ready = AgentRuntime.on_snapshot_ready

        def note(runtime: AgentRuntime, snapshot: Any) -> None:
            ready(runtime, snapshot)
            chain = runtime.taps.stacks.chain
            if chain is not None:
                outcome.snapshots[chain.stack.name] += 1
                outcome.last, outcome.layers[chain.stack.name] = len(outcome.watched), chain.stack.num_layers

        def watch(model: Any, *optimizers: Any) -> Any:
            agent = agents(model, list(optimizers), endpoint=monitor.endpoint, config=EVERY_STEP)
            monitor.wait(lambda: agent.status().get("connected", True))
            made.append(agent)
            return agent

        monkeypatch.setattr(AgentRuntime, "on_snapshot_ready", note)
        with caplog.at_level(logging.WARNING, "koopmon"):
            losses(case, watch, outcome.watched)
        outcome.reasons = [agent.status()["reason"] for agent in made]
        outcome.errors = sum(agent.status().get("errors", 0) for agent in made)
        outcome.lines = [
            record.getMessage()
            for record in caplog.records
            if record.name.startswith("koopmon") and record.levelno >= logging.WARNING
        ]
        return outcome

    return run
