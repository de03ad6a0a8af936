"""Verdicts on the effect of a command, from the snapshots before and after it."""

from __future__ import annotations

import math

import pytest

from koopmon.views.action_effects import with_effects
from koopmon.views.run_view import CommandView, DecisionView, TimelinePoint
from koopmon.wire.messages import KssSettings
from tests.factories import INCARNATION, command, point


def points(
    start: int, risks: list[float], losses: list[float | None], incarnation: str = INCARNATION, **fields: float
) -> list[TimelinePoint]:
    return [
        point(start + index, incarnation, risk=risk, loss=loss, **fields)
        for index, (risk, loss) in enumerate(zip(risks, losses, strict=True))
    ]


BEFORE = points(0, [0.9] * 10, [3.0] * 10)


def decided(
    step: int, outcome: str = "applied", incarnation: str = INCARNATION, ack: int | None = None, **fields: object
) -> DecisionView:
    found = CommandView(command=command(step, **fields), outcome=outcome, step=step if ack is None else ack)
    return DecisionView(
        incarnation=incarnation, step=step, time=0.0, phase="acting", reason="", risk=0.9, commands=(found,)
    )


def effects(decisions: list[DecisionView], seen: list[TimelinePoint]) -> list[CommandView]:
    return [each for decision in with_effects(decisions, seen) for each in decision.commands]


@pytest.mark.parametrize(
    ("after", "losses", "verdict", "why"),
    [
        ([0.1] * 8, [3.0] * 8, "helped", "the risk fell, the loss held"),
        ([0.1] * 8, [2.0] * 8, "helped", "the risk fell, the loss fell"),
        ([0.1] * 8, [None] * 8, "helped", "the risk fell, the loss is not known"),
        ([0.1] * 8, [9.0] * 8, "unclear", "the risk fell, the loss rose"),
        ([0.9] * 8, [3.0] * 8, "unclear", "the risk held, the loss held"),
        ([0.86] * 8, [3.1] * 8, "unclear", "the risk held, the loss held"),
        ([0.84] * 8, [3.0] * 8, "helped", "the risk fell, the loss held"),
        ([0.9] * 8, [3.2] * 8, "did not help", "the risk held, the loss rose"),
        ([0.99] * 8, [3.0] * 8, "did not help", "the risk rose, the loss held"),
        ([0.1] * 2, [3.0] * 2, "cannot be told", "2 snapshots after it, 3 are needed"),
        ([0.1], [3.0], "cannot be told", "1 snapshot after it, 3 are needed"),
        ([0.1] * 8, [3.0] * 7 + [math.nan], "did not help", "afterwards the states or the loss were not finite"),
        ([0.1] * 8 + [0.99] * 9, [3.0] * 8 + [math.nan] * 9, "helped", "the risk fell, the loss held"),
    ],
)
def test_whether_it_helped(after: list[float], losses: list[float | None], verdict: str, why: str) -> None:
    (found,) = effects([decided(9, ack=10)], [*BEFORE, *points(11, after, losses)])
    assert found.effect is not None
    assert (found.effect.verdict, found.effect.why) == (verdict, why)
    assert (found.effect.risk_before, found.effect.num_before, found.effect.num_after) == (0.9, 8, min(len(after), 8))


@pytest.mark.parametrize(
    ("after", "losses", "verdict", "why"),
    [
        ([0.99] * 8, [2.0] * 8, "helped", "the risk rose, the loss fell; the rate stays"),
        ([0.99] * 8, [3.0] * 8, "unclear", "the risk rose, the loss held; the rate stays"),
        ([0.1] * 8, [9.0] * 8, "did not help", "the risk fell, the loss rose; the rate stays"),
        ([0.99] * 8, [None] * 8, "unclear", "the risk rose, the loss is not known; the rate stays"),
        ([0.1] * 8, [3.0] * 7 + [math.nan], "did not help", "afterwards the states or the loss were not finite"),
    ],
)
def test_ceilings_are_judged_by_the_loss(
    after: list[float], losses: list[float | None], verdict: str, why: str
) -> None:
    ceilings = decided(9, ack=10, kind="set_ceilings", lr_scale=None, ceilings={0: 0.8})
    (found,) = effects([ceilings], [*BEFORE, *points(11, after, losses)])
    assert found.effect is not None
    assert (found.effect.verdict, found.effect.why) == (verdict, why)


def test_the_snapshot_at_the_step_of_the_ack_is_from_before() -> None:
    seen = [*BEFORE, point(10, risk=0.99, loss=9.0), *points(11, [0.1] * 8, [3.0] * 8)]
    (found,) = effects([decided(9, ack=10)], seen)
    assert found.effect is not None
    assert (found.effect.risk_after, found.effect.loss_before, found.effect.loss_after) == (0.1, 3.0, 3.0)


def test_a_back_off_that_another_one_followed_was_not_enough_and_a_release_has_no_effect() -> None:
    seen = [*BEFORE, *points(10, [0.5] * 5, [3.0] * 5), *points(15, [0.1] * 5, [3.0] * 5)]
    decisions = [decided(9, lr_scale=0.5), decided(14, lr_scale=0.25), decided(19, lr_scale=0.3)]
    first, second, third = effects(decisions, seen)
    assert first.effect is not None
    assert second.effect is not None
    assert first.effect.why == "the risk fell, the loss held, and another such command followed at step 14"
    assert (first.effect.verdict, second.effect.verdict) == ("not enough", "helped")
    assert [each.direction for each in (first, second, third)] == ["restrain", "restrain", "release"]
    assert third.effect is None


def test_two_actions_close_together_cannot_be_told_apart() -> None:
    kss = decided(9, kind="set_kss", kss=KssSettings(alpha=0.15))
    first, second = effects([decided(8), kss], [*BEFORE, *points(10, [0.1] * 10, [3.0] * 10)])
    assert first.effect is not None
    assert second.effect is not None
    assert first.effect.verdict == "cannot be told"
    assert "before the next action at step 9" in first.effect.why
    assert second.effect.verdict == "helped"


def test_more_snapshots_do_not_wait_for_the_next_action() -> None:
    found, _ = effects([decided(9), decided(30, lr_scale=0.25)], [*BEFORE, *points(10, [0.1] * 20, [3.0] * 20)])
    assert found.effect is not None
    assert found.effect.verdict == "helped"


@pytest.mark.parametrize("outcome", ["refused", "expired", "pending", "dry_run", "unanswered"])
def test_a_command_that_was_not_applied_changes_nothing(outcome: str) -> None:
    first, second = effects([decided(8, outcome), decided(9, lr_scale=0.7)], BEFORE)
    assert (first.direction, first.effect) == ("restrain", None)
    assert second.direction == "restrain", "0.5 was never in force"


def test_a_scale_that_is_in_force_already_restrains_nothing() -> None:
    first, again = effects([decided(8, lr_scale=0.5), decided(9, lr_scale=0.5)], BEFORE)
    assert (first.direction, again.direction, again.effect) == ("restrain", "release", None)


def test_directions_of_kss_of_a_stop_and_of_a_cadence() -> None:
    decisions = [
        decided(1, kind="set_kss", kss=KssSettings(alpha=0.1)),
        decided(2, kind="set_kss", kss=KssSettings(alpha=0.2)),
        decided(3, kind="set_kss", kss=KssSettings()),
        decided(4, kind="set_cadence", cadence_steps=1),
        decided(5, kind="stop"),
    ]
    directions = [each.direction for each in effects(decisions, BEFORE)]
    assert directions == ["restrain", "restrain", "release", "observe", "restrain"]


def test_a_launch_begins_at_what_was_in_force_and_is_no_witness_of_another() -> None:
    later = points(5, [0.1] * 10, [3.0] * 10, "fedcba98", lr_scale=0.5)
    first, second = effects([decided(9), decided(12, incarnation="fedcba98", lr_scale=0.6)], [*BEFORE, *later])
    assert first.effect is not None
    assert first.effect.verdict == "cannot be told"
    assert (second.direction, second.effect) == ("release", None)
