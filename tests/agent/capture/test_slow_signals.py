"""Snapshots that measure slow signals: all dense ones, and some of a calm cadence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from koopmon.agent.capture.slow_signals import DENSE_STEPS, MIN_STEPS, SlowSignals
from tests.agent.models import build, train_step
from tests.agent.scripted_monitor import ScriptedMonitor


def measured(steps: Iterable[int]) -> list[int]:
    signals, found = SlowSignals(), []
    for step in steps:
        if signals.is_due(step):
            found.append(step)
            signals.note(step)
    return found


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(20), list(range(20))),
        (range(0, 70, DENSE_STEPS - 1), list(range(0, 70, DENSE_STEPS - 1))),
        (range(0, 130, 10), [0, 40, 80, 120]),
        (range(0, 200, MIN_STEPS), list(range(0, 200, MIN_STEPS))),
        ([0, 10, 20, 21, 22, 32, 42, 52, 62], [0, 21, 22, 62]),
        ([40, 50, 3, 13, 23], [40, 3]),
    ],
)
def test_dense_snapshots_have_values_of_their_own(steps: Iterable[int], expected: list[int]) -> None:
    assert measured(steps) == expected


def test_a_measurement_that_failed_is_tried_again() -> None:
    signals = SlowSignals()
    assert [signals.is_due(step) for step in (0, 10, 20)] == [True] * 3
    signals.note(20)
    assert not signals.is_due(30)


@pytest.mark.parametrize(("every", "distinct"), [(2, 12), (12, 4)])
def test_snapshots_in_between_repeat_the_values(
    every: int, distinct: int, monitor: ScriptedMonitor, agents: Callable[..., Any]
) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    cadence = {"dense_every": every, "warmup_steps": 1, "calm_every": every}
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": cadence})
    monitor.wait(lambda: agent.status()["connected"])
    step = 0
    while len(monitor.shards) < 12:
        train_step(model, optimizer, step)
        step += 1
        if step % every == 0:
            monitor.wait(lambda: agent.status()["sent"] == len(monitor.shards))
    shards = [shard for shard, _ in monitor.shards[:12]]
    logits = [tuple(each.observables["max_attention_logit"]) for each in shards]
    assert len(set(logits)) == distinct
    assert len({each.training.log_partition for each in shards}) == distinct
    assert None not in {value for row in logits for value in row}
    assert len({each.training.update_rms for each in shards}) >= 11, "fast signals are measured in each"
    assert len({each.training.loss for each in shards}) == 12
