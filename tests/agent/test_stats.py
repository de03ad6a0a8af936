"""Counters of one agent: steps and their mean duration; values that arrive later, and values that the loop logs."""

from __future__ import annotations

import pytest
import torch

from koopmon.agent.stats import AgentStats, AsyncScalar, Reading
from koopmon.wire.messages import MAX_LOGGED, LoggedScalar, TrainingStep


def test_steps_are_timed_from_edge_to_edge() -> None:
    stats = AgentStats()
    assert [stats.on_step_edge(now) for now in (100.0, 101.0, 103.0)] == [0.0, 1.0, 2.0]
    assert (stats.step, stats.elapsed_seconds) == (3, 3.0)
    assert stats.step_seconds == pytest.approx(1.0 + 0.2 * (2.0 - 1.0))


class Event:
    """A device's event that the test completes; a wait completes it."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_the_newest_value_that_has_arrived_is_shown_and_the_latest_is_waited_for() -> None:
    scalar, events = AsyncScalar(), [Event() for _ in range(6)]
    assert (scalar.get(), scalar.latest.wait()) == (None, None)
    scalar.put(0.5)
    for number, event in enumerate(events[:3]):
        scalar._readings.appendleft(Reading(host=torch.tensor(float(number)), ready=event))
    assert scalar.get() == 0.5
    events[1].done = True
    assert scalar.get() == 1.0
    latest = scalar.latest
    assert not latest.arrived
    assert latest.wait() == 2.0
    assert latest.arrived
    assert scalar.get() == 2.0
    for number, event in enumerate(events[3:], 3):
        scalar._readings.appendleft(Reading(host=torch.tensor(float(number)), ready=event))
    assert scalar.get() == 2.0
    scalar.put(None)
    assert (scalar.get(), scalar.latest.get()) == (None, None), "unknown is a value too"


def test_what_the_loop_logs_replaces_what_is_measured() -> None:
    stats = AgentStats()
    stats.measure("loss", torch.tensor(1.0))
    stats.measure("grad_norm", 2.0)
    kept = stats.readings()
    with pytest.raises(TypeError):
        stats.log("loss", torch.zeros(2))
    stats.measure("loss", 3.0)
    assert stats.with_measured(TrainingStep(step=1)) == TrainingStep(step=1, loss=3.0, grad_norm=2.0)
    stats.log("loss", 4.0)
    stats.measure("loss", None)
    stats.measure("grad_norm", None)
    assert stats.with_measured(TrainingStep(step=1)) == TrainingStep(step=1, loss=4.0)
    unknown = dict.fromkeys(("learning_rate", "update_rms", "log_partition"))
    assert {name: each.get() for name, each in kept.items()} == {"loss": 1.0, "grad_norm": 2.0, **unknown}


def test_any_further_name_is_sent_with_its_step_once_its_value_has_arrived() -> None:
    stats = AgentStats()
    stats.log("kl", 0.5)
    stats.step = 3
    stats.log("entropy", torch.tensor([2.0]))
    event = Event()
    stats.named["kl"]._readings.appendleft(Reading(step=3, host=torch.tensor(0.75), ready=event))
    entropy = LoggedScalar(step=3, value=2.0)
    assert stats.logged_scalars() == {"kl": LoggedScalar(step=0, value=0.5), "entropy": entropy}
    event.done = True
    assert stats.logged_scalars() == {"kl": LoggedScalar(step=3, value=0.75), "entropy": entropy}
    assert "kl" not in stats.readings()


@pytest.mark.parametrize("name", ["", "KL", "rewards/mean", "kl divergence", "\u212b", "k" * 41, "kl\n"])
def test_a_name_that_is_no_label_of_the_wire_is_refused(name: str) -> None:
    stats = AgentStats()
    with pytest.raises(ValueError, match="Expected"):
        stats.log(name, 1.0)
    assert stats.logged_scalars() == {}


def test_the_number_of_names_is_bounded() -> None:
    stats = AgentStats()
    for number in range(MAX_LOGGED):
        stats.log(f"scalar_{number}", 1.0)
    with pytest.raises(ValueError, match="at most 32 names"):
        stats.log("one_more", 1.0)
    stats.log("scalar_0", 2.0)
    assert stats.logged_scalars()["scalar_0"].value == 2.0
