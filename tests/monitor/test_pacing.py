"""Stride of snapshots that an engine can judge: its rules, and the loop of an agent and an engine in simulated time."""

from __future__ import annotations

import pytest

from koopmon.monitor.pacing import WINDOW_SECONDS, Pacing
from koopmon.wire.messages import MAX_MIN_STRIDE

STEP_SECONDS = 0.1


class Loop:
    """A training and an engine that keeps the newest waiting snapshot. `profile_seconds` is the time of a profile."""

    def __init__(self, profile_seconds: float, dense_every: int = 1) -> None:
        self.profile_seconds, self.dense_every = profile_seconds, dense_every
        self.pacing = Pacing()
        self.strides: list[int] = [1]
        self.step = self.num_sent = self.num_judged = 0
        self.waiting: int | None = None
        self.working: tuple[int, float] | None = None
        self.busy_seconds = 0.0

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_SECONDS)):
            self.step += 1
            now = self.step * STEP_SECONDS
            stride = self.pacing.steps if self.step >= self.pacing.from_step else self.strides[-2]
            if self.working is not None and now >= self.working[1]:
                self.finish(now)
            if self.step % (self.dense_every * -(-stride // self.dense_every)) == 0:
                self.num_sent += 1
                if self.waiting is not None:
                    self.pacing.on_skipped()
                self.waiting = self.step
            if self.working is None and self.waiting is not None:
                self.working, self.waiting = (self.waiting, now + self.profile_seconds), None

    def finish(self, now: float) -> None:
        assert self.working is not None
        self.busy_seconds += self.profile_seconds
        self.num_judged += 1
        stride = self.pacing.on_judged(now, self.working[0], self.busy_seconds)
        self.working = None
        if stride != self.pacing.steps:
            self.pacing.change(stride, self.step + 20)
            self.strides.append(stride)


@pytest.mark.parametrize(("profile_seconds", "expected"), [(0.05, 1), (0.15, 2), (0.33, 4), (1.7, 32)])
def test_the_stride_settles_where_the_engine_keeps_up(profile_seconds: float, expected: int) -> None:
    loop = Loop(profile_seconds)
    loop.run(200.0)
    settled = len(loop.strides)
    assert loop.pacing.steps == expected
    sent, judged = loop.num_sent, loop.num_judged
    loop.run(300.0)
    assert len(loop.strides) == settled, "no changes to and fro"
    assert loop.num_judged - judged >= 0.8 * (loop.num_sent - sent)


def test_a_free_engine_gets_the_dense_cadence_back() -> None:
    loop = Loop(1.7)
    loop.run(100.0)
    assert loop.pacing.steps > 8
    loop.profile_seconds = 0.02
    loop.run(100.0)
    assert loop.pacing.steps == 1


def test_a_cadence_that_is_sparse_itself_needs_no_limit() -> None:
    loop = Loop(0.5, dense_every=10)
    loop.run(100.0)
    assert loop.strides == [1]


def test_a_slow_start_alone_changes_nothing() -> None:
    """The first profile loads libraries."""
    loop = Loop(3.0)
    loop.run(3.2)
    loop.profile_seconds = 0.05
    loop.run(100.0)
    assert loop.pacing.steps == 1


def test_nothing_changes_while_a_change_is_not_in_force() -> None:
    pacing = Pacing()
    pacing.on_judged(0.0, 0, 0.0)
    pacing.change(8, 1000)
    for number in range(1, 50):
        assert pacing.on_judged(number * WINDOW_SECONDS, 20 * number, 0.0) == 8
    assert pacing.on_judged(1000 * WINDOW_SECONDS, 1000, 0.0) == 1


def test_the_stride_is_bounded() -> None:
    pacing = Pacing()
    pacing.on_judged(0.0, 0, 0.0)
    for _ in range(9):
        pacing.on_skipped()
    assert pacing.on_judged(WINDOW_SECONDS, 1 << 52, 1e300) == MAX_MIN_STRIDE
