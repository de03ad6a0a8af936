"""The control state: ramps are functions of the step alone, and every change is a new version."""

from __future__ import annotations

import msgspec
import pytest

from koopmon.agent.control.state import ActionState, ControlState, ControlUpdate, Ramp


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10])
def test_a_ramp_reaches_its_target_in_equal_steps(num_steps: int) -> None:
    """The first part of the way is done in the first step."""
    ramp = Ramp(first_step=7, start=0.25, target=1.0, num_steps=num_steps)
    assert [ramp.linear(step) for step in (0, 6)] == [ramp.geometric(step) for step in (0, 6)] == [0.25, 0.25]
    for done in range(1, num_steps + 1):
        share = done / num_steps
        assert ramp.linear(6 + done) == pytest.approx(0.25 + 0.75 * share)
        assert ramp.geometric(6 + done) == pytest.approx(0.25 ** (1 - share))
    for step in (6 + num_steps, 7 + num_steps, 1000):
        assert (ramp.linear(step), ramp.geometric(step)) == (1.0, 1.0)


def test_a_ramp_of_no_steps_is_at_its_target_at_once() -> None:
    ramp = Ramp(first_step=7, start=0.25, target=0.5)
    assert [ramp.linear(step) for step in (6, 7, 8)] == [0.25, 0.5, 0.5]


def test_nothing_is_in_force_at_the_start() -> None:
    state = ControlState()
    assert (state.version, state.actions, state.cadence_steps, state.cadence_until_step) == (0, {}, 0, -1)
    assert Ramp().linear(0) == 0.0
    assert ActionState(ramp=Ramp()).parameters == {}


def test_each_change_is_a_version() -> None:
    first = ControlState().changed(cadence_until_step=7)
    second = first.changed(cadence_steps=3)
    assert [each.version for each in (first, second)] == [1, 2]
    assert (second.cadence_until_step, second.cadence_steps) == (7, 3)


def test_snapshot_steps_include_the_last() -> None:
    update = ControlUpdate(step=4, state=ControlState(), snapshots=(5, 11, 3), next_step=12)
    assert list(update.snapshot_steps()) == [5, 8, 11]
    empty = ControlUpdate(step=4, state=ControlState(), snapshots=(0, -1, 1), next_step=12)
    assert list(empty.snapshot_steps()) == []


def test_a_next_exchange_lies_ahead() -> None:
    packed = msgspec.msgpack.encode([4, ControlState(), (5, 11, 3), 0])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(packed, type=ControlUpdate)
